/*
 * gemm4_tile.cuh - products with a 4-bit weight by tiles of m16n8k16, both ways: x W^T and, GRAD, x W
 *
 * A tile is 128 rows of activations by 128 columns of the result; a step is 64 along the sum.  Activations come by
 * asynchronous copies; so do the codes, which are decoded, scaled in f32 and rounded to T once for the 128 rows, into
 * shared memory as they lie: a row of W is a row there.  x W^T reads it as rows of the operand, x W transposed.
 * Eight warps have 64 x 32 results each.  Two blocks share a multiprocessor, so that one decodes while one multiplies.
 */
#ifndef BNB_CUDA_GEMM4_TILE_CUH
#define BNB_CUDA_GEMM4_TILE_CUH

#include "core/plan_gemm4.h"
#include "cuda/kernels/gemm4_decode.cuh"
#include "cuda/kernels/gemm4_walk.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

enum {
    TILE_SIDE = 128,
    TILE_DEPTH = 64,
    TILE_WARPS = 8,
    TILE_X = TILE_SIDE * TILE_DEPTH * 2,     /* bytes of a step of activations, of decoded weights, of codes */
    TILE_CODES = TILE_SIDE * TILE_DEPTH / 2,
    TILE_TABLE = 8192,                       /* the table of pairs for each eighth lane */
    TILE_MAP2_AT = TILE_TABLE,
    TILE_X_AT = TILE_MAP2_AT + 1024 + 128, /* the offset of nested scales behind their map */
    TILE_CODES_AT = TILE_X_AT + 2 * TILE_X,
    TILE_WEIGHTS_AT = TILE_CODES_AT + 2 * TILE_CODES,
    TILE_BYTES = TILE_WEIGHTS_AT + 2 * TILE_X
};
static_assert((int)TILE_BYTES == BNB_GEMM4_TILE_SHARED, "what the launch asks for");

/* Where chunk `c` of 16 bytes of a row of `across` chunks lies. */
DEVICE unsigned tile_chunk(int row, int c, int across) { return (unsigned)((row * across + (c ^ row % 8)) * 16); }

struct tile_place {
    struct walk_tile<int> at;
    int column, inner, outer; /* the first of the result; sizes of the sum and of a row of the result */
};

/* What this thread brings of the next step. */
struct tile_source {
    const unsigned char *x; /* 16 bytes of the first of its four rows */
    int64_t weight;         /* the first of 32 weights, an element of all codes */
    int left, weights;      /* elements of the sum that are left from its 16 bytes on, and from its weights on */
    int rows;               /* of activations, from its first on */
};

template <typename T, bool GRAD>
DEVICE struct tile_source tile_source_of(const struct bnb_cuda_gemm4_fast &p, const struct tile_place &t)
{
    const int thread = (int)threadIdx.x;
    struct tile_source s;
    const int64_t base = t.at.expert * p.g.n * p.g.k;
    const int token = t.at.token + thread / 8;
    s.x = (const unsigned char *)((const T *)p.g.x + (int64_t)token * t.inner + thread % 8 * 8);
    s.left = t.inner - thread % 8 * 8;
    s.rows = t.at.end - token;
    const int column = t.column + (GRAD ? thread % 4 * 32 : thread / 2);
    const int along = GRAD ? thread / 4 : thread % 2 * 32;
    s.weight = base + (GRAD ? along * p.g.k + column : column * p.g.k + along);
    s.weights = column < t.outer ? t.inner - along : 0;
    return s;
}

