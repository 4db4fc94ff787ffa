/* optim_reference.c - one optimizer step by definition */
#include "optim_reference.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

const struct reference_row reference_rows[REFERENCE_ROWS] = {
    {"adam", ADAM, 2, 2, true},          {"lamb", ADAM, 2, 2, true},        {"ademamix", ADEMAMIX, 2, 3, true},
    {"momentum", MOMENTUM, 1, 1, false}, {"lars", MOMENTUM, 1, 1, false},   {"lion", LION, 1, 1, true},
    {"rmsprop", RMSPROP, 1, 1, false},   {"adagrad", ADAGRAD, 1, 1, false},
};

const struct reference_row *reference_find(const char *name)
{
    for (int i = 0; i < REFERENCE_ROWS; i++)
        if (!strcmp(reference_rows[i].name, name))
            return &reference_rows[i];
    abort();
}

/* ---- scalars of one update, in double */

double reference_alpha(const bnb_optim_config *c, int64_t t)
{
    if (c->t_alpha <= 0.0 || (double)t >= c->t_alpha)
        return c->alpha;
    return (double)t * c->alpha / c->t_alpha;
}

/* The time constant -1 / ln(beta) goes linearly from that of beta1 to that of beta3. */
double reference_beta3(const bnb_optim_config *c, int64_t t)
{
    if (c->t_beta3 <= 0.0 || (double)t >= c->t_beta3)
        return c->beta3;
    const double part = (double)t / c->t_beta3;
    const double beta = exp(1.0 / ((1.0 - part) / log(c->beta1) + part / log(c->beta3)));
    return beta < c->beta3 ? beta : c->beta3;
}

struct corrections { double c1, c2; };

static struct corrections corrections_of(const bnb_optim_config *c, int64_t t)
{
    if (c->no_bias_correction)
        return (struct corrections){1.0, 1.0};
    return (struct corrections){1.0 - pow(c->beta1, (double)t), sqrt(1.0 - pow(c->beta2, (double)t))};
}

/* What u must be multiplied with to be the update before the learning rate. */
static double scale_of_u(const bnb_optim_config *c, int64_t t)
{
    const struct corrections k = corrections_of(c, t);
    const enum reference_rule rule = reference_find(c->name)->rule;
    return rule == ADAM ? k.c2 / k.c1 : rule == ADEMAMIX ? k.c2 : 1.0;
}

double reference_trust(const bnb_optim_config *c, const double norms[2])
{
    const double update = sqrt(norms[0]), weight = sqrt(norms[1]);
    const double threshold = c->max_unorm * weight + (reference_find(c->name)->states == 1 ? c->eps : 0.0);
    if (c->max_unorm <= 0.0 || weight == 0.0 || !isfinite(update))
        return 1.0;
    return update > threshold ? threshold / update : 1.0;
}

/* ---- one element in f32 */

static float mean(float beta, float old, float rest, float g)
{
    const float kept = beta * old, added = rest * g;
    return kept + added;
}

static float mean_square(float beta, float old, float rest, float g)
{
    const float kept = beta * old, part = rest * g, added = part * g;
    return kept + added;
}

static float over_root(float x, float v, double eps)
{
    const float root = sqrtf(v), bottom = root + (float)eps;
    return x / bottom;
}

static void update_adam(const bnb_optim_config *c, int64_t t, float g, const struct element *old, struct element *x)
{
    x->s[0] = mean((float)c->beta1, old->s[0], (float)(1.0 - c->beta1), g);
    x->s[1] = mean_square((float)c->beta2, old->s[1], (float)(1.0 - c->beta2), g);
    x->u = over_root(x->s[0], x->s[1], c->eps * corrections_of(c, t).c2);
}

static void update_ademamix(const bnb_optim_config *c, int64_t t, float g, const struct element *old, struct element *x)
{
    const double beta3 = reference_beta3(c, t);
    const struct corrections k = corrections_of(c, t);
    update_adam(c, t, g, old, x);
    x->s[2] = mean((float)beta3, old->s[2], (float)(1.0 - beta3), g);
    const float fast = x->s[0] * (float)(1.0 / k.c1), slow = x->s[2] * (float)reference_alpha(c, t);
    x->u = over_root(fast + slow, x->s[1], c->eps * k.c2);
}

