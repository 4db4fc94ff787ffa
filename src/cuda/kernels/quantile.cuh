/*
 * quantile.cuh - the elements of up to 256 ranks by radix selection: keys, slots, and how a rank is found among counters
 *
 * A value becomes a key, an integer in the same order.  The first pass counts the upper bits of all keys; the second the
 * next bits of keys whose upper bits are those of a wanted rank, and the third what is left of a key of 32 bits.  Between
 * two passes a small kernel finds each rank's counter.  The distinct prefixes of the wanted keys have numbers, their slots.
 * How wide the second digit is depends on how many there are: data that lies close together has few, and more bits of it
 * are told apart.  Whoever needs slots or widths derives them from the wanted keys.
 */
#ifndef BNB_CUDA_QUANTILE_CUH
#define BNB_CUDA_QUANTILE_CUH

#include "cuda/kernels/device.cuh"

/* Threads of a block that finds ranks; the counters of a group; accesses of a thread under way; elements that a block
 * counts before it adds to the counts of all; no slot. */
enum { RANKS = BNB_CUDA_RANKS, GROUP = 32, IN_FLIGHT = 4, ROUND = 1 << 20, NO_SLOT = 0xffff };

/* A line of the cache: above, which of the counters that share it has it, from 1; below, the count, at most a round's. */
enum { LINE_COUNT_BITS = 21 };

/* ---------------------------------------------------------------- keys */

/* Bits of a key, and +Inf; 16-bit types use the upper half alone. */
template <typename T> struct format;
template <> struct format<float> {
    enum : unsigned { BITS = 32, INF = 0x7f800000u };
};
template <> struct format<f16> {
    enum : unsigned { BITS = 16, INF = 0x7c000000u };
};
template <> struct format<bf16> {
    enum : unsigned { BITS = 16, INF = 0x7f800000u };
};

/* NaN is above every number, whatever its sign. */
template <typename T> DEVICE unsigned key_of(unsigned bits)
{
    const unsigned flip = (unsigned)((int)bits >> 31) | 0x80000000u;
    return (bits & 0x7fffffffu) > (unsigned)format<T>::INF ? 0xffffffffu : bits ^ flip;
}

template <typename T> DEVICE void keys_of(const uint4 &word, unsigned key[16 / sizeof(T)])
{
    const unsigned w[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (sizeof(T) == 4) {
            key[i] = key_of<T>(w[i]);
        } else {
            key[2 * i % (16 / sizeof(T))] = key_of<T>(w[i] << 16);
            key[(2 * i + 1) % (16 / sizeof(T))] = key_of<T>(w[i] & 0xffff0000u);
        }
    }
}

/* The 16 bits of a key's value. */
DEVICE unsigned half_of_key(unsigned key)
{
    const unsigned half = key >> 16;
    return half == 0xffffu ? 0x7fffu : half & 0x8000u ? half & 0x7fffu : ~half & 0xffffu;
}

DEVICE float key_value(const float *, unsigned key)
{
    return __uint_as_float(key == 0xffffffffu ? 0x7fc00000u : key >> 31 ? key & 0x7fffffffu : ~key);
}

DEVICE float key_value(const f16 *, unsigned key) { return bnb_from_f16(bnb_f16_of(half_of_key(key))); }
DEVICE float key_value(const bf16 *, unsigned key) { return bnb_from_bf16(bnb_bf16_of(half_of_key(key))); }

/* ---------------------------------------------------------------- slots and widths */

/* The number of distinct prefixes of `bits` bits among the wanted keys, which ascend.  *slot: of rank threadIdx.x, how many
 * lie below its own.  All threads of a block, of RANKS or more. */
