/*
 * test_optim_many.c - many tensors in one call, in any loop; and numbers that are read through pointers
 *
 * NUMERICS rule 26: a step over many tensors equals one step per tensor, bit for bit.
 */
#include <math.h>
#include <string.h>

#include "check.h"
#include "optim_subject.h"

enum { COUNT = 40, STEPS = 3 };

static const bnb_exec backwards = {.size = sizeof backwards, .parallel_for = loop_backwards};
static const bnb_exec threads = {.size = sizeof threads, .parallel_for = loop_threads};

/* Mixed lengths, dtypes and states; some without elements. */
static struct subject make_one(const char *row, int i)
{
    struct subject s = subject_make(row, i == 20 ? 70001 : i * 26 % 1001, (bnb_dtype)(i % 3), i % 4 == 3 ? 32 : 8);
    s.t.seed = (uint64_t)i;
    return s;
}

/* The arguments of tensor i at a step; some have no gradient, and every one is at its own t. */
static bnb_optim_tensor arguments(const struct subject *s, int i, int step)
{
    bnb_optim_tensor t = s->t;
    t.step = step + i % 3;
    if (i % 7 == 6)
        t.g = NULL;
    return t;
}

static void many_tensors(const bnb_exec *ex, const bnb_optim_config *c)
{
    struct subject one[COUNT], all[COUNT];
    bnb_optim_tensor t[COUNT];
    for (int i = 0; i < COUNT; i++) {
        one[i] = make_one(c->name, i);
        all[i] = make_one(c->name, i);
    }
    for (int step = 1; step <= STEPS; step++) {
        for (int i = 0; i < COUNT; i++) {
            subject_gradient(&one[i], FILL_HEAVY, i + step);
            subject_gradient(&all[i], FILL_HEAVY, i + step);
            t[i] = arguments(&one[i], i, step);
            CHECK(bnb_optim_step(NULL, c, &t[i], 1) == BNB_OK, "%s", bnb_detail());
            t[i] = arguments(&all[i], i, step);
        }
        CHECK(bnb_optim_step(ex, c, t, COUNT) == BNB_OK, "%s", bnb_detail());
        for (int i = 0; i < COUNT; i++)
            CHECK(!subject_difference(&one[i], &all[i]), "%s step %d tensor %d: %s differs from one at a time", c->name,
                  step, i, subject_difference(&one[i], &all[i]));
    }
    for (int i = 0; i < COUNT; i++)
        CHECK(subject_free(&one[i]) && subject_free(&all[i]), "%s tensor %d: guards written", c->name, i);
    CHECK(bnb_optim_step(ex, c, NULL, 0) == BNB_OK, "no tensor at all: %s", bnb_detail());
}

/* A tensor without gradient keeps every byte. */
static void no_gradient(const char *row)
{
    const bnb_optim_config c = usual_config(row);
    struct subject s = subject_make(row, 500, BNB_F32, 8), before = subject_make(row, 500, BNB_F32, 8);
    bnb_optim_tensor t = s.t;
    float count = 3.0f;
    t.g = NULL;
    t.step_count = &count;
    CHECK(bnb_optim_step(NULL, &c, &t, 1) == BNB_OK, "%s", bnb_detail());
    CHECK(!subject_difference(&s, &before) && count == 3.0f, "%s: %s changed, step_count %g", row,
          subject_difference(&s, &before), (double)count);
    CHECK(subject_free(&s) && subject_free(&before), "guards written");
}

/* ---- pointers */

struct numbers { float count, lr, scale; };

