/*
 * gemm4_few.cuh - a 4-bit weight times few rows of activations: all speed is that of reading the weight once
 *
 * Rows of the weight are the operand A of m16n8k16, decoded in registers; activations are B, out is transposed.  A warp
 * keeps the sums of one band of 16 or 32 rows; the warps of a band share K in turn and meet at the end, in fixed order.
 * Codes and activations come by asynchronous copies, `depth` steps ahead; a step is `slices` runs of KW elements of K.
 * Weights enter unscaled: the sum over 64 (or 32, the block) products is multiplied by the scale, in f32.  Scales are
 * loaded one step ahead into registers and meet in shared memory.
 */
#ifndef BNB_CUDA_GEMM4_FEW_CUH
#define BNB_CUDA_GEMM4_FEW_CUH

#include "core/plan_gemm4.h"
#include "cuda/kernels/gemm4_decode.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

/* RT tiles of 16 rows in a band, NT tiles of 8 rows of activations. */
template <int RT, int NT, int KW, int WARPS> struct few_shape {
    enum {
        TILES = RT,
        TOKENS = NT,
        WIDTH = KW,
        WARP_COUNT = WARPS,
        ROWS = 16 * RT,
        CHUNKS = KW / 32,                  /* of 16 bytes in a row of codes          */
        PASSES = ROWS * CHUNKS / 32,       /* copies of a lane                       */
        LOG_PARTS = KW == 256 ? 2
        : KW == 128           ? 1
                              : 0, /* of 64 elements in a run */
        CODES = ROWS * KW / 2,             /* bytes of a band in a run               */
        TOKEN = KW * 2,                    /* bytes of a row of activations in a run */
        X_BYTES = 8 * NT * TOKEN,
        ENTRIES = ROWS * (KW / 64) / 32,   /* scales of a lane; twice where blocks are of 32 */
        SCALES = ROWS * (KW / 32),
        MAP2 = PAIRS,
        SCALES_AT = MAP2 + 1024, /* two steps of each warp */
        STAGES_AT = BNB_GEMM4_FEW_FIXED(RT, KW, WARPS),
        SUMS = BNB_GEMM4_FEW_SUMS /* floats of a tile of sums: eight rows of 16, 20 apart */
    };
};

/* What a warp works on. */
struct few_warp {
    int64_t row; /* of the weight, its band's first */
    int first;   /* run of K of slice 0 in step 0 */
    int slice, active;
    unsigned stage_bytes, x_at; /* of all that a step brings; where the activations lie in it */
};

template <class S> DEVICE struct few_warp few_place(const struct bnb_cuda_gemm4_fast &p)
{
    struct few_warp w;
    const int warp = (int)threadIdx.x / 32, band = warp / p.slices, used = p.bands * p.slices;
    const int chunk = (int)blockIdx.x / p.splits, split = (int)blockIdx.x % p.splits;
    w.row = ((int64_t)chunk * p.bands + band) * S::ROWS;
    w.slice = warp % p.slices;
    w.first = split * p.steps * p.slices;
    w.active = warp < used && w.row < p.g.n;
    w.x_at = (unsigned)(used * S::CODES);
    w.stage_bytes = w.x_at + (unsigned)(p.slices * S::X_BYTES);
    return w;
}

/* The first element of K of a step, for slice 0. */
template <class S> DEVICE int64_t few_start(const struct bnb_cuda_gemm4_fast &p, const struct few_warp &w, int step)
{
    return (int64_t)(w.first + step * p.slices) * S::WIDTH;
}

/* Where chunk `c` of a row lies: so that eight rows that are read together meet no bank twice. */
template <int CHUNKS> DEVICE unsigned few_slot(int row, int c)
{
    const int turn = CHUNKS >= 8 ? row % 8 : row / (8 / CHUNKS) % CHUNKS;
    return (unsigned)((row * CHUNKS + (c ^ turn)) * 16);
}