DEVICE int count_slots(const struct bnb_cuda_target *targets, int count, int bits, int *slot)
{
    __shared__ int fresh_of[RANKS / 32];
    const int j = (int)threadIdx.x, lane = j % 32;
    const bool fresh = j < count && (j == 0 || (targets[j].key ^ targets[j - 1].key) >> (32 - bits) != 0);
    const unsigned mask = __ballot_sync(0xffffffffu, fresh);
    if (lane == 0 && j < RANKS)
        fresh_of[j / 32] = __popc(mask);
    __syncthreads();
    int below = __popc(mask & ((2u << lane) - 1)) - 1, all = 0;
#pragma unroll
    for (int w = 0; w < RANKS / 32; w++) {
        below += w < j / 32 ? fresh_of[w] : 0;
        all += fresh_of[w];
    }
    __syncthreads();
    *slot = below;
    return all;
}

/* The bits that tell `slots` of them apart. */
DEVICE int bits_for(int slots) { return 32 - __clz(slots - 1); }

/* The width of the second digit; what then is left of the key is the third. */
template <typename T> DEVICE int second_width(const struct bnb_cuda_quantile &q, int slots)
{
    return min((int)format<T>::BITS - q.first, q.spread - bits_for(slots));
}

/* ---------------------------------------------------------------- finding a rank */

/* The index of the counter that *rank falls into, of `width` of them; *rank becomes the rank among its values.  All threads
 * of a block of RANKS. */
DEVICE int find_counter(const uint64_t *counts, int width, uint64_t *rank)
{
    __shared__ uint64_t sum_of[RANKS / 32], rest;
    __shared__ int index;
    const int each = (width + RANKS - 1) / RANKS, first = (int)threadIdx.x * each;
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    uint64_t own = 0;
    for (int i = first; i < first + each; i++)
        own += i < width ? counts[i] : 0;
    uint64_t sum = own;
    for (int o = 1; o < 32; o *= 2) {
        const uint64_t lower = __shfl_up_sync(0xffffffffu, sum, o);
        sum += lane >= o ? lower : 0;
    }
    if (lane == 31)
        sum_of[warp] = sum;
    __syncthreads();
    uint64_t below = sum - own;
    for (int w = 0; w < warp; w++)
        below += sum_of[w];
    if (*rank >= below && *rank - below < own) {
        uint64_t left = *rank - below;
        int i = first;
        while (left >= counts[i])
            left -= counts[i++];
        index = i;
        rest = left;
    }
    __syncthreads();
    const int found = index;
    *rank = rest;
    __syncthreads();
    return found;
}

/* Rank number blockIdx.x after a pass: its key, and its rank among the values with the same bits so far. */
template <typename T, int PASS> DEVICE void locate(const struct bnb_cuda_quantile &q, uint64_t rank, unsigned key)
{
    __shared__ int own_slot;
    const int j = (int)blockIdx.x, rest = (int)format<T>::BITS - q.first;
    int slot = 0;
    if (PASS == 1) {
        const int group = find_counter(q.groups, (1 << q.first) / GROUP, &rank);
        key = (unsigned)(group * GROUP + find_counter(q.counts[0] + group * GROUP, GROUP, &rank)) << (32 - q.first);
    } else {
        const struct bnb_cuda_target *targets = q.targets[PASS - 2];
        const int second = second_width<T>(q, count_slots(targets, q.count, q.first, &slot));
        const int width = PASS == 2 ? second : rest - second, above = q.first + (PASS == 2 ? 0 : second);
        if (PASS == 3)
            count_slots(targets, q.count, above, &slot);
        if ((int)threadIdx.x == j)
            own_slot = slot;
        __syncthreads();
        const uint64_t *counts = q.counts[PASS - 1] + ((int64_t)own_slot << width);
        key |= (unsigned)find_counter(counts, 1 << width, &rank) << (32 - above - width);
    }
    if (threadIdx.x != 0)
        return;
    if (PASS == (format<T>::BITS == 32 ? 3 : 2)) {
        q.out[j] = key_value((const T *)0, key);
    } else {
        q.targets[PASS - 1][j].rank = (int64_t)rank;
        q.targets[PASS - 1][j].key = key;
    }
}

#endif
