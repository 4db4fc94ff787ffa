/*
 * test_optim_norms.c - the norms that trust clipping needs, against sums in long double; and what a step makes of them
 *
 * NUMERICS rules 27 and 28.
 */
#include <math.h>
#include <string.h>

#include "check.h"
#include "optim_subject.h"

static const int64_t lengths[] = {1, 7, 255, 256, 257, 4097, 16384, 16385, 50001};
enum { LENGTHS = sizeof lengths / sizeof lengths[0] };

static const bnb_exec backwards = {.size = sizeof backwards, .parallel_for = loop_backwards};
static const bnb_exec threads = {.size = sizeof threads, .parallel_for = loop_threads};

/* Relative 1e-12; NaN and Inf as they are. */
static bool near(double x, long double want)
{
    if (isnan(want) || isinf(want))
        return isnan(want) ? isnan(x) != 0 : (double)want == x;
    return fabsl((long double)x - want) <= 1e-12L * fabsl(want);
}

/* NaN equals NaN. */
static bool same_sums(const double a[2], const double b[2])
{
    for (int k = 0; k < 2; k++)
        if (memcmp(&a[k], &b[k], sizeof a[k]) != 0 && !(isnan(a[k]) && isnan(b[k])))
            return false;
    return true;
}

/* A subject after two updates, with a gradient for the third. */
static struct subject worn_subject(const bnb_optim_config *c, int64_t n, bnb_dtype dtype, int bits, enum fill kind)
{
    struct subject s = subject_make(c->name, n, dtype, bits);
    for (s.t.step = 1; s.t.step <= 2; s.t.step++) {
        subject_gradient(&s, FILL_BELL, s.t.step);
        CHECK(bnb_optim_step(NULL, c, &s.t, 1) == BNB_OK, "%s", bnb_detail());
    }
    subject_gradient(&s, kind, 3);
    return s;
}

/* ---- the sums */

static void check_tables(const bnb_optim_config *c, const struct subject *s)
{
    struct bnb_cpu_step step;
    double direction, first[2] = {0.0, 0.0};
    const int64_t blocks = (s->t.n + STATE_BLOCK - 1) / STATE_BLOCK;
    bnb_cpu_open_step(&step, c, &s->t, 1);
    const struct bnb_optim_args a = bnb_cpu_optim_args(&step, 0, &direction);
    bnb_cpu_ops_scalar.optim_norms[step.row->rule](&a, 0, blocks, first);
    for (int t = 0; t < bnb_cpu_all_count; t++) {
        double sums[2] = {0.0, 0.0};
        if (!table_at(t))
            continue;
        bnb_cpu_all[t]->optim_norms[step.row->rule](&a, 0, blocks, sums);
        CHECK(same_sums(sums, first), "%s %s n %lld: %.17g %.17g, scalar has %.17g %.17g", bnb_cpu_all[t]->name,
              c->name, (long long)s->t.n, sums[0], sums[1], first[0], first[1]);
    }
}

static void check_sums(const bnb_optim_config *c, int64_t n, bnb_dtype dtype, int bits, enum fill kind)
{
    struct subject s = worn_subject(c, n, dtype, bits, kind), before = subject_make(c->name, n, dtype, bits);
    long double want[2];
    double sums[3][2];
    subject_copy(&before, &s);
    reference_norms(c, &s.t, want);
    CHECK(bnb_optim_norms(NULL, c, &s.t, 1, sums[0]) == BNB_OK, "%s", bnb_detail());
    CHECK(bnb_optim_norms(&backwards, c, &s.t, 1, sums[1]) == BNB_OK, "%s", bnb_detail());
    CHECK(bnb_optim_norms(&threads, c, &s.t, 1, sums[2]) == BNB_OK, "%s", bnb_detail());
    CHECK(near(sums[0][0], want[0]) && near(sums[0][1], want[1]),
          "%s %s %d bits n %lld kind %d: %.17g %.17g, expected %.17Lg %.17Lg", c->name, dtype_name[dtype], bits,
          (long long)n, (int)kind, sums[0][0], sums[0][1], want[0], want[1]);
    CHECK(same_sums(sums[0], sums[1]) && same_sums(sums[0], sums[2]), "%s n %lld: the loop changes the sums", c->name,
          (long long)n);
    CHECK(!subject_difference(&s, &before), "%s: %s was written", c->name, subject_difference(&s, &before));
    check_tables(c, &s);
    CHECK(subject_free(&s) && subject_free(&before), "guards written");
}

