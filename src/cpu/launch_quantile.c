/*
 * launch_quantile.c - exact order statistics on the CPU by radix selection
 *
 * Values become integer keys in the same order, NaN above all.  A first pass counts the upper 16 bits; the buckets that
 * hold a wanted rank, at most 256, are counted again by the next 8 bits, and those by the last 8.  Every pass reads the
 * data once and adds into 65536 counters, private to a chunk of the data, so the result depends on no thread.
 */
#include <string.h>

#include "core/half.h"
#include "cpu/cpu.h"

/* 256 slots of 256 counters, and one more slot for the values that no wanted rank can be: counting them costs less than
 * a branch that cannot be predicted. */
enum { NO_SLOT = 256, COUNTERS = 257 * 256, PREFIXES = 65536 };

/* Chunks have private counters: enough of them for the threads, and few enough values for 32 bits. */
#define VALUES_PER_CHUNK (1 << 22)
#define MOST_CHUNKS 64
#define MOST_VALUES_PER_CHUNK ((int64_t)1 << 31)

struct selection {
    const void *x;
    bnb_dtype dtype;
    int64_t n;
    int64_t chunks;
    uint32_t *counts;     /* [chunks][COUNTERS]                                            */
    uint16_t slot16[PREFIXES]; /* upper 16 bits -> slot, or NO_SLOT                        */
    uint16_t slot24[COUNTERS]; /* slot and next 8 bits -> slot, or NO_SLOT                 */
    int pass;
};

/* 32-bit keys in the order of the values; 16-bit dtypes use the upper half alone. */
static inline uint32_t key32(float x)
{
    const uint32_t u = bnb_bits_of(x), flip = (0u - (u >> 31)) | 0x80000000u;
    return x == x ? u ^ flip : 0xffffffffu;
}

static inline uint16_t key16(uint16_t u, uint16_t infinity)
{
    const uint32_t flip = (0u - (uint32_t)(u >> 15)) | 0x8000u;
    return (uint16_t)((u & 0x7fffu) > infinity ? 0xffffu : u ^ flip);
}

static float value_of_key(uint32_t key, bnb_dtype dtype)
{
    if (dtype == BNB_F32)
        return bnb_float_of(key == 0xffffffffu ? 0x7fc00000u : key >> 31 ? key & 0x7fffffffu : ~key);
    const uint32_t half = key >> 16;
    const uint16_t bits = (uint16_t)(half == 0xffffu ? 0x7fffu : half & 0x8000u ? half & 0x7fffu : ~half);
    return dtype == BNB_F16 ? bnb_from_f16((bnb_f16){bits}) : bnb_from_bf16((bnb_bf16){bits});
}

static void count_halves(const struct selection *s, int64_t begin, int64_t end, uint32_t *counts)
{
    const uint16_t *x = s->x;
    const uint16_t infinity = s->dtype == BNB_F16 ? 0x7c00u : 0x7f80u;
    for (int64_t i = begin; i < end; i++)
        counts[key16(x[i], infinity)]++;
}

static void count_floats(const struct selection *s, int64_t begin, int64_t end, uint32_t *counts)
{
    const float *x = s->x;
    if (s->pass == 0) {
        for (int64_t i = begin; i < end; i++)
            counts[key32(x[i]) >> 16]++;
        return;
    }
    if (s->pass == 1) {
        for (int64_t i = begin; i < end; i++) {
            const uint32_t key = key32(x[i]);
            counts[(uint32_t)s->slot16[key >> 16] << 8 | (key >> 8 & 0xffu)]++;
        }
        return;
    }
    for (int64_t i = begin; i < end; i++) {
        const uint32_t key = key32(x[i]), slot = s->slot16[key >> 16];
        counts[(uint32_t)s->slot24[slot << 8 | (key >> 8 & 0xffu)] << 8 | (key & 0xffu)]++;
    }
}

