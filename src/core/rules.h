/*
 * rules.h - the update rules of the optimizers, written once for every device, instruction set and precision of state
 *
 * A rule takes the gradient and the old state and gives the new state and u, the direction of the step; the parameter
 * then becomes p decay + step_size u.  States use + and * alone; u may divide and take roots.  No fused multiply-add:
 * states must have the same bits on every device (NUMERICS rules 20 to 22).
 *
 * Written in the words of the CPU's simd_*.h, with ALWAYS_INLINE and FLT_MAX; on CUDA a vector is one float.
 */
#ifndef BNB_CORE_RULES_H
#define BNB_CORE_RULES_H

#include "core/args.h"

#define OPTIM_BLOCK 256 /* BNB_OPTIM_BLOCK of bitsandbytes.h */

/* s: m, v, and the slow average of ademamix; one-state rules use s[0] alone. */
struct rule_state { vf p, u, s[BNB_MAX_STATES]; };

struct rule_scalars {
    vf beta1, gain1, beta2, gain2, beta3, gain3, mix1, mix2, step_size, eps, decay, coupled, gnorm_scale;
    bool is_coupled, skip_zeros;
};

static ALWAYS_INLINE struct rule_scalars rule_load(const struct bnb_optim_scalars *s)
{
    struct rule_scalars k;
    k.beta1 = vf_set(s->beta1);
    k.gain1 = vf_set(s->gain1);
    k.beta2 = vf_set(s->beta2);
    k.gain2 = vf_set(s->gain2);
    k.beta3 = vf_set(s->beta3);
    k.gain3 = vf_set(s->gain3);
    k.mix1 = vf_set(s->mix1);
    k.mix2 = vf_set(s->mix2);
    k.step_size = vf_set(s->step_size);
    k.eps = vf_set(s->eps);
    k.decay = vf_set(s->decay);
    k.coupled = vf_set(s->coupled);
    k.gnorm_scale = vf_set(s->gnorm_scale);
    k.is_coupled = s->coupled > 0.0f;
    k.skip_zeros = s->skip_zeros != 0;
    return k;
}

/* In C++ a function of constants is a constant. */
#ifndef RULE_CONSTANT
#ifdef __cplusplus
#define RULE_CONSTANT constexpr
#else
#define RULE_CONSTANT
#endif
#endif

/* How many states a rule has, and which of them may be negative: those keep their sign when requantised. */
static ALWAYS_INLINE RULE_CONSTANT int rule_states(int rule)
{
    return rule == BNB_RULE_ADEMAMIX ? 3 : rule == BNB_RULE_ADAM ? 2 : 1;
}

static ALWAYS_INLINE bool rule_is_signed(int rule, int k) { return k != 1 && rule != BNB_RULE_RMSPROP; }

static ALWAYS_INLINE vf average(vf beta, vf s, vf gain, vf g) { return vf_add(vf_mul(beta, s), vf_mul(gain, g)); }

static ALWAYS_INLINE vf average_square(vf beta, vf s, vf gain, vf g)
{
    return vf_add(vf_mul(beta, s), vf_mul(vf_mul(gain, g), g));
}

/* x / (sqrt(v) + eps) */
static ALWAYS_INLINE vf over_root(vf x, vf v, vf eps) { return vf_div(x, vf_add(vf_sqrt(v), eps)); }

/* 1, 0 or -1; 0 for NaN */
static ALWAYS_INLINE vf sign_of(vf x)
{
    const vf zero = vf_set(0.0f), one = vf_set(1.0f);
    return vf_sub(vf_where(vf_lt(zero, x), one), vf_where(vf_lt(x, zero), one));
}

/* New states and direction; gradient is the raw one.  NUMERICS rules 20 and 21 give the equations. */
static ALWAYS_INLINE void rule_update(int rule, vf gradient, struct rule_state *x, const struct rule_scalars *k,
                                      bool plain)
{
    vf g = vf_mul(gradient, k->gnorm_scale);
    if (!plain && k->is_coupled)
        g = vf_add(g, vf_mul(k->coupled, x->p));
    switch (rule) {
    case BNB_RULE_ADAM:
        x->s[0] = average(k->beta1, x->s[0], k->gain1, g);
        x->s[1] = average_square(k->beta2, x->s[1], k->gain2, g);
        x->u = over_root(x->s[0], x->s[1], k->eps);
        break;
    case BNB_RULE_ADEMAMIX:
        x->s[0] = average(k->beta1, x->s[0], k->gain1, g);
        x->s[1] = average_square(k->beta2, x->s[1], k->gain2, g);
        x->s[2] = average(k->beta3, x->s[2], k->gain3, g);
        x->u = over_root(vf_add(vf_mul(x->s[0], k->mix1), vf_mul(x->s[2], k->mix2)), x->s[1], k->eps);
        break;
    case BNB_RULE_MOMENTUM:
        x->s[0] = average(k->beta1, x->s[0], k->gain1, g);
        x->u = vf_add(vf_mul(g, k->mix1), vf_mul(x->s[0], k->mix2));
        break;
    case BNB_RULE_LION:
        x->u = sign_of(average(k->beta1, x->s[0], k->gain1, g));
        x->s[0] = average(k->beta2, x->s[0], k->gain2, g);
        break;
    default: /* BNB_RULE_RMSPROP */
        x->s[0] = average_square(k->beta1, x->s[0], k->gain1, g);
        x->u = over_root(g, x->s[0], k->eps);
    }
}

/* Put back what was there before, where `keep`; the direction is 0 there. */
static ALWAYS_INLINE void rule_keep(int rule, vm keep, const struct rule_state *before, struct rule_state *x)
{
    x->p = vf_select(keep, before->p, x->p);
    x->u = vf_select(keep, vf_set(0.0f), x->u);
    for (int k = 0; k < rule_states(rule); k++)
        x->s[k] = vf_select(keep, before->s[k], x->s[k]);
}

/* 8-bit state: an element whose new state is not finite keeps p, and forgets its states (NUMERICS rule 23). */
static ALWAYS_INLINE void rule_drop_infinite(int rule, vf p, struct rule_state *x)
{
    vm finite = vf_le(vf_abs(x->s[0]), vf_set(FLT_MAX));
    for (int k = 1; k < rule_states(rule); k++)
        finite = vm_and(finite, vf_le(vf_abs(x->s[k]), vf_set(FLT_MAX)));
    x->p = vf_select(finite, x->p, p);
    x->u = vf_where(finite, x->u);
    for (int k = 0; k < rule_states(rule); k++)
        x->s[k] = vf_where(finite, x->s[k]);
}

/* Neither coupled decay nor skip_zeros: the usual case, of which the compiler makes a loop without branches. */
static ALWAYS_INLINE bool rule_is_plain(const struct rule_scalars *k) { return !k->is_coupled && !k->skip_zeros; }

/* One update of one vector, as it is before anything is rounded to storage.  `plain`, a constant: see above. */
static ALWAYS_INLINE void rule_step(int rule, int bits, bool plain, vf gradient, struct rule_state *x,
                                    const struct rule_scalars *k)
{
    const struct rule_state before = *x;
    rule_update(rule, gradient, x, k, plain);
    x->p = vf_add(vf_mul(x->p, k->decay), vf_mul(k->step_size, x->u));
    if (bits == 8)
        rule_drop_infinite(rule, before.p, x);
    if (!plain && k->skip_zeros)
        rule_keep(rule, vf_eq(gradient, vf_set(0.0f)), &before, x);
}

#endif
