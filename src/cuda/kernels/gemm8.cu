/*
 * gemm8.cu - products with an int8 weight, forward and gradient, for f32, f16 and bf16: NUMERICS rules 30 and 34
 *
 * Forward, the sums are exact int32; what follows is rounded operation by operation, so that without outliers the result
 * has the bits of any other device.
 */
#include "cuda/kernels/gemm_tile.cuh"
#include "cuda/kernels/rows8.cuh"

/* Depth of a step in words of four codes; a row of them, skewed by 8 for every 4. */
enum { WORDS = 16 };

DEVICE int word_slot(int d, int at) { return d * PITCH + d / 4 * 8 + at; }

/* Sixteen codes from `at` on of a row of n; zero beyond its end. */
DEVICE uint4 codes16_of(const int8_t *row, int64_t n, int64_t at, int vector)
{
    if (vector && n - at >= 16)
        return __ldg((const uint4 *)(row + at));
    unsigned w[4] = {};
#pragma unroll
    for (int i = 0; i < 16; i++)
        if (at + i < n)
            w[i / 4] |= (unsigned)(uint8_t)row[at + i] << 8 * (i % 4);
    return make_uint4(w[0], w[1], w[2], w[3]);
}

/* sum plus the products of four codes of each. */
DEVICE int dot4(unsigned a, unsigned b, int sum)
{
#if __CUDA_ARCH__ >= 610
    return __dp4a((int)a, (int)b, sum);
#else
#pragma unroll
    for (int i = 0; i < 4; i++)
        sum += (int)(int8_t)(a >> 8 * i) * (int)(int8_t)(b >> 8 * i);
    return sum;
#endif
}

DEVICE int dot16(uint4 a, uint4 b, int sum)
{
    return dot4(a.w, b.w, dot4(a.z, b.z, dot4(a.y, b.y, dot4(a.x, b.x, sum))));
}

/* What this thread brings of codes [m, k]: 16 of one of 64 rows. */
DEVICE void put_words(unsigned *operand, const int8_t *codes, int64_t m, int64_t k, int64_t row, int64_t l, int vector)
{
    const int64_t i = row + bring_row(), at = l + bring_depth() * 2;
    const uint4 w = i < m ? codes16_of(codes + i * k, k, at, vector) : make_uint4(0, 0, 0, 0);
    unsigned *to = operand + word_slot(bring_depth() / 2, bring_row());
    to[0] = w.x, to[PITCH] = w.y, to[2 * PITCH] = w.z, to[3 * PITCH] = w.w;
}

DEVICE void multiply_words(const unsigned *rows, const unsigned *columns, int sums[4][4])
{
#pragma unroll 4
    for (int d = 0; d < WORDS; d++) {
        const uint4 a = *(const uint4 *)(rows + word_slot(d, tile_row()));
        const uint4 b = *(const uint4 *)(columns + word_slot(d, tile_column()));
        const unsigned x[4] = {a.x, a.y, a.z, a.w}, w[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                sums[i][j] = dot4(x[i], w[j], sums[i][j]);
    }
}

/* a b^T for one tile, or what is given for it. */
DEVICE void tile_sums8(const struct bnb_cuda_gemm8 &p, int64_t row, int64_t column, unsigned *rows, unsigned *columns,
                       int sums[4][4])
{
    const struct bnb_gemm8_block &g = p.g;
    for (int64_t l = 0; !g.product && l < g.k; l += 4 * WORDS) {
        put_words(rows, g.a, g.m, g.k, row, l, p.codes);
        put_words(columns, g.b, g.n, g.k, column, l, p.codes);
        __syncthreads();
        multiply_words(rows, columns, sums);
        __syncthreads();
    }
    if (!g.product)
        return;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int64_t r = row + tile_row() + i, c = column + tile_column() + j;
            sums[i][j] = r < g.m && c < g.n ? g.product[r * g.n + c] : 0;
        }
}

DEVICE void store_sums8(const struct bnb_gemm8_block &g, int64_t row, int64_t column, const int sums[4][4])
{
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int64_t r = row + tile_row() + i, c = column + tile_column() + j;
            if (r < g.m && c < g.n)
                g.sums[r * g.n + c] = sums[i][j];
        }
}

DEVICE float bias8_of(const struct bnb_gemm8_block &g, int64_t j)
{
    if (g.bias_dtype == BNB_CUDA_F16)
        return value_of((const f16 *)g.bias + j);
    return g.bias_dtype == BNB_CUDA_BF16 ? value_of((const bf16 *)g.bias + j) : value_of((const float *)g.bias + j);
}

/* The sum of row r under the scale of its column, col_stats / 16129, and what is added to it: NUMERICS rule 34. */
DEVICE float scaled8(const struct bnb_gemm8_block &g, int64_t r, int sum, float scale, bool has_outliers,
                     float outliers)
{
    const float product = __fmul_rn((float)sum, __fmul_rn(g.row_stats[r], scale));
    return has_outliers ? __fadd_rn(product, outliers) : product;
}

DEVICE float biased8(const struct bnb_gemm8_block &g, int64_t c, float x)
{
    return g.bias ? __fadd_rn(x, bias8_of(g, c)) : x;
}

/* The first `count` of eight sums. */
DEVICE void sums8_of(const int *p, int count, int vector, int sums[8])
{
    if (vector && count == 8) {
        const int4 a = __ldcs((const int4 *)p), b = __ldcs((const int4 *)p + 1);
        sums[0] = a.x, sums[1] = a.y, sums[2] = a.z, sums[3] = a.w;
        sums[4] = b.x, sums[5] = b.y, sums[6] = b.z, sums[7] = b.w;
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < count)
            sums[i] = p[i];
}

/* Eight codes of a row as floats; the rest zero. */
DEVICE void codes8_values(const int8_t *p, int count, int vector, float v[8])
{
    if (vector && count == 8) {
        const uint2 w = __ldg((const uint2 *)p);
#pragma unroll
        for (int i = 0; i < 8; i++)
            v[i] = (float)(int8_t)((i < 4 ? w.x : w.y) >> 8 * (i % 4));
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        v[i] = i < count ? (float)p[i] : 0.0f;
}

/* What an activation in an outlier column adds beside the sum, in which its code may stand. */
DEVICE float outlier8_of(const struct bnb_cuda_gemm8 &p, int64_t row, float x)
{
    return p.threshold > 0.0f ? rest8_of(x, p.g.row_stats[row], 127.0f / p.g.row_stats[row], p.threshold) : x;
}

/* How many columns of outliers there are, as the host or the device knows. */
DEVICE int64_t outliers8_of(const struct bnb_cuda_gemm8 &p) { return p.count ? *p.count : p.g.outliers; }

#if BNB_HAS_DTYPE(BNB_CUDA_F32)
#define T float
#define NAME(f) f##_f32
#include "cuda/kernels/gemm8.tmpl.cuh"
#undef T
#undef NAME
#endif
#if BNB_HAS_DTYPE(BNB_CUDA_F16)
#define T f16
#define NAME(f) f##_f16
#include "cuda/kernels/gemm8.tmpl.cuh"
#undef T
#undef NAME
#endif
#if BNB_HAS_DTYPE(BNB_CUDA_BF16)
#define T bf16
#define NAME(f) f##_bf16
#include "cuda/kernels/gemm8.tmpl.cuh"
#undef T
#undef NAME
#endif
