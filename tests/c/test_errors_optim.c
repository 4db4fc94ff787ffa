/*
 * test_errors_optim.c - bad arguments of the optimizer functions: status, a detail with argument and value, nothing
 * written
 *
 * A row sets one or two arguments of an otherwise good call.  What a step refuses, bnb_optim_norms() refuses too.
 */
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "check.h"
#include "optim_subject.h"

enum { TENSORS = 3, N_GOOD = 500 };

struct call { /* every argument of every function; the tensors before the last are good */
    bnb_exec ex;
    bnb_optim_config config;
    bnb_optim_tensor tensor;
    bnb_gradient gradient;
    bnb_clip_tensor history;
    int percentile;
    bool no_config, no_list, no_norms, no_report;
};

/* Where an argument lies within a call, and as what. */
enum kind { POINTER, BOOLEAN, INT, INT64, SIZE, DOUBLE, TEXT };
struct argument {
    enum kind kind;
    size_t place;
};
#define AT(kind, member) {kind, offsetof(struct call, member)}

/* Pointers become NULL, flags true, the text a name that no optimizer has (0: NULL). */
static void set(struct call *c, struct argument a, double v)
{
    void *place = (char *)c + a.place;
    const int64_t l = isfinite(v) ? (int64_t)v : 0;
    const int i = (int)l; /* enums too: int is their type */
    const size_t size = (size_t)l;
    const char *text = v != 0.0 ? "adamant" : NULL;
    const bool flag = true;
    const void *null = NULL;
    const struct {
        const void *value;
        size_t bytes;
    } as[] = {
        [POINTER] = {&null, sizeof null}, [BOOLEAN] = {&flag, sizeof flag}, [INT] = {&i, sizeof i},
        [INT64] = {&l, sizeof l},         [SIZE] = {&size, sizeof size},    [DOUBLE] = {&v, sizeof v},
        [TEXT] = {&text, sizeof text},
    };
    memcpy(place, as[a.kind].value, as[a.kind].bytes);
}

/* ---- bnb_optim_step() and bnb_optim_norms() */

struct row {
    struct argument argument;
    double value; /* 0 for a pointer: NULL */
    bnb_status status;
    const char *name, *shown; /* both must be in the detail */
};

