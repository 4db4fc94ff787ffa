/* support.c - input, guarded buffers and parallel loops for the tests */
#include "support.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/device.h"

const char *const dtype_name[BNB_FLOATS] = {"f32", "f16", "bf16"};

uint64_t random_bits(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u; /* splitmix64 */
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

double random_unit(uint64_t *state) { return (double)(random_bits(state) >> 11) * 0x1p-53; }

uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

float value_at(const void *x, bnb_dtype dtype, int64_t i)
{
    if (dtype == BNB_F32) {
        float value; /* x may be misaligned on purpose by whole elements only, so a plain load is fine */
        memcpy(&value, (const float *)x + i, sizeof value);
        return value;
    }
    const uint16_t bits = ((const uint16_t *)x)[i];
    return dtype == BNB_F16 ? define_from_f16(bits) : float_of((uint32_t)bits << 16);
}

void store_at(void *x, bnb_dtype dtype, int64_t i, float value)
{
    if (dtype == BNB_F32)
        ((float *)x)[i] = value;
    else
        ((uint16_t *)x)[i] = dtype == BNB_F16 ? define_to_f16(value) : define_to_bf16(value);
}

static float one_value(enum fill kind, uint64_t *state)
{
    const uint64_t bits = random_bits(state);
    const float sign = bits >> 63 ? -1.0f : 1.0f;
    switch (kind) {
    case FILL_HEAVY:
    case FILL_MIXED:
        return sign * (float)pow(10.0, 4.0 * random_unit(state) - 4.0 * random_unit(state));
    case FILL_BELL:
        return (float)(random_unit(state) + random_unit(state) + random_unit(state) - 1.5);
    case FILL_ZERO:
        return sign * 0.0f;
    case FILL_SUBNORMAL:
        return float_of((uint32_t)(bits & 0x80000fffu));
    default:
        return float_of((uint32_t)bits);
    }
}

void fill_values(void *x, bnb_dtype dtype, int64_t n, enum fill kind, uint64_t seed)
{
    uint64_t state = seed * 1000003u + (uint64_t)kind;
    for (int64_t i = 0; i < n; i++) {
        if (kind == FILL_ANY_BITS && dtype != BNB_F32)
            ((uint16_t *)x)[i] = (uint16_t)random_bits(&state);
        else
            store_at(x, dtype, i, one_value(kind, &state));
    }
    if (kind != FILL_MIXED)
        return;
    for (int64_t i = (int64_t)(random_bits(&state) % 97); i < n; i += 61 + (int64_t)(random_bits(&state) % 197)) {
        const uint64_t what = random_bits(&state) % 4;
        if (what < 2)
            store_at(x, dtype, i, what ? INFINITY : NAN);
        else
            for (int64_t k = i; k < n && k < i + 130; k++)
                store_at(x, dtype, k, 0.0f);
    }
}

/* ---- guarded buffers */

enum { GUARD = 64 };
#define GUARD_BYTE 0xa5

struct guarded guarded_make(size_t bytes, size_t shift)
{
    struct guarded g = {NULL, bytes, shift, NULL};
    const size_t total = (GUARD + shift + bytes + GUARD + 63) / 64 * 64;
    g.base = aligned_alloc(64, total);
    if (!g.base)
        abort();
    g.data = g.base + GUARD + shift;
    guarded_reset(&g);
    return g;
}

void guarded_reset(const struct guarded *g) { memset(g->base, GUARD_BYTE, GUARD + g->shift + g->bytes + GUARD); }

static bool all_guard(const uint8_t *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (p[i] != GUARD_BYTE)
            return false;
    return true;
}

bool guarded_intact(const struct guarded *g)
{
    return all_guard(g->base, GUARD + g->shift) && all_guard(g->base + GUARD + g->shift + g->bytes, GUARD);
}

bool guarded_untouched(const struct guarded *g) { return all_guard(g->base, GUARD + g->shift + g->bytes + GUARD); }

void guarded_free(struct guarded *g)
{
    free(g->base);
    *g = (struct guarded){NULL, 0, 0, NULL};
}

/* ---- workspace */

void *workspace_alloc(void *context, size_t bytes)
{
    struct workspace *w = context;
    if (++w->calls == w->refuse)
        return NULL;
    uint8_t *p = aligned_alloc(64, (bytes + GUARD + 63) / 64 * 64);
    if (!p)
        abort();
    memset(p, 0xff, bytes); /* NaN, where something is read before it is written */
    memset(p + bytes, GUARD_BYTE, GUARD);
    w->taken += (int64_t)bytes;
    return p;
}

void workspace_free(void *context, void *ptr, size_t bytes)
{
    struct workspace *w = context;
    if (!all_guard((const uint8_t *)ptr + bytes, GUARD))
        abort();
    w->taken -= (int64_t)bytes;
    free(ptr);
}

/* ---- results */

double half_spacing(bnb_dtype dtype, double value)
{
    const int bits = dtype == BNB_F16 ? 11 : 8, least = dtype == BNB_F16 ? -14 : -126;
    if (dtype == BNB_F32)
        return 0.0;
    const int exponent = fabs(value) > 0.0 ? ilogb(value) : least;
    return ldexp(0.5, (exponent > least ? exponent : least) + 1 - bits);
}

/* ---- devices */

static int cards = -1; /* how many there are, once known */

int absent_card(void)
{
    if (cards < 0)
        cards = bnb_cuda_count();
    return BNB_CUDA_CARDS - 1;
}

bnb_status absent_card_status(void) { return cards > 0 ? BNB_EINVAL : BNB_EDEVICE; }

const char *absent_card_word(void) { return cards > 0 ? "ordinal is 63" : "CUDA"; }

/* ---- tables and loops */

int skip_foreign_isa(void)
{
    const char *wanted = getenv("BNB_CPU_ISA");
    if (!wanted || !strcmp(wanted, bnb_cpu_isa()))
        return 0;
    return TEST_SKIPPED;
}

const struct bnb_cpu_ops *table_at(int i)
{
    return bnb_cpu_all[i]->needs & ~bnb_cpu_features() ? NULL : bnb_cpu_all[i];
}

void loop_backwards(void *context, int64_t n, int64_t grain, bnb_range_fn body, void *arg)
{
    (void)context;
    const int64_t piece = grain / 3 * 2 + 1; /* odd, and no multiple of the grain */
    for (int64_t end = n; end > 0; end -= piece)
        body(arg, end > piece ? end - piece : 0, end);
}

struct thread_range {
    bnb_range_fn body;
    void *arg;
    int64_t begin, end;
};

static void *run_range(void *p)
{
    const struct thread_range *r = p;
    if (r->begin < r->end)
        r->body(r->arg, r->begin, r->end);
    return NULL;
}

void loop_threads(void *context, int64_t n, int64_t grain, bnb_range_fn body, void *arg)
{
    enum { THREADS = 4 };
    (void)context;
    (void)grain;
    pthread_t thread[THREADS];
    struct thread_range range[THREADS];
    for (int i = 0; i < THREADS; i++) {
        range[i] = (struct thread_range){body, arg, n * i / THREADS, n * (i + 1) / THREADS};
        if (pthread_create(&thread[i], NULL, run_range, &range[i]))
            abort();
    }
    for (int i = 0; i < THREADS; i++)
        pthread_join(thread[i], NULL);
}
