/*
 * gemm4_few.cuh - a 4-bit weight times few rows of activations: all speed is that of reading the weight once
 *
 * Rows of the weight are the operand A of m16n8k16, decoded in registers; activations are B, out is transposed.  A warp
 * keeps the sums of one band of 16 or 32 rows; the warps of a band share K in turn and meet at the end, in fixed order.
 * More warps bring codes and activations, `depth` steps ahead; a step is `slices` runs of WIDTH of K.  Who multiplies
 * loads the scales of its rows itself, one step ahead.
 *
 * The order of K within 64 is another than in memory, the same for both operands: lane j of a quad takes the sixteen
 * elements from 16j on, whose codes are 8 bytes, and whose activations are 32.  Nothing is read twice.
 * Weights enter unscaled: the sum over 64 products is multiplied by the scale, in f32.  Where blocks are of 32 it is the
 * sum over 32, and lane j takes the eight elements from 8j on of each half.
 *
 * A stage of shared memory lies as the copy engine of 9.0 swizzles: units of 16 bytes change places within 128 bytes.
 */
#ifndef BNB_CUDA_GEMM4_FEW_CUH
#define BNB_CUDA_GEMM4_FEW_CUH

#include "core/plan_gemm4.h"
#include "cuda/kernels/gemm4_decode.cuh"
#include "cuda/kernels/gemm_hopper.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

/* RT tiles of 16 rows in a band, NT tiles of 8 rows of activations, WARPS that multiply, MORE that bring. */
template <int RT, int NT, int KW, int WARPS, int MORE, int REGISTERS> struct few_shape {
    enum {
        TILES = RT,
        TOKENS = NT,
        WIDTH = KW,
        MULTIPLIERS = WARPS * 32, /* threads */
        BRINGERS = MORE * 32,
        ROWS = 16 * RT,
        CHUNKS = KW / 32, /* of 16 bytes in a run of codes */
        PARTS = KW / 64,
        ROW = KW / 2,     /* bytes of a run of codes */
        MAP2_AT = PAIRS,
        BARRIERS_AT = MAP2_AT + 1024,
        STAGES_AT = BNB_GEMM4_FEW_FIXED,
        MOST = REGISTERS, /* of a thread that multiplies, on 9.0 */
        SUMS = BNB_GEMM4_FEW_SUMS /* floats of a tile of sums: eight rows of 16, 20 apart */
    };
};

/* What a block works on, and where activations lie in a stage: behind the codes, 128 bytes for each 64 of K and row. */
struct few_place {
    int row, rows;          /* of the weight: the first, and how many there are of the block's `band_rows` */
    int band_rows, k, steps; /* k: where its part of K begins */
    unsigned x_at;
};

template <class S> DEVICE struct few_place few_place_of(const struct bnb_cuda_gemm4_fast &p)
{
    const int chunk = (int)blockIdx.x / p.splits, split = (int)blockIdx.x % p.splits, step = p.slices * S::WIDTH;
    struct few_place w;
    w.band_rows = p.bands * S::ROWS;
    w.row = chunk * w.band_rows;
    w.rows = (int)p.g.n - w.row < w.band_rows ? (int)p.g.n - w.row : w.band_rows;
    w.k = split * p.steps * step;
    w.steps = ((int)p.g.k - w.k + step - 1) / step;
    w.steps = w.steps < p.steps ? w.steps : p.steps;
    w.x_at = (unsigned)(p.slices * w.band_rows * S::ROW);
    return w;
}

/* Where chunk `c` of a run of codes lies. */
template <int CHUNKS> DEVICE unsigned few_slot(int row, int c)
{
    const int turn = CHUNKS >= 8 ? row % 8 : row / (8 / CHUNKS) % CHUNKS;
    return (unsigned)((row * CHUNKS + (c ^ turn)) * 16);
}

/* The row of a tile whose codes lanes 4g to 4g + 3 read: 32 bytes of four rows that are read together meet in no bank. */
template <int CHUNKS> DEVICE int few_row(int g)
{
    return CHUNKS >= 8 ? g % 4 * 2 + g / 4 : CHUNKS == 4 ? g % 2 + g / 2 % 2 * 4 + g / 4 * 2 : g;
}

