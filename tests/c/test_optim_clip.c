/*
 * test_optim_clip.c - norms of gradients against sums in long double; percentile clipping against a plain rewriting
 *
 * NUMERICS rule 27.
 */
#include <math.h>
#include <string.h>

#include "check.h"
#include "support.h"

enum { LONGEST = 100001, TENSORS = 4, SLOTS = 100, STEPS = 250 };

static const bnb_exec backwards = {.size = sizeof backwards, .parallel_for = loop_backwards};
static const bnb_exec threads = {.size = sizeof threads, .parallel_for = loop_threads};

/* ---- norms of gradients */

static void check_norm(int64_t n, bnb_dtype dtype, enum fill kind)
{
    struct guarded g = guarded_make((size_t)n * bnb_dtype_size(dtype), bnb_dtype_size(dtype));
    double norm[3], table[2] = {0.0, 0.0};
    long double want = 0.0L;
    fill_values(g.data, dtype, n, kind, (uint64_t)n + 17);
    for (int64_t i = 0; i < n; i++)
        want += (long double)value_at(g.data, dtype, i) * (long double)value_at(g.data, dtype, i);
    const bnb_gradient gradient = {g.data, n, dtype};
    CHECK(bnb_gradient_norms(NULL, &gradient, 1, &norm[0]) == BNB_OK, "%s", bnb_detail());
    CHECK(bnb_gradient_norms(&backwards, &gradient, 1, &norm[1]) == BNB_OK, "%s", bnb_detail());
    CHECK(bnb_gradient_norms(&threads, &gradient, 1, &norm[2]) == BNB_OK, "%s", bnb_detail());
    CHECK(isnan(want)   ? isnan(norm[0]) != 0
          : isinf(want) ? norm[0] == (double)INFINITY
                        : fabsl((long double)norm[0] - want) <= 1e-12L * want,
          "%s n %lld kind %d: %.17g, expected %.17Lg", dtype_name[dtype], (long long)n, (int)kind, norm[0], want);
    for (int k = 1; k < 3; k++)
        CHECK(!memcmp(&norm[0], &norm[k], sizeof norm[0]) || (isnan(norm[0]) && isnan(norm[k])),
              "%s n %lld: loop %d gives %.17g, serially %.17g", dtype_name[dtype], (long long)n, k, norm[k], norm[0]);
    for (int t = 0; t < bnb_cpu_all_count; t++) {
        if (!table_at(t))
            continue;
        table[0] = bnb_cpu_all[t]->square_blocks((int)dtype, g.data, n);
        table[1] = bnb_cpu_ops_scalar.square_blocks((int)dtype, g.data, n);
        CHECK(!memcmp(&table[0], &table[1], sizeof table[0]) || (isnan(table[0]) && isnan(table[1])),
              "%s %s n %lld: %.17g, scalar has %.17g", bnb_cpu_all[t]->name, dtype_name[dtype], (long long)n, table[0],
              table[1]);
    }
    CHECK(guarded_intact(&g), "guards written");
    guarded_free(&g);
}

static void every_norm(void)
{
    static const int64_t length[] = {0, 1, 7, 8, 255, 256, 257, 4097, 16383, 16384, 16385, 32769, LONGEST};
    for (int dtype = 0; dtype < BNB_FLOATS; dtype++) {
        for (size_t i = 0; i < sizeof length / sizeof length[0]; i++)
            check_norm(length[i], (bnb_dtype)dtype, i % 2 ? FILL_BELL : FILL_HEAVY);
        for (int kind = 0; kind < FILL_COUNT; kind++)
            check_norm(2000, (bnb_dtype)dtype, (enum fill)kind);
    }
}

static void many_norms(void)
{
    enum { COUNT = 9 };
    static float x[LONGEST];
    bnb_gradient g[COUNT];
    double one[COUNT], all[COUNT];
    fill_values(x, BNB_F32, LONGEST, FILL_HEAVY, 3);
    for (int i = 0; i < COUNT; i++) {
        const int64_t n = i * 11003 % 40000;
        g[i] = (bnb_gradient){n > 0 ? x + i : NULL, n, BNB_F32};
        CHECK(bnb_gradient_norms(NULL, &g[i], 1, &one[i]) == BNB_OK, "%s", bnb_detail());
    }
    const bnb_exec *const ex[] = {NULL, &backwards, &threads};
    for (int k = 0; k < 3; k++) {
        memset(all, 0xff, sizeof all);
        CHECK(bnb_gradient_norms(ex[k], g, COUNT, all) == BNB_OK, "%s", bnb_detail());
        CHECK(!memcmp(one, all, sizeof one), "loop %d: many gradients differ from one at a time", k);
    }
    CHECK(bnb_gradient_norms(NULL, NULL, 0, NULL) == BNB_OK, "no gradient at all: %s", bnb_detail());
}

/* ---- percentile clipping */

struct clip { float norm, limit, scale; };

/* Rank of the history by counting; a norm that is no number is above all others. */
static struct clip plain_clip(float history[SLOTS], int64_t step, int percentile, double norm)
{
    struct clip r = {sqrtf((float)norm), INFINITY, 1.0f};
    int zeros = 0;
    for (int i = 0; i < SLOTS; i++)
        zeros += history[i] == 0.0f;
    for (int i = 0; i < SLOTS; i++)
        if (step == 1 || zeros == SLOTS || i == step % SLOTS)
            history[i] = (float)norm;
    for (int i = 0; i < SLOTS; i++) {
        int below = 0, equal = 0;
        for (int k = 0; k < SLOTS; k++) {
            below += history[k] < history[i] || (!isnan(history[k]) && isnan(history[i]));
            equal += history[k] == history[i] || (isnan(history[k]) && isnan(history[i]));
        }
        if (below <= percentile && percentile < below + equal)
            r.limit = isnan(history[i]) ? INFINITY : sqrtf(history[i]);
    }
    if (isfinite(r.norm) && r.norm > r.limit)
        r.scale = r.limit / r.norm;
    return r;
}

