/*
 * quantile.cu - counting the digits of keys: exact quantiles of f32, f16 and bf16
 *
 * A block of threads counts in shared memory and adds to the counts of all when it is done; the sums do not depend on who
 * came first.  Equal keys of a warp, of which skewed data has many, meet in one addition of the hardware.
 */
#include "cuda/kernels/quantile.cuh"

/* What a block counts with.  Of a key, shift leaves the first digit; shift2 and mask2 the second, mask3 the third. */
struct counting {
    unsigned *counts;
    uint16_t *first;  /* first digit -> its slot << width of the second, or NO_SLOT */
    uint16_t *second; /* that + second digit -> slot of both, or NO_SLOT            */
    uint64_t *total;  /* counts of all                                              */
    int shift, shift2, mask2, mask3;
    int width3, lines; /* of the third digit, and of what finds a line              */
    int used;          /* counters                                                  */
};

extern __shared__ uint4 quantile_memory[];

DEVICE void add_to(uint64_t *total, unsigned n) { atomicAdd((unsigned long long *)total, (unsigned long long)n); }

DEVICE void fill(unsigned *words, int count, unsigned value)
{
    for (int i = (int)threadIdx.x; i < count; i += (int)blockDim.x)
        words[i] = value;
}

/* ---------------------------------------------------------------- tables */

template <typename T, int PASS> DEVICE struct counting prepare(const struct bnb_cuda_quantile &q)
{
    struct counting c = {};
    const int kept = PASS == 1 ? q.first : PASS == 2 ? q.spread : q.lines;
    c.counts = (unsigned *)quantile_memory;
    c.first = (uint16_t *)(c.counts + (1 << kept));
    c.second = c.first + (1 << q.first);
    c.total = q.counts[PASS - 1];
    c.shift = 32 - q.first;
    c.used = 1 << kept;
    fill(c.counts, 1 << kept, 0);
    if (PASS > 1) {
        const struct bnb_cuda_target *targets = q.targets[PASS - 2];
        int slot = 0, slot3 = 0;
        const int slots = count_slots(targets, q.count, q.first, &slot), width2 = second_width<T>(q, slots);
        c.shift2 = c.shift - width2;
        c.mask2 = (1 << width2) - 1;
        c.used = PASS == 2 ? slots << width2 : 0;
        if (PASS == 3) {
            const int slots3 = count_slots(targets, q.count, q.first + width2, &slot3);
            c.width3 = c.shift2;
            c.mask3 = (1 << c.width3) - 1;
            c.lines = min(c.width3, q.lines - bits_for(slots3));
            c.used = slots3 << c.lines;
            fill((unsigned *)(void *)c.second, (1 << q.spread) / 2, 0xffffffffu);
        }
        fill((unsigned *)(void *)c.first, (1 << q.first) / 2, 0xffffffffu);
        __syncthreads();
        if ((int)threadIdx.x < q.count) {
            const unsigned key = targets[threadIdx.x].key, base = (unsigned)(slot << width2);
            c.first[key >> c.shift] = (uint16_t)base;
            if (PASS == 3)
                c.second[base + (key >> c.shift2 & (unsigned)c.mask2)] = (uint16_t)slot3;
        }
    }
    __syncthreads();
    return c;
}

/* ---------------------------------------------------------------- counting */

/* The third digit in the cache.  A line belongs to the counter that came first; the others that would have it go past. */
DEVICE void count_third(const struct counting &c, unsigned slot, unsigned low)
{
    const unsigned line = slot << c.lines | (low & ((1u << c.lines) - 1)), tag = (low >> c.lines) + 1;
    unsigned *counter = &c.counts[line];
    unsigned owner = *(volatile unsigned *)counter >> LINE_COUNT_BITS;
    if (owner == 0) {
        owner = atomicCAS(counter, 0u, tag << LINE_COUNT_BITS) >> LINE_COUNT_BITS;
        owner = owner == 0 ? tag : owner;
    }
    if (owner == tag)
        atomicAdd(counter, 1u);
    else
        add_to(c.total + ((int64_t)slot << c.width3 | low), 1u);
}

/* Neither base of a slot leaves room for a digit to reach NO_SLOT, which stays above with any. */
template <int PASS, int N> DEVICE void count_keys(const struct counting &c, const unsigned key[N])
{
    unsigned at[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        at[i] = key[i] >> c.shift;
        if (PASS > 1)
            at[i] = c.first[at[i]] + (key[i] >> c.shift2 & (unsigned)c.mask2);
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (PASS == 1 || (PASS == 2 && at[i] < NO_SLOT))
            atomicAdd(&c.counts[at[i]], 1u);
        if (PASS == 3 && at[i] < NO_SLOT) {
            const unsigned slot = c.second[at[i]];
            if (slot != NO_SLOT)
                count_third(c, slot, key[i] & (unsigned)c.mask3);
        }
    }
}