/* ---------------------------------------------------------------- the warps that bring */

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* One thread: the copy engine does all of it, and writes zeros beyond the weight. */
template <typename T, class S>
DEVICE void few_bring(const struct bnb_cuda_gemm4_wide &p, const struct few_place &w, unsigned char *memory)
{
    const struct bnb_cuda_gemm4_fast &f = p.fast;
    uint64_t *full = (uint64_t *)(memory + S::BARRIERS_AT), *empty = full + BNB_GEMM4_FEW_DEEPEST;
    const int run = w.band_rows * S::ROW, x_bytes = f.slices * S::PARTS * (int)f.g.m * 128;
    int slot = 0, k = w.k;
    unsigned parity = 1;
    if (threadIdx.x != S::MULTIPLIERS)
        return;
#pragma unroll 1
    for (int i = 0; i < w.steps; i++, k += f.slices * S::WIDTH) {
        unsigned char *stage = memory + S::STAGES_AT + slot * f.stage;
        const int left = ((int)f.g.k - k + S::WIDTH - 1) / S::WIDTH, runs = left < f.slices ? left : f.slices;
        barrier_wait(empty + slot, parity);
        barrier_expect(full + slot, (unsigned)(runs * run + x_bytes));
#pragma unroll 1
        for (int s = 0; s < runs; s++)
            copy_box(stage + s * run, &p.codes, (k + s * S::WIDTH) / 2, w.row, full + slot);
        copy_box3(stage + w.x_at, &p.x, 0, 0, k / 64, full + slot);
        if (++slot == f.depth)
            slot = 0, parity ^= 1;
    }
}

#else

template <class S>
DEVICE void few_bring_codes(const struct bnb_cuda_gemm4_fast &p, const struct few_place &w, int k, int thread,
                            unsigned char *to)
{
    enum { APART = S::BRINGERS / S::CHUNKS }; /* rows from one of a thread to its next: they lie in the same turn */
    const int c = thread % S::CHUNKS, first = thread / S::CHUNKS;
    const int64_t stride = p.g.k / 2;
    const uint8_t *from = p.g.codes + (w.row + first) * stride + k / 2 + c * 16;
    to += few_slot<S::CHUNKS>(first, c);
    k += c * 32;
    for (int s = 0; s < p.slices && k < p.g.k; s++, k += S::WIDTH) {
        const uint8_t *row = from + s * S::ROW;
        unsigned char *there = to + s * w.band_rows * S::ROW;
#pragma unroll 4
        for (int r = first; r < w.rows; r += APART) {
            copy16(there, row, true);
            row += APART * stride;
            there += APART * S::ROW;
        }
    }
}

/* Zeros beyond K: what is left there of codes counts for nothing. */
template <typename T, class S>
DEVICE void few_bring_x(const struct bnb_cuda_gemm4_fast &p, int k, int thread, unsigned char *to)
{
    const int c = thread % 8, m = (int)p.g.m, lines = p.slices * S::PARTS * m;
    for (int i = thread / 8; i < lines; i += S::BRINGERS / 8) {
        const int at = k + i / m * 64 + c * 8;
        const bool there = at < p.g.k;
        copy16(to + i * 128 + (c ^ i % 8) * 16, (const T *)p.g.x + (there ? i % m * p.g.k + at : 0), there);
    }
}

template <typename T, class S>
DEVICE void few_bring(const struct bnb_cuda_gemm4_wide &p, const struct few_place &w, unsigned char *memory)
{
    const struct bnb_cuda_gemm4_fast &f = p.fast;
    const int thread = (int)threadIdx.x - S::MULTIPLIERS;
    uint64_t *full = (uint64_t *)(memory + S::BARRIERS_AT), *empty = full + BNB_GEMM4_FEW_DEEPEST;
    int slot = 0, k = w.k;
    unsigned parity = 1;
#pragma unroll 1
    for (int i = 0; i < w.steps; i++, k += f.slices * S::WIDTH) {
        unsigned char *stage = memory + S::STAGES_AT + slot * f.stage;
        barrier_wait(empty + slot, parity);
        few_bring_codes<S>(f, w, k, thread, stage);
        few_bring_x<T, S>(f, k, thread, stage + w.x_at);
        copies_arrive(full + slot);
        if (++slot == f.depth)
            slot = 0, parity ^= 1;
    }
}