static void update_momentum(const bnb_optim_config *c, int64_t t, float g, const struct element *old, struct element *x)
{
    x->s[0] = t == 1 ? mean(0.0f, old->s[0], 1.0f, g) : mean((float)c->beta1, old->s[0], (float)(1.0 - c->beta2), g);
    const float along_g = g * (c->nesterov ? 1.0f : 0.0f);
    const float along_m = x->s[0] * (c->nesterov ? (float)c->beta1 : 1.0f);
    x->u = along_g + along_m;
}

static void update_lion(const bnb_optim_config *c, float g, const struct element *old, struct element *x)
{
    const float d = mean((float)c->beta1, old->s[0], (float)(1.0 - c->beta1), g);
    x->u = d > 0.0f ? 1.0f : d < 0.0f ? -1.0f : 0.0f;
    x->s[0] = mean((float)c->beta2, old->s[0], (float)(1.0 - c->beta2), g);
}

static void update_rmsprop(const bnb_optim_config *c, bool sum, float g, const struct element *old, struct element *x)
{
    x->s[0] = mean_square(sum ? 1.0f : (float)c->beta1, old->s[0], sum ? 1.0f : (float)(1.0 - c->beta1), g);
    x->u = over_root(g, x->s[0], c->eps);
}

struct element reference_update(const bnb_optim_config *c, int64_t step, const double *norms, float gradient,
                                struct element old)
{
    const struct reference_row *row = reference_find(c->name);
    const bool decoupled = row->decoupled && !c->coupled_decay;
    const float weight_decay = (float)c->weight_decay;
    float g = gradient * (float)c->gnorm_scale;
    if (!decoupled && weight_decay > 0.0f) {
        const float pull = weight_decay * old.p;
        g = g + pull;
    }
    struct element x = old;
    switch (row->rule) {
    case ADAM:
        update_adam(c, step, g, &old, &x);
        break;
    case ADEMAMIX:
        update_ademamix(c, step, g, &old, &x);
        break;
    case MOMENTUM:
        update_momentum(c, step, g, &old, &x);
        break;
    case LION:
        update_lion(c, g, &old, &x);
        break;
    default:
        update_rmsprop(c, row->rule == ADAGRAD, g, &old, &x);
    }
    const struct corrections k = corrections_of(c, step);
    const double top = row->rule == ADAM || row->rule == ADEMAMIX ? k.c2 : 1.0, bottom = row->rule == ADAM ? k.c1 : 1.0;
    const float step_size = (float)(-c->lr * top / bottom * (norms ? reference_trust(c, norms) : 1.0));
    const float kept = old.p * (decoupled ? (float)(1.0 - c->lr * c->weight_decay) : 1.0f), moved = step_size * x.u;
    x.p = kept + moved;
    return x;
}

/* ---- one element in double, from the papers */