static const struct row step_rows[] = {
    {AT(INT, ex.device), 1, BNB_EDEVICE, "CUDA", ""},
    {AT(BOOLEAN, no_config), 0, BNB_EINVAL, "config", "NULL"},
    {AT(SIZE, config.size), 16, BNB_EINVAL, "size", "16"},
    {AT(TEXT, config.name), 0, BNB_EINVAL, "name", "NULL"},
    {AT(TEXT, config.name), 1, BNB_EINVAL, "name", "adamant"},
    {AT(DOUBLE, config.lr), -0.5, BNB_EINVAL, "lr", "-0.5"},
    {AT(DOUBLE, config.lr), (double)NAN, BNB_EINVAL, "lr", "nan"},
    {AT(DOUBLE, config.lr), (double)INFINITY, BNB_EINVAL, "lr", "inf"},
    {AT(DOUBLE, config.beta1), 1.0, BNB_EINVAL, "beta1", "1"},
    {AT(DOUBLE, config.beta1), -0.25, BNB_EINVAL, "beta1", "-0.25"},
    {AT(DOUBLE, config.beta2), 1.5, BNB_EINVAL, "beta2", "1.5"},
    {AT(DOUBLE, config.beta2), (double)NAN, BNB_EINVAL, "beta2", "nan"},
    {AT(DOUBLE, config.beta3), -1.0, BNB_EINVAL, "beta3", "-1"},
    {AT(DOUBLE, config.alpha), -2.0, BNB_EINVAL, "alpha", "-2"},
    {AT(DOUBLE, config.eps), -1e-8, BNB_EINVAL, "eps", "-1e-08"},
    {AT(DOUBLE, config.eps), (double)NAN, BNB_EINVAL, "eps", "nan"},
    {AT(DOUBLE, config.weight_decay), -0.01, BNB_EINVAL, "weight_decay", "-0.01"},
    {AT(DOUBLE, config.gnorm_scale), (double)NAN, BNB_EINVAL, "gnorm_scale", "nan"},
    {AT(DOUBLE, config.gnorm_scale), (double)INFINITY, BNB_EINVAL, "gnorm_scale", "inf"},
    {AT(POINTER, config.qmap1), 0, BNB_EINVAL, "qmap1", "NULL"},
    {AT(POINTER, config.qmap2), 0, BNB_EINVAL, "qmap2", "NULL"},
    {AT(BOOLEAN, no_list), 0, BNB_EINVAL, "tensors", "NULL"},
    {AT(INT64, tensor.n), -1, BNB_EINVAL, "tensors[2].n", "-1"},
    {AT(INT, tensor.dtype), 3, BNB_EDTYPE, "tensors[2].dtype", "3"},
    {AT(INT, tensor.bits), 16, BNB_EINVAL, "tensors[2].bits", "16"},
    {AT(INT, tensor.bits), 0, BNB_EINVAL, "tensors[2].bits", "0"},
    {AT(INT64, tensor.step), 0, BNB_EINVAL, "tensors[2].step", "0"},
    {AT(POINTER, tensor.p), 0, BNB_EINVAL, "tensors[2].p", "NULL"},
    {AT(POINTER, tensor.state1), 0, BNB_EINVAL, "tensors[2].state1", "NULL"},
    {AT(POINTER, tensor.state2), 0, BNB_EINVAL, "tensors[2].state2", "NULL"},
    {AT(POINTER, tensor.absmax1), 0, BNB_EINVAL, "tensors[2].absmax1", "NULL"},
    {AT(POINTER, tensor.absmax2), 0, BNB_EINVAL, "tensors[2].absmax2", "NULL"},
    {AT(DOUBLE, config.lr), -1e-300, BNB_EINVAL, "lr", "-1e-300"},
    {AT(DOUBLE, config.beta3), 1.0, BNB_EINVAL, "beta3", "1"},
    {AT(DOUBLE, config.alpha), (double)INFINITY, BNB_EINVAL, "alpha", "inf"},
    {AT(DOUBLE, config.t_alpha), -1.0, BNB_EINVAL, "t_alpha", "-1"},
    {AT(DOUBLE, config.t_alpha), (double)NAN, BNB_EINVAL, "t_alpha", "nan"},
    {AT(DOUBLE, config.t_alpha), (double)INFINITY, BNB_EINVAL, "t_alpha", "inf"},
    {AT(DOUBLE, config.t_beta3), -0.5, BNB_EINVAL, "t_beta3", "-0.5"},
    {AT(DOUBLE, config.t_beta3), (double)NAN, BNB_EINVAL, "t_beta3", "nan"},
    {AT(DOUBLE, config.weight_decay), (double)INFINITY, BNB_EINVAL, "weight_decay", "inf"},
    {AT(DOUBLE, config.gnorm_scale), -1.0, BNB_EINVAL, "gnorm_scale", "-1"},
    {AT(DOUBLE, config.max_unorm), -0.1, BNB_EINVAL, "max_unorm", "-0.1"},
    {AT(DOUBLE, config.max_unorm), (double)NAN, BNB_EINVAL, "max_unorm", "nan"},
    {AT(DOUBLE, config.max_unorm), (double)INFINITY, BNB_EINVAL, "max_unorm", "inf"},
    {AT(BOOLEAN, config.nesterov), 1, BNB_EINVAL, "nesterov", "adam"},
    {AT(INT, tensor.bits), -8, BNB_EINVAL, "tensors[2].bits", "-8"},
    {AT(INT64, tensor.step), -3, BNB_EINVAL, "tensors[2].step", "-3"},
};

/* Rows and their options: the option that one row has is refused by the others. */
struct option {
    const char *row;
    struct argument argument[2];
    double value[2];
    const char *name, *shown; /* NULL: the call is good */
};

