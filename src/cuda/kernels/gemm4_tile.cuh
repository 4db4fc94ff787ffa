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
    TILE_X_AT = TILE_MAP2_AT + 1024,
    TILE_CODES_AT = TILE_X_AT + 2 * TILE_X,
    TILE_WEIGHTS_AT = TILE_CODES_AT + 2 * TILE_CODES,
    TILE_BYTES = TILE_WEIGHTS_AT + 2 * TILE_X
};

/* Where chunk `c` of 16 bytes of a row of `across` chunks lies. */
DEVICE unsigned tile_chunk(int row, int c, int across) { return (unsigned)((row * across + (c ^ row % 8)) * 16); }

struct tile_place {
    struct walk_tile at;
    int64_t column, inner, outer,
        base; /* of the result; sizes of the sum and of a row of it; the expert's first element */
};

/* The row of W that this thread decodes 32 weights of in a step, and the first of them. */
template <bool GRAD> DEVICE void tile_weights(const struct tile_place &t, int64_t l, int64_t *row, int64_t *k)
{
    const int thread = (int)threadIdx.x;
    *row = GRAD ? l + thread / 4 : t.column + thread / 2;
    *k = GRAD ? t.column + thread % 4 * 32 : l + thread % 2 * 32;
}

/* Copies of one step; *raw: the scale of this thread's weights, zero where there are none. */
template <typename T, bool GRAD>
DEVICE void tile_bring(const struct bnb_cuda_gemm4_fast &p, const struct tile_place &t, int64_t l,
                       unsigned char *memory, int slot, struct scale4 *raw, int *there)
{
    const int thread = (int)threadIdx.x, c = thread % 8;
    int64_t row, k;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int r = thread / 8 + i * 32;
        const int64_t token = t.at.token + r, at = l + c * 8;
        const bool whole = token < t.at.end && at < t.inner;
        copy16(memory + TILE_X_AT + slot * TILE_X + tile_chunk(r, c, 8),
               (const T *)p.g.x + (whole ? token * t.inner + at : 0), whole);
    }
    tile_weights<GRAD>(t, l, &row, &k);
    *there = row < p.g.n && k < p.g.k;
    const int64_t at = *there ? t.base + row * p.g.k + k : 0;
    copy16(memory + TILE_CODES_AT + slot * TILE_CODES + thread * 16, p.g.codes + at / 2, *there);
    *raw = scale4_load(p, at);
}

/* This thread's 32 weights of a step, which its own copy brought. */
template <typename T, bool GRAD>
DEVICE void tile_decode(const struct bnb_cuda_gemm4_fast &p, unsigned char *memory, int slot, struct scale4 raw,
                        int there, float offset)
{
    const T *tag = nullptr;
    const int thread = (int)threadIdx.x, row = GRAD ? thread / 4 : thread / 2;
    const int c = GRAD ? thread % 4 * 4 : thread % 2 * 4, across = GRAD ? 16 : 8;
    const float scale = there ? scale4_value(p, raw, (const float *)(memory + TILE_MAP2_AT), offset) * p.shrink : 0.0f;
    const uint4 codes = *(const uint4 *)(memory + TILE_CODES_AT + slot * TILE_CODES + thread * 16);
    const unsigned word[4] = {codes.x, codes.y, codes.z, codes.w};
    const unsigned char *pairs = memory + thread % 8 * 4;
    unsigned char *to = memory + TILE_WEIGHTS_AT + slot * TILE_X;
#pragma unroll
    for (int w = 0; w < 4; w++) {
        unsigned r[4];
#pragma unroll
        for (int b = 0; b < 4; b++) {
            float low, high;
            f16_pair_values(*(const unsigned *)(pairs + (word[w] >> 8 * b & 255) * 32), &low, &high);
            r[b] = quick_pair(tag, low * scale, high * scale);
        }
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
DEVICE void tile_put(const struct bnb_cuda_gemm4_fast &p, const struct tile_place &t, int64_t token, int64_t column,
                     float a, float b)
{
    if (token >= t.at.end || column >= t.outer)
        return;
    const T *bias = (const T *)p.g.bias + t.at.expert * t.outer + column;
    const bool two = column + 1 < t.outer;
    if (p.g.bias) {
        a += value_of(bias);
        b += two ? value_of(bias + 1) : 0.0f;
    }
    T *to = (T *)p.g.out + token * t.outer + column;
    if (p.store) {
        *(unsigned *)to = quick_pair(bias, a, b);
        return;
    }
    set_value(to, a);
    if (two)
        set_value(to + 1, b);
}

template <typename T, bool GRAD>
DEVICE void tile_result(const struct bnb_cuda_gemm4_fast &p, const struct tile_place &t, unsigned char *memory,
                        float offset)
{
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int steps = (int)((t.inner + TILE_DEPTH - 1) / TILE_DEPTH);
    float sums[4][4][4] = {};
    struct scale4 raw;
    int there;
    tile_bring<T, GRAD>(p, t, 0, memory, 0, &raw, &there);
    copies_commit();
    copies_wait<0>();
    tile_decode<T, GRAD>(p, memory, 0, raw, there, offset);
    tile_bring<T, GRAD>(p, t, TILE_DEPTH, memory, 1, &raw, &there);
    copies_commit();
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < steps; i++) {
        tile_products<T, GRAD>(memory + TILE_X_AT + i % 2 * TILE_X, memory + TILE_WEIGHTS_AT + i % 2 * TILE_X, sums);
        copies_wait<0>();
        tile_decode<T, GRAD>(p, memory, (i + 1) % 2, raw, there, offset);
        __syncthreads();
        tile_bring<T, GRAD>(p, t, (int64_t)(i + 2) * TILE_DEPTH, memory, i % 2, &raw, &there);
        copies_commit();
    }
    copies_wait<0>();
    __syncthreads();
    const int64_t token = t.at.token + warp / 4 * 64 + lane / 4, column = t.column + warp % 4 * 32 + lane % 4 * 2;
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
    const unsigned e = threadIdx.x,
                   pair = quick_pair((const f16 *)nullptr, value4(p, e >> 4) * p.gain, value4(p, e & 15) * p.gain);
    *(uint4 *)(pairs + e * 32) = make_uint4(pair, pair, pair, pair);
    *(uint4 *)(pairs + e * 32 + 16) = make_uint4(pair, pair, pair, pair);
}

template <typename T, bool GRAD> DEVICE void tile_product(const struct bnb_cuda_gemm4_fast &p)
{
    SHARED_MEMORY(memory);
    struct walk w = {(int64_t)blockIdx.x, 0, 0};
    struct tile_place t;
    const float offset = p.g.scale.absmax2 ? __ldg(p.g.scale.offset) : 0.0f;
    t.inner = GRAD ? p.g.n : p.g.k, t.outer = GRAD ? p.g.k : p.g.n;
    tile_table(p, memory);
    map2_fill(p, (float *)(memory + TILE_MAP2_AT));
    __syncthreads();
    while (walk_next(p, TILE_SIDE, (int)((t.outer + TILE_SIDE - 1) / TILE_SIDE), gridDim.x, &w, &t.at)) {
        t.column = (int64_t)t.at.column * TILE_SIDE;
        t.base = t.at.expert * p.g.n * p.g.k;
        tile_result<T, GRAD>(p, t, memory, offset);
    }
}

#endif

#endif
