/*
 * api_optim.c - optimizer steps and gradient clipping: the checks, then the table of the device
 */
#include <math.h>

#include "core/check.h"

/* The learning rate is checked where the host can read it. */
static bnb_status check_ranges(const char *f, const bnb_optim_config *c, double lr)
{
    const struct {
        const char *name;
        double value, end;
    } range[] = {
        {"lr", lr, INFINITY},
        {"beta1", c->beta1, 1.0},
        {"beta2", c->beta2, 1.0},
        {"beta3", c->beta3, 1.0},
        {"alpha", c->alpha, INFINITY},
        {"t_alpha", c->t_alpha, INFINITY},
        {"t_beta3", c->t_beta3, INFINITY},
        {"eps", c->eps, INFINITY},
        {"weight_decay", c->weight_decay, INFINITY},
        {"gnorm_scale", c->gnorm_scale, INFINITY},
        {"max_unorm", c->max_unorm, INFINITY},
    };
    for (size_t i = 0; i < sizeof range / sizeof range[0]; i++)
        if (!(range[i].value >= 0.0 && range[i].value < range[i].end))
            return bnb_fail(BNB_EINVAL, "%s: %s is %g, expected a number in [0, %g)", f, range[i].name, range[i].value,
                            range[i].end);
    return BNB_OK;
}

/* Options that only some rows have. */
static bnb_status check_options(const char *f, const bnb_optim_config *c, const struct bnb_optim_row *row)
{
    if (c->nesterov && row->rule != BNB_RULE_MOMENTUM)
        return bnb_fail(BNB_EINVAL, "%s: nesterov is true, expected false for '%s'", f, c->name);
    if (c->nesterov && (c->beta1 == 0.0 || c->beta2 != 0.0))
        return bnb_fail(BNB_EINVAL, "%s: nesterov is true with momentum %g and dampening %g, expected > 0 and 0", f,
                        c->beta1, c->beta2);
    if ((c->no_bias_correction || c->coupled_decay) && row->rule != BNB_RULE_ADAM)
        return bnb_fail(BNB_EINVAL, "%s: %s is true, expected false for '%s'", f,
                        c->coupled_decay ? "coupled_decay" : "no_bias_correction", c->name);
    if (c->t_beta3 > 0.0 && row->rule == BNB_RULE_ADEMAMIX && (c->beta1 == 0.0 || c->beta3 == 0.0))
        return bnb_fail(BNB_EINVAL, "%s: beta1 is %g and beta3 %g, expected numbers above 0 with t_beta3", f, c->beta1,
                        c->beta3);
    return BNB_OK;
}

static bnb_status check_config(const char *f, const bnb_exec *ex, const bnb_optim_config *c)
{
    if (!c)
        return bnb_fail(BNB_EINVAL, "%s: config is NULL, expected a bnb_optim_config", f);
    if (c->size < sizeof *c)
        return bnb_fail(BNB_EINVAL, "%s: config->size is %zu, expected at least sizeof(bnb_optim_config) = %zu", f,
                        c->size, sizeof *c);
    const struct bnb_optim_row *row = c->name ? bnb_optim_find(c->name) : NULL;
    if (!row)
        return bnb_fail(BNB_EINVAL,
                        "%s: optimizer_name is '%s', expected one of bnb_optim_name(): 'adam', 'lamb', 'ademamix', "
                        "'momentum', 'lars', 'lion', 'rmsprop', 'adagrad'",
                        f, c->name ? c->name : "NULL");
    const bool readable = c->lr_value && (!ex || ex->device == BNB_CPU);
    const bnb_status status = check_ranges(f, c, readable ? (double)*c->lr_value : c->lr);
    return status ? status : check_options(f, c, row);
}

static bnb_status check_tensor(const char *f, const bnb_optim_tensor *t, size_t i, const struct bnb_optim_row *row)
{
    if (t->n < 0)
        return bnb_fail(BNB_EINVAL, "%s: tensors[%zu].n is %lld, expected 0 or more", f, i, (long long)t->n);
    if (t->n == 0 || !t->g)
        return BNB_OK;
    if (t->dtype != BNB_F32 && t->dtype != BNB_F16 && t->dtype != BNB_BF16)
        return bnb_fail(BNB_EDTYPE, "%s: tensors[%zu].dtype is %d, expected f32, f16 or bf16", f, i, (int)t->dtype);
    if (t->bits != 8 && t->bits != 32)
        return bnb_fail(BNB_EINVAL, "%s: tensors[%zu].bits is %d, expected 8 or 32", f, i, t->bits);
    if (t->step < 1 && !t->step_count)
        return bnb_fail(BNB_EINVAL, "%s: tensors[%zu].step is %lld, expected 1 or more", f, i, (long long)t->step);
    const struct {
        const char *name;
        bool needed;
        const void *ptr;
    } buffer[] = {
        {"p", true, t->p},
        {"state1", true, t->state1},
        {"state2", row->states == 2, t->state2},
        {"absmax1", t->bits == 8, t->absmax1},
        {"absmax2", t->bits == 8 && row->states == 2, t->absmax2},
    };
    for (size_t k = 0; k < sizeof buffer / sizeof buffer[0]; k++)
        if (buffer[k].needed && !buffer[k].ptr)
            return bnb_fail(BNB_EINVAL, "%s: tensors[%zu].%s is NULL, expected a buffer ('%s' with %d-bit state)", f, i,
                            buffer[k].name, row->name, t->bits);
    return BNB_OK;
}