#endif

/* ---------------------------------------------------------------- scales */

/* Scales of a run, nested or not, that lie together are loaded in one access, a run ahead; others when they are needed,
 * and so are those of blocks of 32. */
enum { FEW_NESTED, FEW_PLAIN, FEW_ANYWHERE, FEW_NARROW };

/* Of a lane's two rows of each tile: where these begin, and the scales of the next run as they lie in memory. */
template <class S, int HOW> struct few_scales {
    enum { PER = HOW == FEW_NARROW ? 2 * S::PARTS : S::PARTS, APART = HOW == FEW_NARROW ? 32 : 64 };
    unsigned row,
        last; /* the first of them, and the last of the weight, in units of 64 elements, which can be counted */
    float scale[S::TILES][2][HOW == FEW_PLAIN ? PER : 1]; /* nested: that of their block of scales */
    unsigned codes[S::TILES][2];
};

template <int COUNT> DEVICE unsigned few_codes(const uint8_t *from)
{
    if (COUNT == 4)
        return __ldg((const unsigned *)from);
    return COUNT == 2 ? (unsigned)__ldg((const unsigned short *)from) : (unsigned)__ldg(from);
}

template <int COUNT> DEVICE void few_floats(const float *from, float *v)
{
    if (COUNT == 4) {
        const float4 f = __ldg((const float4 *)from);
        v[0] = f.x, v[1 % COUNT] = f.y, v[2 % COUNT] = f.z, v[3 % COUNT] = f.w;
    } else if (COUNT == 2) {
        const float2 f = __ldg((const float2 *)from);
        v[0] = f.x, v[1 % COUNT] = f.y;
    } else {
        v[0] = __ldg(from);
    }
}

/* Row i of a lane, from k on; one beyond the weight lies somewhere in its last. */
template <class S, int HOW>
DEVICE unsigned few_block(const struct bnb_cuda_gemm4_fast &p, const struct few_scales<S, HOW> &s, int i, int k)
{
    const unsigned row = s.row + (unsigned)(i * 8) * ((unsigned)p.g.k / 64);
    return (row < s.last ? row : s.last) + (unsigned)k / 64;
}

/* Those of the run from k on, which may be beyond K. */
template <class S, int HOW>
DEVICE void few_scales_load(const struct bnb_cuda_gemm4_fast &p, int k, struct few_scales<S, HOW> *s)
{
    if (k >= p.g.k)
        return;
#pragma unroll
    for (int i = 0; i < 2 * S::TILES; i++) {
        const unsigned block = few_block<S, HOW>(p, *s, i, k);
        if constexpr (HOW == FEW_NESTED) {
            s->codes[i / 2][i % 2] = few_codes<S::PARTS>((const uint8_t *)p.g.scale.absmax + block);
            s->scale[i / 2][i % 2][0] = __ldg(p.g.scale.absmax2 + (block >> p.shift2));
        } else if constexpr (HOW == FEW_PLAIN) {
            few_floats<S::PARTS>((const float *)p.g.scale.absmax + block, s->scale[i / 2][i % 2]);
        }
    }
}

/* Scale i of a row as a number; zero beyond K.  k: where the run begins. */
template <class S, int HOW>
DEVICE float few_scale(const struct bnb_cuda_gemm4_fast &p, int k, const struct few_scales<S, HOW> &s, int row, int i,
                       const unsigned char *map2, float offset)
{
    const float *scale = s.scale[row / 2][row % 2];
    if constexpr (HOW == FEW_NESTED) {
        const unsigned codes = s.codes[row / 2][row % 2], code4 = (i ? codes >> (8 * i - 2) : codes << 2) & 0x3fcu;
        return __fadd_rn(__fmul_rn(*(const float *)(map2 + code4), scale[0]), offset);
    } else if constexpr (HOW == FEW_PLAIN) {
        return scale[i];
    } else {
        const int64_t at = (int64_t)few_block<S, HOW>(p, s, row, k) * 64 + i * s.APART;
        return k + i * s.APART < p.g.k ? scale4_value(p, scale4_load(p, at), (const float *)map2, offset) : 0.0f;
    }
}

