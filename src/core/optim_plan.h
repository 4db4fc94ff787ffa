/*
 * optim_plan.h - the scalars of one update, from its recipe, learning rate, number and norms: NUMERICS rules 12, 21 and 28
 *
 * The host computes them before a step; on CUDA a kernel does where learning rate, count or norms are on the device.
 * Everything is double, and rounded once.
 */
#ifndef BNB_CORE_OPTIM_PLAN_H
#define BNB_CORE_OPTIM_PLAN_H

#include "core/args.h"

#if !defined(__CUDACC__)
#include <math.h>
#endif

/* The update that a step makes, before the learning rate, is `direction` times what a rule calls u. */
struct bnb_optim_plan {
    struct bnb_optim_scalars scalars;
    double direction;
};

/* A rule steps by -lr numerator / denominator times u: the corrections of its averages. */
struct bnb_optim_correction { double numerator, denominator; };

/* base^n by repeated squaring: NUMERICS rule 12. */
BNB_EITHER_DEVICE double bnb_optim_power(double base, int64_t n)
{
    double result = 1.0;
    for (; n > 0; n >>= 1, base *= base)
        if (n & 1)
            result *= base;
    return result;
}

/* The schedules of AdEMAMix (Pagliardini et al. 2024, section 3): alpha rises linearly, beta3 so that its half-life does. */
BNB_EITHER_DEVICE double bnb_optim_alpha(const struct bnb_optim_recipe *r, double t)
{
    return r->t_alpha > 0.0 ? fmin(t * r->alpha / r->t_alpha, r->alpha) : r->alpha;
}

BNB_EITHER_DEVICE double bnb_optim_beta3(const struct bnb_optim_recipe *r, double t)
{
    if (!(r->t_beta3 > 0.0) || t >= r->t_beta3)
        return r->beta3;
    const double low = log(r->beta1), high = log(r->beta3), part = t / r->t_beta3;
    return fmin(exp(low * high / ((1.0 - part) * high + part * low)), r->beta3);
}

/* What the step is multiplied with, so that its norm is at most max_unorm times that of the parameter: rule 28. */
BNB_EITHER_DEVICE double bnb_optim_trust(const struct bnb_optim_recipe *r, const double *norms)
{
    const double update = sqrt(norms[0]), largest = 0x1.fffffffffffffp+1023;
    const double limit = r->max_unorm * sqrt(norms[1]) + (r->states == 1 ? r->eps : 0.0);
    return norms[1] > 0.0 && update > limit && update <= largest ? limit / update : 1.0;
}

BNB_EITHER_DEVICE struct bnb_optim_correction bnb_optim_fill(const struct bnb_optim_recipe *r, int64_t t,
                                                             struct bnb_optim_scalars *s)
{
    struct bnb_optim_correction by = {1.0, 1.0};
    const double c1 = r->corrected ? 1.0 - bnb_optim_power(r->beta1, t) : 1.0;
    const double c2 = r->corrected ? sqrt(1.0 - bnb_optim_power(r->beta2, t)) : 1.0;
    s->beta1 = (float)r->beta1;
    s->gain1 = (float)(1.0 - r->beta1);
    s->beta2 = (float)r->beta2;
    s->gain2 = (float)(1.0 - r->beta2);
    s->beta3 = s->gain3 = s->mix1 = s->mix2 = 0.0f;
    s->eps = (float)r->eps;
    switch (r->rule) {
    case BNB_RULE_ADAM:
        s->eps = (float)(r->eps * c2);
        by.numerator = c2;
        by.denominator = c1;
        break;
    case BNB_RULE_ADEMAMIX: {
        const double beta3 = bnb_optim_beta3(r, (double)t);
        s->eps = (float)(r->eps * c2);
        s->beta3 = (float)beta3;
        s->gain3 = (float)(1.0 - beta3);
        s->mix1 = (float)(1.0 / c1);
        s->mix2 = (float)bnb_optim_alpha(r, (double)t);
        by.numerator = c2;
        break;
    }
    case BNB_RULE_MOMENTUM: /* beta2 is the dampening; the first update takes g as it is */
        s->beta1 = t == 1 ? 0.0f : (float)r->beta1;
        s->gain1 = t == 1 ? 1.0f : (float)(1.0 - r->beta2);
        s->mix1 = r->nesterov ? 1.0f : 0.0f;
        s->mix2 = r->nesterov ? (float)r->beta1 : 1.0f;
        break;
    default:
        if (r->no_gain)
            s->beta1 = s->gain1 = 1.0f;
    }
    return by;
}

/* Update `t` at learning rate `lr`, gradients scaled by `gnorm_scale` beside the recipe's; norms NULL: no trust clipping. */
BNB_EITHER_DEVICE struct bnb_optim_plan bnb_optim_plan_of(const struct bnb_optim_recipe *r, double lr, int64_t t,
                                                          double gnorm_scale, const double *norms)
{
    struct bnb_optim_plan plan;
    const struct bnb_optim_correction by = bnb_optim_fill(r, t, &plan.scalars);
    plan.direction = by.numerator / by.denominator;
    plan.scalars.step_size = (float)(-lr * by.numerator / by.denominator * (norms ? bnb_optim_trust(r, norms) : 1.0));
    plan.scalars.decay = r->decoupled ? (float)(1.0 - lr * r->weight_decay) : 1.0f;
    plan.scalars.coupled = r->decoupled ? 0.0f : (float)r->weight_decay;
    plan.scalars.gnorm_scale = (float)(r->gnorm_scale * gnorm_scale);
    plan.scalars.skip_zeros = r->skip_zeros;
    return plan;
}

#endif
