/*
 * test_optim_rules.c - what the optimizers promise beyond their formulas: accuracy, schedules, signs, non-finite
 * values, zeros, maps
 *
 * NUMERICS rules 21 to 25.  The promises hold for every row unless a test says otherwise.
 */
#include <math.h>
#include <string.h>

#include "check.h"
#include "optim_subject.h"

enum { N = 1000, BLOCKS = (N + 255) / 256 };

/* One step by the library; `step` counts. */
static void step_once(const bnb_optim_config *c, struct subject *s, int64_t step)
{
    s->t.step = step;
    CHECK(bnb_optim_step(NULL, c, &s->t, 1) == BNB_OK, "%s", bnb_detail());
}

static void free_whole(struct subject *s) { CHECK(subject_free(s), "guards written"); }

static float *floats(const struct subject *s, int buffer) { return s->buffer[buffer].data; }
static uint8_t *codes(const struct subject *s, int buffer) { return s->buffer[buffer].data; }

/* ---- accuracy */

/* Averages of `old` and `added` parts lose at most three roundings a step; v decays so slowly that they add up. */
static void check_near(const bnb_optim_config *c, const struct subject *s, const struct exact *x, int64_t step)
{
    const struct reference_row *row = reference_find(c->name);
    for (int64_t i = 0; i < s->t.n; i++) {
        const double p = (double)floats(s, 0)[i];
        CHECK(fabs(p - x[i].p) <= 2e-7 * (double)step, "%s step %lld element %lld: %.9g, expected %.9g", c->name,
              (long long)step, (long long)i, p, x[i].p);
        for (int k = 0; k < row->averages; k++) {
            const double value = (double)floats(s, k == 1 ? 3 : 2)[k == 2 ? s->t.n + i : i], want = x[i].s[k];
            const bool square = k == 1 || row->rule == RMSPROP || row->rule == ADAGRAD;
            const double roundings = square ? (3.0 * (double)step + 4.0) * 0x1p-24 * want : 4e-6;
            /* coupled decay hands the error of p on to the averages */
            const double of_p = row->decoupled ? 0.0 : c->weight_decay * 2e-7 * (double)step * (square ? 2.0 : 10.0);
            CHECK(fabs(value - want) <= roundings + of_p,
                  "%s step %lld element %lld: average %d is %.9g, expected %.9g", c->name, (long long)step,
                  (long long)i, k, value, want);
        }
    }
}

/* 1000 steps with 32-bit state stay within the roundings of the formula in double: two a step for p, below 2. */
static void near_the_formula(const bnb_optim_config *c)
{
    enum { COUNT = 64, STEPS = 1000 };
    struct exact x[COUNT] = {{0}};
    struct subject s = subject_make(c->name, COUNT, BNB_F32, 32);
    for (int i = 0; i < COUNT; i++)
        x[i].p = (double)floats(&s, 0)[i];
    for (int64_t step = 1; step <= STEPS; step++) {
        fill_values(s.buffer[1].data, BNB_F32, COUNT, FILL_BELL, (uint64_t)step + 100);
        step_once(c, &s, step);
        for (int i = 0; i < COUNT; i++)
            x[i] = exact_update(c, step, (double)floats(&s, 1)[i], x[i]);
        check_near(c, &s, x, step);
    }
    free_whole(&s);
}

static void every_formula(void)
{
    bnb_optim_config c;
    for (int r = 0; r < REFERENCE_ROWS; r++) {
        c = usual_config(reference_rows[r].name);
        c.lr = reference_rows[r].rule == MOMENTUM ? 1e-3 : 1e-2; /* so that p stays below 2 */
        near_the_formula(&c);
    }
    c = usual_config("adam");
    c.coupled_decay = true;
    near_the_formula(&c);
    c.no_bias_correction = true;
    c.lr = 1e-3;
    near_the_formula(&c);
    c = usual_config("momentum");
    c.lr = 1e-3;
    c.nesterov = true;
    near_the_formula(&c);
    c.nesterov = false;
    c.beta2 = 0.5;
    near_the_formula(&c);
    c = usual_config("ademamix");
    c.t_alpha = c.t_beta3 = 500.0;
    near_the_formula(&c);
}