/* ---------------------------------------------------------------- the warps that multiply */

/* sums += scale * part, of the two rows of a lane. */
DEVICE void few_add(float sums[4], const float part[4], float top, float low)
{
    sums[0] = __fmaf_rn(top, part[0], sums[0]);
    sums[1] = __fmaf_rn(top, part[1], sums[1]);
    sums[2] = __fmaf_rn(low, part[2], sums[2]);
    sums[3] = __fmaf_rn(low, part[3], sums[3]);
}

/* Where the lane's part of a stage begins, in bytes of shared memory. */
struct few_lane { unsigned codes, x; };

/* 64 weights of the two rows of a lane, decoded. */
template <class S, bool NARROW>
DEVICE void few_decode(const unsigned char *memory, unsigned codes, int tile, int q, unsigned a[4][4])
{
    const unsigned lane = threadIdx.x % 32 * 4;
    const unsigned char *from = memory + (codes ^ (unsigned)(32 * q)) + tile * 16 * S::ROW;
    uint2 top, low;
    if (NARROW) {
        const unsigned char *second = memory + (codes ^ (unsigned)(32 * q + 16)) + tile * 16 * S::ROW;
        top = make_uint2(*(const unsigned *)from, *(const unsigned *)second);
        low = make_uint2(*(const unsigned *)(from + 8 * S::ROW), *(const unsigned *)(second + 8 * S::ROW));
    } else {
        top = *(const uint2 *)from, low = *(const uint2 *)(from + 8 * S::ROW);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const unsigned t = i < 2 ? top.x : top.y, l = i < 2 ? low.x : low.y;
        a[i][0] = pair_at(memory, t, lane, pair_selector(i % 2 * 2));
        a[i][1] = pair_at(memory, l, lane, pair_selector(i % 2 * 2));
        a[i][2] = pair_at(memory, t, lane, pair_selector(i % 2 * 2 + 1));
        a[i][3] = pair_at(memory, l, lane, pair_selector(i % 2 * 2 + 1));
    }
}

/* A warp's run of one step.  Beyond the m-th, rows of activations are whatever lies there: so are their sums. */
template <typename T, class S, bool NARROW>
DEVICE void few_run(const unsigned char *memory, const struct few_lane &l, int m,
                    const float v[S::TILES][2][S::PARTS << NARROW], float sums[S::TILES][S::TOKENS][4])
{
    const T *tag = nullptr;
    const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const unsigned chunk = threadIdx.x % 4 * (NARROW ? 16 : 32);
#pragma unroll
    for (int q = 0; q < S::PARTS; q++) {
        const unsigned line = l.x + (unsigned)(q * m * 128), at = line + ((line >> 3 & 0x70u) ^ chunk);
        unsigned a[S::TILES][4][4];
#pragma unroll
        for (int r = 0; r < S::TILES; r++)
            few_decode<S, NARROW>(memory, l.codes, r, q, a[r]);
#pragma unroll
        for (int t = 0; t < S::TOKENS; t++) {
            const unsigned char *x = memory + t * 8 * 128;
            const uint4 b = *(const uint4 *)(x + at), c = *(const uint4 *)(x + (at ^ (NARROW ? 64u : 16u)));
#pragma unroll
            for (int r = 0; r < S::TILES; r++) {
                float part[4];
                multiply16(tag, part, a[r][0], b.x, b.y, zero);
                multiply16(tag, part, a[r][1], b.z, b.w, part);
                if (NARROW)
                    few_add(sums[r][t], part, v[r][0][2 * q % (S::PARTS << NARROW)],
                            v[r][1][2 * q % (S::PARTS << NARROW)]);
                multiply16(tag, part, a[r][2], c.x, c.y, NARROW ? zero : part);
                multiply16(tag, part, a[r][3], c.z, c.w, part);
                few_add(sums[r][t], part, v[r][0][NARROW ? 2 * q + 1 : q], v[r][1][NARROW ? 2 * q + 1 : q]);
            }
        }
    }
}

