/*
 * ops_optim.c - the operators of the optimizer classes: all parameters of a group in one call, and gradient clipping
 */
#include "ops.h"
#include "optim_call.h"

struct bnb_group bnb_take_group(struct bnb_call *c)
{
    struct bnb_group l = {.config = {.name = bnb_take_string(c)}};
    l.p = bnb_take_tensors(c, "p");
    l.g = bnb_take_tensors(c, "g");
    c->host_too = true;
    l.state1 = bnb_take_tensors(c, "state1");
    l.state2 = bnb_take_tensors(c, "state2");
    c->host_too = false;
    l.absmax1 = bnb_take_tensors(c, "absmax1");
    l.absmax2 = bnb_take_tensors(c, "absmax2");
    l.qmaps = bnb_take_tensors(c, "qmaps");
    l.steps = bnb_take_tensors(c, "steps");
    l.unorm = bnb_take_tensors(c, "unorm");
    bnb_take_options(c, &l);
    return l;
}

void bnb_take_options(struct bnb_call *c, struct bnb_group *l)
{
    bnb_optim_config *config = &l->config;
    config->size = sizeof *config;
    config->gnorm_scale = 1.0;
    l->gnorm_scale = bnb_take_optional(c, "gnorm_scale");
    l->norms = bnb_take_optional(c, "norms");
    l->lr_tensor = bnb_take_optional(c, "lr_tensor");
    l->step = bnb_take_ints(c);
    l->seed = bnb_take_ints(c);
    double *const number[] = {&config->lr,           &config->beta1,    &config->beta2,   &config->beta3,
                              &config->alpha,        &config->t_alpha,  &config->t_beta3, &config->eps,
                              &config->weight_decay, &config->max_unorm};
    for (size_t i = 0; i < sizeof number / sizeof number[0]; i++)
        *number[i] = bnb_take_float(c);
    config->skip_zeros = bnb_take_bool(c);
    config->nesterov = bnb_take_bool(c);
    config->no_bias_correction = !bnb_take_bool(c);
    config->coupled_decay = !bnb_take_bool(c);
    config->stochastic_rounding = bnb_take_bool(c);
    const int64_t pages = bnb_take_int(c);
    if (pages < 0)
        bnb_call_fail(c, BNB_EINVAL, "%s: page_bytes is %lld, expected 0 or more", c->op, (long long)pages);
    config->page_bytes = (size_t)pages;
}

static void check_length(struct bnb_call *c, const char *name, size_t count, size_t expected, const char *why)
{
    if (count != expected)
        bnb_call_fail(c, BNB_EINVAL, "%s: %s has %zu entries, expected %zu (%s)", c->op, name, count, expected, why);
}

static void check_lengths(struct bnb_call *c, const struct bnb_group *l, int states)
{
    const size_t count = l->p.count;
    size_t count8 = 0;
    for (size_t i = 0; i < l->state1.count; i++)
        count8 += l->state1.items[i].dtype == bnb_torch_dtypes[BNB_TORCH_uint8];
    check_length(c, "g", l->g.count, count, "one per parameter");
    check_length(c, "state1", l->state1.count, count, "one per parameter");
    check_length(c, "state2", l->state2.count, states == 2 ? count : 0, "one per parameter and second state");
    check_length(c, "absmax1", l->absmax1.count, count8, "one per uint8 state1");
    check_length(c, "absmax2", l->absmax2.count, states == 2 ? count8 : 0, "one per uint8 state2");
    check_length(c, "qmaps", l->qmaps.count, count8 ? (size_t)states : 0, "one per state if any is uint8");
    check_length(c, "step", l->step.count, l->steps.count ? 0 : count, "one per parameter, or steps");
    if (l->steps.count)
        check_length(c, "steps", l->steps.count, count, "one per parameter, or step");
    if (l->unorm.count)
        check_length(c, "unorm", l->unorm.count, count, "one per parameter, or none");
    if (l->seed.count || l->config.stochastic_rounding)
        check_length(c, "seed", l->seed.count, count, "one per parameter, with stochastic_rounding");
}