/* After a step, decoded averages lie within half a gap of the exact ones, relative to their block. */
static void state_error(void)
{
    const bnb_optim_config c = usual_config("adam");
    struct subject s = subject_make("adam", N, BNB_F32, 8);
    fill_values(s.buffer[1].data, BNB_F32, N, FILL_BELL, 8);
    step_once(&c, &s, 1);
    for (int i = 0; i < N; i++) {
        const double g = (double)floats(&s, 1)[i], m = 0.1 * g, v = 0.001 * g * g;
        const double a1 = (double)floats(&s, 4)[i / 256], a2 = (double)floats(&s, 5)[i / 256];
        const double m_error = fabs((double)subject_signed_map[codes(&s, 2)[i]] * a1 - m);
        const double v_error = fabs((double)subject_unsigned_map[codes(&s, 3)[i]] * a2 - v);
        /* half gaps of the top decade, 0.9 / 128 and 0.9 / 256, reach to the edge of the decade below */
        CHECK(m_error <= a1 * 0.00704 && v_error <= a2 * 0.00353, "element %d: errors %g and %g of absmax", i,
              m_error / a1, v_error / a2);
    }
    free_whole(&s);
}

/* beta3 of beta1 0.9, beta3 0.9999 over 100 updates; alpha 5 over 100 updates. */
static void schedules(void)
{
    static const struct {
        int64_t t;
        double beta3, alpha;
    } point[] = {
        {1, 0.9909002, 0.05}, {10, 0.9990089, 0.5}, {50, 0.9998002, 2.5}, {100, 0.9999, 5.0}, {1000, 0.9999, 5.0}};
    for (size_t i = 0; i < sizeof point / sizeof point[0]; i++) {
        bnb_optim_config c = usual_config("ademamix");
        struct subject s = subject_make("ademamix", 1, BNB_F32, 32);
        c.t_alpha = c.t_beta3 = 100.0;
        c.weight_decay = c.eps = 0.0;
        floats(&s, 0)[0] = 0.0f;
        floats(&s, 1)[0] = 1.0f;
        step_once(&c, &s, point[i].t);
        const double slow = (double)floats(&s, 2)[1], want = 1.0 - point[i].beta3;
        CHECK(fabs(slow - want) <= 6e-8, "t %lld: 1 - beta3 is %.9g, expected %.9g", (long long)point[i].t, slow, want);
        const double t = (double)point[i].t, fast = 0.1 / (1.0 - pow(0.9, t)),
                     root = sqrt(0.001 / (1.0 - pow(0.999, t)));
        const double moved = -0.01 * (fast + point[i].alpha * want) / root, p = (double)floats(&s, 0)[0];
        CHECK(fabs(p - moved) <= 1e-5 * fabs(moved), "t %lld: p is %.9g, expected %.9g", (long long)point[i].t, p,
              moved);
        free_whole(&s);
    }
}

/* ---- special values */

static bool state_is_zero(const bnb_optim_config *c, const struct subject *s, int i)
{
    const struct reference_row *row = reference_find(c->name);
    for (int k = 0; k < row->averages; k++) {
        const float *map = k == 1 ? c->qmap2 : c->qmap1;
        if (map[codes(s, k == 1 ? 3 : 2)[k == 2 ? N + i : i]] != 0.0f)
            return false;
    }
    return true;
}

static void check_scales(const struct subject *s, const char *row, int step)
{
    for (int k = 4; k < SUBJECT_BUFFERS; k++)
        for (size_t b = 0; b < s->buffer[k].bytes / 4; b++)
            CHECK(isfinite(floats(s, k)[b]), "%s step %d: absmax %zu of buffer %d is %g", row, step, b, k,
                  (double)floats(s, k)[b]);
}