/* The table and the map for all, and the scales of the first run on their way meanwhile. */
template <typename T, class S, int HOW>
DEVICE void few_begin(const struct bnb_cuda_gemm4_fast &p, const struct few_place &w, int warp, int k,
                      unsigned char *memory, struct few_scales<S, HOW> *s)
{
    const int g = (int)threadIdx.x % 32 / 4, row = w.row + warp / p.slices * S::ROWS + few_row<S::CHUNKS>(g);
    s->row = (unsigned)row * ((unsigned)p.g.k / 64);
    s->last = (unsigned)(p.g.n - 1) * ((unsigned)p.g.k / 64);
    if (warp < p.bands * p.slices)
        few_scales_load(p, k, s);
    pairs_fill((const T *)nullptr, p, memory, threadIdx.x, S::MULTIPLIERS);
    map2_fill(p, (float *)(memory + S::MAP2_AT), threadIdx.x, S::MULTIPLIERS);
    some_barrier(2, S::MULTIPLIERS + S::BRINGERS);
}

template <typename T, class S, int HOW>
DEVICE void few_multiply(const struct bnb_cuda_gemm4_fast &p, const struct few_place &w, int warp,
                         unsigned char *memory, float sums[S::TILES][S::TOKENS][4])
{
    const int lane = (int)threadIdx.x % 32, g = lane / 4, j = lane % 4, slice = warp % p.slices;
    const int row = slice * w.band_rows + warp / p.slices * S::ROWS + few_row<S::CHUNKS>(g);
    const unsigned char *map2 = memory + S::MAP2_AT;
    uint64_t *full = (uint64_t *)(memory + S::BARRIERS_AT), *empty = full + BNB_GEMM4_FEW_DEEPEST;
    struct few_lane first, l;
    struct few_scales<S, HOW> s;
    first.codes = HOW == FEW_NARROW ? few_slot<S::CHUNKS>(row, 0) + (unsigned)(j * 4)
                                    : (few_slot<S::CHUNKS>(row, 0) ^ (unsigned)(j / 2 * 16)) + (unsigned)(j % 2 * 8);
    const int m = (int)p.g.m, token = S::TOKENS > 1 || g < m ? g : m - 1;
    first.x = w.x_at + (unsigned)((slice * S::PARTS * m + token) * 128);
    int slot = 0, k = w.k + slice * S::WIDTH;
    unsigned parity = 0;
    few_begin<T, S, HOW>(p, w, warp, k, memory, &s);
    const float offset = p.g.scale.absmax2 ? __ldg(p.g.scale.offset) : 0.0f;
    if (warp >= p.bands * p.slices)
        return;
#pragma unroll 1
    for (int i = 0; i < w.steps; i++) {
        const unsigned stage = (unsigned)(S::STAGES_AT + slot * p.stage);
        float v[S::TILES][2][few_scales<S, HOW>::PER];
        l.codes = stage + first.codes, l.x = stage + first.x;
#pragma unroll
        for (int n = 0; n < 2 * S::TILES * s.PER; n++)
            v[n / s.PER / 2][n / s.PER % 2][n % s.PER] = few_scale(p, k, s, n / s.PER, n % s.PER, map2, offset);
        const bool there = k < p.g.k;
        k += p.slices * S::WIDTH;
        if (i + 1 < w.steps)
            few_scales_load(p, k, &s);
        barrier_wait(full + slot, parity);
        if (there)
            few_run<T, S, HOW == FEW_NARROW>(memory, l, m, v, sums);
        __syncwarp();
        if (lane == 0)
            barrier_arrive(empty + slot);
        if (++slot == p.depth)
            slot = 0, parity ^= 1;
    }
}

/* ---------------------------------------------------------------- results */

