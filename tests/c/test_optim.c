/*
 * test_optim.c - every optimizer with 8-bit and 32-bit state: every table against the definition, bit for bit, over
 * several steps
 *
 * Each buffer lies between guard bytes, one element off any alignment.  NUMERICS rules 20 to 29.
 */
#include <string.h>

#include "check.h"
#include "optim_subject.h"

enum { LONGEST = 1000003, TABLES = 8 };

static float linear_map[256], small_map[256], no_zero_map[256];

struct shape {
    int64_t n;
    bnb_dtype dtype;
    int bits;
    enum fill kind;
    int steps;
};

static void check_step(const struct shape *shape, const bnb_optim_config *c, struct subject *want, struct subject *got)
{
    for (int t = 0; t < bnb_cpu_all_count; t++) {
        if (!table_at(t))
            continue;
        memcpy(got[t].buffer[1].data, want->buffer[1].data, want->buffer[1].bytes);
        got[t].t.step = want->t.step;
        run_table(bnb_cpu_all[t], c, &got[t].t);
        const char *difference = subject_difference(&got[t], want);
        CHECK(!difference, "%s %s %s %d bits n %lld step %lld lr %g betas %g %g wd %g kind %d options %d%d%d%d%d: %s",
              bnb_cpu_all[t]->name, c->name, dtype_name[shape->dtype], shape->bits, (long long)shape->n,
              (long long)want->t.step, c->lr, c->beta1, c->beta2, c->weight_decay, (int)shape->kind, c->skip_zeros,
              c->nesterov, c->no_bias_correction, c->coupled_decay, c->stochastic_rounding, difference);
    }
}

static void check_tables(const struct shape *shape, const bnb_optim_config *c)
{
    struct subject want = subject_make(c->name, shape->n, shape->dtype, shape->bits), got[TABLES];
    for (int t = 0; t < bnb_cpu_all_count; t++)
        got[t] = subject_make(c->name, shape->n, shape->dtype, shape->bits);
    for (want.t.step = 1; want.t.step <= shape->steps; want.t.step++) {
        subject_gradient(&want, shape->kind, want.t.step);
        reference_step(c, &want.t);
        check_step(shape, c, &want, got);
    }
    CHECK(subject_free(&want), "the reference writes outside");
    for (int t = 0; t < bnb_cpu_all_count; t++)
        CHECK(subject_free(&got[t]), "%s %s %s %d bits n %lld: guards written", bnb_cpu_all[t]->name, c->name,
              dtype_name[shape->dtype], shape->bits, (long long)shape->n);
}

/* Rows that share a rule take every length through it once. */
static bool first_of_rule(const struct reference_row *row)
{
    return row->rule != ADAGRAD && strcmp(row->name, "lamb") != 0 && strcmp(row->name, "lars") != 0;
}

static void every_shape(const struct reference_row *row, bnb_dtype dtype, int bits)
{
    static const int64_t length[] = {1, 255, 256, 257, 4095, 4096, 4097};
    bnb_optim_config c = usual_config(row->name);
    for (size_t i = 0; i < sizeof length / sizeof length[0]; i++)
        check_tables(&(struct shape){length[i], dtype, bits, i % 2 ? FILL_BELL : FILL_HEAVY, 5}, &c);
    for (int kind = 0; kind < FILL_COUNT; kind++)
        check_tables(&(struct shape){2000, dtype, bits, (enum fill)kind, 5}, &c);
    for (int64_t n = 0; n <= 600 && first_of_rule(row); n++) {
        c.skip_zeros = n % 2;
        check_tables(&(struct shape){n, dtype, bits, n % 3 ? FILL_HEAVY : FILL_MIXED, 2}, &c);
    }
    if (!strcmp(row->name, "adam")) {
        c.skip_zeros = false;
        check_tables(&(struct shape){4095, dtype, bits, FILL_BELL, 20}, &c);
        check_tables(&(struct shape){LONGEST, dtype, bits, FILL_BELL, 2}, &c);
    }
}