/* NaN, Inf, and finite gradients that overflow: that element's states become 0, its p stays; its neighbours go on. */
static void non_finite(const struct reference_row *row)
{
    static const float any[] = {NAN, INFINITY, -INFINITY, 3e38f, -1e25f};
    const int bad = row->rule == LION || row->rule == MOMENTUM ? 3 : 5; /* only squares overflow */
    const bnb_optim_config c = usual_config(row->name);
    struct subject s = subject_make(row->name, N, BNB_F32, 8);
    for (int step = 1; step <= 4; step++) {
        float before[N];
        fill_values(s.buffer[1].data, BNB_F32, N, FILL_BELL, (uint64_t)step);
        for (int i = 3; i < N; i += 101)
            floats(&s, 1)[i] = any[(i / 101 + step) % bad];
        memcpy(before, s.buffer[0].data, sizeof before);
        step_once(&c, &s, step);
        for (int i = 0; i < N; i++) {
            const bool spoilt = i % 101 == 3;
            const float p = floats(&s, 0)[i];
            CHECK(!spoilt || (state_is_zero(&c, &s, i) && bits_of(p) == bits_of(before[i])),
                  "%s step %d gradient %g: p moved %g, code %d", row->name, step, (double)floats(&s, 1)[i],
                  (double)(p - before[i]), codes(&s, 2)[i]);
            CHECK(spoilt || p != before[i], "%s step %d: neighbour %d did not move", row->name, step, i);
        }
        check_scales(&s, row->name, step);
    }
    free_whole(&s);
}

/* With 32-bit state NaN spreads into the element, and no further.  Lion does not move along NaN. */
static void non_finite32(const struct reference_row *row)
{
    const bnb_optim_config c = usual_config(row->name);
    struct subject s = subject_make(row->name, N, BNB_F32, 32);
    fill_values(s.buffer[1].data, BNB_F32, N, FILL_BELL, 5);
    for (int i = 3; i < N; i += 101)
        floats(&s, 1)[i] = NAN;
    step_once(&c, &s, 1);
    for (int i = 0; i < N; i++) {
        const bool spoilt = i % 101 == 3;
        CHECK(isnan(floats(&s, 2)[i]) == spoilt, "%s element %d: state %g", row->name, i, (double)floats(&s, 2)[i]);
        CHECK(isnan(floats(&s, 0)[i]) == (spoilt && row->rule != LION), "%s element %d: p %g", row->name, i,
              (double)floats(&s, 0)[i]);
    }
    free_whole(&s);
}

/* A negative average never gets the code of 0 or above, a positive one never a negative code. */
static void signs(const struct reference_row *row)
{
    const bnb_optim_config c = usual_config(row->name);
    if (row->rule == RMSPROP || row->rule == ADAGRAD)
        return;
    struct subject s = subject_make(row->name, N, BNB_F32, 8);
    memset(s.buffer[0].data, 0, s.buffer[0].bytes); /* else coupled decay sets the sign */
    for (int i = 0; i < N; i++)
        floats(&s, 1)[i] = (i % 2 ? 1.0f : -1.0f) * (float)pow(10.0, -(double)(i % 256) / 20.0);
    step_once(&c, &s, 1);
    for (int i = 0; i < (row->averages == 3 ? 2 * N : N); i++)
        CHECK(i % 2 ? codes(&s, 2)[i] >= 127 : codes(&s, 2)[i] <= 126, "%s element %d: code %d", row->name, i,
              codes(&s, 2)[i]);
    free_whole(&s);
}

