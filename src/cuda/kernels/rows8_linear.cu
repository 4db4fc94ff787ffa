/*
 * rows8_linear.cu - the activations of an int8 layer, for f32, f16 and bf16: codes, statistics and flags of outlier columns
 * by one read.  NUMERICS rule 33
 *
 * A row belongs to a block, which holds it in registers between its statistic and its codes.  Codes in outlier columns stay
 * as they are: the product knows what to do.  Blocks collect the columns as bits in shared memory.  Few rows: the blocks
 * are one cluster, which writes all flags and all bits.  Many rows: they are set in memory that was cleared before.
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

/* ---------------------------------------------------------------- the cluster of few rows */

#if __CUDA_ARCH__ >= 900

DEVICE void cluster_meet(int size)
{
    __syncwarp(); /* by whole warps */
    if (size > 1)
        asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    else
        __syncthreads();
}

DEVICE unsigned cluster_word(const unsigned *p, int rank)
{
    unsigned v;
    asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %1, %2; ld.shared::cluster.u32 %0, [there]; }"
                 : "=r"(v)
                 : "r"((unsigned)__cvta_generic_to_shared(p)), "r"(rank)
                 : "memory");
    return v;
}

/* Four bits as flags. */
DEVICE unsigned bytes4(unsigned bits) { return (bits & 15u) * 0x00204081u & 0x01010101u; }

DEVICE uint4 bytes16(unsigned bits)
{
    return make_uint4(bytes4(bits), bytes4(bits >> 4), bytes4(bits >> 8), bytes4(bits >> 12));
}

/* Each block has marked the columns of its rows: the flags of all of them together, by the blocks in turn. */
DEVICE void join8(const struct bnb_cuda_held8 &q, const unsigned *own)
{
    const int words = (int)BNB_CUDA_MASK_WORDS(q.a.cols), size = q.cluster;
    const bool vector = ((uint64_t)q.a.outlier & 15u) == 0;
    cluster_meet(size);
    for (int w = (int)(blockIdx.x + threadIdx.x * size); w < words; w += THREADS * size) {
        uint8_t *flags = q.a.outlier + (int64_t)w * WORD;
        const int64_t left = q.a.cols - (int64_t)w * WORD;
        unsigned bits = size == 1 ? own[w] : 0u;
        for (int r = 0; size > 1 && r < size; r++)
            bits |= cluster_word(own + w, r);
        if (q.mask)
            q.mask[w] = bits;
        if (vector && left >= WORD) {
            ((uint4 *)flags)[0] = bytes16(bits);
            ((uint4 *)flags)[1] = bytes16(bits >> 16);
            continue;
        }
        for (int i = 0; i < WORD && i < left; i++)
            flags[i] = (uint8_t)(bits >> i & 1u);
    }
    cluster_meet(size); /* nobody leaves while others read its mask */
}

#endif

/* The columns of a block among many. */
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

/* Before many rows: no flags. */
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