/* ---------------------------------------------------------------- the counts of all */

DEVICE unsigned warp_sum(unsigned n)
{
#if __CUDA_ARCH__ >= 800
    return __reduce_add_sync(0xffffffffu, n);
#else
    for (int o = 16; o > 0; o /= 2)
        n += __shfl_xor_sync(0xffffffffu, n, o);
    return n;
#endif
}

/* Add a block's counts to those of all, and leave zeros.  The counters of a first pass are as many as threads, or more. */
template <int PASS> DEVICE void merge(const struct counting &c, uint64_t *groups)
{
    for (int i = (int)threadIdx.x; i < c.used; i += (int)blockDim.x) {
        const unsigned n = c.counts[i];
        if (PASS == 1) {
            const unsigned sum = __any_sync(0xffffffffu, n > 0) ? warp_sum(n) : 0;
            if (sum > 0 && i % GROUP == 0)
                add_to(&groups[i / GROUP], sum);
        }
        if (n == 0)
            continue;
        c.counts[i] = 0;
        if (PASS < 3) {
            add_to(&c.total[i], n);
        } else {
            const unsigned low = (unsigned)i & ((1u << c.lines) - 1), tag = (n >> LINE_COUNT_BITS) - 1;
            const int64_t slot = i >> c.lines;
            add_to(c.total + (slot << c.width3 | tag << c.lines | low), n & ((1u << LINE_COUNT_BITS) - 1));
        }
    }
}

/* ---------------------------------------------------------------- a pass */

/* Elements before the first 16 bytes that are aligned, and behind the last ones: one for each of some threads. */
template <typename T, int PASS>
DEVICE void count_edges(const struct bnb_cuda_quantile &q, const struct counting &c, int head, int64_t inner)
{
    const T *x = (const T *)q.x;
    const int64_t i = (int)threadIdx.x < head ? (int64_t)threadIdx.x : inner + threadIdx.x;
    if (i >= q.n)
        return;
    const unsigned key[1] = {key_of<T>(bits_of(x[i]) << (sizeof(T) == 2 ? 16 : 0))};
    count_keys<PASS, 1>(c, key);
}

/* Every block has an equal run of words of 16 bytes.  The second pass goes through it from its end, where the first one
 * has left it in the cache. */
template <typename T, int PASS> DEVICE void count_pass(const struct bnb_cuda_quantile &q)
{
    enum { N = 16 / sizeof(T), WORDS = ROUND / N };
    const struct counting c = prepare<T, PASS>(q);
    const int64_t head = min((int64_t)((0 - (uint64_t)q.x) % 16 / sizeof(T)), q.n), words = (q.n - head) / N;
    const int64_t begin = words * blockIdx.x / gridDim.x, end = words * (blockIdx.x + 1) / gridDim.x;
    const int64_t step = PASS == 2 ? -1 : 1;
    const uint4 *x = (const uint4 *)((const T *)q.x + head) + (PASS == 2 ? end - 1 : begin);
    if (blockIdx.x == 0)
        count_edges<T, PASS>(q, c, (int)head, words * N);
    for (int64_t done = 0; done == 0 || done < end - begin; done += WORDS, x += step * WORDS) {
        const int size = (int)min(end - begin - done, (int64_t)WORDS);
        for (int i = (int)threadIdx.x; i < size; i += IN_FLIGHT * (int)blockDim.x) {
            uint4 word[IN_FLIGHT];
#pragma unroll
            for (int k = 0; k < IN_FLIGHT; k++)
                if (i + k * (int)blockDim.x < size)
                    word[k] = __ldg(x + step * (i + k * (int)blockDim.x));
#pragma unroll
            for (int k = 0; k < IN_FLIGHT; k++) {
                unsigned key[N];
                if (i + k * (int)blockDim.x >= size)
                    break;
                keys_of<T>(word[k], key);
                count_keys<PASS, N>(c, key);
            }
        }
        __syncthreads();
        merge<PASS>(c, q.groups);
        __syncthreads();
    }
}

#if BNB_HAS_DTYPE(BNB_CUDA_F32)
#define T float
#define NAME(f) f##_f32
#define WIDE
#include "cuda/kernels/quantile.tmpl.cuh"
#undef T
#undef NAME
#undef WIDE
#endif
#if BNB_HAS_DTYPE(BNB_CUDA_F16)
#define T f16
#define NAME(f) f##_f16
#include "cuda/kernels/quantile.tmpl.cuh"
#undef T
#undef NAME
#endif
#if BNB_HAS_DTYPE(BNB_CUDA_BF16)
#define T bf16
#define NAME(f) f##_bf16
#include "cuda/kernels/quantile.tmpl.cuh"
#undef T
#undef NAME
#endif