/* Copies of one step, and on to the next; *raw: the scale of this thread's weights. */
template <typename T, bool GRAD>
DEVICE void tile_bring(const struct bnb_cuda_gemm4_fast &p, const struct tile_place &t, struct tile_source *s,
                       unsigned char *memory, int slot, struct scale4 *raw)
{
    const int thread = (int)threadIdx.x, c = thread % 8;
    unsigned char *to = memory + TILE_X_AT + slot * TILE_X + tile_chunk(thread / 8, c, 8);
#pragma unroll
    for (int i = 0; i < 4; i++) { /* rows 32 apart have chunks in the same order */
        const bool there = i * 32 < s->rows && s->left > 0;
        copy16(to + i * 32 * 128, there ? s->x + (int64_t)i * 64 * t.inner : (const unsigned char *)p.g.x, there);
    }
    const bool there = s->weights > 0;
    const int64_t at = there ? s->weight : 0;
    copy16(memory + TILE_CODES_AT + slot * TILE_CODES + thread * 16, p.g.codes + at / 2, there);
    *raw = scale4_load(p, at);
    raw->scale = there ? raw->scale : 0.0f; /* a scale may be NaN, which no zero of the other side would stop */
    s->x += TILE_DEPTH * sizeof(T);
    s->weight += GRAD ? TILE_DEPTH * p.g.k : TILE_DEPTH;
    s->left -= TILE_DEPTH;
    s->weights -= TILE_DEPTH;
}

/* This thread's 32 weights of a step, which its own copy brought. */
template <typename T, bool GRAD>
DEVICE void tile_decode(const struct bnb_cuda_gemm4_fast &p, unsigned char *memory, int slot, struct scale4 raw)
{
    const T *tag = nullptr;
    const int thread = (int)threadIdx.x, row = GRAD ? thread / 4 : thread / 2;
    const int c = GRAD ? thread % 4 * 4 : thread % 2 * 4, across = GRAD ? 16 : 8;
    const float *map2 = (const float *)(memory + TILE_MAP2_AT);
    const float scale = scale4_value(p, raw, map2, map2[256]) * p.shrink;
    const uint4 codes = *(const uint4 *)(memory + TILE_CODES_AT + slot * TILE_CODES + thread * 16);
    const unsigned word[4] = {codes.x, codes.y, codes.z, codes.w};
    const unsigned char *pairs = memory + thread % 8 * 4;
    unsigned char *to = memory + TILE_WEIGHTS_AT + slot * TILE_X;
#pragma unroll
    for (int w = 0; w < 4; w++) {
        unsigned r[4];
#pragma unroll
        for (int b = 0; b < 4; b++)
            r[b] = scale_pair(tag, *(const unsigned *)(pairs + (word[w] >> 8 * b & 255) * 32), scale, scale);
        *(uint4 *)(to + tile_chunk(row, c + w, across)) = make_uint4(r[0], r[1], r[2], r[3]);
    }
}

/* All products of one step; this warp's 64 rows and 32 columns. */
template <typename T, bool GRAD>
DEVICE void tile_products(const unsigned char *x, const unsigned char *weights, float sums[4][4][4])
{
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, row = warp / 4 * 64, column = warp % 4 * 32;
#pragma unroll
    for (int s = 0; s < TILE_DEPTH / 16; s++) {
        unsigned a[4][4], b[2][4];
#pragma unroll
        for (int i = 0; i < 4; i++) /* matrices: rows 0 and 8, then both again eight along the sum */
            load_matrices(a[i], x + tile_chunk(row + i * 16 + lane % 16, 2 * s + lane / 16, 8));
#pragma unroll
        for (int j = 0; j < 2; j++) { /* matrices: along the sum 0 and 8, then both again eight columns on */
            if (GRAD)
                load_matrices_transposed(b[j],
                                         weights + tile_chunk(s * 16 + lane % 16, column / 8 + 2 * j + lane / 16, 16));
            else
                load_matrices(
                    b[j], weights + tile_chunk(column + j * 16 + lane / 16 * 8 + lane % 8, 2 * s + lane / 8 % 2, 8));
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                multiply16((const T *)nullptr, sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1],
                           sums[i][j]);
    }
}

