/* optim_reference.c - one optimizer step by definition */
#include "optim_reference.h"

#include <math.h>
#include <string.h>

struct element reference_adam(const struct hyper *h, float gradient, struct element old)
{
    const double c1 = 1.0 - pow(h->beta1, (double)h->step), c2 = sqrt(1.0 - pow(h->beta2, (double)h->step));
    const float b1 = (float)h->beta1, rest1 = (float)(1.0 - h->beta1);
    const float b2 = (float)h->beta2, rest2 = (float)(1.0 - h->beta2);
    const float step_size = (float)(-h->lr * c2 / c1), eps = (float)(h->eps * c2);
    const float decay = (float)(1.0 - h->lr * h->weight_decay);
    const float g = gradient * (float)h->gnorm_scale;
    struct element x;
    x.m = b1 * old.m + rest1 * g;
    x.v = b2 * old.v + (rest2 * g) * g;
    x.p = old.p * decay + step_size * (x.m / (sqrtf(x.v) + eps));
    return x;
}

double exact_adam_p(const struct hyper *h, double gradient, double p, double m, double v)
{
    const double t = (double)h->step, g = gradient * h->gnorm_scale;
    const double mean = (h->beta1 * m + (1.0 - h->beta1) * g) / (1.0 - pow(h->beta1, t));
    const double variance = (h->beta2 * v + (1.0 - h->beta2) * g * g) / (1.0 - pow(h->beta2, t));
    return p - h->lr * h->weight_decay * p - h->lr * mean / (sqrt(variance) + h->eps);
}

void reference_step32(const struct hyper *h, bnb_dtype dtype, int64_t n, void *p, const void *g, float *m, float *v)
{
    for (int64_t i = 0; i < n; i++) {
        const float gradient = value_at(g, dtype, i);
        if (h->skip_zeros && gradient == 0.0f)
            continue;
        const struct element x = reference_adam(h, gradient, (struct element){value_at(p, dtype, i), m[i], v[i]});
        store_at(p, dtype, i, x.p);
        m[i] = x.m;
        v[i] = x.v;
    }
}

/* Codes of one block of state; m keeps its sign, and zero has none. */
static void requantise(const float *state, int64_t n, const float *map, bool keeps_sign, uint8_t *codes, float *absmax)
{
    float midpoint[255];
    define_midpoints(map, midpoint);
    *absmax = define_absmax(state, BNB_F32, n);
    const float r = 1.0f / *absmax;
    for (int64_t i = 0; i < n; i++) {
        int code = define_code8(isfinite(r) ? state[i] * r : 0.0f, midpoint);
        if (keeps_sign && isfinite(r) && state[i] < 0.0f && map[code] >= 0.0f)
            code -= code > 0;
        else if (keeps_sign && isfinite(r) && state[i] > 0.0f && map[code] < 0.0f)
            code += code < 255;
        codes[i] = (uint8_t)code;
    }
}

void reference_step8(const struct hyper *h, bnb_dtype dtype, bnb_optim_tensor *t)
{
    uint8_t *codes1 = t->state1, *codes2 = t->state2;
    for (int64_t low = 0; low < t->n; low += STATE_BLOCK) {
        const int64_t n = t->n - low < STATE_BLOCK ? t->n - low : STATE_BLOCK, b = low / STATE_BLOCK;
        float m[STATE_BLOCK], v[STATE_BLOCK];
        for (int64_t k = 0; k < n; k++) {
            const int64_t i = low + k;
            const float gradient = value_at(t->g, dtype, i);
            const struct element old = {value_at(t->p, dtype, i), h->map1[codes1[i]] * t->absmax1[b],
                                        h->map2[codes2[i]] * t->absmax2[b]};
            const struct element x = reference_adam(h, gradient, old);
            const bool finite = isfinite(x.m) && isfinite(x.v), skip = h->skip_zeros && gradient == 0.0f;
            m[k] = skip ? old.m : finite ? x.m : 0.0f;
            v[k] = skip ? old.v : finite ? x.v : 0.0f;
            if (finite && !skip)
                store_at(t->p, dtype, i, x.p);
        }
        requantise(m, n, h->map1, true, codes1 + low, &t->absmax1[b]);
        requantise(v, n, h->map2, false, codes2 + low, &t->absmax2[b]);
    }
}