static bnb_status check_step(const char *f, const bnb_exec *ex, const bnb_optim_config *config,
                             const bnb_optim_tensor *tensors, size_t count)
{
    bnb_status status = check_config(f, ex, config);
    if (status)
        return status;
    if (count > 0 && !tensors)
        return bnb_fail(BNB_EINVAL, "%s: tensors is NULL, expected %zu of them", f, count);
    const struct bnb_optim_row *row = bnb_optim_find(config->name);
    bool any8 = false;
    for (size_t i = 0; i < count; i++) {
        status = check_tensor(f, &tensors[i], i, row);
        if (status)
            return status;
        any8 = any8 || (tensors[i].bits == 8 && tensors[i].g && tensors[i].n > 0);
    }
    if (any8 && (!config->qmap1 || (row->states == 2 && !config->qmap2)))
        return bnb_fail(BNB_EINVAL, "%s: qmap%d is NULL, expected the map of 8-bit state", f, config->qmap1 ? 2 : 1);
    return BNB_OK;
}

bnb_status bnb_optim_step(const bnb_exec *ex, const bnb_optim_config *config, const bnb_optim_tensor *tensors,
                          size_t count)
{
    const char *f = "optim_step";
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    const bnb_status status = check_step(f, ex, config, tensors, count);
    if (status)
        return status;
    if (config->max_unorm > 0.0 && count > 0 && !config->norms)
        return bnb_fail(BNB_EINVAL, "%s: norms is NULL with max_unorm %g, expected those of bnb_optim_norms()", f,
                        config->max_unorm);
    BNB_CHECK(bnb_core_check_member(f, device->optim_step != NULL));
    return device->optim_step(ex, config, tensors, count);
}

bnb_status bnb_optim_norms(const bnb_exec *ex, const bnb_optim_config *config, const bnb_optim_tensor *tensors,
                           size_t count, double *norms)
{
    const char *f = "optim_norms";
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    const bnb_status status = check_step(f, ex, config, tensors, count);
    if (status)
        return status;
    if (count > 0 && !norms)
        return bnb_fail(BNB_EINVAL, "%s: norms is NULL, expected a buffer of %zu x 2", f, count);
    BNB_CHECK(bnb_core_check_member(f, device->optim_norms != NULL));
    return count > 0 ? device->optim_norms(ex, config, tensors, count, norms) : BNB_OK;
}

bnb_status bnb_gradient_norms(const bnb_exec *ex, const bnb_gradient *gradients, size_t count, double *norms)
{
    const char *f = "gradient_norms";
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    if (count > 0 && (!gradients || !norms))
        return bnb_fail(BNB_EINVAL, "%s: %s is NULL, expected %zu entries", f, gradients ? "norms" : "gradients",
                        count);
    for (size_t i = 0; i < count; i++) {
        const bnb_gradient *g = &gradients[i];
        if (g->n < 0 || (g->n > 0 && !g->g))
            return bnb_fail(BNB_EINVAL, "%s: gradients[%zu] has n = %lld%s, expected values", f, i, (long long)g->n,
                            g->g ? "" : " and g = NULL");
        if (g->dtype != BNB_F32 && g->dtype != BNB_F16 && g->dtype != BNB_BF16)
            return bnb_fail(BNB_EDTYPE, "%s: gradients[%zu].dtype is %d, expected f32, f16 or bf16", f, i,
                            (int)g->dtype);
    }
    BNB_CHECK(bnb_core_check_member(f, device->gradient_norms != NULL));
    return count > 0 ? device->gradient_norms(ex, gradients, count, norms) : BNB_OK;
}

bnb_status bnb_clip_percentile(const bnb_exec *ex, const bnb_clip_tensor *tensors, size_t count, int percentile,
                               const double *norms, float *report)
{
    const char *f = "clip_percentile";
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    if (percentile < 0 || percentile > 99)
        return bnb_fail(BNB_EINVAL, "%s: percentile is %d, expected 0 to 99", f, percentile);
    if (count > 0 && (!tensors || !norms || !report))
        return bnb_fail(BNB_EINVAL, "%s: %s is NULL, expected %zu entries", f,
                        !tensors ? "tensors"
                        : !norms ? "norms"
                                 : "report",
                        count);
    for (size_t i = 0; i < count; i++) {
        if (!tensors[i].history)
            return bnb_fail(BNB_EINVAL, "%s: tensors[%zu].history is NULL, expected 100 numbers", f, i);
        if (tensors[i].step < 1 && !tensors[i].step_count)
            return bnb_fail(BNB_EINVAL, "%s: tensors[%zu].step is %lld, expected 1 or more", f, i,
                            (long long)tensors[i].step);
    }
    BNB_CHECK(bnb_core_check_member(f, device->clip_percentile != NULL));
    return count > 0 ? device->clip_percentile(ex, tensors, count, percentile, norms, report) : BNB_OK;
}
