/*
 * rules.h - the update rules of the optimizers, written once for every dtype, instruction set and precision of state
 *
 * A rule takes the scaled gradient and the old state and gives the new one; it uses +, * and, for the parameter alone,
 * sqrt and division.  No fused multiply-add: states must have the same bits on every device (NUMERICS rules 20 to 23).
 */
#ifndef BNB_CPU_RULES_H
#define BNB_CPU_RULES_H

#include <stdbool.h>

#define OPTIM_BLOCK 256 /* BNB_OPTIM_BLOCK of bitsandbytes.h */

struct rule_state { vf p, s1, s2; };

struct rule_scalars { vf beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, eps, decay, gnorm_scale; };

static ALWAYS_INLINE struct rule_scalars rule_load(const struct bnb_optim_scalars *s)
{
    return (struct rule_scalars){vf_set(s->beta1),           vf_set(s->one_minus_beta1), vf_set(s->beta2),
                                 vf_set(s->one_minus_beta2), vf_set(s->step_size),       vf_set(s->eps),
                                 vf_set(s->decay),           vf_set(s->gnorm_scale)};
}

/* m = beta1 m + (1 - beta1) g;  v = beta2 v + ((1 - beta2) g) g;  p = p decay + step_size m / (sqrt(v) + eps) */
static ALWAYS_INLINE void rule_adam(vf g, struct rule_state *x, const struct rule_scalars *s)
{
    x->s1 = vf_add(vf_mul(s->beta1, x->s1), vf_mul(s->one_minus_beta1, g));
    x->s2 = vf_add(vf_mul(s->beta2, x->s2), vf_mul(vf_mul(s->one_minus_beta2, g), g));
    const vf ratio = vf_div(x->s1, vf_add(vf_sqrt(x->s2), s->eps));
    x->p = vf_add(vf_mul(x->p, s->decay), vf_mul(s->step_size, ratio));
}

/* g is the raw gradient. */
static ALWAYS_INLINE void rule_update(int rule, vf g, struct rule_state *x, const struct rule_scalars *s)
{
    const vf scaled = vf_mul(g, s->gnorm_scale);
    if (rule == BNB_RULE_ADAM)
        rule_adam(scaled, x, s);
}

static ALWAYS_INLINE void rule_keep(vm keep, const struct rule_state *before, struct rule_state *x)
{
    x->p = vf_select(keep, before->p, x->p);
    x->s1 = vf_select(keep, before->s1, x->s1);
    x->s2 = vf_select(keep, before->s2, x->s2);
}

/* -1 where a negative value got an entry that is not, +1 where a positive value got a negative entry, else 0. */
static ALWAYS_INLINE vi sign_step(vf value, vf entry)
{
    const vf zero = vf_set(0.0f);
    const vm down = vm_and(vf_lt(value, zero), vf_le(zero, entry)), up = vm_and(vf_lt(zero, value), vf_lt(entry, zero));
    return vi_sub(vi_of_mask(down), vi_of_mask(up));
}

/*
 * Codes of one block of state.  Where is_signed, the chosen entry keeps the sign of the value, one step towards it if
 * they differ, so that a negative value never becomes 0 (NUMERICS rule 24).
 */
static ALWAYS_INLINE void encode_state(const float *state, float absmax, const struct bnb_map8 *map,
                                       const struct encoder8 *e, bool is_signed, uint8_t *codes)
{
    const float r = 1.0f / absmax;
    if (!(r <= FLT_MAX)) {
        memset(codes, map->zero, OPTIM_BLOCK);
        return;
    }
    for (int i = 0; i < OPTIM_BLOCK; i += 4 * VF_LANES) {
        vi c[4];
        for (int k = 0; k < 4; k++) {
            const vf value = vf_load_f32(state + i + k * VF_LANES);
            c[k] = encode8(vf_mul(value, vf_set(r)), e);
            if (is_signed && e->kind == ENCODE_SIGNED) { /* only the code of 0 can have the wrong sign */
                const vm zero = vi_eq(c[k], vi_set(127));
                c[k] = vi_add(c[k], vi_of_mask(vm_and(zero, vf_lt(value, vf_set(0.0f)))));
            }
            if (is_signed && e->kind == ENCODE_SORTED)
                c[k] =
                    vi_min(vi_max(vi_add(c[k], sign_step(value, vf_gather(map->code, c[k]))), vi_set(0)), vi_set(255));
        }
        group_store_u8(codes + i, c);
    }
}

#endif
