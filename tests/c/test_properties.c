/*
 * test_properties.c - what must hold for any input: idempotence, powers of two, error bounds
 *
 * The maps' half gaps are computed here; the input has positive extremes, because some maps have no -1.
 */
#include <math.h>
#include <string.h>

#include "check.h"
#include "support.h"

enum { N = 5003 };

/* One quantiser: 8 bits with a map, or a 4-bit type. */
struct quantiser {
    const char *name;
    const float *map; /* NULL: 4 bits */
    bnb_type4 type;
    int64_t block;
};

static void encode(const struct quantiser *q, bnb_dtype dtype, const void *x, uint8_t *codes, float *absmax)
{
    const bnb_status status = q->map ? bnb_quantize8(NULL, x, dtype, N, q->block, q->map, codes, absmax)
                                     : bnb_quantize4(NULL, x, dtype, N, q->block, q->type, codes, absmax);
    CHECK(status == BNB_OK, "%s", bnb_detail());
}

static void decode(const struct quantiser *q, bnb_dtype dtype, const uint8_t *codes, const float *absmax, void *out)
{
    const bnb_scales scales = {.absmax = absmax};
    const bnb_status status = q->map ? bnb_dequantize8(NULL, codes, N, q->block, q->map, &scales, out, dtype)
                                     : bnb_dequantize4(NULL, codes, N, q->block, q->type, &scales, out, dtype);
    CHECK(status == BNB_OK, "%s", bnb_detail());
}

static size_t code_bytes(const struct quantiser *q) { return q->map ? N : (N + 1) / 2; }

/* Input whose largest magnitude per block is positive, and which has no negative values for an unsigned map. */
static void make_input(const struct quantiser *q, bnb_dtype dtype, void *x, uint64_t seed)
{
    fill_values(x, dtype, N, FILL_HEAVY, seed);
    for (int64_t i = 0; i < N; i++)
        if (q->map && q->map[0] == 0.0f)
            store_at(x, dtype, i, fabsf(value_at(x, dtype, i)));
    for (int64_t low = 0; low < N; low += q->block)
        store_at(x, dtype, low, 16384.0f);
}

/* Quantising what was decoded changes nothing: no code where the values of the map are distinct, no value anywhere.
 * (FP4 and some 8-bit maps have two codes of zero.) */
static void idempotent(const struct quantiser *q, bnb_dtype dtype)
{
    static float x[N], y[N], z[N], a1[N], a2[N];
    static uint8_t q1[N], q2[N];
    make_input(q, dtype, x, 5);
    encode(q, dtype, x, q1, a1);
    decode(q, dtype, q1, a1, y);
    encode(q, dtype, y, q2, a2);
    const size_t blocks = (size_t)((N + q->block - 1) / q->block);
    CHECK(!memcmp(a1, a2, blocks * sizeof a1[0]), "%s %s: absmax moved", q->name, dtype_name[dtype]);
    if (q->map ? q->map[127] != q->map[128] : q->type == BNB_NF4)
        CHECK(!memcmp(q1, q2, code_bytes(q)), "%s %s: codes moved", q->name, dtype_name[dtype]);
    decode(q, dtype, q2, a2, z);
    for (int64_t i = 0; i < N; i++)
        CHECK(value_at(y, dtype, i) == value_at(z, dtype, i), "%s %s: element %lld moved", q->name, dtype_name[dtype],
              (long long)i);
}

/* A power of two moves absmax, never a code. */
static void scaling(const struct quantiser *q)
{
    static float x[N], s[N], a1[N], a2[N];
    static uint8_t q1[N], q2[N];
    fill_values(x, BNB_F32, N, FILL_HEAVY, 11);
    encode(q, BNB_F32, x, q1, a1);
    for (int power = -40; power <= 80; power += 13) {
        for (int i = 0; i < N; i++)
            s[i] = ldexpf(x[i], power);
        encode(q, BNB_F32, s, q2, a2);
        CHECK(!memcmp(q1, q2, code_bytes(q)), "%s: 2^%d moved a code", q->name, power);
        for (int64_t b = 0; b * q->block < N; b++)
            CHECK(a2[b] == ldexpf(a1[b], power), "%s: 2^%d, absmax %g to %g", q->name, power, (double)a1[b],
                  (double)a2[b]);
    }
}

