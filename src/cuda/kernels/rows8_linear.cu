/*
 * rows8_linear.cu - the activations of an int8 layer, for f32, f16 and bf16: codes, statistics and flags of outlier columns.
 * NUMERICS rule 33
 *
 * A row belongs to a block, which holds it in registers between its statistic and its codes.  Codes in outlier columns stay
 * as they are: the product knows what to do.  Which columns these are is found in one of two ways.  Few activations, which
 * the second-level cache holds, are read twice: blocks of the same launch look at 32 columns of all rows, and nothing needs
 * to be cleared before.  Of many, rows' blocks collect columns as bits in shared memory, then set them in memory that was
 * cleared before.
 *
 * Outliers take the same way as other elements, without a branch.
 */
#include "cuda/kernels/early.cuh"
#include "cuda/kernels/rows8.cuh"

/* Groups of eight elements that a thread holds, of rows of up to 4096 elements and of longer ones; columns of a mask's
 * word; threads of a block that look at one row of them, and rows that a thread has on their way. */
enum { THREADS = 256, SHORT_PARTS = 2, PARTS = 8, WORD = 32, ACROSS = WORD / 8, AHEAD = 8 };

/* The bits of a block: BNB_CUDA_MASK_WORDS, where there is a mask that rows set. */
extern __shared__ unsigned own_marks[];

/* ---------------------------------------------------------------- what is an outlier */

/* Magnitudes whose bits are at least `from` and no more than `span` above, those of infinity; of magnitudes below `limit`
 * there are codes.  Where rows' blocks note outliers: bits in shared memory, or bytes in memory, or nowhere. */
struct marks8 {
    unsigned from, span;
    float threshold, limit;
    unsigned *bits;
    uint8_t *bytes;
};

DEVICE struct marks8 marks8_of(const struct bnb_rows_args &a, unsigned *bits, bool noted)
{
    const bool some = a.threshold > 0.0f; /* or no magnitude is `from` or more */
    const unsigned from = some ? __float_as_uint(a.threshold) : 0xffffffffu;
    return {from, some ? INFINITE - from : 0u,         a.threshold, some ? a.threshold : __uint_as_float(INFINITE),
            bits, noted && !bits ? a.outlier : nullptr};
}

DEVICE unsigned magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

DEVICE bool is_marked(const struct marks8 &m, unsigned magnitude) { return magnitude - m.from <= m.span; }

DEVICE void mark8(const struct marks8 &m, int64_t column)
{
    if (m.bits)
        atomicOr(m.bits + column / WORD, 1u << column % WORD);
    else
        m.bytes[column] = 1; /* other rows may write the same */
}

/* What eight elements from column `at` on add to the statistic of their row, as bits; above INFINITE: one is NaN. */
DEVICE unsigned look8(const float v[8], int64_t at, const struct marks8 &m)
{
    unsigned largest = 0;
#pragma unroll
    for (int i = 0; i < 8; i++)
        largest = max(largest, is_marked(m, magnitude_bits(v[i])) ? 0u : magnitude_bits(v[i]));
    if ((m.bits || m.bytes) && absmax8_bits(v) >= m.from) {
        unsigned found = 0;
#pragma unroll
        for (int i = 0; i < 8; i++)
            found |= is_marked(m, magnitude_bits(v[i])) ? 1u << i : 0u;
        for (; found; found &= found - 1)
            mark8(m, at + __ffs((int)found) - 1);
    }
    return largest;
}

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

/* Under r, which is finite; of what has no code, 0. */
DEVICE uint2 codes8_of(const float v[8], float r, float limit)
{
    float u[8];
#pragma unroll
    for (int i = 0; i < 8; i++)
        u[i] = fabsf(v[i]) < limit ? v[i] : 0.0f;
    return make_uint2(round4(u, r), round4(u + 4, r));
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

/* Word `word` of all columns, by a block. */
DEVICE void give_flags8(const struct bnb_cuda_held8 &q, int word, unsigned bits)
{
    const int64_t column = (int64_t)word * WORD + (int)threadIdx.x;
    if (threadIdx.x == 0)
        q.mask[word] = bits;
    if (threadIdx.x < WORD && column < q.a.cols)
        q.a.outlier[column] = (uint8_t)(bits >> threadIdx.x & 1u);
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