struct exact exact_update(const bnb_optim_config *c, int64_t step, double gradient, struct exact old)
{
    const struct reference_row *row = reference_find(c->name);
    const bool decoupled = row->decoupled && !c->coupled_decay;
    const double t = (double)step, b1 = c->beta1, b2 = c->beta2;
    const double g = gradient * c->gnorm_scale + (decoupled ? 0.0 : c->weight_decay * old.p);
    const double unbias1 = c->no_bias_correction ? 1.0 : 1.0 - pow(b1, t);
    const double unbias2 = c->no_bias_correction ? 1.0 : 1.0 - pow(b2, t);
    struct exact x = old;
    double update;
    if (row->rule == ADAM || row->rule == ADEMAMIX) {
        const double b3 = reference_beta3(c, step);
        x.s[0] = b1 * old.s[0] + (1.0 - b1) * g;
        x.s[1] = b2 * old.s[1] + (1.0 - b2) * g * g;
        if (row->rule == ADEMAMIX)
            x.s[2] = b3 * old.s[2] + (1.0 - b3) * g;
        const double slow = row->rule == ADEMAMIX ? reference_alpha(c, step) * x.s[2] : 0.0;
        update = (x.s[0] / unbias1 + slow) / (sqrt(x.s[1] / unbias2) + c->eps);
    } else if (row->rule == MOMENTUM) {
        x.s[0] = step == 1 ? g : b1 * old.s[0] + (1.0 - b2) * g;
        update = c->nesterov ? g + b1 * x.s[0] : x.s[0];
    } else if (row->rule == LION) {
        const double d = b1 * old.s[0] + (1.0 - b1) * g;
        update = d > 0.0 ? 1.0 : d < 0.0 ? -1.0 : 0.0;
        x.s[0] = b2 * old.s[0] + (1.0 - b2) * g;
    } else {
        x.s[0] = row->rule == ADAGRAD ? old.s[0] + g * g : b1 * old.s[0] + (1.0 - b1) * g * g;
        update = g / (sqrt(x.s[0]) + c->eps);
    }
    x.p = old.p - (decoupled ? c->lr * c->weight_decay * old.p : 0.0) - c->lr * update;
    return x;
}

/* ---- stochastic rounding */

static uint64_t split_mix(uint64_t x)
{
    uint64_t state = x; /* the first output of the generator whose state is x */
    return random_bits(&state);
}

static uint32_t murmur_finish(uint32_t h)
{
    h ^= h >> 16;
    h *= 0x85ebca6bu;
    h ^= h >> 13;
    h *= 0xc2b2ae35u;
    return h ^ h >> 16;
}

/* Cut off towards zero, then up by one place if the noise and the part cut off, as a fraction of `levels`, reach 1. */
uint16_t reference_random(float x, bnb_dtype dtype, uint64_t seed, int64_t t, int64_t i)
{
    const bool f16 = dtype == BNB_F16;
    if (!isfinite(x) || (f16 && fabsf(x) >= 65504.0f))
        return f16 ? define_to_f16(x) : define_to_bf16(x);
    const uint64_t block = split_mix(split_mix(split_mix(seed) + (uint64_t)t) + (uint64_t)(i / STATE_BLOCK));
    const uint32_t noise = murmur_finish((uint32_t)(block >> 32) + (uint32_t)(i % STATE_BLOCK) * 0x9e3779b9u);
    const int least = f16 ? -14 : -126, digits = f16 ? 10 : 7; /* of the smallest normal; behind the point */
    const double a = fabs((double)x);
    const int exponent = a < ldexp(1.0, least) ? least : ilogb(a);
    const double places = ldexp(a, digits - exponent), whole = floor(places);
    const double levels = f16 && a >= ldexp(1.0, least) ? 8192.0 : 65536.0; /* f32 has 13 or 16 digits more */
    const double random = fmod((double)noise, levels), cut = floor((places - whole) * levels);
    const uint16_t sign = (uint16_t)(bits_of(x) >> 31 << 15);
    const double up = cut + random >= levels ? 1.0 : 0.0;
    const unsigned bits = (unsigned)(whole + up) + (unsigned)(exponent - least) * (1u << digits);
    return (uint16_t)(sign | bits);
}

/* ---- whole tensors */

/* Where average k of element i lies, and the scale and map of its codes. */
struct place {
    float *value, *absmax;
    uint8_t *code;
    const float *map;
};

static struct place place_of(const bnb_optim_config *c, const bnb_optim_tensor *t, int64_t i, int k)
{
    const int64_t blocks = (t->n + STATE_BLOCK - 1) / STATE_BLOCK;
    void *state = k == 1 ? t->state2 : t->state1;
    float *absmax = k == 1 ? t->absmax2 : t->absmax1;
    const int64_t at = k == 2 ? t->n + i : i, block = (k == 2 ? blocks : 0) + i / STATE_BLOCK;
    struct place x = {NULL, NULL, NULL, k == 1 ? c->qmap2 : c->qmap1};
    if (t->bits == 32) {
        x.value = (float *)state + at;
    } else {
        x.code = (uint8_t *)state + at;
        x.absmax = absmax + block;
    }
    return x;
}