/* Blocks without gradient: new state stays zero and is written as the codes of zero; p only decays, if decoupled. */
static void zero_blocks(const struct reference_row *row)
{
    bnb_optim_config c = usual_config(row->name);
    const float left = row->decoupled ? (float)(1.0 - 0.01 * 0.01) : 1.0f;
    struct subject s = subject_make(row->name, N, BNB_F32, 8);
    if (!row->decoupled)
        c.weight_decay = 0.0;
    for (int i = 0; i < N; i++)
        floats(&s, 0)[i] = 1.0f;
    step_once(&c, &s, 1);
    for (int i = 0; i < N; i++)
        CHECK(state_is_zero(&c, &s, i) && floats(&s, 0)[i] == left, "%s element %d: code %d, p %.9g", row->name, i,
              codes(&s, 2)[i], (double)floats(&s, 0)[i]);
    for (int k = 4; k < SUBJECT_BUFFERS; k++)
        for (size_t b = 0; b < s.buffer[k].bytes / 4; b++)
            CHECK(bits_of(floats(&s, k)[b]) == 0, "%s: absmax %zu of buffer %d is not 0", row->name, b, k);
    free_whole(&s);
}

/* ---- maps */

/* The search gives what the closed form gives for the same maps. */
static void searched_maps(const struct reference_row *row)
{
    const bnb_optim_config c = usual_config(row->name);
    for (int t = 0; t < bnb_cpu_all_count; t++) {
        if (!table_at(t))
            continue;
        struct subject form = subject_make(row->name, N, BNB_F32, 8), search = subject_make(row->name, N, BNB_F32, 8);
        for (int step = 1; step <= 6; step++) {
            double direction;
            struct bnb_cpu_step shared;
            subject_gradient(&form, step % 2 ? FILL_HEAVY : FILL_MIXED, step);
            subject_gradient(&search, step % 2 ? FILL_HEAVY : FILL_MIXED, step);
            form.t.step = search.t.step = step;
            run_table(bnb_cpu_all[t], &c, &form.t);
            bnb_cpu_open_step(&shared, &c, &search.t, 1);
            struct bnb_optim_args a = bnb_cpu_optim_args(&shared, 0, &direction);
            CHECK(a.map[0].form, "%s: the default map is not recognised", row->name);
            a.map[0].form = a.map[1].form = NULL;
            bnb_cpu_all[t]->optim8[shared.row->rule](&a, 0, BLOCKS);
            CHECK(!subject_difference(&form, &search), "%s %s step %d: search and closed form differ in %s",
                  bnb_cpu_all[t]->name, row->name, step, subject_difference(&form, &search));
        }
        free_whole(&form);
        free_whole(&search);
    }
}

/* A map with one entry changed is searched; with the entry restored it is the default again: same as never changed. */
static void restored_map(void)
{
    struct subject s[3];
    float map[256];
    bnb_optim_config c = usual_config("adam");
    memcpy(map, subject_signed_map, sizeof map);
    for (int k = 0; k < 3; k++)
        s[k] = subject_make("adam", N, BNB_F32, 8);
    for (int step = 1; step <= 5; step++) {
        for (int k = 0; k < 3; k++) { /* 0: default, 1: entry changed and restored, 2: changed */
            fill_values(s[k].buffer[1].data, BNB_F32, N, FILL_HEAVY, (uint64_t)step);
            map[200] = nextafterf(subject_signed_map[200], k == 2 ? 1.0f : subject_signed_map[200]);
            c.qmap1 = k == 0 ? subject_signed_map : map;
            step_once(&c, &s[k], step);
        }
        CHECK(!subject_difference(&s[0], &s[1]), "step %d: a restored map differs from the default", step);
    }
    int moved = 0;
    for (int i = 0; i < N; i++)
        moved += codes(&s[0], 2)[i] != codes(&s[2], 2)[i];
    CHECK(moved <= 2, "one entry moved by one ulp changed %d codes", moved);
    for (int k = 0; k < 3; k++)
        free_whole(&s[k]);
}

int main(void)
{
    every_formula();
    state_error();
    schedules();
    for (int r = 0; r < REFERENCE_ROWS; r++) {
        non_finite(&reference_rows[r]);
        non_finite32(&reference_rows[r]);
        signs(&reference_rows[r]);
        zero_blocks(&reference_rows[r]);
        searched_maps(&reference_rows[r]);
    }
    restored_map();
    return CHECK_RESULT();
}