static void run_count(void *arg, int64_t begin, int64_t end)
{
    const struct selection *s = arg;
    for (int64_t c = begin; c < end; c++) {
        uint32_t *counts = s->counts + c * COUNTERS;
        const int64_t size = s->n / s->chunks, low = c * size;
        const int64_t high = c + 1 == s->chunks ? s->n : low + size;
        memset(counts, 0, COUNTERS * sizeof counts[0]);
        if (s->dtype == BNB_F32)
            count_floats(s, low, high, counts);
        else
            count_halves(s, low, high, counts);
    }
}

/* Where a wanted rank lies: the bits of its key found so far, its slot, and how many values precede within. */
struct target {
    uint32_t key;
    int slot;
    int64_t rank;
};

/* Walk the counters of `slot` (or all, for the first pass), find each target's counter, narrow its key. */
static void locate(const struct selection *s, struct target *target, int count)
{
    const int width = s->pass == 0 ? PREFIXES : 256;
    for (int j = 0; j < count;) {
        const int slot = target[j].slot;
        int64_t before = 0;
        for (int k = 0; k < width && j < count && target[j].slot == slot; k++) {
            int64_t here = 0;
            for (int64_t c = 0; c < s->chunks; c++)
                here += s->counts[c * COUNTERS + slot * 256 + k];
            while (j < count && target[j].slot == slot && target[j].rank < before + here) {
                target[j].rank -= before;
                target[j].key |= (uint32_t)k << (s->pass == 0 ? 16 : s->pass == 1 ? 8 : 0);
                j++;
            }
            before += here;
        }
    }
}

/* Give each distinct prefix among the targets a slot; targets are in ascending order of key. */
static void assign_slots(struct selection *s, struct target *target, int count)
{
    uint16_t *table = s->pass == 0 ? s->slot16 : s->slot24;
    for (int i = 0; i < (s->pass == 0 ? PREFIXES : COUNTERS); i++)
        table[i] = NO_SLOT;
    int slot = -1, old_slot = 0;
    for (int j = 0; j < count; j++) {
        if (j == 0 || target[j].key != target[j - 1].key)
            slot++;
        old_slot = target[j].slot;
        const uint32_t index =
            s->pass == 0 ? target[j].key >> 16 : ((uint32_t)old_slot << 8 | (target[j].key >> 8 & 0xffu));
        table[index] = (uint16_t)slot;
        target[j].slot = slot;
    }
}

bnb_status bnb_cpu_select(const bnb_exec *ex, const void *x, bnb_dtype dtype, int64_t n, const int64_t *rank, int count,
                          float *out)
{
    int64_t chunks = n / VALUES_PER_CHUNK < MOST_CHUNKS ? n / VALUES_PER_CHUNK + 1 : MOST_CHUNKS;
    if (chunks < n / MOST_VALUES_PER_CHUNK + 1)
        chunks = n / MOST_VALUES_PER_CHUNK + 1;
    const size_t counts_bytes = (size_t)chunks * COUNTERS * sizeof(uint32_t);
    const size_t bytes = sizeof(struct selection) + counts_bytes;
    struct selection *s = bnb_cpu_alloc(ex, bytes);
    if (!s)
        return bnb_fail(BNB_ENOMEM, "estimate_quantiles: no %zu bytes of workspace", bytes);
    s->x = x;
    s->dtype = dtype;
    s->n = n;
    s->chunks = chunks;
    s->counts = (uint32_t *)(void *)(s + 1);
    struct target target[256];
    for (int j = 0; j < count; j++)
        target[j] = (struct target){0, 0, rank[j]};
    const int passes = dtype == BNB_F32 ? 3 : 1;
    for (s->pass = 0; s->pass < passes; s->pass++) {
        bnb_cpu_parallel(ex, chunks, 1, run_count, s);
        locate(s, target, count);
        if (s->pass + 1 < passes)
            assign_slots(s, target, count);
    }
    for (int j = 0; j < count; j++)
        out[j] = value_of_key(target[j].key, dtype);
    bnb_cpu_free(ex, s, bytes);
    return BNB_OK;
}
