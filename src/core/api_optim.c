/*
 * api_optim.c - the optimizer table, the scalars of an update, and the checks of bnb_optim_step()
 *
 * An algorithm is a row: its states, which of them keep their sign, and the rule that every device implements.
 */
#include <math.h>
#include <string.h>

#include "core/internal.h"

const struct bnb_optim_row bnb_optim_rows[] = {
    {.name = "adam", .states = 2, .is_signed = {1, 0}, .rule = BNB_RULE_ADAM},
};
enum { ROWS = sizeof bnb_optim_rows / sizeof bnb_optim_rows[0] };

const char *bnb_optim_name(int i) { return i >= 0 && i < ROWS ? bnb_optim_rows[i].name : NULL; }

int bnb_optim_states(int i) { return i >= 0 && i < ROWS ? bnb_optim_rows[i].states : 0; }

const struct bnb_optim_row *bnb_optim_find(const char *name)
{
    for (int i = 0; i < ROWS; i++)
        if (!strcmp(bnb_optim_rows[i].name, name))
            return &bnb_optim_rows[i];
    return NULL;
}

/* base^n by repeated squaring: NUMERICS rule 12. */
static double power(double base, int64_t n)
{
    double result = 1.0;
    for (; n > 0; n >>= 1, base *= base)
        if (n & 1)
            result *= base;
    return result;
}

struct bnb_optim_scalars bnb_optim_scalars_of(const bnb_optim_config *c, int64_t step)
{
    const double c1 = 1.0 - power(c->beta1, step), c2 = sqrt(1.0 - power(c->beta2, step));
    return (struct bnb_optim_scalars){
        .beta1 = (float)c->beta1,
        .one_minus_beta1 = (float)(1.0 - c->beta1),
        .beta2 = (float)c->beta2,
        .one_minus_beta2 = (float)(1.0 - c->beta2),
        .step_size = (float)(-c->lr * c2 / c1),
        .eps = (float)(c->eps * c2),
        .decay = (float)(1.0 - c->lr * c->weight_decay),
        .gnorm_scale = (float)c->gnorm_scale,
        .skip_zeros = c->skip_zeros,
    };
}

static bnb_status check_config(const char *f, const bnb_optim_config *c)
{
    if (!c)
        return bnb_fail(BNB_EINVAL, "%s: config is NULL, expected a bnb_optim_config", f);
    if (c->size < sizeof *c)
        return bnb_fail(BNB_EINVAL, "%s: config->size is %zu, expected at least sizeof(bnb_optim_config) = %zu", f,
                        c->size, sizeof *c);
    if (!c->name || !bnb_optim_find(c->name))
        return bnb_fail(BNB_EINVAL, "%s: optimizer_name is '%s', expected one of bnb_optim_name(): 'adam'", f,
                        c->name ? c->name : "NULL");
    const struct {
        const char *name;
        double value, end;
    } range[] = {
        {"lr", c->lr, INFINITY},
        {"beta1", c->beta1, 1.0},
        {"beta2", c->beta2, 1.0},
        {"beta3", c->beta3, 1.0},
        {"alpha", c->alpha, INFINITY},
        {"eps", c->eps, INFINITY},
        {"weight_decay", c->weight_decay, INFINITY},
        {"gnorm_scale", c->gnorm_scale, INFINITY},
    };
    for (size_t i = 0; i < sizeof range / sizeof range[0]; i++)
        if (!(range[i].value >= 0.0 && range[i].value < range[i].end))
            return bnb_fail(BNB_EINVAL, "%s: %s is %g, expected a number in [0, %g)", f, range[i].name, range[i].value,
                            range[i].end);
    return BNB_OK;
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
    if (t->step < 1)
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

bnb_status bnb_optim_step(const bnb_exec *ex, const bnb_optim_config *config, const bnb_optim_tensor *tensors,
                          size_t count)
{
    const char *f = "optim_step";
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    bnb_status status = check_config(f, config);
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
    return device->optim_step(ex, config, tensors, count);
}