#define NOT_USED AT(DOUBLE, config.lr)
static const struct option options[] = {
    {"lamb", {AT(BOOLEAN, config.nesterov), NOT_USED}, {1, 0}, "nesterov", "lamb"},
    {"ademamix", {AT(BOOLEAN, config.nesterov), NOT_USED}, {1, 0}, "nesterov", "ademamix"},
    {"lion", {AT(BOOLEAN, config.nesterov), NOT_USED}, {1, 0}, "nesterov", "lion"},
    {"rmsprop", {AT(BOOLEAN, config.nesterov), NOT_USED}, {1, 0}, "nesterov", "rmsprop"},
    {"adagrad", {AT(BOOLEAN, config.nesterov), NOT_USED}, {1, 0}, "nesterov", "adagrad"},
    {"momentum", {AT(BOOLEAN, config.nesterov), NOT_USED}, {1, 0}, NULL, NULL},
    {"lars", {AT(BOOLEAN, config.nesterov), NOT_USED}, {1, 0}, NULL, NULL},
    {"momentum", {AT(BOOLEAN, config.nesterov), AT(DOUBLE, config.beta2)}, {1, 0.25}, "dampening", "0.25"},
    {"lars", {AT(BOOLEAN, config.nesterov), AT(DOUBLE, config.beta2)}, {1, 0.25}, "nesterov", "0.25"},
    {"momentum", {AT(BOOLEAN, config.nesterov), AT(DOUBLE, config.beta1)}, {1, 0}, "nesterov", "momentum 0"},
    {"momentum", {AT(DOUBLE, config.beta2), NOT_USED}, {0.25, 0}, NULL, NULL},
    {"adam", {AT(BOOLEAN, config.no_bias_correction), AT(BOOLEAN, config.coupled_decay)}, {1, 1}, NULL, NULL},
    {"lamb", {AT(BOOLEAN, config.no_bias_correction), AT(BOOLEAN, config.coupled_decay)}, {1, 1}, NULL, NULL},
    {"ademamix", {AT(BOOLEAN, config.no_bias_correction), NOT_USED}, {1, 0}, "no_bias_correction", "ademamix"},
    {"ademamix", {AT(BOOLEAN, config.coupled_decay), NOT_USED}, {1, 0}, "coupled_decay", "ademamix"},
    {"momentum", {AT(BOOLEAN, config.no_bias_correction), NOT_USED}, {1, 0}, "no_bias_correction", "momentum"},
    {"lars", {AT(BOOLEAN, config.coupled_decay), NOT_USED}, {1, 0}, "coupled_decay", "lars"},
    {"lion", {AT(BOOLEAN, config.coupled_decay), NOT_USED}, {1, 0}, "coupled_decay", "lion"},
    {"rmsprop", {AT(BOOLEAN, config.no_bias_correction), NOT_USED}, {1, 0}, "no_bias_correction", "rmsprop"},
    {"adagrad", {AT(BOOLEAN, config.coupled_decay), NOT_USED}, {1, 0}, "coupled_decay", "adagrad"},
    {"ademamix", {AT(DOUBLE, config.t_beta3), AT(DOUBLE, config.beta1)}, {10, 0}, "beta1", "t_beta3"},
    {"ademamix", {AT(DOUBLE, config.t_beta3), AT(DOUBLE, config.beta3)}, {10, 0}, "beta3", "t_beta3"},
    {"ademamix", {AT(DOUBLE, config.t_alpha), AT(DOUBLE, config.beta1)}, {10, 0}, NULL, NULL},
    {"ademamix", {AT(DOUBLE, config.t_alpha), AT(DOUBLE, config.t_beta3)}, {10, 10}, NULL, NULL},
    {"lion", {AT(POINTER, tensor.state2), AT(POINTER, tensor.absmax2)}, {0, 0}, NULL, NULL},
    {"lion", {AT(POINTER, config.qmap2), NOT_USED}, {0, 0}, NULL, NULL},
    {"lion", {AT(POINTER, config.qmap1), NOT_USED}, {0, 0}, "qmap1", "NULL"},
    {"adagrad", {AT(POINTER, tensor.absmax1), NOT_USED}, {0, 0}, "tensors[2].absmax1", "adagrad"},
    {"ademamix", {AT(POINTER, tensor.state2), NOT_USED}, {0, 0}, "tensors[2].state2", "ademamix"},
    {"lamb", {AT(POINTER, tensor.absmax2), NOT_USED}, {0, 0}, "tensors[2].absmax2", "lamb"},
    {"adam", {AT(INT, tensor.bits), AT(POINTER, tensor.absmax2)}, {32, 0}, NULL, NULL},
    {"adam", {AT(INT64, tensor.n), AT(POINTER, tensor.p)}, {0, 0}, NULL, NULL},
    {"adam", {AT(POINTER, tensor.g), AT(POINTER, tensor.p)}, {0, 0}, NULL, NULL},
};