/* Codes of one block of state; one that may be negative keeps its sign, and zero has none. */
static void requantise(const float *state, int64_t n, bool keeps_sign, struct place to)
{
    float midpoint[255];
    define_midpoints(to.map, midpoint);
    *to.absmax = define_absmax(state, BNB_F32, n);
    const float r = 1.0f / *to.absmax;
    for (int64_t i = 0; i < n; i++) {
        int code = define_code8(isfinite(r) ? state[i] * r : 0.0f, midpoint);
        if (keeps_sign && isfinite(r) && state[i] < 0.0f && to.map[code] >= 0.0f)
            code -= code > 0;
        else if (keeps_sign && isfinite(r) && state[i] > 0.0f && to.map[code] < 0.0f)
            code += code < 255;
        to.code[i] = (uint8_t)code;
    }
}

/* The old element and the new one; false where rules 23 and 25 hold the element back: then p stays. */
static bool update_at(const bnb_optim_config *c, const bnb_optim_tensor *t, int64_t i, struct element *x)
{
    const int averages = reference_find(c->name)->averages;
    const float gradient = value_at(t->g, t->dtype, i);
    struct element old = {value_at(t->p, t->dtype, i), 0.0f, {0.0f, 0.0f, 0.0f}};
    for (int k = 0; k < averages; k++) {
        const struct place from = place_of(c, t, i, k);
        old.s[k] = from.code ? from.map[*from.code] * *from.absmax : *from.value;
    }
    *x = old;
    if (c->skip_zeros && gradient == 0.0f)
        return false;
    *x = reference_update(c, t->step, c->max_unorm > 0.0 ? c->norms : NULL, gradient, old);
    bool finite = true;
    for (int k = 0; k < averages; k++)
        finite = finite && isfinite(x->s[k]);
    if (finite || t->bits == 32)
        return true;
    *x = (struct element){old.p, 0.0f, {0.0f, 0.0f, 0.0f}};
    return false;
}

void reference_step(const bnb_optim_config *c, const bnb_optim_tensor *t)
{
    const struct reference_row *row = reference_find(c->name);
    const bool random = c->stochastic_rounding && t->dtype != BNB_F32;
    for (int64_t low = 0; low < t->n; low += STATE_BLOCK) {
        const int64_t n = t->n - low < STATE_BLOCK ? t->n - low : STATE_BLOCK;
        float state[AVERAGES][STATE_BLOCK];
        for (int64_t i = low; i < low + n; i++) {
            struct element x;
            const bool moves = update_at(c, t, i, &x);
            if (moves && random)
                ((uint16_t *)t->p)[i] = reference_random(x.p, t->dtype, t->seed, t->step, i);
            else if (moves)
                store_at(t->p, t->dtype, i, x.p);
            for (int k = 0; k < row->averages; k++)
                state[k][i - low] = x.s[k];
        }
        for (int k = 0; k < row->averages; k++) {
            const struct place to = place_of(c, t, low, k);
            const bool keeps_sign = k != 1 && row->rule != RMSPROP && row->rule != ADAGRAD;
            if (t->bits == 8)
                requantise(state[k], n, keeps_sign, to);
            else
                memcpy(to.value, state[k], (size_t)n * sizeof(float));
        }
    }
}

void reference_norms(const bnb_optim_config *c, const bnb_optim_tensor *t, long double sums[2])
{
    const long double scale = (long double)scale_of_u(c, t->step);
    sums[0] = sums[1] = 0.0L;
    for (int64_t i = 0; i < t->n && t->g; i++) {
        struct element x;
        const float p = value_at(t->p, t->dtype, i);
        const bool moves = update_at(c, t, i, &x);
        const long double u = moves ? scale * (long double)x.u : 0.0L;
        sums[0] += u * u;
        sums[1] += (long double)p * (long double)p;
    }
}
