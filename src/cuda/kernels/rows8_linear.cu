/*
 * rows8_linear.cu - the activations of an int8 layer, for f32, f16 and bf16: codes, statistics, flags and list of outlier
 * columns in one launch that reads them once.  NUMERICS rule 33
 *
 * A row belongs to a block, which holds it in registers between its statistic and its codes.  Few rows: the blocks are one
 * cluster, which collects the columns in shared memory and clears their codes.  Many rows: the columns are collected in
 * memory, and the last block makes the list.
 */
#include "cuda/kernels/rows8.cuh"

/* Groups of eight elements that a thread holds; columns of a mask's word; words of the longest row's mask. */
enum { THREADS = 256, PARTS = 8, WORD = 32, MAX_WORDS = (BNB_MAX_K8 + WORD) / WORD };

/* The next launch may come to the card: it waits for the end of this one itself. */
DEVICE void let_next_launch_come()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

DEVICE void wait_for_launch_before()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
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

/* Where a block notes them: bits in shared memory or bytes in memory. */
struct marks8 {
    unsigned *bits;
    uint8_t *bytes;
    float threshold;
};

DEVICE void mark8(const struct marks8 &m, int64_t column)
{
    if (m.bits)
        atomicOr(m.bits + column / WORD, 1u << column % WORD);
    else if (m.bytes)
        m.bytes[column] = 1; /* other rows may write the same */
}

/* What eight elements from column `at` on add to the statistic of their row; *plain as in codes8_of(). */
DEVICE unsigned look8(const float v[8], int64_t at, const struct marks8 &m, unsigned limit, bool *plain)
{
    unsigned largest = absmax8_bits(v);
    *plain = largest < limit;
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

/* Sums over the threads below this one; *total of all. */
DEVICE int sum_below(int x, int sums[THREADS / 32], int *total)
{
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    int below = x, before = 0, all = 0;
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, below, o);
        below += lane >= o ? other : 0;
    }
    __syncthreads(); /* sums was read before */
    if (lane == 31)
        sums[warp] = below;
    __syncthreads();
    for (int w = 0; w < THREADS / 32; w++) {
        before += w < warp ? sums[w] : 0;
        all += sums[w];
    }
    *total = all;
    return before + below - x;
}

/* Four flags as bits. */
DEVICE unsigned flags4(unsigned w) { return w * 0x01020408u >> 24 & 15u; }

DEVICE unsigned flags16(uint4 w) { return flags4(w.x) | flags4(w.y) << 4 | flags4(w.z) << 8 | flags4(w.w) << 12; }

/* The 32 flags from column 32 `word` on, as bits. */
DEVICE unsigned flags32(const uint8_t *flags, int64_t cols, int word)
{
    const int64_t first = (int64_t)word * WORD;
    unsigned bits = 0;
    if (((uint64_t)flags & 15u) == 0 && first + WORD <= cols)
        return flags16(__ldcg((const uint4 *)(flags + first))) | flags16(__ldcg((const uint4 *)(flags + first) + 1))
                                                                     << 16;
    for (int i = 0; i < WORD && first + i < cols; i++)
        bits |= __ldcg(flags + first + i) ? 1u << i : 0u;
    return bits;
}

/* By one block: the list from the mask, or where there is none, from the flags. */
DEVICE void list8(const struct bnb_cuda_linear8 &q, const unsigned *mask, int sums[THREADS / 32])
{
    const int words = (int)((q.a.cols + WORD - 1) / WORD);
    int64_t found = 0;
    for (int base = 0; base < words; base += THREADS) {
        const int word = base + (int)threadIdx.x;
        unsigned bits = word >= words ? 0u : mask ? mask[word] : flags32(q.a.outlier, q.a.cols, word);
        int total;
        int64_t to = found + sum_below(__popc(bits), sums, &total);
        for (; bits; bits &= bits - 1)
            q.columns[to++] = (int64_t)word * WORD + __ffs((int)bits) - 1;
        found += total;
    }
    if (threadIdx.x == 0)
        *q.count = found;
}

/* ---------------------------------------------------------------- the cluster of few rows */

#if __CUDA_ARCH__ >= 900

DEVICE void cluster_meet()
{
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

DEVICE unsigned cluster_word(const unsigned *p, unsigned rank)
{
    unsigned v;
    asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %1, %2; ld.shared::cluster.u32 %0, [there]; }"
                 : "=r"(v)
                 : "r"((unsigned)__cvta_generic_to_shared(p)), "r"(rank)
                 : "memory");
    return v;
}

/* Each block has marked the columns of its rows: all of them together, the flags, the list, and the codes cleared. */
DEVICE void join8(const struct bnb_cuda_linear8 &q, const unsigned *own, unsigned *all, int sums[THREADS / 32])
{
    const int words = (int)((q.a.cols + WORD - 1) / WORD), size = q.cluster, rank = (int)blockIdx.x;
    cluster_meet();
    for (int w = (int)threadIdx.x; w < words; w += THREADS) {
        unsigned bits = 0;
        for (int r = 0; r < size; r++)
            bits |= cluster_word(own + w, (unsigned)r);
        all[w] = bits;
        for (int i = 0; w % size == rank && i < WORD && (int64_t)w * WORD + i < q.a.cols; i++)
            q.a.outlier[(int64_t)w * WORD + i] = (uint8_t)(bits >> i & 1u);
    }
    __syncthreads();
    for (int64_t row = rank; q.a.rows > 1 && row < q.a.rows; row += size)
        for (int w = (int)threadIdx.x; w < words; w += THREADS)
            for (unsigned bits = all[w]; bits; bits &= bits - 1)
                q.a.codes[row * q.a.cols + (int64_t)w * WORD + __ffs((int)bits) - 1] = 0;
    if (rank == 0)
        list8(q, all, sums);
    cluster_meet(); /* nobody leaves while others read its mask */
}

#endif

/* Is this the last block to come here? */
DEVICE bool is_last8(unsigned *ticket)
{
    __shared__ unsigned came;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0)
        came = atomicAdd(ticket, 1u);
    __syncthreads();
    __threadfence();
    return came == gridDim.x - 1;
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