/* A good call, writing to the buffers of s alone. */
static struct call good_call(const char *row, const struct subject *s, float history[100])
{
    static const float g[8] = {1.0f};
    return (struct call){.ex = {.size = sizeof(bnb_exec), .ordinal = absent_card()},
                         .config = usual_config(row),
                         .tensor = s->t,
                         .gradient = {g, 8, BNB_F32},
                         .history = {.history = history, .step = 1},
                         .percentile = 5};
}

static bnb_status run_step(const struct call *c, const bnb_optim_tensor *good, double *norms)
{
    bnb_optim_tensor tensors[TENSORS] = {*good, *good, c->tensor};
    const bnb_optim_config *config = c->no_config ? NULL : &c->config;
    if (norms)
        return bnb_optim_norms(&c->ex, config, c->no_list ? NULL : tensors, TENSORS, c->no_norms ? NULL : norms);
    return bnb_optim_step(&c->ex, config, c->no_list ? NULL : tensors, TENSORS);
}

/* BNB_EDEVICE stands for what a call for absent_card() gives. */
static void expect(bnb_status status, bnb_status wanted, const char *name, const char *shown, const char *what)
{
    if (wanted == BNB_EDEVICE) {
        wanted = absent_card_status();
        name = absent_card_word();
    }
    CHECK(status == wanted && bnb_last_status() == status, "%s '%s': status %d, expected %d", what, name, (int)status,
          (int)wanted);
    CHECK(strstr(bnb_detail(), what), "'%s' lacks '%s'", bnb_detail(), what);
    CHECK(strstr(bnb_detail(), name) && strstr(bnb_detail(), shown), "%s: '%s' lacks '%s' or '%s'", what, bnb_detail(),
          name, shown);
}

/* The call is refused as a step and as a request for norms, and nothing is written; it is good where name is NULL. */
static void check_call(const struct call *c, const char *row, const struct subject *s, const struct row *r)
{
    double norms[TENSORS][2];
    struct subject before = subject_make(row, N_GOOD, BNB_F32, s->t.bits);
    subject_copy(&before, s);
    memset(norms, 0x55, sizeof norms);
    const bnb_status as_norms = run_step(c, &s->t, norms[0]);
    if (r->name) {
        expect(as_norms, r->status, r->name, r->shown, "optim_norms");
        for (size_t i = 0; i < sizeof norms; i++)
            CHECK(((const uint8_t *)norms)[i] == 0x55, "%s: byte %zu of norms was written", r->name, i);
        expect(run_step(c, &s->t, NULL), r->status, r->name, r->shown, "optim_step");
        CHECK(!subject_difference(s, &before), "%s: %s was written", r->name, subject_difference(s, &before));
    } else {
        CHECK(as_norms == BNB_OK && !subject_difference(s, &before), "%s: %s", row, bnb_detail());
        CHECK(run_step(c, &s->t, NULL) == BNB_OK && subject_difference(s, &before), "%s: %s", row, bnb_detail());
    }
    CHECK(subject_free(&before), "guards written");
}

