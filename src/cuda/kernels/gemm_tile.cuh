/*
 * gemm_tile.cuh - a tile of a matrix product: 64 x 64 results of a block of 256 threads, in steps of 32 along the sum
 *
 * Both operands of a step lie in shared memory as f32, the sum's index first: a thread reads four neighbours of each and
 * adds 16 products.  Rows are skewed by 8 for every 8 of depth, so that neither the transposing writes nor the reads
 * meet in a bank.  The order of a sum is that of its index.
 */
#ifndef BNB_CUDA_GEMM_TILE_CUH
#define BNB_CUDA_GEMM_TILE_CUH

#include "cuda/kernels/device.cuh"

enum { TILE = 64, DEPTH = 32, PITCH = 88, TILE_THREADS = 256, OPERAND = DEPTH * PITCH };

/* Where element `at` of the operand at depth d lies. */
DEVICE int tile_slot(int d, int at) { return d * PITCH + d / 8 * 8 + at; }

/* The first of the four columns, and of the four rows, of this thread. */
DEVICE int tile_column() { return (int)threadIdx.x % 16 * 4; }
DEVICE int tile_row() { return (int)threadIdx.x / 16 * 4; }

DEVICE void tile_multiply(const float *rows, const float *columns, float sums[4][4])
{
    const int row = tile_row(), column = tile_column();
#pragma unroll 8
    for (int d = 0; d < DEPTH; d++) {
        const float4 a = *(const float4 *)(rows + tile_slot(d, row));
        const float4 b = *(const float4 *)(columns + tile_slot(d, column));
        const float x[4] = {a.x, a.y, a.z, a.w}, w[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                sums[i][j] = __fmaf_rn(x[i], w[j], sums[i][j]);
    }
}

/* The eight elements of depth that this thread brings of one of 64 rows, and its row. */
DEVICE int bring_row() { return (int)threadIdx.x / 4; }
DEVICE int bring_depth() { return (int)threadIdx.x % 4 * 8; }

DEVICE void tile_put_row(float *operand, const float v[8])
{
#pragma unroll
    for (int i = 0; i < 8; i++)
        operand[tile_slot(bring_depth() + i, bring_row())] = v[i];
}

/* The same for an operand that lies with the sum's index first: eight neighbours at one of 32 depths. */
DEVICE int bring_line() { return (int)threadIdx.x / 8; }
DEVICE int bring_column() { return (int)threadIdx.x % 8 * 8; }

DEVICE void tile_put_line(float *operand, const float v[8])
{
    float4 *to = (float4 *)(operand + tile_slot(bring_line(), bring_column()));
    to[0] = make_float4(v[0], v[1], v[2], v[3]);
    to[1] = make_float4(v[4], v[5], v[6], v[7]);
}

/* The first `count` of eight, the rest zero; memory that other blocks read too. */
template <typename T> DEVICE void values8_of(const T *p, int count, int vector, float v[8])
{
    struct raw8<T> raw;
    if (vector && count == 8) {
#pragma unroll
        for (int i = 0; i < (int)(sizeof(T) / 2); i++)
            raw.word[i] = __ldg((const uint4 *)p + i);
    } else {
        raw = raw8_load(p, count, 0);
    }
    raw8_values(raw, v);
}

/* What this thread brings of x [m, inner]: rows from `row` on, at depth `l`. */
template <typename T>
DEVICE void tile_row_values(const T *x, int64_t m, int64_t inner, int64_t row, int64_t l, int vector, float v[8])
{
    const int64_t i = row + bring_row(), at = l + bring_depth();
    values8_of(x + i * inner + at, i < m ? count8(inner, at) : 0, vector, v);
}

/* Four neighbours of a row. */
DEVICE void store4(float *p, const float v[4]) { *(float4 *)p = make_float4(v[0], v[1], v[2], v[3]); }

template <typename T> DEVICE void store4(T *p, const float v[4])
{
    T h[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        set_value(h + i, v[i]);
    *(uint2 *)p = make_uint2(h[0].bits | (unsigned)h[1].bits << 16, h[2].bits | (unsigned)h[3].bits << 16);
}

/* A tile's results into out [m, n], from `row` and `column` on. */
template <typename T>
DEVICE void tile_store(T *out, int64_t m, int64_t n, int64_t row, int64_t column, int vector, const float v[4][4])
{
    const int64_t j = column + tile_column();
    const int count = count_of<4>(n, j);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int64_t r = row + tile_row() + i;
        if (r >= m)
            break;
        T *p = out + r * n + j;
        if (vector && count == 4) {
            store4(p, v[i]);
            continue;
        }
#pragma unroll
        for (int c = 0; c < 4; c++)
            if (c < count)
                set_value(p + c, v[i][c]);
    }
}

/* The sum over the lanes of a warp, in each of them. */
DEVICE float warp_sum(float x)
{
#pragma unroll
    for (int o = 16; o > 0; o /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

DEVICE int warp_sum(int x)
{
#pragma unroll
    for (int o = 16; o > 0; o /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

#endif
