/*
 * gemm4_few.cuh - a 4-bit weight times few rows of activations: all speed is that of reading the weight once
 *
 * Rows of the weight are the operand A of m16n8k16, decoded in registers; activations are B, out is transposed.  A warp
 * keeps the sums of one band of 16 or 32 rows; the warps of a band share K in turn and meet at the end, in fixed order.
 * More warps bring codes, activations and scales, `depth` steps ahead; a step is `slices` runs of WIDTH of K.
 *
 * The order of K within 32 is another than in memory, the same for both operands: lane j of a quad takes the eight
 * elements from 8j on, whose codes are one word, and whose activations are 16 bytes.  Nothing is read twice.
 * Weights enter unscaled: the sum over 64 (or 32, the block) products is multiplied by the scale, in f32.
 */
#ifndef BNB_CUDA_GEMM4_FEW_CUH
#define BNB_CUDA_GEMM4_FEW_CUH

#include "core/plan_gemm4.h"
#include "cuda/kernels/gemm4_decode.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

/* RT tiles of 16 rows in a band, NT tiles of 8 rows of activations, WARPS that multiply, MORE that bring. */
template <int RT, int NT, int KW, int WARPS, int MORE> struct few_shape {
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
        TOKEN = KW * 2,   /* bytes of a run of activations */
        MAP2_AT = PAIRS,
        BARRIERS_AT = MAP2_AT + 1024,
        STAGES_AT = BNB_GEMM4_FEW_FIXED,
        SUMS = BNB_GEMM4_FEW_SUMS /* floats of a tile of sums: eight rows of 16, 20 apart */
    };
};

/* What a block works on, and how a stage of its shared memory lies: codes, activations, scales, each slice by slice. */
struct few_place {
    int row, rows;          /* of the weight: the first, and how many there are of the block's `band_rows` */
    int band_rows, k, steps; /* k: where its part of K begins */
    unsigned x_at, scales_at;
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
    w.scales_at = w.x_at + (unsigned)(p.slices * (int)p.g.m * S::TOKEN);
    return w;
}

/* Where chunk `c` of a run of codes lies: so that eight rows that are read together meet no bank twice. */
template <int CHUNKS> DEVICE unsigned few_slot(int row, int c)
{
    const int turn = CHUNKS >= 8 ? row % 8 : row / (8 / CHUNKS) % CHUNKS;
    return (unsigned)((row * CHUNKS + (c ^ turn)) * 16);
}

/* ---------------------------------------------------------------- the warps that bring */

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
    enum { ACROSS = S::WIDTH / 8, APART = S::BRINGERS / ACROSS };
    const int c = thread % ACROSS, m = (int)p.g.m;
    k += c * 8;
    for (int s = 0; s < p.slices; s++, k += S::WIDTH, to += m * S::TOKEN) {
        const bool there = k < p.g.k;
        for (int t = thread / ACROSS; t < m; t += APART)
            copy16(to + t * S::TOKEN + (c ^ t % 2 * 4) * 16, (const T *)p.g.x + (there ? t * p.g.k + k : 0), there);
    }
}

template <class S>
DEVICE void few_bring_scales(const struct bnb_cuda_gemm4_fast &p, const struct few_place &w, int k, int thread,
                             const float *map2, float offset, float *to)
{
    enum { BATCH = 4 };
    const int narrow = p.shift == 5, per = S::PARTS << narrow, apart = S::BRINGERS / per;
    const int part = thread % per, first = thread / per;
    k += part * (64 >> narrow);
    for (int s = 0; s < p.slices; s++, k += S::WIDTH, to += w.band_rows * per) {
        const bool there = k < p.g.k;
        const int64_t at = (w.row + first) * p.g.k + (there ? k : 0);
        for (int r = 0; first + r < w.rows; r += BATCH * apart) {
            struct scale4 raw[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; i++)
                if (first + r + i * apart < w.rows)
                    raw[i] = scale4_load(p, at + (r + i * apart) * p.g.k);
#pragma unroll
            for (int i = 0; i < BATCH; i++)
                if (first + r + i * apart < w.rows)
                    to[(first + r + i * apart) * per + part] = there ? scale4_value(p, raw[i], map2, offset) : 0.0f;
        }
    }
}