/* Two neighbours of a row of the result. */
template <typename T>
DEVICE void tile_put(const struct bnb_cuda_gemm4_fast &p, const struct tile_place &t, int token, int column, float a,
                     float b)
{
    if (token >= t.at.end || column >= t.outer)
        return;
    const T *bias = (const T *)p.g.bias + (int64_t)t.at.expert * t.outer + column;
    const bool two = column + 1 < t.outer;
    if (p.g.bias) {
        a += value_of(bias);
        b += two ? value_of(bias + 1) : 0.0f;
    }
    T *to = (T *)p.g.out + (int64_t)token * t.outer + column;
    if (p.store) {
        *(unsigned *)to = quick_pair(bias, a, b);
        return;
    }
    set_value(to, a);
    if (two)
        set_value(to + 1, b);
}

template <typename T, bool GRAD>
DEVICE void tile_result(const struct bnb_cuda_gemm4_fast &p, const struct tile_place &t, unsigned char *memory)
{
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int steps = (t.inner + TILE_DEPTH - 1) / TILE_DEPTH;
    struct tile_source source = tile_source_of<T, GRAD>(p, t);
    float sums[4][4][4] = {};
    struct scale4 raw;
    tile_bring<T, GRAD>(p, t, &source, memory, 0, &raw);
    copies_commit();
    copies_wait<0>();
    tile_decode<T, GRAD>(p, memory, 0, raw);
    tile_bring<T, GRAD>(p, t, &source, memory, 1, &raw);
    copies_commit();
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < steps; i++) {
        tile_products<T, GRAD>(memory + TILE_X_AT + i % 2 * TILE_X, memory + TILE_WEIGHTS_AT + i % 2 * TILE_X, sums);
        copies_wait<0>();
        tile_decode<T, GRAD>(p, memory, (i + 1) % 2, raw);
        __syncthreads();
        tile_bring<T, GRAD>(p, t, &source, memory, i % 2, &raw);
        copies_commit();
    }
    copies_wait<0>();
    __syncthreads();
    const int token = t.at.token + warp / 4 * 64 + lane / 4, column = t.column + warp % 4 * 32 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            tile_put<T>(p, t, token + i * 16, column + j * 8, sums[i][j][0], sums[i][j][1]);
            tile_put<T>(p, t, token + i * 16 + 8, column + j * 8, sums[i][j][2], sums[i][j][3]);
        }
}

/* The table of f16 pairs, eight times. */
DEVICE void tile_table(const struct bnb_cuda_gemm4_fast &p, unsigned char *pairs)
{
    const unsigned e = threadIdx.x, pair = quick_pair((const f16 *)nullptr, p.values[e >> 4], p.values[e & 15]);
    *(uint4 *)(pairs + e * 32) = make_uint4(pair, pair, pair, pair);
    *(uint4 *)(pairs + e * 32 + 16) = make_uint4(pair, pair, pair, pair);
}

template <typename T, bool GRAD> DEVICE void tile_product(const struct bnb_cuda_gemm4_fast &p)
{
    SHARED_MEMORY(memory);
    const struct walk_work work = {p.first, p.g.m, p.experts, p.splits};
    struct walk<int> w = {(int)blockIdx.x, 0, 0};
    struct tile_place t;
    t.inner = (int)(GRAD ? p.g.n : p.g.k), t.outer = (int)(GRAD ? p.g.k : p.g.n);
    tile_table(p, memory);
    map2_fill(p, (float *)(memory + TILE_MAP2_AT), threadIdx.x, 256);
    if (p.g.scale.absmax2 && threadIdx.x == 0)
        ((float *)(memory + TILE_MAP2_AT))[256] = __ldg(p.g.scale.offset);
    __syncthreads();
    while (walk_next(work, TILE_SIDE, (t.outer + TILE_SIDE - 1) / TILE_SIDE, (int)gridDim.x, &w, &t.at)) {
        t.column = t.at.column * TILE_SIDE;
        tile_result<T, GRAD>(p, t, memory);
    }
}

#endif

#endif