struct bnb_parameter *bnb_deal_group(struct bnb_call *c, struct bnb_group *l)
{
    const size_t count = l->p.count;
    const int states = bnb_states_of(l->config.name);
    check_lengths(c, l, states);
    const float *scale = bnb_read_floats(c, &l->gnorm_scale, (int64_t)count, " (one per parameter)");
    struct bnb_parameter *q = bnb_call_alloc(c, count, sizeof *q);
    if (!q || !bnb_call_ok(c))
        return NULL;
    size_t next8 = 0;
    for (size_t i = 0; i < count; i++) {
        q[i] = (struct bnb_parameter){.p = &l->p.items[i], .g = &l->g.items[i], .state1 = &l->state1.items[i]};
        const bool is8 = q[i].state1->dtype == bnb_torch_dtypes[BNB_TORCH_uint8];
        if (states == 2)
            q[i].state2 = &l->state2.items[i];
        if (is8)
            q[i].absmax1 = &l->absmax1.items[next8];
        if (is8 && states == 2)
            q[i].absmax2 = &l->absmax2.items[next8];
        next8 += is8;
        if (l->steps.count)
            q[i].step_count = &l->steps.items[i];
        else
            q[i].step = l->step.values[i];
        if (l->unorm.count)
            q[i].unorm = &l->unorm.items[i];
        if (l->seed.count)
            q[i].seed = (uint64_t)l->seed.values[i];
        q[i].gnorm_scale = scale ? scale + i : NULL;
    }
    return q;
}

void bnb_finish_config(struct bnb_call *c, struct bnb_group *l)
{
    if (l->qmaps.count > 0)
        l->config.qmap1 = bnb_read_floats(c, &l->qmaps.items[0], 256, " (an 8-bit map)");
    if (l->qmaps.count > 1)
        l->config.qmap2 = bnb_read_floats(c, &l->qmaps.items[1], 256, " (an 8-bit map)");
    l->config.lr_value = bnb_read_floats(c, &l->lr_tensor, 1, "");
    if (!l->norms.present || !bnb_call_ok(c))
        return;
    bnb_check_dtype(c, &l->norms, BNB_TORCH_float64);
    bnb_check_count(c, &l->norms, 2 * (int64_t)l->p.count, " (two per parameter)");
    bnb_call_stage(c, &l->norms, NULL, BNB_STAGE_READ);
    l->config.norms = bnb_read(c, &l->norms);
}

/* _optimizer_step(str name, Tensor(a!)[] p, Tensor[] g, Tensor(b!)[] state1, Tensor(c!)[] state2, Tensor(d!)[] absmax1,
 *     Tensor(e!)[] absmax2, Tensor[] qmaps, Tensor(f!)[] steps, Tensor(h!)[] unorm, Tensor? gnorm_scale, Tensor? norms,
 *     Tensor? lr_tensor, int[] step, int[] seed, float lr, float beta1, float beta2, float beta3, float alpha,
 *     float t_alpha, float t_beta3, float eps, float weight_decay, float max_unorm, bool skip_zeros, bool nesterov,
 *     bool bias_correction, bool adam_w_mode, bool stochastic_rounding, int page_bytes) -> () */
void bnb_op_optimizer_step(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    (void)outputs;
    bnb_call_begin(&c, "_optimizer_step", stack, inputs, 31);
    struct bnb_group l = bnb_take_group(&c);
    bnb_check_optimizer(&c, &l.config);
    struct bnb_parameter *q = bnb_deal_group(&c, &l);
    bnb_finish_config(&c, &l);
    bnb_step_parameters(&c, &l.config, q, q ? l.p.count : 0);
    bnb_call_end(&c);
}

/* _optimizer_norms(the arguments of _optimizer_step) -> Tensor: f64 [count, 2] */
void bnb_op_optimizer_norms(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    (void)outputs;
    bnb_call_begin(&c, "_optimizer_norms", stack, inputs, 31);
    struct bnb_group l = bnb_take_group(&c);
    bnb_check_optimizer(&c, &l.config);
    struct bnb_parameter *q = bnb_deal_group(&c, &l);
    bnb_finish_config(&c, &l);
    const bnb_optim_tensor *tensors = bnb_open_parameters(&c, &l.config, q, q ? l.p.count : 0);
    const struct bnb_tensor norms = bnb_measure_parameters(&c, &l.config, tensors, q ? l.p.count : 0);
    bnb_give(&c, &norms);
    bnb_call_end(&c);
}

