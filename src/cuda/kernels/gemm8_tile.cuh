/*
 * gemm8_tile.cuh - from the sums of a tile to its results: scales, bias, one rounding, and the way out
 *
 * In the layout of tile8.h: f[4 j + i] is value i of this lane in block j of eight tokens.  NUMERICS rule 34: without
 * outliers every operation is rounded by itself.
 */
#ifndef BNB_CUDA_GEMM8_TILE_CUH
#define BNB_CUDA_GEMM8_TILE_CUH

#include "cuda/kernels/gemm8_outliers.cuh"

/* ---------------------------------------------------------------- scales and bias */

/* Of this lane's two rows: what a sum is multiplied by, and one with outliers; bias. */
struct lane8 { float sum[2], begun[2], bias[2]; };

DEVICE float bias8_at(const struct bnb_gemm8_block &g, int64_t j)
{
    if (g.bias_dtype == BNB_CUDA_F16)
        return value_of((const f16 *)g.bias + j);
    return g.bias_dtype == BNB_CUDA_BF16 ? value_of((const bf16 *)g.bias + j) : value_of((const float *)g.bias + j);
}

/* Of a row, where it is one.  Divided at once: later the sums leave no registers for it. */
DEVICE float4 row8_of(const struct bnb_gemm8_block &g, int64_t n)
{
    if (n >= g.n || g.sums)
        return {};
    const float scale = g.col_stats[n], bias = g.bias ? bias8_at(g, n) : -0.0f; /* which changes nothing */
    return {scale / 16129.0f, scale / 127.0f, bias, 0.0f};
}

DEVICE struct lane8 pair8(float4 upper, float4 lower)
{
    return {{upper.x, lower.x}, {upper.y, lower.y}, {upper.z, lower.z}};
}

DEVICE struct lane8 lane8_of(const struct bnb_gemm8_block &g, int64_t row)
{
    const int64_t n = row + lane_here() / 4;
    return pair8(row8_of(g, n), row8_of(g, n + 8));
}

/* Results of sums without outliers, block by block: statistics are read when they are wanted, for the sums leave few
 * registers. */
template <int R> struct plain8 {
    const int (&d)[R];
    const float *own; /* the statistic of the first value */
    struct lane8 lane;

    __device__ __forceinline__ void block(int j, float v[4]) const
    {
        const float2 row = *(const float2 *)(own + 8 * j);
#pragma unroll
        for (int i = 0; i < 4; i++)
            v[i] = __fadd_rn(__fmul_rn((float)d[4 * j + i], __fmul_rn(i % 2 ? row.y : row.x, lane.sum[i / 2])),
                             lane.bias[i / 2]);
    }
};

/* Results of sums with outliers, which begin8() began. */
template <int R> struct begun8 {
    const float (&f)[R];
    struct lane8 lane;

    __device__ __forceinline__ void block(int j, float v[4]) const
    {
#pragma unroll
        for (int i = 0; i < 4; i++)
            v[i] = __fadd_rn(__fmul_rn(f[4 * j + i], lane.begun[i / 2]), lane.bias[i / 2]);
    }
};

/* Where this lane's statistics begin. */
DEVICE const float *own_stats8(const float *stats) { return stats + lane_here() % 4 * 2; }

/* The sums under the scales of the tokens: products of outlier columns are added next. */
template <int R> DEVICE void begin8(const int (&d)[R], float (&f)[R], const float *stats)
{
    const float *own = own_stats8(stats);
#pragma unroll
    for (int j = 0; j < R / 4; j++) {
        if (j % 8 == 0) /* statistics are not read far ahead: the sums leave few registers */
            __threadfence_block();
        const float2 row = *(const float2 *)(own + 8 * j);
        const float x = __fmul_rn(row.x, 1.0f / 127.0f), y = __fmul_rn(row.y, 1.0f / 127.0f);
#pragma unroll
        for (int i = 0; i < 4; i++)
            f[4 * j + i] = __fmul_rn((float)d[4 * j + i], i % 2 ? y : x);
    }
}

/* ---------------------------------------------------------------- the way out */

DEVICE bool is_placed8(const struct bnb_cuda_product8 &p, const struct place8 &at, int token)
{
    return token >= at.first && token < at.end && at.token + token < p.g.m;
}