/* Copies of one step: each warp its codes, all together the activations. */
template <typename T, class S>
DEVICE void few_bring(const struct bnb_cuda_gemm4_fast &p, const struct few_warp &w, int step, unsigned char *stage)
{
    const int lane = (int)threadIdx.x % 32, c = lane % S::CHUNKS;
    const int64_t start = few_start<S>(p, w, step), k = start + w.slice * S::WIDTH + c * 32;
    if (w.active && k - c * 32 < p.g.k) {
        unsigned char *to = stage + threadIdx.x / 32 * S::CODES;
        const uint8_t *from = p.g.codes + k / 2;
#pragma unroll
        for (int i = 0; i < S::PASSES; i++) {
            const int r = lane / S::CHUNKS + i * (32 / S::CHUNKS);
            const int64_t row = w.row + r < p.g.n ? w.row + r : p.g.n - 1;
            copy16(to + few_slot<S::CHUNKS>(r, c), k < p.g.k ? from + row * (p.g.k / 2) : p.g.codes, k < p.g.k);
        }
    }
    enum { ACROSS = S::WIDTH / 8 };
#pragma unroll 1
    for (int t = (int)threadIdx.x; t < p.slices * 8 * S::TOKENS * ACROSS; t += S::WARP_COUNT * 32) {
        const int token = t / ACROSS % (8 * S::TOKENS), slice = t / (ACROSS * 8 * S::TOKENS);
        const int64_t at = start + slice * S::WIDTH + t % ACROSS * 8;
        if (token < p.g.m)
            copy16(stage + w.x_at + slice * S::X_BYTES + few_slot<ACROSS>(token, t % ACROSS),
                   (const T *)p.g.x + (at < p.g.k ? token * p.g.k + at : 0), at < p.g.k);
    }
}

/* The rows of activations beyond m: zeros that no copy overwrites. */
template <class S>
DEVICE void few_clear(const struct bnb_cuda_gemm4_fast &p, const struct few_warp &w, unsigned char *stages)
{
    enum { WORDS = S::X_BYTES / 16 };
    for (int stage = 0; stage < p.depth; stage++) {
        unsigned char *to = stages + stage * w.stage_bytes + w.x_at;
#pragma unroll 1
        for (int t = (int)threadIdx.x; t < p.slices * WORDS; t += S::WARP_COUNT * 32)
            if (t % WORDS / (S::TOKEN / 16) >= p.g.m)
                *(uint4 *)(to + t * 16) = make_uint4(0, 0, 0, 0);
    }
}

/* ---------------------------------------------------------------- scales */

/* This lane's scales of a step: entry e of a warp is row e / per, part e % per of the run. */
template <class S>
DEVICE void few_scales_load(const struct bnb_cuda_gemm4_fast &p, const struct few_warp &w, int step,
                            struct scale4 raw[2 * S::ENTRIES])
{
    const int narrow = p.shift == 5, per = S::LOG_PARTS + narrow, width = 6 - narrow;
    const int64_t start = few_start<S>(p, w, step) + w.slice * S::WIDTH;
#pragma unroll
    for (int i = 0; i < 2 * S::ENTRIES; i++) {
        const int e = i * 32 + (int)threadIdx.x % 32, part = e & ((1 << per) - 1);
        const int64_t r = w.row + (e >> per), row = r < p.g.n ? r : p.g.n - 1, k = start + (part << width);
        if (w.active && e < S::ROWS << per && k < p.g.k)
            raw[i] = scale4_load(p, row * p.g.k + k);
    }
}

template <class S>
DEVICE void few_scales_put(const struct bnb_cuda_gemm4_fast &p, const struct scale4 raw[2 * S::ENTRIES],
                           const float *map2, float offset, float *scales)
{
    const int entries = S::ROWS * (S::WIDTH / 64) << (p.shift == 5);
#pragma unroll
    for (int i = 0; i < 2 * S::ENTRIES; i++) {
        const int e = i * 32 + (int)threadIdx.x % 32;
        if (e < entries)
            scales[e] = scale4_value(p, raw[i], map2, offset);
    }
}