/* _gradient_norms(Tensor[] g) -> Tensor: f64 [count], sums of squares */
void bnb_op_gradient_norms(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    (void)outputs;
    bnb_call_begin(&c, "_gradient_norms", stack, inputs, 1);
    struct bnb_tensors g = bnb_take_tensors(&c, "g");
    bnb_gradient *gradients = bnb_call_alloc(&c, g.count, sizeof *gradients);
    for (size_t i = 0; gradients && i < g.count && bnb_call_ok(&c); i++) {
        gradients[i].n = g.items[i].n;
        gradients[i].dtype = bnb_check_float_tensor(&c, &g.items[i]);
        bnb_call_stage(&c, &g.items[i], NULL, BNB_STAGE_READ);
        gradients[i].g = bnb_read(&c, &g.items[i]);
    }
    const int64_t shape = (int64_t)g.count;
    const struct bnb_tensor norms =
        bnb_new_tensor(&c, "norms", (struct bnb_ints){&shape, 1}, bnb_torch_dtypes[BNB_TORCH_float64]);
    double *values = bnb_call_ok(&c) && g.count ? bnb_write(&c, &norms) : NULL;
    if (bnb_call_ok(&c))
        c.status = bnb_gradient_norms(&c.exec, gradients, g.count, values);
    bnb_give(&c, &norms);
    bnb_call_end(&c);
}

/* _percentile_clip(Tensor(a!)[] gnorm_vec, Tensor norms, Tensor[] steps, int[] step, int percentile) -> Tensor:
 *     f32 [count, 3], the norm, its limit and the scale of each gradient */
void bnb_op_percentile_clip(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    (void)outputs;
    bnb_call_begin(&c, "_percentile_clip", stack, inputs, 5);
    struct bnb_tensors history = bnb_take_tensors(&c, "gnorm_vec");
    struct bnb_tensor norms = bnb_take_tensor(&c, "norms");
    struct bnb_tensors steps = bnb_take_tensors(&c, "steps");
    const struct bnb_ints step = bnb_take_ints(&c);
    const int64_t percentile = bnb_take_int(&c), count = (int64_t)history.count;
    check_length(&c, "step", steps.count + step.count, history.count, "one per history, with steps");
    bnb_check_dtype(&c, &norms, BNB_TORCH_float64);
    bnb_check_count(&c, &norms, count, " (one per history)");
    bnb_call_stage(&c, &norms, NULL, BNB_STAGE_READ);
    bnb_clip_tensor *tensors = bnb_call_alloc(&c, history.count, sizeof *tensors);
    for (size_t i = 0; tensors && i < history.count && bnb_call_ok(&c); i++) {
        struct bnb_tensor *h = &history.items[i];
        bnb_check_dtype(&c, h, BNB_TORCH_float32);
        bnb_check_count(&c, h, 100, " (a history)");
        bnb_call_stage(&c, h, NULL, BNB_STAGE_READ | BNB_STAGE_WRITE);
        tensors[i].history = bnb_write(&c, h);
        tensors[i].step = step.count ? step.values[i] : 0;
        tensors[i].step_count = steps.count ? bnb_write(&c, &steps.items[i]) : NULL;
    }
    const int64_t shape[2] = {count, 3};
    const struct bnb_tensor report =
        bnb_new_tensor(&c, "report", (struct bnb_ints){shape, 2}, bnb_torch_dtypes[BNB_TORCH_float32]);
    float *values = bnb_call_ok(&c) && count ? bnb_write(&c, &report) : NULL;
    if (bnb_call_ok(&c)) {
        const int rank = percentile < 0 || percentile > 100 ? -1 : (int)percentile;
        c.status = bnb_clip_percentile(&c.exec, tensors, history.count, rank, bnb_read(&c, &norms), values);
    }
    bnb_give(&c, &report);
    bnb_call_end(&c);
}