/* Both subjects make the same step: one told by numbers, one by pointers, of which its own numbers are nonsense. */
static void check_pointers(const bnb_exec *ex, const bnb_optim_config *c, int64_t n, bnb_dtype dtype, int bits)
{
    static const float rate[] = {0.01f, 0.003f, 0.0f, 0.1f}, scale[] = {1.0f, 0.3f, 0.0f, 1.7f};
    struct subject by_number = subject_make(c->name, n, dtype, bits),
                   by_pointer = subject_make(c->name, n, dtype, bits);
    struct numbers now = {0.0f, 0.0f, 0.0f};
    for (int step = 1; step <= 4; step++) {
        bnb_optim_config numbers = *c, pointers = *c;
        bnb_optim_tensor t = by_pointer.t;
        subject_gradient(&by_number, FILL_HEAVY, step);
        subject_gradient(&by_pointer, FILL_HEAVY, step);
        by_number.t.step = step;
        numbers.lr = (double)rate[step - 1];
        numbers.gnorm_scale = 0.75 * (double)scale[step - 1];
        CHECK(bnb_optim_step(NULL, &numbers, &by_number.t, 1) == BNB_OK, "%s", bnb_detail());
        now.lr = rate[step - 1];
        now.scale = scale[step - 1];
        pointers.lr = 77.0;
        pointers.lr_value = &now.lr;
        pointers.gnorm_scale = 0.75;
        t.step = -5;
        t.step_count = &now.count;
        t.gnorm_scale = &now.scale;
        CHECK(bnb_optim_step(ex, &pointers, &t, 1) == BNB_OK, "%s", bnb_detail());
        CHECK(!subject_difference(&by_number, &by_pointer), "%s %s %d bits n %lld step %d: %s differs", c->name,
              dtype_name[dtype], bits, (long long)n, step, subject_difference(&by_number, &by_pointer));
        CHECK(now.count == (float)step, "%s n %lld: step_count is %g after step %d", c->name, (long long)n,
              (double)now.count, step);
        CHECK(now.lr == rate[step - 1] && now.scale == scale[step - 1], "%s: a number was written", c->name);
    }
    CHECK(subject_free(&by_number) && subject_free(&by_pointer), "guards written");
}

/* Norms see the same numbers, and leave step_count alone. */
static void norms_by_pointer(const char *row)
{
    bnb_optim_config c = usual_config(row);
    struct subject s = subject_make(row, 3000, BNB_BF16, 8);
    double by_number[2], by_pointer[2];
    float count = 6.0f, scale = 0.4f;
    subject_gradient(&s, FILL_BELL, 1);
    s.t.step = 7;
    c.gnorm_scale = (double)scale;
    CHECK(bnb_optim_norms(NULL, &c, &s.t, 1, by_number) == BNB_OK, "%s", bnb_detail());
    c.gnorm_scale = 1.0;
    s.t.step = 0;
    s.t.step_count = &count;
    s.t.gnorm_scale = &scale;
    CHECK(bnb_optim_norms(&threads, &c, &s.t, 1, by_pointer) == BNB_OK, "%s", bnb_detail());
    CHECK(!memcmp(by_number, by_pointer, sizeof by_number), "%s: %g %g by number, %g %g by pointer", row, by_number[0],
          by_number[1], by_pointer[0], by_pointer[1]);
    CHECK(count == 6.0f, "%s: bnb_optim_norms() wrote step_count, %g", row, (double)count);
    CHECK(subject_free(&s), "guards written");
}

int main(void)
{
    if (skip_foreign_isa())
        return TEST_SKIPPED;
    for (int r = 0; r < REFERENCE_ROWS; r++) {
        const char *row = reference_rows[r].name;
        bnb_optim_config c = usual_config(row);
        many_tensors(NULL, &c);
        many_tensors(&backwards, &c);
        many_tensors(&threads, &c);
        c.stochastic_rounding = true;
        many_tensors(&backwards, &c);
        no_gradient(row);
        c = usual_config(row);
        check_pointers(NULL, &c, 700, BNB_F32, 8);
        check_pointers(NULL, &c, 700, BNB_BF16, 32);
        check_pointers(&backwards, &c, 150001, BNB_F16, 8); /* several tasks */
        check_pointers(&threads, &c, 150001, BNB_F32, 32);
        c.stochastic_rounding = true;
        check_pointers(&threads, &c, 150001, BNB_BF16, 8);
        norms_by_pointer(row);
    }
    return CHECK_RESULT();
}
