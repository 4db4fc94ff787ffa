/*
 * test_optim_random.c - stochastic rounding: only the two neighbours, with the right mean, repeatable, the same in
 * every table
 *
 * Values are rounded through a momentum step at t > 1 with gradient 0, momentum 0.5 and lr 1: it turns p = 0 into
 * -0.5 m, and m is f32.  NUMERICS rule 29.
 */
#include <math.h>
#include <string.h>

#include "check.h"
#include "optim_subject.h"

static bnb_optim_config rounding_config(void)
{
    bnb_optim_config c = usual_config("momentum");
    c.lr = 1.0;
    c.beta1 = 0.5;
    c.weight_decay = 0.0;
    c.stochastic_rounding = true;
    return c;
}

/* Round x [n] to 16 bits: p = -(0.5 m) with m = -2 x, both exact. */
static void round_values(const struct bnb_cpu_ops *ops, const float *x, int64_t n, bnb_dtype dtype, uint64_t seed,
                         int64_t step, uint16_t *out)
{
    const bnb_optim_config c = rounding_config();
    struct subject s = subject_make("momentum", n, dtype, 32);
    memset(s.buffer[0].data, 0, s.buffer[0].bytes);
    memset(s.buffer[1].data, 0, s.buffer[1].bytes);
    for (int64_t i = 0; i < n; i++)
        store_at(s.buffer[2].data, BNB_F32, i, -2.0f * x[i]);
    s.t.seed = seed;
    s.t.step = step;
    run_table(ops, &c, &s.t);
    memcpy(out, s.buffer[0].data, (size_t)n * 2);
    CHECK(subject_free(&s), "guards written");
}

static double value_of(uint16_t bits, bnb_dtype dtype) { return (double)value_at(&bits, dtype, 0); }

/* The neighbours of x in the dtype: the largest value not above and the smallest not below; infinite ones included. */
static void neighbours(float x, bnb_dtype dtype, double *below, double *above)
{
    *below = (double)-INFINITY;
    *above = (double)INFINITY;
    for (unsigned bits = 0; bits < 0x10000u; bits++) {
        const double v = value_of((uint16_t)bits, dtype);
        if (v <= (double)x && v > *below)
            *below = v;
        if (v >= (double)x && v < *above)
            *above = v;
    }
}

enum { COPIES = 4096 };

/* Many copies of one value: each becomes a neighbour, and the share of the upper one is that of the distance. */
static void check_value(float x, bnb_dtype dtype)
{
    static float copies[COPIES];
    static uint16_t out[COPIES];
    double below, above, sum = 0.0;
    neighbours(x, dtype, &below, &above);
    for (int i = 0; i < COPIES; i++)
        copies[i] = x;
    round_values(bnb_cpu_ops_in_use(), copies, COPIES, dtype, 11, 5, out);
    for (int i = 0; i < COPIES; i++) {
        const double v = value_of(out[i], dtype);
        CHECK(v == below || v == above, "%s %.9g: became %.9g, expected %.9g or %.9g", dtype_name[dtype], (double)x, v,
              below, above);
        sum += v == above && above > below;
    }
    if (!(above > below) || isinf(above) || isinf(below))
        return;
    const double share = ((double)x - below) / (above - below), deviation = sqrt(COPIES * share * (1.0 - share));
    CHECK(fabs(sum - COPIES * share) <= 5.0 * deviation + 0.1,
          "%s %.9g: %g of %d became the upper neighbour, expected %g", dtype_name[dtype], (double)x, sum, COPIES,
          COPIES * share);
}

static void every_value(void)
{
    static const float simple[] = {1.0f,    -1.0f, 1.003f,   -1.003f,  3.14159265f, -0.3333333f,
                                   1000.1f, 7e-3f, 65519.0f, 65503.0f, -65490.5f,   0.0f};
    static const float f16_small[] = {6.1e-5f,  -6.0e-5f,   3.3e-6f,      -8.9e-8f,     6.2e-8f,      3e-8f,   -2.1e-8f,
                                      0x1p-24f, 0x1.8p-24f, 0x1.004p-14f, 0x1.ffcp-15f, 0x1.ffep-15f, 0x1p-14f};
    static const float bf16_small[] = {1e-38f, 1.2e-38f, -9.1e-41f, 0x1p-133f, 0x1.8p-133f, 0x1.01p-126f, 1e-30f};
    for (size_t i = 0; i < sizeof simple / sizeof simple[0]; i++) {
        if (fabsf(simple[i]) < 65504.0f)
            check_value(simple[i], BNB_F16);
        check_value(simple[i], BNB_BF16);
    }
    for (size_t i = 0; i < sizeof f16_small / sizeof f16_small[0]; i++)
        check_value(f16_small[i], BNB_F16);
    for (size_t i = 0; i < sizeof bf16_small / sizeof bf16_small[0]; i++)
        check_value(bf16_small[i], BNB_BF16);
}