static void every_sum(const struct reference_row *row)
{
    bnb_optim_config c = usual_config(row->name);
    for (int dtype = 0; dtype < BNB_FLOATS; dtype++)
        for (int bits = 8; bits <= 32; bits += 24) {
            for (int i = 0; i < LENGTHS; i++)
                check_sums(&c, lengths[i], (bnb_dtype)dtype, bits, FILL_BELL);
            check_sums(&c, 3000, (bnb_dtype)dtype, bits, FILL_HEAVY);
            check_sums(&c, 3000, (bnb_dtype)dtype, bits, FILL_MIXED);
            c.skip_zeros = true;
            check_sums(&c, 3000, (bnb_dtype)dtype, bits, FILL_MIXED);
            c.skip_zeros = false;
        }
    c.gnorm_scale = 0.25;
    c.weight_decay = 0.5;
    check_sums(&c, 999, BNB_F32, 8, FILL_BELL);
    c.weight_decay = 0.0;
    c.no_bias_correction = row->rule == ADAM;
    c.nesterov = row->rule == MOMENTUM;
    check_sums(&c, 999, BNB_F32, 32, FILL_BELL);
    if (row->rule == ADEMAMIX)
        c.t_alpha = c.t_beta3 = 10.0;
    check_sums(&c, 999, BNB_F32, 8, FILL_BELL);
}

/* What fills up a short block is no element: eps 0, and a map without a zero, would make it count. */
static void short_block(const struct reference_row *row)
{
    float no_zero[256];
    bnb_create_linear_map(true, 8, false, no_zero);
    for (int bits = 8; bits <= 32; bits += 24)
        for (int zero_eps = 0; zero_eps <= 1; zero_eps++) {
            bnb_optim_config c = usual_config(row->name);
            struct subject s = subject_make(row->name, 5, BNB_F32, bits);
            long double want[2];
            double sums[2];
            c.eps = zero_eps ? 0.0 : 1e-8;
            c.qmap1 = zero_eps ? c.qmap1 : no_zero;
            for (s.t.step = 1; s.t.step <= 3; s.t.step++) {
                fill_values(s.buffer[1].data, BNB_F32, 5, FILL_BELL, (uint64_t)s.t.step);
                reference_norms(&c, &s.t, want);
                CHECK(bnb_optim_norms(NULL, &c, &s.t, 1, sums) == BNB_OK, "%s", bnb_detail());
                CHECK(near(sums[0], want[0]) && near(sums[1], want[1]),
                      "%s %d bits eps %g step %lld: %.17g %.17g, expected %.17Lg %.17Lg", row->name, bits, c.eps,
                      (long long)s.t.step, sums[0], sums[1], want[0], want[1]);
                reference_step(&c, &s.t);
            }
            CHECK(subject_free(&s), "guards written");
        }
}

/* Many tensors in one call: each has its own sums, and those that are skipped have zeros. */
static void many_tensors(void)
{
    enum { COUNT = 11 };
    const bnb_optim_config c = usual_config("lamb");
    struct subject s[COUNT];
    bnb_optim_tensor t[COUNT];
    double one[COUNT][2], all[COUNT][2];
    for (int i = 0; i < COUNT; i++) {
        s[i] = worn_subject(&c, i * 4099 % 20000, (bnb_dtype)(i % 3), i % 2 ? 8 : 32, FILL_BELL);
        t[i] = s[i].t;
        if (i % 4 == 3)
            t[i].g = NULL;
        CHECK(bnb_optim_norms(NULL, &c, &t[i], 1, one[i]) == BNB_OK, "%s", bnb_detail());
        CHECK((i != 0 && i % 4 != 3) || (one[i][0] == 0.0 && one[i][1] == 0.0), "tensor %d is skipped: %g %g", i,
              one[i][0], one[i][1]);
    }
    const bnb_exec *const ex[] = {NULL, &backwards, &threads};
    for (int k = 0; k < 3; k++) {
        memset(all, 0xff, sizeof all);
        CHECK(bnb_optim_norms(ex[k], &c, t, COUNT, all[0]) == BNB_OK, "%s", bnb_detail());
        CHECK(!memcmp(one, all, sizeof one), "loop %d: the sums of many tensors differ from one at a time", k);
    }
    for (int i = 0; i < COUNT; i++)
        CHECK(subject_free(&s[i]), "guards written");
}

/* ---- what a step makes of them */

/* The step is that of the reference, which scales by rule 28; the sum of squares is handed on where it is asked for. */
static void check_trust(bnb_optim_config c, const double norms[2], int bits, bool clips)
{
    struct subject got = worn_subject(&c, 700, BNB_F32, bits, FILL_BELL);
    struct subject want = subject_make(c.name, 700, BNB_F32, bits), whole = subject_make(c.name, 700, BNB_F32, bits);
    float unorm = -1.0f;
    subject_copy(&want, &got);
    subject_copy(&whole, &got);
    want.t.step = whole.t.step = got.t.step = 3;
    CHECK(bnb_optim_step(NULL, &c, &whole.t, 1) == BNB_OK, "%s", bnb_detail());
    c.max_unorm = 0.02;
    c.norms = norms;
    got.t.unorm = &unorm;
    reference_step(&c, &want.t);
    CHECK(bnb_optim_step(NULL, &c, &got.t, 1) == BNB_OK, "%s", bnb_detail());
    const char *difference = subject_difference(&got, &want);
    CHECK(!difference, "%s %d bits U %g P %g: %s differs", c.name, bits, norms[0], norms[1], difference);
    CHECK((subject_difference(&got, &whole) != NULL) == clips, "%s %d bits U %g P %g: clipped or not", c.name, bits,
          norms[0], norms[1]);
    CHECK(unorm == (float)norms[0] || (isnan(norms[0]) && isnan(unorm)), "unorm is %g, expected %g", (double)unorm,
          norms[0]);
    CHECK(subject_free(&got) && subject_free(&want) && subject_free(&whole), "guards written");
}