/* Half of the widest gap of the map around u, or the distance to its end. */
static double half_gap(const float *value, int count, double u)
{
    if (u <= (double)value[0])
        return (double)value[0] - u;
    int k = 0;
    while (k + 2 < count && (double)value[k + 1] < u)
        k++;
    return ((double)value[k + 1] - (double)value[k]) / 2;
}

static int ascending(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* |x - y| <= absmax (half the gap that holds u), plus the roundings of r, u, the midpoints and the product. */
static void error_bound(const struct quantiser *q, enum fill kind)
{
    static float x[N], y[N], absmax[N];
    static uint8_t codes[N];
    float value[256];
    const int count = q->map ? 256 : 16;
    memcpy(value,
           q->map               ? q->map
           : q->type == BNB_NF4 ? define_nf4_values
                                : define_fp4_values,
           (size_t)count * sizeof value[0]);
    qsort(value, (size_t)count, sizeof value[0], ascending);
    fill_values(x, BNB_F32, N, kind, 23);
    if (value[0] == 0.0f)
        for (int i = 0; i < N; i++)
            x[i] = fabsf(x[i]);
    encode(q, BNB_F32, x, codes, absmax);
    decode(q, BNB_F32, codes, absmax, y);
    /* FP4's thresholds are decimals, at most 3.6e-7 from the midpoints */
    const double slack = q->map || q->type == BNB_NF4 ? 3e-7 : 7e-7;
    for (int i = 0; i < N; i++) {
        const double scale = (double)absmax[i / q->block], error = fabs((double)x[i] - (double)y[i]);
        const double bound = scale * (half_gap(value, count, (double)x[i] / scale) + slack);
        CHECK(error <= bound, "%s: %g became %g, absmax %g, error %g, bound %g", q->name, (double)x[i], (double)y[i],
              scale, error, bound);
        if (!q->map && q->type == BNB_NF4)
            CHECK(error <= 0.15191 * scale, "NF4: error %g of absmax %g", error, scale);
    }
}

/* The order of values survives: a larger element never gets a smaller code. */
static void monotone(const struct quantiser *q)
{
    static float x[N], y[N], absmax[N];
    static uint8_t codes[N];
    fill_values(x, BNB_F32, N, FILL_HEAVY, 41);
    qsort(x, N, sizeof x[0], ascending);
    encode(q, BNB_F32, x, codes, absmax);
    decode(q, BNB_F32, codes, absmax, y);
    for (int i = 1; i < N; i++)
        CHECK(i % q->block == 0 || y[i] >= y[i - 1], "%s: %g < %g decode to %g > %g", q->name, (double)x[i - 1],
              (double)x[i], (double)y[i - 1], (double)y[i]);
}

int main(void)
{
    static float s[256], u[256], linear[256], fp8[256];
    bnb_create_dynamic_map(true, 7, 8, s);
    bnb_create_dynamic_map(false, 7, 8, u);
    bnb_create_linear_map(true, 8, true, linear);
    bnb_create_fp8_map(true, 4, 3, 8, fp8);
    const struct quantiser all[] = {
        {"signed", s, BNB_NF4, 256},        {"signed, long", s, BNB_NF4, 4096}, {"unsigned", u, BNB_NF4, 64},
        {"linear", linear, BNB_NF4, 100},   {"fp8", fp8, BNB_NF4, 33},          {"NF4", NULL, BNB_NF4, 64},
        {"NF4, long", NULL, BNB_NF4, 4096}, {"FP4", NULL, BNB_FP4, 64},         {"FP4, short", NULL, BNB_FP4, 32},
    };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        for (int dtype = 0; dtype < BNB_FLOATS; dtype++)
            idempotent(&all[i], (bnb_dtype)dtype);
        scaling(&all[i]);
        error_bound(&all[i], FILL_HEAVY);
        error_bound(&all[i], FILL_BELL);
        monotone(&all[i]);
    }
    return CHECK_RESULT();
}