/* The sums of all slices, in their order, to out or to the split's place.  memory: room for all tiles. */
template <typename T, class S>
DEVICE void few_store(const struct bnb_cuda_gemm4_fast &p, float *memory, const float sums[S::TILES][S::TOKENS][4])
{
    enum { RT = S::TILES, NT = S::TOKENS, OWN = RT * NT * S::SUMS };
    const struct few_place w = few_place_of<S>(p);
    const int lane = (int)threadIdx.x % 32, j = lane % 4 * 2, warp = (int)threadIdx.x / 32;
    const int g = few_row<S::CHUNKS>(lane / 4);
#pragma unroll
    for (int r = 0; r < RT && warp < p.bands * p.slices; r++)
#pragma unroll
        for (int t = 0; t < NT; t++) {
            float *to = memory + warp * OWN + (r * NT + t) * S::SUMS + g;
            to[j * 20] = sums[r][t][0], to[j * 20 + 20] = sums[r][t][1];
            to[j * 20 + 8] = sums[r][t][2], to[j * 20 + 28] = sums[r][t][3];
        }
    some_barrier(2, S::MULTIPLIERS);
    const int m = (int)p.g.m;
    for (int i = (int)threadIdx.x; i < w.band_rows * m; i += S::MULTIPLIERS) {
        const int row = i % w.band_rows, token = i / w.band_rows;
        const int band = row / S::ROWS, tile = row % S::ROWS / 16 * NT + token / 8;
        const float *from = memory + band * p.slices * OWN + tile * S::SUMS + token % 8 * 20 + row % 16;
        float sum = 0.0f;
        for (int s = 0; s < p.slices; s++)
            sum += from[s * OWN];
        sum *= p.shrink;
        if (row >= w.rows)
            continue;
        const int64_t n = w.row + row;
        if (p.partial)
            p.partial[((int64_t)(blockIdx.x % p.splits) * m + token) * p.g.n + n] = sum;
        else
            set_value((T *)p.g.out + token * p.g.n + n, p.g.bias ? sum + value_of((const T *)p.g.bias + n) : sum);
    }
}

/* ---------------------------------------------------------------- the kernel */

/* Do the scales of a run lie together, and begin where one access may? */
template <class S> DEVICE bool few_is_together(const struct bnb_cuda_gemm4_fast &p)
{
    const int bytes = p.g.scale.absmax2 ? 1 : 4;
    return p.shift == 6 && p.g.k % S::WIDTH == 0 && (size_t)p.g.scale.absmax % (size_t)(S::PARTS * bytes) == 0 &&
           (!p.g.scale.absmax2 || S::PARTS >> p.shift2 <= 1);
}

/* On 9.0 those who bring leave their registers to the others; MOST: 0 where there are enough. */
template <int MOST, bool MULTIPLIES> DEVICE void few_registers()
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if constexpr (MOST > 0 && MULTIPLIES)
        registers_to<MOST>();
    else if constexpr (MOST > 0)
        registers_down_to<24>();
#endif
}

template <typename T, class S> DEVICE void few_product(const struct bnb_cuda_gemm4_wide &p)
{
    SHARED_MEMORY(memory);
    const struct bnb_cuda_gemm4_fast &f = p.fast;
    const struct few_place w = few_place_of<S>(f);
    const int warp = warp_number();
    let_next_launch_come();
    if (warp >= S::MULTIPLIERS / 32) {
        uint64_t *full = (uint64_t *)(memory + S::BARRIERS_AT), *empty = full + BNB_GEMM4_FEW_DEEPEST;
        if (threadIdx.x == S::MULTIPLIERS) {
            for (int i = 0; i < f.depth; i++) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
                barrier_init(full + i, 1);
#else
                barrier_init(full + i, S::BRINGERS);
#endif
                barrier_init(empty + i, f.bands * f.slices);
            }
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
            barriers_ready();
#endif
        }
        few_registers<S::MOST, false>();
        some_barrier(1, S::BRINGERS);
        some_arrive(2, S::MULTIPLIERS + S::BRINGERS);
        wait_for_launch_before();
        few_bring<T, S>(p, w, memory);
    } else {
        float sums[S::TILES][S::TOKENS][4] = {};
        few_registers<S::MOST, true>();
        if (f.shift == 5)
            few_multiply<T, S, FEW_NARROW>(f, w, warp, memory, sums);
        else if (!few_is_together<S>(f))
            few_multiply<T, S, FEW_ANYWHERE>(f, w, warp, memory, sums);
        else if (f.g.scale.absmax2)
            few_multiply<T, S, FEW_NESTED>(f, w, warp, memory, sums);
        else
            few_multiply<T, S, FEW_PLAIN>(f, w, warp, memory, sums);
        some_barrier(2, S::MULTIPLIERS);
        few_store<T, S>(f, (float *)(memory + S::STAGES_AT), sums);
    }
}

#endif

#endif