/* Squared norms as training has them: some outliers, some not finite, some zero. */
static double a_norm(uint64_t *state, int64_t step)
{
    const double u = random_unit(state), size = exp(6.0 * u - 3.0);
    if (step % 17 == 5)
        return step % 2 ? (double)NAN : (double)INFINITY;
    return step % 13 == 4 ? 0.0 : step % 29 == 7 ? size * 1e6 : size;
}

static bool same_float(float a, float b) { return bits_of(a) == bits_of(b) || (isnan(a) && isnan(b)); }

static void clip(int percentile, bool counted, bool finite)
{
    struct guarded history[TENSORS], report = guarded_make(TENSORS * 3 * 4, 4);
    float plain[TENSORS][SLOTS], count[TENSORS];
    bnb_clip_tensor t[TENSORS];
    double norms[TENSORS];
    uint64_t state = (uint64_t)percentile;
    int scaled = 0;
    for (int i = 0; i < TENSORS; i++)
        history[i] = guarded_make(SLOTS * 4, 4);
    for (int64_t step = 1; step <= STEPS; step++) {
        for (int i = 0; i < TENSORS; i++) {
            norms[i] = a_norm(&state, finite ? 0 : step + i);
            count[i] = (float)(step - 1);
            t[i] = (bnb_clip_tensor){history[i].data, counted ? -7 : step, counted ? &count[i] : NULL};
        }
        CHECK(bnb_clip_percentile(NULL, t, TENSORS, percentile, norms, report.data) == BNB_OK, "%s", bnb_detail());
        for (int i = 0; i < TENSORS; i++) {
            const struct clip want = plain_clip(plain[i], step, percentile, norms[i]);
            const float *got = (const float *)report.data + 3 * i;
            CHECK(same_float(got[0], want.norm) && same_float(got[1], want.limit) && same_float(got[2], want.scale),
                  "percentile %d step %lld tensor %d: %g %g %g, expected %g %g %g", percentile, (long long)step, i,
                  (double)got[0], (double)got[1], (double)got[2], (double)want.norm, (double)want.limit,
                  (double)want.scale);
            scaled += got[2] < 1.0f;
            for (int k = 0; k < SLOTS; k++)
                CHECK(same_float(((const float *)history[i].data)[k], plain[i][k]), "step %lld slot %d",
                      (long long)step, k);
            CHECK(count[i] == (float)(step - 1), "step_count was written");
        }
    }
    /* of norms drawn alike, 99 - q of a hundred are above rank q; half of that is asked for */
    CHECK(!finite || scaled >= STEPS * TENSORS * (99 - percentile) / 200, "percentile %d: %d scaled", percentile,
          scaled);
    CHECK(guarded_intact(&report), "guards written");
    guarded_free(&report);
    for (int i = 0; i < TENSORS; i++) {
        CHECK(guarded_intact(&history[i]), "guards written");
        guarded_free(&history[i]);
    }
}

/* A constant norm is never scaled; ten times the constant is scaled to it. */
static void outlier(void)
{
    float history[SLOTS], report[3];
    bnb_clip_tensor t = {.history = history};
    for (t.step = 1; t.step <= 120; t.step++) {
        const double norm = t.step == 110 ? 400.0 : 4.0;
        CHECK(bnb_clip_percentile(NULL, &t, 1, 50, &norm, report) == BNB_OK, "%s", bnb_detail());
        CHECK(report[0] == (t.step == 110 ? 20.0f : 2.0f) && report[1] == 2.0f &&
                  report[2] == (t.step == 110 ? 0.1f : 1.0f),
              "step %lld: %g %g %g", (long long)t.step, (double)report[0], (double)report[1], (double)report[2]);
    }
    CHECK(bnb_clip_percentile(NULL, NULL, 0, 50, NULL, NULL) == BNB_OK, "no tensor at all: %s", bnb_detail());
}

/* Clipping that starts at a later step, with an empty history: the first norm is every slot, and nothing is scaled. */
static void late_start(void)
{
    float history[SLOTS] = {0}, report[3];
    bnb_clip_tensor t = {.history = history, .step = 41};
    const double norm = 9.0;
    CHECK(bnb_clip_percentile(NULL, &t, 1, 5, &norm, report) == BNB_OK, "%s", bnb_detail());
    CHECK(report[0] == 3.0f && report[1] == 3.0f && report[2] == 1.0f, "%g %g %g", (double)report[0], (double)report[1],
          (double)report[2]);
    CHECK(history[0] == 9.0f && history[99] == 9.0f, "history is %g .. %g", (double)history[0], (double)history[99]);
}

int main(void)
{
    static const int percentile[] = {0, 1, 5, 50, 98, 99};
    if (skip_foreign_isa())
        return TEST_SKIPPED;
    every_norm();
    many_norms();
    for (size_t i = 0; i < sizeof percentile / sizeof percentile[0]; i++)
        for (int finite = 0; finite <= 1; finite++)
            clip(percentile[i], i % 2 != 0, finite);
    outlier();
    late_start();
    return CHECK_RESULT();
}