static void steps(void)
{
    float history[100];
    for (size_t i = 0; i < sizeof step_rows / sizeof step_rows[0]; i++) {
        struct subject s = subject_make("adam", N_GOOD, BNB_F32, 8);
        struct call c = good_call("adam", &s, history);
        subject_gradient(&s, FILL_BELL, 1);
        set(&c, step_rows[i].argument, step_rows[i].value);
        check_call(&c, "adam", &s, &step_rows[i]);
        CHECK(subject_free(&s), "guards written");
    }
    for (size_t i = 0; i < sizeof options / sizeof options[0]; i++) {
        const struct option *o = &options[i];
        struct subject s = subject_make(o->row, N_GOOD, BNB_F32, o->value[0] == 32.0 ? 32 : 8);
        struct call c = good_call(o->row, &s, history);
        subject_gradient(&s, FILL_BELL, 1);
        set(&c, o->argument[0], o->value[0]);
        if (o->argument[1].place != offsetof(struct call, config.lr))
            set(&c, o->argument[1], o->value[1]);
        check_call(&c, o->row, &s, &(struct row){{DOUBLE, 0}, 0, BNB_EINVAL, o->name, o->shown});
        CHECK(subject_free(&s), "guards written");
    }
}

/* Norms that a step needs, or has no room for. */
static void norms(void)
{
    struct subject s = subject_make("lamb", N_GOOD, BNB_F32, 8), before = subject_make("lamb", N_GOOD, BNB_F32, 8);
    struct call c = good_call("lamb", &s, NULL);
    float unorm = -1.0f, count = 4.0f;
    double room[TENSORS][2];
    c.config.max_unorm = 0.5;
    c.tensor.unorm = &unorm;
    c.tensor.step_count = &count;
    expect(run_step(&c, &s.t, NULL), BNB_EINVAL, "norms", "0.5", "optim_step");
    CHECK(!subject_difference(&s, &before) && unorm == -1.0f && count == 4.0f, "a refused step wrote something");
    CHECK(run_step(&c, &s.t, room[0]) == BNB_OK, "norms with max_unorm: %s", bnb_detail());
    c.no_norms = true;
    expect(run_step(&c, &s.t, room[0]), BNB_EINVAL, "norms", "3 x 2", "optim_norms");
    c.config.norms = room[0];
    CHECK(run_step(&c, &s.t, NULL) == BNB_OK && count == 5.0f, "step with norms: %s", bnb_detail());
    CHECK(subject_free(&s) && subject_free(&before), "guards written");
}

/* ---- bnb_gradient_norms() and bnb_clip_percentile() */

static const struct row gradient_rows[] = {
    {AT(SIZE, ex.size), 8, BNB_EINVAL, "size", "8"},
    {AT(INT, ex.device), 1, BNB_EDEVICE, "CUDA", ""},
    {AT(BOOLEAN, no_list), 0, BNB_EINVAL, "gradients", "NULL"},
    {AT(BOOLEAN, no_norms), 0, BNB_EINVAL, "norms", "NULL"},
    {AT(INT64, gradient.n), -2, BNB_EINVAL, "gradients[2]", "-2"},
    {AT(POINTER, gradient.g), 0, BNB_EINVAL, "gradients[2]", "NULL"},
    {AT(INT, gradient.dtype), 3, BNB_EDTYPE, "gradients[2].dtype", "3"},
    {AT(INT, gradient.dtype), -1, BNB_EDTYPE, "gradients[2].dtype", "-1"},
};

static const struct row clip_rows[] = {
    {AT(SIZE, ex.size), 8, BNB_EINVAL, "size", "8"},
    {AT(INT, ex.device), 1, BNB_EDEVICE, "CUDA", ""},
    {AT(INT, percentile), 100, BNB_EINVAL, "percentile", "100"},
    {AT(INT, percentile), -1, BNB_EINVAL, "percentile", "-1"},
    {AT(INT, percentile), 1000000, BNB_EINVAL, "percentile", "1000000"},
    {AT(BOOLEAN, no_list), 0, BNB_EINVAL, "tensors", "NULL"},
    {AT(BOOLEAN, no_norms), 0, BNB_EINVAL, "norms", "NULL"},
    {AT(BOOLEAN, no_report), 0, BNB_EINVAL, "report", "NULL"},
    {AT(POINTER, history.history), 0, BNB_EINVAL, "tensors[2].history", "NULL"},
    {AT(INT64, history.step), 0, BNB_EINVAL, "tensors[2].step", "0"},
    {AT(INT64, history.step), -9, BNB_EINVAL, "tensors[2].step", "-9"},
};

