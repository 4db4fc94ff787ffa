/*
 * optim_table.c - the optimizer table, and the scalars of one update
 *
 * An algorithm is a row: its rule, its states and its form of weight decay.  Every device implements the rules; a row
 * that is a special case of a rule differs in its scalars alone.
 */
#include <float.h>
#include <math.h>
#include <string.h>

#include "core/internal.h"
#include "core/random.h"

static const struct bnb_optim_row rows[] = {
    {.name = "adam", .rule = BNB_RULE_ADAM, .states = 2, .decoupled = true},
    {.name = "lamb", .rule = BNB_RULE_ADAM, .states = 2, .decoupled = true},
    {.name = "ademamix", .rule = BNB_RULE_ADEMAMIX, .states = 2, .is_double = true, .decoupled = true},
    {.name = "momentum", .rule = BNB_RULE_MOMENTUM, .states = 1},
    {.name = "lars", .rule = BNB_RULE_MOMENTUM, .states = 1},
    {.name = "lion", .rule = BNB_RULE_LION, .states = 1, .decoupled = true},
    {.name = "rmsprop", .rule = BNB_RULE_RMSPROP, .states = 1},
    {.name = "adagrad", .rule = BNB_RULE_RMSPROP, .states = 1, .no_gain = true},
};
enum { ROWS = sizeof rows / sizeof rows[0] };

const char *bnb_optim_name(int i) { return i >= 0 && i < ROWS ? rows[i].name : NULL; }

int bnb_optim_states(int i) { return i >= 0 && i < ROWS ? rows[i].states : 0; }

int bnb_optim_averages(int i) { return i >= 0 && i < ROWS ? 1 + rows[i].is_double : 0; }

bool bnb_optim_is_signed(int i, int state)
{
    return i >= 0 && i < ROWS && state == 0 && rows[i].rule != BNB_RULE_RMSPROP;
}

const struct bnb_optim_row *bnb_optim_find(const char *name)
{
    for (int i = 0; i < ROWS; i++)
        if (!strcmp(rows[i].name, name))
            return &rows[i];
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

/* The schedules of AdEMAMix (Pagliardini et al. 2024, section 3): alpha rises linearly, beta3 so that its half-life does. */
static double alpha_at(const bnb_optim_config *c, double t)
{
    return c->t_alpha > 0.0 ? fmin(t * c->alpha / c->t_alpha, c->alpha) : c->alpha;
}

static double beta3_at(const bnb_optim_config *c, double t)
{
    if (!(c->t_beta3 > 0.0) || t >= c->t_beta3)
        return c->beta3;
    const double low = log(c->beta1), high = log(c->beta3), part = t / c->t_beta3;
    return fmin(exp(low * high / ((1.0 - part) * high + part * low)), c->beta3);
}

/* What the step is multiplied with, so that its norm is at most max_unorm times that of the parameter: NUMERICS rule 28. */
static double trust(const struct bnb_optim_row *row, const bnb_optim_config *c, const double norms[2])
{
    const double update = sqrt(norms[0]);
    const double limit = c->max_unorm * sqrt(norms[1]) + (row->states == 1 ? c->eps : 0.0);
    return norms[1] > 0.0 && update > limit && update <= DBL_MAX ? limit / update : 1.0;
}

/* A rule steps by -lr numerator / denominator times u: the corrections of its averages. */
struct correction { double numerator, denominator; };

static struct correction fill_rule(const struct bnb_optim_row *row, const bnb_optim_config *c, int64_t t,
                                   struct bnb_optim_scalars *s)
{
    const bool corrected = !c->no_bias_correction;
    const double c1 = corrected ? 1.0 - power(c->beta1, t) : 1.0, c2 = corrected ? sqrt(1.0 - power(c->beta2, t)) : 1.0;
    *s = (struct bnb_optim_scalars){.beta1 = (float)c->beta1,
                                    .gain1 = (float)(1.0 - c->beta1),
                                    .beta2 = (float)c->beta2,
                                    .gain2 = (float)(1.0 - c->beta2),
                                    .eps = (float)c->eps};
    if (row->rule == BNB_RULE_ADAM) {
        s->eps = (float)(c->eps * c2);
        return (struct correction){c2, c1};
    }
    if (row->rule == BNB_RULE_ADEMAMIX) {
        const double beta3 = beta3_at(c, (double)t);
        s->eps = (float)(c->eps * c2);
        s->beta3 = (float)beta3;
        s->gain3 = (float)(1.0 - beta3);
        s->mix1 = (float)(1.0 / c1);
        s->mix2 = (float)alpha_at(c, (double)t);
        return (struct correction){c2, 1.0};
    }
    if (row->rule == BNB_RULE_MOMENTUM) { /* beta2 is the dampening; the first update takes g as it is */
        s->beta1 = t == 1 ? 0.0f : (float)c->beta1;
        s->gain1 = t == 1 ? 1.0f : (float)(1.0 - c->beta2);
        s->mix1 = c->nesterov ? 1.0f : 0.0f;
        s->mix2 = c->nesterov ? (float)c->beta1 : 1.0f;
    }
    if (row->no_gain)
        s->beta1 = s->gain1 = 1.0f;
    return (struct correction){1.0, 1.0};
}

struct bnb_optim_plan bnb_optim_plan_of(const struct bnb_optim_row *row, const bnb_optim_config *config, double lr,
                                        int64_t step, const double norms[2])
{
    struct bnb_optim_plan plan;
    const struct correction by = fill_rule(row, config, step, &plan.scalars);
    const bool decoupled = row->decoupled && !config->coupled_decay;
    plan.direction = by.numerator / by.denominator;
    plan.scalars.step_size = (float)(-lr * by.numerator / by.denominator * (norms ? trust(row, config, norms) : 1.0));
    plan.scalars.decay = decoupled ? (float)(1.0 - lr * config->weight_decay) : 1.0f;
    plan.scalars.coupled = decoupled ? 0.0f : (float)config->weight_decay;
    plan.scalars.gnorm_scale = (float)config->gnorm_scale;
    plan.scalars.skip_zeros = config->skip_zeros;
    return plan;
}

uint64_t bnb_optim_key(uint64_t seed, int64_t step) { return bnb_mix64(bnb_mix64(seed) + (uint64_t)step); }