/* ---------------------------------------------------------------- products */

/* Rows g and g + 8 of a tile: 64 weights of each, decoded. */
template <class S>
DEVICE void few_decode(const unsigned char *pairs, const unsigned char *codes, int tile, int q, unsigned selector,
                       unsigned a[4][4])
{
    const unsigned lane = threadIdx.x % 32 * 4;
    const int row = tile * 16 + (int)threadIdx.x % 32 / 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const uint4 top = *(const uint4 *)(codes + few_slot<S::CHUNKS>(row, 2 * q + h));
        const uint4 low = *(const uint4 *)(codes + few_slot<S::CHUNKS>(row + 8, 2 * q + h));
        decode_step(pairs, top.x, top.y, low.x, low.y, lane, selector, a[2 * h]);
        decode_step(pairs, top.z, top.w, low.z, low.w, lane, selector, a[2 * h + 1]);
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

/* 64 elements of K: part q of the run of this warp. */
template <typename T, class S>
DEVICE void few_multiply(const struct bnb_cuda_gemm4_fast &p, const unsigned char *pairs, const unsigned char *codes,
                         const unsigned char *x, const float *scales, int q, float sums[S::TILES][S::TOKENS][4])
{
    enum { RT = S::TILES, ACROSS = S::WIDTH / 8 };
    const int lane = (int)threadIdx.x % 32, row = lane / 4, narrow = p.shift == 5;
    const int per = S::WIDTH / 64 << narrow;
    const unsigned selector = pair_selector(lane % 4);
    const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    unsigned a[RT][4][4];
    float top[RT], low[RT], top2[RT] = {}, low2[RT] = {};
#pragma unroll
    for (int r = 0; r < RT; r++) {
        const float *s = scales + (r * 16 + row) * per + (q << narrow);
        few_decode<S>(pairs, codes, r, q, selector, a[r]);
        top[r] = s[0], low[r] = s[8 * per];
        if (narrow)
            top2[r] = s[1], low2[r] = s[8 * per + 1];
    }
#pragma unroll
    for (int t = 0; t < S::TOKENS; t++) {
        unsigned b[8];
        load_matrices(b, x + few_slot<ACROSS>(8 * t + lane % 8, 8 * q + lane / 8));
        load_matrices(b + 4, x + few_slot<ACROSS>(8 * t + lane % 8, 8 * q + 4 + lane / 8));
#pragma unroll
        for (int r = 0; r < RT; r++) {
            float part[4];
            multiply16((const T *)nullptr, part, a[r][0], b[0], b[1], zero);
            multiply16((const T *)nullptr, part, a[r][1], b[2], b[3], part);
            if (narrow) {
                few_add(sums[r][t], part, top[r], low[r]);
                multiply16((const T *)nullptr, part, a[r][2], b[4], b[5], zero);
                multiply16((const T *)nullptr, part, a[r][3], b[6], b[7], part);
                few_add(sums[r][t], part, top2[r], low2[r]);
            } else {
                multiply16((const T *)nullptr, part, a[r][2], b[4], b[5], part);
                multiply16((const T *)nullptr, part, a[r][3], b[6], b[7], part);
                few_add(sums[r][t], part, top[r], low[r]);
            }
        }
    }
}

/* ---------------------------------------------------------------- results */

/* The sums of all slices, in their order, to out or to the split's place.  memory: room for all tiles. */
template <typename T, class S>
DEVICE void few_store(const struct bnb_cuda_gemm4_fast &p, const struct few_warp &w, float *memory,
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
    const int rows = p.bands * S::ROWS, m = (int)p.g.m;
    const int64_t first = (int64_t)(blockIdx.x / p.splits) * rows;
    for (int i = (int)threadIdx.x; i < rows * m; i += S::WARP_COUNT * 32) {
        const int row = i % rows, token = i / rows;
        const int band = row / S::ROWS, tile = row % S::ROWS / 16 * NT + token / 8;
        const float *from = memory + band * p.slices * OWN + tile * S::SUMS + token % 8 * 20 + row % 16;
        float sum = 0.0f;
        for (int s = 0; s < p.slices; s++)
            sum += from[s * OWN];
        sum *= p.shrink;
        const int64_t n = first + row;
        if (n >= p.g.n)
            continue;
        if (p.partial)
            p.partial[((int64_t)(blockIdx.x % p.splits) * m + token) * p.g.n + n] = sum;
        else
            set_value((T *)p.g.out + token * p.g.n + n, p.g.bias ? sum + value_of((const T *)p.g.bias + n) : sum);
    }
}

/* ---------------------------------------------------------------- the kernel */

/* Until at most depth - 2 steps are under way. */
DEVICE void few_wait(int depth)
{
    if (depth == 2)
        copies_wait<0>();
    else if (depth == 3)
        copies_wait<1>();
    else
        copies_wait<2>();
}

template <typename T, class S> DEVICE void few_product(const struct bnb_cuda_gemm4_fast &p)
{
    SHARED_MEMORY(memory);
    const struct few_warp w = few_place<S>(p);
    const int steps = p.steps, warp = (int)threadIdx.x / 32;
    unsigned char *stages = memory + S::STAGES_AT;
    float *map2 = (float *)(memory + S::MAP2), *scales = (float *)(memory + S::SCALES_AT) + warp * 2 * S::SCALES;
    struct scale4 raw[2 * S::ENTRIES] = {}, ahead[2 * S::ENTRIES] = {};
    float sums[S::TILES][S::TOKENS][4] = {};
#pragma unroll 1
    for (int i = 0; i < p.depth - 1; i++) {
        if (i < steps)
            few_bring<T, S>(p, w, i, stages + i * w.stage_bytes);
        copies_commit();
    }
    const float offset = p.g.scale.absmax2 ? __ldg(p.g.scale.offset) : 0.0f;
    few_scales_load<S>(p, w, 0, raw);
    few_scales_load<S>(p, w, 1, ahead);
    pairs_fill((const T *)nullptr, p, memory);
    map2_fill(p, map2);
    few_clear<S>(p, w, stages);
    __syncthreads();
    few_scales_put<S>(p, raw, map2, offset, scales);
    int slot = 0, next = p.depth - 1;
#pragma unroll 1
    for (int i = 0; i < steps; i++) {
        few_wait(p.depth);
        __syncthreads();
        if (i + p.depth - 1 < steps)
            few_bring<T, S>(p, w, i + p.depth - 1, stages + next * w.stage_bytes);
        copies_commit();
        few_scales_put<S>(p, ahead, map2, offset, scales + (i + 1) % 2 * S::SCALES);
        few_scales_load<S>(p, w, i + 2, ahead);
        const int64_t k = few_start<S>(p, w, i) + w.slice * S::WIDTH;
        const unsigned char *stage = stages + slot * w.stage_bytes;
        const int parts = w.active && k < p.g.k ? (int)(p.g.k - k < S::WIDTH ? p.g.k - k : S::WIDTH) / 64 : 0;
#pragma unroll
        for (int q = 0; q < S::WIDTH / 64; q++)
            if (q < parts)
                few_multiply<T, S>(p, memory, stage + warp * S::CODES, stage + w.x_at + w.slice * S::X_BYTES,
                                   scales + i % 2 * S::SCALES, q, sums);
        slot = slot + 1 < p.depth ? slot + 1 : 0;
        next = next + 1 < p.depth ? next + 1 : 0;
    }
    copies_wait<0>();
    __syncthreads();
    few_store<T, S>(p, w, (float *)stages, sums);
}

#endif

#endif