/* What both functions write, filled with a pattern. */
struct written {
    float history[2][100], report[TENSORS][3];
    double norms[TENSORS];
};

static bnb_status run_gradients(const struct call *c, struct written *w)
{
    const float g[4] = {1.0f, 2.0f, 3.0f, 4.0f};
    const bnb_gradient list[TENSORS] = {{g, 4, BNB_F32}, {g, 8, BNB_BF16}, c->gradient};
    return bnb_gradient_norms(&c->ex, c->no_list ? NULL : list, TENSORS, c->no_norms ? NULL : w->norms);
}

static bnb_status run_clip(const struct call *c, struct written *w)
{
    static const double norms[TENSORS] = {1.0, 4.0, 9.0};
    const bnb_clip_tensor list[TENSORS] = {
        {.history = w->history[0], .step = 1}, {.history = w->history[0], .step = 7}, c->history};
    return bnb_clip_percentile(&c->ex, c->no_list ? NULL : list, TENSORS, c->percentile, c->no_norms ? NULL : norms,
                               c->no_report ? NULL : w->report[0]);
}

static void check_row(bnb_status (*run)(const struct call *c, struct written *w), const struct row *r, const char *what)
{
    struct written w, before;
    struct subject s = subject_make("adam", 1, BNB_F32, 8);
    struct call c = good_call("adam", &s, w.history[1]);
    memset(&w, 0x5a, sizeof w);
    memcpy(&before, &w, sizeof w);
    set(&c, r->argument, r->value);
    expect(run(&c, &w), r->status, r->name, r->shown, what);
    CHECK(!memcmp(&before, &w, sizeof w), "%s '%s': something was written", what, r->name);
    CHECK(subject_free(&s), "guards written");
}

static void lists(void)
{
    struct written w;
    struct subject s = subject_make("adam", 1, BNB_F32, 8);
    const struct call c = good_call("adam", &s, w.history[1]);
    for (size_t i = 0; i < sizeof gradient_rows / sizeof gradient_rows[0]; i++)
        check_row(run_gradients, &gradient_rows[i], "gradient_norms");
    for (size_t i = 0; i < sizeof clip_rows / sizeof clip_rows[0]; i++)
        check_row(run_clip, &clip_rows[i], "clip_percentile");
    memset(&w, 0, sizeof w);
    CHECK(run_gradients(&c, &w) == BNB_OK && w.norms[0] == 30.0 && w.norms[2] == 1.0, "%s", bnb_detail());
    CHECK(run_clip(&c, &w) == BNB_OK && w.report[2][0] == 3.0f, "%s", bnb_detail());
    CHECK(subject_free(&s), "guards written");
}

/* The table of names and the checks know the same rows. */
static void names(void)
{
    for (int i = 0; i < REFERENCE_ROWS; i++) {
        CHECK(bnb_optim_name(i) && bnb_optim_states(i) == reference_find(bnb_optim_name(i))->states, "row %d", i);
        for (int k = 0; k < i; k++)
            CHECK(strcmp(bnb_optim_name(i), bnb_optim_name(k)), "rows %d and %d are both %s", i, k, bnb_optim_name(i));
    }
    CHECK(!bnb_optim_name(REFERENCE_ROWS) && bnb_optim_states(REFERENCE_ROWS) == 0, "a row behind the last");
    CHECK(!bnb_optim_name(-1) && !bnb_optim_name(1000) && bnb_optim_states(-1) == 0 && bnb_optim_states(1000) == 0,
          "a row outside the optimizer table");
}

int main(void)
{
    steps();
    norms();
    lists();
    names();
    return CHECK_RESULT();
}