/* Many different values: the errors, in units of the distance of the neighbours, have mean 0 and variance <= 1/4. */
static void no_drift(bnb_dtype dtype, float scale)
{
    enum { N = 100000 };
    static float x[N];
    static uint16_t out[N];
    double sum = 0.0;
    uint64_t state = 9;
    const int digits = dtype == BNB_F16 ? 10 : 7, least = dtype == BNB_F16 ? -14 : -126;
    for (int i = 0; i < N; i++)
        x[i] = scale * (float)(random_unit(&state) - 0.5);
    round_values(bnb_cpu_ops_in_use(), x, N, dtype, 3, 2, out);
    for (int i = 0; i < N; i++) {
        const int exponent = x[i] != 0.0f && ilogbf(x[i]) > least ? ilogbf(x[i]) : least;
        const double error = (value_of(out[i], dtype) - (double)x[i]) / ldexp(1.0, exponent - digits);
        CHECK(fabs(error) < 1.0, "%s %.9g: off by %g places", dtype_name[dtype], (double)x[i], error);
        sum += error;
    }
    CHECK(fabs(sum) <= 5.0 * 0.5 * sqrt(N), "%s values below %g: the sum of errors is %g", dtype_name[dtype],
          (double)scale, sum);
}

/* Values that have 16 bits stay, and so do infinities; NaN stays NaN. */
static void exact_values(bnb_dtype dtype)
{
    enum { N = 65536 };
    static float x[N];
    static uint16_t bits[N], out[N];
    for (int i = 0; i < N; i++) {
        bits[i] = (uint16_t)i;
        x[i] = value_at(bits, dtype, i);
        if (dtype == BNB_BF16 && fabsf(x[i]) >= 0x1p127f && isfinite(x[i]))
            x[i] = 1.0f; /* 2 x, the state, would overflow */
    }
    round_values(bnb_cpu_ops_in_use(), x, N, dtype, 1, 2, out);
    for (int i = 0; i < N; i++) {
        const float y = value_at(out, dtype, i);
        CHECK(isnan(x[i]) ? isnan(y) : y == x[i], "%s %#x: %.9g became %.9g", dtype_name[dtype], (unsigned)i,
              (double)x[i], (double)y);
    }
}

/* f16: what is beyond the largest number is rounded to the nearest. */
static void beyond_f16(void)
{
    static const float x[] = {65504.0f, 65505.0f, 65519.9f, 65520.0f, 70000.0f, -65519.9f, -65520.0f, -1e30f};
    for (size_t i = 0; i < sizeof x / sizeof x[0]; i++) {
        uint16_t out;
        round_values(bnb_cpu_ops_in_use(), &x[i], 1, BNB_F16, i, 2, &out);
        CHECK(out == define_to_f16(x[i]), "%.9g became %#x, expected %#x", (double)x[i], out, define_to_f16(x[i]));
    }
}

/* Bits of the definition on every table; other bits for another seed, step or place. */
static void repeatable(bnb_dtype dtype)
{
    enum { N = 3001 };
    static float x[N];
    static uint16_t first[N], other[N];
    fill_values(x, BNB_F32, N, FILL_BELL, 5);
    round_values(&bnb_cpu_ops_scalar, x, N, dtype, 123456789012345u, 17, first);
    for (int i = 0; i < N; i++) {
        const uint16_t want = reference_random(x[i], dtype, 123456789012345u, 17, i);
        CHECK(first[i] == want, "%s element %d: %.9g became %#x, expected %#x", dtype_name[dtype], i, (double)x[i],
              first[i], want);
    }
    for (int t = 0; t < bnb_cpu_all_count; t++) {
        if (!table_at(t))
            continue;
        round_values(bnb_cpu_all[t], x, N, dtype, 123456789012345u, 17, other);
        CHECK(!memcmp(first, other, sizeof first), "%s %s: other bits than scalar", bnb_cpu_all[t]->name,
              dtype_name[dtype]);
    }
    const struct {
        uint64_t seed;
        int64_t step;
    } change[] = {{123456789012346u, 17}, {123456789012345u, 18}, {0, 17}, {1, 17}, {17, 2}};
    for (size_t k = 0; k < sizeof change / sizeof change[0]; k++) {
        int differ = 0;
        round_values(&bnb_cpu_ops_scalar, x, N, dtype, change[k].seed, change[k].step, other);
        for (int i = 0; i < N; i++)
            differ += first[i] != other[i];
        CHECK(differ > N / 5 && differ < N / 2, "%s seed %llu step %lld: %d of %d differ", dtype_name[dtype],
              (unsigned long long)change[k].seed, (long long)change[k].step, differ, N); /* 1/3 of all, on average */
    }
}