template <typename T, class S>
DEVICE void few_bring(const struct bnb_cuda_gemm4_fast &p, const struct few_place &w, unsigned char *memory)
{
    const int thread = (int)threadIdx.x - S::MULTIPLIERS;
    uint64_t *full = (uint64_t *)(memory + S::BARRIERS_AT), *empty = full + BNB_GEMM4_FEW_DEEPEST;
    float *map2 = (float *)(memory + S::MAP2_AT);
    const float offset = p.g.scale.absmax2 ? __ldg(p.g.scale.offset) : 0.0f;
    map2_fill(p, map2, (unsigned)thread, S::BRINGERS);
    int slot = 0, k = w.k;
    unsigned parity = 1;
#pragma unroll 1
    for (int i = 0; i < w.steps; i++, k += p.slices * S::WIDTH) {
        unsigned char *stage = memory + S::STAGES_AT + slot * p.stage;
        barrier_wait(empty + slot, parity);
        few_bring_codes<S>(p, w, k, thread, stage);
        few_bring_x<T, S>(p, k, thread, stage + w.x_at);
        copies_arrive(full + slot);
        if (i == 0)
            some_barrier(1, S::BRINGERS); /* the map is complete */
        few_bring_scales<S>(p, w, k, thread, map2, offset, (float *)(stage + w.scales_at));
        barrier_arrive(full + slot);
        if (++slot == p.depth)
            slot = 0, parity ^= 1;
    }
}

/* ---------------------------------------------------------------- the warps that multiply */

template <int COUNT> DEVICE void few_floats(const float *from, float v[COUNT])
{
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
        if (COUNT >= 4) {
            const float4 f = *(const float4 *)(from + i);
            v[i] = f.x, v[i + 1] = f.y, v[i + 2] = f.z, v[i + 3] = f.w;
        } else if (COUNT == 2) {
            const float2 f = *(const float2 *)from;
            v[0] = f.x, v[COUNT - 1] = f.y;
        } else {
            v[0] = *from;
        }
    }
}

/* sums += scale * part, of rows g and g + 8. */
DEVICE void few_add(float sums[4], const float part[4], float top, float low)
{
    sums[0] = __fmaf_rn(top, part[0], sums[0]);
    sums[1] = __fmaf_rn(top, part[1], sums[1]);
    sums[2] = __fmaf_rn(low, part[2], sums[2]);
    sums[3] = __fmaf_rn(low, part[3], sums[3]);
}

/* Where the lane's part of a stage begins, in bytes of shared memory. */
struct few_lane { unsigned codes, x, scales; };

/* Rows g and g + 8 of a tile: 64 weights of each, decoded. */
template <class S>
DEVICE void few_decode(const unsigned char *memory, unsigned codes, int tile, int q, unsigned a[4][4])
{
    const unsigned lane = threadIdx.x % 32 * 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const unsigned char *from = memory + (codes ^ (unsigned)(2 * q + h) * 16) + tile * 16 * S::ROW;
        const unsigned top = *(const unsigned *)from, low = *(const unsigned *)(from + 8 * S::ROW);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            a[2 * h + i][0] = pair_at(memory, top, lane, pair_selector(2 * i));
            a[2 * h + i][1] = pair_at(memory, low, lane, pair_selector(2 * i));
            a[2 * h + i][2] = pair_at(memory, top, lane, pair_selector(2 * i + 1));
            a[2 * h + i][3] = pair_at(memory, low, lane, pair_selector(2 * i + 1));
        }
    }
}

/* A warp's run of one step. */
template <typename T, class S, bool NARROW>
DEVICE void few_run(const unsigned char *memory, const struct few_lane &l, int m, float sums[S::TILES][S::TOKENS][4])
{
    enum { RT = S::TILES, PER = S::PARTS << NARROW };
    const T *tag = nullptr;
    const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    float top[RT][PER], low[RT][PER];
#pragma unroll
    for (int r = 0; r < RT; r++) {
        few_floats<PER>((const float *)(memory + l.scales) + r * 16 * PER, top[r]);
        few_floats<PER>((const float *)(memory + l.scales) + (r * 16 + 8) * PER, low[r]);
    }
#pragma unroll
    for (int q = 0; q < S::PARTS; q++) {
        unsigned a[RT][4][4];
#pragma unroll
        for (int r = 0; r < RT; r++)
            few_decode<S>(memory, l.codes, r, q, a[r]);
#pragma unroll
        for (int t = 0; t < S::TOKENS; t++) {
            const unsigned char *x = memory + q * 128 + t * 8 * S::TOKEN;
            uint4 b = make_uint4(0, 0, 0, 0), c = b;
            if (8 * t + (int)threadIdx.x % 32 / 4 < m)
                b = *(const uint4 *)(x + l.x), c = *(const uint4 *)(x + (l.x ^ 64));
#pragma unroll
            for (int r = 0; r < RT; r++) {
                float part[4];
                multiply16(tag, part, a[r][0], b.x, b.y, zero);
                multiply16(tag, part, a[r][1], b.z, b.w, part);
                if (NARROW)
                    few_add(sums[r][t], part, top[r][2 * q % PER], low[r][2 * q % PER]);
                multiply16(tag, part, a[r][2], c.x, c.y, NARROW ? zero : part);
                multiply16(tag, part, a[r][3], c.z, c.w, part);
                few_add(sums[r][t], part, top[r][NARROW ? 2 * q + 1 : q], low[r][NARROW ? 2 * q + 1 : q]);
            }
        }
    }
}