/* Numbers and maps that every row has. */
static int common_options(bnb_optim_config *c)
{
    c[0].lr = 0.0;
    c[1].beta1 = 0.0;
    c[2].beta2 = c->beta2 > 0.0 ? 0.0 : 0.25;
    c[3].weight_decay = 0.0;
    c[4].gnorm_scale = 0.125;
    c[5].eps = 1e-3;
    c[6].qmap1 = linear_map;  /* searched, with two zeros */
    c[7].qmap2 = small_map;   /* searched, mostly zeros: one map alone is no default */
    c[8].gnorm_scale = 1e30;  /* overflows v: the new state is not finite */
    c[9].qmap1 = no_zero_map; /* what lies behind a short block is not the state of an element */
    c[10].qmap2 = no_zero_map;
    c[11].stochastic_rounding = true;
    c[12].qmap1 = c[12].qmap1 == subject_signed_map ? subject_unsigned_map : subject_signed_map; /* the other one */
    c[13].weight_decay = 1e-50; /* 0 in f32 */
    return 14;
}

/* Options of one rule; returns how many. */
static int own_options(const struct reference_row *row, bnb_optim_config *c)
{
    static const double clipped[2] = {9.0, 0.25}, free_step[2] = {1e-30, 0.25}, zero[2] = {9.0, 0.0};
    c[0].norms = clipped;
    c[1].norms = free_step;
    c[2].norms = zero;
    c[0].max_unorm = c[1].max_unorm = c[2].max_unorm = 0.02;
    switch (row->rule) {
    case ADAM:
        c[3].no_bias_correction = c[5].no_bias_correction = true;
        c[4].coupled_decay = c[5].coupled_decay = true;
        return 6;
    case ADEMAMIX:
        c[3].t_alpha = c[5].t_alpha = 3.0;
        c[4].t_beta3 = c[5].t_beta3 = 3.5;
        c[6].t_alpha = c[6].t_beta3 = 1000.0;
        c[7].alpha = 0.0;
        c[8].beta3 = 0.0;
        return 9;
    case MOMENTUM:
        c[3].nesterov = c[4].nesterov = true;
        c[4].weight_decay = 0.0;
        c[5].beta2 = 0.75;
        c[5].beta1 = 0.5;
        return 6;
    default:
        return 3;
    }
}

static void every_option(const struct reference_row *row, bnb_dtype dtype, int bits)
{
    enum { MOST = 32 };
    const struct shape shape = {1100, dtype, bits, FILL_HEAVY, 4};
    bnb_optim_config c[MOST];
    for (int i = 0; i < MOST; i++)
        c[i] = usual_config(row->name);
    int count = common_options(c);
    count += own_options(row, c + count);
    for (int i = 0; i < count; i++)
        for (int skip = 0; skip <= 1; skip++) {
            c[i].skip_zeros = skip;
            check_tables(&shape, &c[i]);
        }
}

/* One element whose average all but vanishes in the second step, under maps without a zero: what fills up a short block
 * must not set its scale. */
static void short_blocks(const struct reference_row *row, int bits)
{
    bnb_optim_config c = usual_config(row->name);
    c.qmap1 = no_zero_map;
    c.qmap2 = row->states == 2 ? no_zero_map : NULL;
    c.weight_decay = 0.0;
    struct subject want = subject_make(row->name, 1, BNB_F32, bits), got[TABLES];
    for (int t = 0; t < bnb_cpu_all_count; t++)
        got[t] = subject_make(row->name, 1, BNB_F32, bits);
    for (want.t.step = 1; want.t.step <= 6; want.t.step++) {
        store_at(want.buffer[1].data, BNB_F32, 0, want.t.step % 2 ? 1.0f : -0.9f);
        reference_step(&c, &want.t);
        check_step(&(struct shape){1, BNB_F32, bits, FILL_BELL, 6}, &c, &want, got);
    }
    CHECK(subject_free(&want), "the reference writes outside");
    for (int t = 0; t < bnb_cpu_all_count; t++)
        CHECK(subject_free(&got[t]), "%s %s: guards written", bnb_cpu_all[t]->name, row->name);
}

int main(void)
{
    bnb_create_linear_map(true, 8, true, linear_map);
    bnb_create_linear_map(true, 8, false, no_zero_map);
    bnb_create_dynamic_map(false, 3, 4, small_map);
    CHECK(bnb_cpu_all_count <= TABLES, "%d tables", bnb_cpu_all_count);
    for (int r = 0; r < REFERENCE_ROWS; r++)
        for (int dtype = 0; dtype < BNB_FLOATS; dtype++)
            for (int bits = 8; bits <= 32; bits += 24) {
                every_shape(&reference_rows[r], (bnb_dtype)dtype, bits);
                every_option(&reference_rows[r], (bnb_dtype)dtype, bits);
            }
    for (int r = 0; r < REFERENCE_ROWS; r++)
        for (int bits = 8; bits <= 32; bits += 24)
            short_blocks(&reference_rows[r], bits);
    return CHECK_RESULT();
}