/* Block j of values of 32 bits, as bits: eight lanes have neighbouring rows of one token. */
DEVICE void store32(const struct bnb_cuda_product8 &p, const struct place8 &at, unsigned *out, int j,
                    const unsigned v[4])
{
    const int lane = lane_here(), g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int token = 8 * j + 2 * t + i % 2;
        const int64_t n = at.row + g + 8 * (i / 2);
        if (n < p.g.n && is_placed8(p, at, token))
            out[(at.token + token) * p.g.n + n] = v[i];
    }
}

template <int R> DEVICE void store_sums8(const struct bnb_cuda_product8 &p, const struct place8 &at, const int (&d)[R])
{
#pragma unroll
    for (int j = 0; j < R / 4; j++) {
        const unsigned v[4] = {(unsigned)d[4 * j], (unsigned)d[4 * j + 1], (unsigned)d[4 * j + 2],
                               (unsigned)d[4 * j + 3]};
        store32(p, at, (unsigned *)p.g.sums, j, v);
    }
}

/* Four 8 x 8 matrices, each lane with two values of a row in each, to shared memory by columns. */
DEVICE void store_turned(char *to, int lane, const unsigned w[4])
{
#if __CUDA_ARCH__ >= 900
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     (unsigned)__cvta_generic_to_shared(to + bnb_tile8_written(lane))),
                 "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
                 : "memory");
#elif __CUDA_ARCH__ >= 750
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        unsigned turned;
        asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(w[i]));
        *(unsigned *)(to + bnb_tile8_turned(i / 2 * 8 + g, i % 2) + 4 * t) = turned;
    }
#endif
}

/* The first `count` of eight values of 16 bits, one by one. */
DEVICE void store_some(unsigned short *to, int64_t count, uint4 v)
{
    uint64_t low = (uint64_t)v.y << 32 | v.x, high = (uint64_t)v.w << 32 | v.z;
#pragma unroll 1
    for (int i = 0; i < 8 && i < count; i++) {
        to[i] = (unsigned short)low;
        low = low >> 16 | high << 48;
        high >>= 16;
    }
}

/* Values of 16 bits, through this warp's two buffers of TILE8_TURN bytes: each lane gets eight rows of one token. */
template <bool HALF, int R, class Results>
DEVICE void store16(const struct bnb_cuda_product8 &p, const struct place8 &at, char *buffers, const Results &results)
{
    const int lane = lane_here(), own = lane / 2;
    const int64_t n = at.row + lane % 2 * 8, rows = p.g.n - n, left = p.g.m - at.token;
    const int end = rows <= 0 ? 0 : left < at.end ? (int)left : at.end;
    unsigned short *to = (unsigned short *)p.g.out + (at.token + own) * p.g.n + n;
#pragma unroll
    for (int q = 0; q < (R + 7) / 8; q++, to += 16 * p.g.n) {
        char *buffer = buffers + q % 2 * TILE8_TURN;
        unsigned w[4] = {};
#pragma unroll
        for (int j = 2 * q; j < 2 * q + 2 && j < R / 4; j++) {
            float v[4];
            results.block(j, v);
#pragma unroll
            for (int i = 0; i < 2; i++)
                w[j % 2 * 2 + i] = HALF ? quick_pair((const f16 *)nullptr, v[2 * i], v[2 * i + 1])
                                        : quick_pair((const bf16 *)nullptr, v[2 * i], v[2 * i + 1]);
        }
        store_turned(buffer, lane, w);
        __syncwarp();
        const uint4 v = *(const uint4 *)(buffer + bnb_tile8_read(lane));
        if (16 * q + own < at.first || 16 * q + own >= end)
            continue;
        if (p.store && rows >= 8)
            *(uint4 *)to = v;
        else
            store_some(to, rows, v);
    }
    __syncwarp();
}

template <int R, class Results>
DEVICE void store8(const struct bnb_cuda_product8 &p, const struct place8 &at, char *buffers, const Results &results)
{
    if (p.dtype == BNB_CUDA_F16) {
        store16<true, R>(p, at, buffers, results);
    } else if (p.dtype == BNB_CUDA_BF16) {
        store16<false, R>(p, at, buffers, results);
    } else {
#pragma unroll
        for (int j = 0; j < R / 4; j++) {
            float v[4];
            results.block(j, v);
            const unsigned bits[4] = {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                                      __float_as_uint(v[3])};
            store32(p, at, (unsigned *)p.g.out, j, bits);
        }
    }
}

#endif