template <typename T, class S>
DEVICE void few_multiply(const struct bnb_cuda_gemm4_fast &p, const struct few_place &w, int warp,
                         unsigned char *memory, float sums[S::TILES][S::TOKENS][4])
{
    const int lane = (int)threadIdx.x % 32, g = lane / 4, narrow = p.shift == 5;
    const int slice = warp % p.slices, row = slice * w.band_rows + warp / p.slices * S::ROWS + g;
    uint64_t *full = (uint64_t *)(memory + S::BARRIERS_AT), *empty = full + BNB_GEMM4_FEW_DEEPEST;
    struct few_lane first, l;
    first.codes = few_slot<S::CHUNKS>(row, 0) + (unsigned)(lane % 4 * 4);
    first.x = w.x_at + (unsigned)((slice * (int)p.g.m + g) * S::TOKEN + g % 2 * 64 + lane % 4 * 16);
    first.scales = w.scales_at + (unsigned)(row * (S::PARTS << narrow) * 4);
    int slot = 0;
    unsigned parity = 0;
#pragma unroll 1
    for (int i = 0; i < w.steps; i++) {
        const unsigned stage = (unsigned)(S::STAGES_AT + slot * p.stage);
        l.codes = stage + first.codes, l.x = stage + first.x, l.scales = stage + first.scales;
        barrier_wait(full + slot, parity);
        if (narrow)
            few_run<T, S, true>(memory, l, (int)p.g.m, sums);
        else
            few_run<T, S, false>(memory, l, (int)p.g.m, sums);
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
DEVICE void few_store(const struct bnb_cuda_gemm4_fast &p, const struct few_place &w, float *memory,
                      const float sums[S::TILES][S::TOKENS][4])
{
    enum { RT = S::TILES, NT = S::TOKENS, OWN = RT * NT * S::SUMS };
    const int lane = (int)threadIdx.x % 32, g = lane / 4, j = lane % 4 * 2, warp = (int)threadIdx.x / 32;
#pragma unroll
    for (int r = 0; r < RT && warp < p.bands * p.slices; r++)
#pragma unroll
        for (int t = 0; t < NT; t++) {
            float *to = memory + warp * OWN + (r * NT + t) * S::SUMS + g;
            to[j * 20] = sums[r][t][0], to[j * 20 + 20] = sums[r][t][1];
            to[j * 20 + 8] = sums[r][t][2], to[j * 20 + 28] = sums[r][t][3];
        }
    __syncthreads();
    const int m = (int)p.g.m;
    for (int i = (int)threadIdx.x; i < w.band_rows * m; i += S::MULTIPLIERS + S::BRINGERS) {
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

template <typename T, class S> DEVICE void few_product(const struct bnb_cuda_gemm4_fast &p)
{
    SHARED_MEMORY(memory);
    const struct few_place w = few_place_of<S>(p);
    const int warp = warp_number();
    uint64_t *full = (uint64_t *)(memory + S::BARRIERS_AT), *empty = full + BNB_GEMM4_FEW_DEEPEST;
    if (threadIdx.x == 0)
        for (int i = 0; i < p.depth; i++) {
            barrier_init(full + i, 2 * S::BRINGERS); /* copies, and scales */
            barrier_init(empty + i, p.bands * p.slices);
        }
    __syncthreads();
    float sums[S::TILES][S::TOKENS][4] = {};
    if (warp >= S::MULTIPLIERS / 32) {
        few_bring<T, S>(p, w, memory);
    } else {
        pairs_fill((const T *)nullptr, p, memory, threadIdx.x, S::MULTIPLIERS);
        some_barrier(2, S::MULTIPLIERS);
        if (warp < p.bands * p.slices)
            few_multiply<T, S>(p, w, warp, memory, sums);
    }
    __syncthreads();
    few_store<T, S>(p, w, (float *)(memory + S::STAGES_AT), sums);
}

#endif

#endif
