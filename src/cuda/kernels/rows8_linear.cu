/*
 * rows8_linear.cu - the activations of an int8 layer, for f32, f16 and bf16: codes, statistics and flags of outlier columns
 * by one read.  NUMERICS rule 33
 *
 * A row belongs to a block, which holds it in registers between its statistic and its codes.  Codes in outlier columns stay
 * as they are: the product knows what to do.  Blocks collect the columns as bits in shared memory, then set them in
 * memory that was cleared before.
 */
#include "cuda/kernels/early.cuh"
#include "cuda/kernels/rows8.cuh"

/* Groups of eight elements that a thread holds, of rows of up to 4096 elements and of longer ones; columns of a mask's
 * word; words of the longest row's mask. */
enum { THREADS = 256, SHORT_PARTS = 2, PARTS = 8, WORD = 32, MAX_WORDS = BNB_CUDA_MASK_WORDS(BNB_MAX_K8) };

/* ---------------------------------------------------------------- codes */

/* Four integers of at most 127 by magnitude, to nearest even, as bytes. */
DEVICE unsigned round4(const float v[4], float r)
{
    unsigned b[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        b[i] = __float_as_uint(__fadd_rn(__fmul_rn(v[i], r), 12582912.0f)); /* 1.5 * 2^23: units in the last place */
    return __byte_perm(__byte_perm(b[0], b[1], 0x0040), __byte_perm(b[2], b[3], 0x0040), 0x5410);
}

/* plain: all eight are finite, no outliers, and so is r. */
DEVICE uint2 codes8_of(const float v[8], float r, float threshold, bool plain)
{
    if (plain)
        return make_uint2(round4(v, r), round4(v + 4, r));
    unsigned w[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 8; i++)
        w[i / 4] |= (unsigned)(code8_of(v[i], r, threshold) & 255) << 8 * (i % 4);
    return make_uint2(w[0], w[1]);
}

DEVICE void store_eight(int8_t *p, int count, int vector, uint2 w)
{
    if (vector && count == 8) {
        *(uint2 *)p = w;
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < count)
            p[i] = (int8_t)((i < 4 ? w.x : w.y) >> 8 * (i % 4));
}

/* ---------------------------------------------------------------- outlier columns */

/* Where a block notes them: bits in shared memory or bytes in memory.  limit: bits of magnitudes below it need no look. */
struct marks8 {
    unsigned *bits;
    uint8_t *bytes;
    float threshold;
    unsigned limit;
};

DEVICE struct marks8 marks8_of(const struct bnb_rows_args &a, unsigned *bits)
{
    const unsigned infinite = INFINITE, limit = __float_as_uint(a.threshold);
    return {bits, bits ? nullptr : a.outlier, a.threshold, a.threshold > 0.0f && limit < infinite ? limit : infinite};
}

DEVICE void mark8(const struct marks8 &m, int64_t column)
{
    if (m.bits)
        atomicOr(m.bits + column / WORD, 1u << column % WORD);
    else if (m.bytes)
        m.bytes[column] = 1; /* other rows may write the same */
}

/* What eight elements from column `at` on add to the statistic of their row; *plain as in codes8_of(). */
DEVICE unsigned look8(const float v[8], int64_t at, const struct marks8 &m, bool *plain)
{
    unsigned largest = absmax8_bits(v);
    *plain = largest < m.limit;
    if (*plain)
        return largest;
    largest = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        largest = max(largest, stat_bits(v[i], m.threshold));
        if (is_outlier(fabsf(v[i]), m.threshold))
            mark8(m, at + i);
    }
    return largest;
}

/* ---------------------------------------------------------------- the columns of all rows */

/* Those of this block. */
DEVICE void add_marks8(const struct bnb_cuda_held8 &q, const unsigned *own)
{
    __syncthreads();
    for (int w = (int)threadIdx.x; w < (int)BNB_CUDA_MASK_WORDS(q.a.cols); w += THREADS) {
        unsigned bits = own[w];
        if (bits)
            atomicOr(q.mask + w, bits);
        for (; bits; bits &= bits - 1)
            q.a.outlier[(int64_t)w * WORD + __ffs((int)bits) - 1] = 1; /* other blocks may write the same */
    }
}

/* No columns so far. */
DEVICE void clear_marks8(const struct bnb_cuda_held8 &q, unsigned *own)
{
    for (int w = (int)threadIdx.x; w < (int)BNB_CUDA_MASK_WORDS(q.a.cols); w += THREADS)
        own[w] = 0;
    __syncthreads();
}

/* Before: no flags. */
extern "C" __global__ void __launch_bounds__(256) bnb_k_linear8_clean(const struct bnb_cuda_held8 q)
{
    wait_for_launch_before();
    let_next_launch_come();
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < q.a.cols; i += (int64_t)gridDim.x * THREADS) {
        q.a.outlier[i] = 0;
        if (i < BNB_CUDA_MASK_WORDS(q.a.cols))
            q.mask[i] = 0;
    }
}

#if BNB_HAS_DTYPE(BNB_CUDA_F32)
#define T float
#define NAME(f) f##_f32
#include "cuda/kernels/rows8_linear.tmpl.cuh"
#undef T
#undef NAME
#endif
#if BNB_HAS_DTYPE(BNB_CUDA_F16)
#define T f16
#define NAME(f) f##_f16
#include "cuda/kernels/rows8_linear.tmpl.cuh"
#undef T
#undef NAME
#endif
#if BNB_HAS_DTYPE(BNB_CUDA_BF16)
#define T bf16
#define NAME(f) f##_bf16
#include "cuda/kernels/rows8_linear.tmpl.cuh"
#undef T
#undef NAME
#endif