static void every_trust(const struct reference_row *row)
{
    static const struct {
        double norms[2];
        bool clips;
    } known[] = {
        {{25.0, 4.0}, true},         {{1e-6, 4.0}, false},    {{0.0, 4.0}, false},
        {{25.0, 0.0}, false},        {{0.0, 0.0}, false},     {{(double)INFINITY, 4.0}, false},
        {{(double)NAN, 4.0}, false}, {{1e300, 1e-300}, true}, {{25.0, (double)NAN}, false},
    };
    for (int bits = 8; bits <= 32; bits += 24)
        for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
            check_trust(usual_config(row->name), known[i].norms, bits, known[i].clips);
}

/* With its own norms, a clipped step is as long as max_unorm says, whatever the rule calls u. */
static void clipped_length(const struct reference_row *row)
{
    for (int bits = 8; bits <= 32; bits += 24) {
        bnb_optim_config c = usual_config(row->name);
        double norms[2], moved = 0.0;
        struct subject s = worn_subject(&c, 2000, BNB_F32, bits, FILL_BELL), before;
        before = subject_make(row->name, 2000, BNB_F32, bits);
        subject_copy(&before, &s);
        c.weight_decay = 0.0;
        c.max_unorm = 1e-3;
        CHECK(bnb_optim_norms(NULL, &c, &s.t, 1, norms) == BNB_OK, "%s", bnb_detail());
        c.norms = norms;
        CHECK(bnb_optim_step(NULL, &c, &s.t, 1) == BNB_OK, "%s", bnb_detail());
        for (int64_t i = 0; i < 2000; i++) {
            const double d = (double)value_at(s.t.p, BNB_F32, i) - (double)value_at(before.t.p, BNB_F32, i);
            moved += d * d;
        }
        const double want = c.lr * c.max_unorm * sqrt(norms[1]);
        CHECK(fabs(sqrt(moved) - want) <= 1e-2 * want, "%s %d bits: moved %.9g, expected %.9g", row->name, bits,
              sqrt(moved), want); /* single moves are 2^-20, and p rounds to 2^-24 */
        CHECK(subject_free(&s) && subject_free(&before), "guards written");
    }
}

/* Every tensor is clipped by its own norms; a skipped one reports nothing; without max_unorm nobody does. */
static void own_norms(void)
{
    enum { COUNT = 5 };
    bnb_optim_config c = usual_config("lars");
    struct subject one[COUNT], all[COUNT];
    bnb_optim_tensor t[COUNT];
    double norms[COUNT][2];
    float unorm[COUNT];
    for (int i = 0; i < COUNT; i++) {
        one[i] = worn_subject(&c, 300 + i, BNB_F32, 8, FILL_BELL);
        all[i] = worn_subject(&c, 300 + i, BNB_F32, 8, FILL_BELL);
        norms[i][0] = i + 1.0;
        norms[i][1] = 1.0 / (i + 1.0);
        unorm[i] = -1.0f;
        t[i] = all[i].t;
        t[i].unorm = i == 1 ? NULL : &unorm[i];
    }
    CHECK(bnb_optim_step(NULL, &c, t, 0) == BNB_OK && unorm[0] == -1.0f, "no tensor, but unorm %g", (double)unorm[0]);
    t[3].g = NULL;
    c.max_unorm = 0.01;
    c.norms = norms[0];
    CHECK(bnb_optim_step(&backwards, &c, t, COUNT) == BNB_OK, "%s", bnb_detail());
    for (int i = 0; i < COUNT; i++) {
        c.norms = norms[i];
        if (i != 3)
            CHECK(bnb_optim_step(NULL, &c, &one[i].t, 1) == BNB_OK, "%s", bnb_detail());
        CHECK(!subject_difference(&one[i], &all[i]), "tensor %d: %s differs", i, subject_difference(&one[i], &all[i]));
        CHECK(unorm[i] == (i == 1 || i == 3 ? -1.0f : (float)norms[i][0]), "tensor %d: unorm %g", i, (double)unorm[i]);
    }
    c.max_unorm = 0.0;
    unorm[0] = -1.0f;
    CHECK(bnb_optim_step(NULL, &c, t, 1) == BNB_OK && unorm[0] == -1.0f, "unorm %g without max_unorm",
          (double)unorm[0]);
    for (int i = 0; i < COUNT; i++)
        CHECK(subject_free(&one[i]) && subject_free(&all[i]), "guards written");
}

int main(void)
{
    if (skip_foreign_isa())
        return TEST_SKIPPED;
    for (int r = 0; r < REFERENCE_ROWS; r++) {
        every_sum(&reference_rows[r]);
        every_trust(&reference_rows[r]);
        clipped_length(&reference_rows[r]);
    }
    many_tensors();
    own_norms();
    for (int r = 0; r < REFERENCE_ROWS; r++)
        short_block(&reference_rows[r]);
    return CHECK_RESULT();
}