/* Neighbouring elements, blocks and steps go up and down independently: pairs agree as often as they should. */
static void independent(void)
{
    enum { N = 65536 };
    static float x[N];
    static uint16_t a[N], b[N];
    static const int lag[] = {1, 2, 8, 16, 255, 256, 257, 1024};
    for (int i = 0; i < N; i++)
        x[i] = 1.00390625f; /* halfway between two values of bf16 */
    round_values(bnb_cpu_ops_in_use(), x, N, BNB_BF16, 7, 2, a);
    round_values(bnb_cpu_ops_in_use(), x, N, BNB_BF16, 7, 3, b);
    for (size_t k = 0; k < sizeof lag / sizeof lag[0]; k++) {
        int agree = 0;
        for (int i = 0; i < N; i++)
            agree += a[i] == a[(i + lag[k]) % N];
        CHECK(abs(agree - N / 2) <= 5 * 128, "lag %d: %d of %d agree", lag[k], agree, N); /* sigma is sqrt(N) / 2 */
    }
    int agree = 0;
    for (int i = 0; i < N; i++)
        agree += a[i] == b[i];
    CHECK(abs(agree - N / 2) <= 5 * 128, "successive steps: %d of %d agree", agree, N);
}

/* A bf16 parameter of 1 with updates of 1e-4 never moves when rounded to nearest; at random it arrives on average. */
static void small_updates(void)
{
    enum { N = 4096, STEPS = 200 };
    bnb_optim_config c = usual_config("lion");
    c.lr = 1e-4;
    c.weight_decay = 0.0;
    for (int random = 0; random <= 1; random++) {
        struct subject s = subject_make("lion", N, BNB_BF16, 8);
        double sum = 0.0;
        for (int i = 0; i < N; i++) {
            store_at(s.buffer[0].data, BNB_BF16, i, 1.0f);
            store_at(s.buffer[1].data, BNB_BF16, i, -1.0f);
        }
        c.stochastic_rounding = random;
        for (s.t.step = 1; s.t.step <= STEPS; s.t.step++)
            CHECK(bnb_optim_step(NULL, &c, &s.t, 1) == BNB_OK, "%s", bnb_detail());
        for (int i = 0; i < N; i++)
            sum += (double)value_at(s.t.p, BNB_BF16, i);
        /* a step up by 2^-7 has probability 0.0128: variance 200 * 0.0128 * 2^-14 of each element */
        const double want = random ? 1.02 : 1.0, sigma = random ? sqrt(200 * 0.0128 / N) * 0x1p-7 : 0.0;
        CHECK(fabs(sum / N - want) <= 5.0 * sigma + 1e-6, "random %d: mean %.9g, expected %.9g", random, sum / N, want);
        CHECK(subject_free(&s), "guards written");
    }
}

/* f32 parameters are not affected. */
static void plain_f32(void)
{
    bnb_optim_config c = usual_config("adam");
    struct subject a = subject_make("adam", 999, BNB_F32, 8), b = subject_make("adam", 999, BNB_F32, 8);
    for (a.t.step = b.t.step = 1; a.t.step <= 3; a.t.step = ++b.t.step) {
        subject_gradient(&a, FILL_BELL, a.t.step);
        subject_gradient(&b, FILL_BELL, a.t.step);
        c.stochastic_rounding = false;
        CHECK(bnb_optim_step(NULL, &c, &a.t, 1) == BNB_OK, "%s", bnb_detail());
        c.stochastic_rounding = true;
        CHECK(bnb_optim_step(NULL, &c, &b.t, 1) == BNB_OK, "%s", bnb_detail());
        CHECK(!subject_difference(&a, &b), "step %lld: %s differs", (long long)a.t.step, subject_difference(&a, &b));
    }
    CHECK(subject_free(&a) && subject_free(&b), "guards written");
}

int main(void)
{
    if (skip_foreign_isa())
        return TEST_SKIPPED;
    every_value();
    for (int dtype = BNB_F16; dtype <= BNB_BF16; dtype++) {
        exact_values((bnb_dtype)dtype);
        repeatable((bnb_dtype)dtype);
        no_drift((bnb_dtype)dtype, 4.0f);
    }
    no_drift(BNB_F16, 1e-4f);
    no_drift(BNB_F16, 1e-6f);
    no_drift(BNB_BF16, 1e-37f);
    beyond_f16();
    independent();
    small_updates();
    plain_f32();
    return CHECK_RESULT();
}
