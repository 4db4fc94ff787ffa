/*
 * optim.h - one optimizer update in blocks of 256 elements, and the norms that clipping needs
 *
 * 8-bit state: a block is decoded, updated, measured and encoded again while it sits in registers and the first-level
 * cache, so every byte is read and written once.  32-bit state: the same rule on plain arrays.  A block that is short,
 * or of 16-bit parameters, is brought to f32 in local buffers first.  The rules themselves are in rules.h.
 * Source: Dettmers et al. 2021, section 2; numbers: NUMERICS rules 20 and on.
 */
#ifndef BNB_CPU_OPTIM_H
#define BNB_CPU_OPTIM_H

#include "core/random.h"
#include "core/rules.h"

/* One block in flight: f32 parameters and gradients, codes or f32 values of state, scales of 8-bit state. */
struct optim_block {
    int n; /* values; those behind are padding */
    float *p;
    const float *g;
    void *state[BNB_MAX_STATES];
    float *absmax[BNB_MAX_STATES];
};

/* What the blocks of one call share. */
struct optim_shared {
    struct rule_scalars scalars;
    struct encoder8 encoder1, encoder2; /* of state 0 and 2, and of state 1 */
};

/*
 * Where a block is worked on: p and g where they are not 256 values of f32, decoded state, and state where the block is
 * short.  The first four arrays fill 4096 bytes: the same element of two of them never has the same low address bits,
 * which would hold up loads behind stores.
 */
struct optim_copy {
    float p[OPTIM_BLOCK], g[OPTIM_BLOCK];
    float decoded[BNB_MAX_STATES][OPTIM_BLOCK];
    float state[BNB_MAX_STATES][OPTIM_BLOCK];
};

static ALWAYS_INLINE int map_of_state(int k) { return k == 1; }

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

/* The states of a block in f32, where they are, and the scale of each. */
struct optim_values {
    float *at[BNB_MAX_STATES];
    vf scale[BNB_MAX_STATES], largest[BNB_MAX_STATES];
};

/* Old states of one vector: decoded codes times their scale, or plain values. */
static ALWAYS_INLINE void load_states(struct rule_state *x, int states, int bits, const struct optim_values *v, int i)
{
    for (int k = 0; k < states; k++) {
        const vf stored = vf_load_f32(v->at[k] + i);
        x->s[k] = bits == 8 ? vf_mul(stored, v->scale[k]) : stored;
    }
}

/* Decode 8-bit state into `decoded`; 32-bit state is used where it is. */
static ALWAYS_INLINE void decode_states(const struct optim_block *b, const struct bnb_optim_args *a, int states,
                                        int bits, float decoded[][OPTIM_BLOCK], struct optim_values *v)
{
    for (int k = 0; k < states; k++) {
        v->scale[k] = bits == 8 ? vf_set(*b->absmax[k]) : vf_set(1.0f);
        v->at[k] = bits == 8 ? decoded[k] : (float *)b->state[k];
        if (bits == 8)
            look_up_f32(a->map[map_of_state(k)].code, b->state[k], OPTIM_BLOCK, decoded[k]);
        for (int i = b->n; bits == 8 && i < OPTIM_BLOCK; i++)
            decoded[k][i] = 0.0f; /* a map need not have a code of zero */
    }
}

static ALWAYS_INLINE void update_values(const struct optim_block *b, struct optim_values *v, int rule, int bits,
                                        bool plain, const struct rule_scalars *scalars)
{
    const int states = rule_states(rule);
    vf largest[BNB_MAX_STATES];
    for (int k = 0; k < states; k++)
        largest[k] = vf_set(0.0f);
    for (int i = 0; i < OPTIM_BLOCK; i += VF_LANES) {
        struct rule_state x = {.p = vf_load_f32(b->p + i)};
        load_states(&x, states, bits, v, i);
        rule_step(rule, bits, plain, vf_load_f32(b->g + i), &x, scalars);
        vf_store_f32(b->p + i, x.p);
        for (int k = 0; k < states; k++) {
            vf_store_f32(v->at[k] + i, x.s[k]);
            largest[k] = vf_max(vf_abs(x.s[k]), largest[k]);
        }
    }
    for (int k = 0; k < states; k++)
        v->largest[k] = largest[k];
}

static ALWAYS_INLINE void encode_one(const struct optim_block *b, const struct bnb_optim_args *a, int rule, int k,
                                     const struct optim_values *v, const struct encoder8 *e)
{
    *b->absmax[k] = vf_hmax(v->largest[k]);
    encode_state(v->at[k], *b->absmax[k], &a->map[map_of_state(k)], e, rule_is_signed(rule, k), b->state[k]);
}

static ALWAYS_INLINE void update_block(const struct optim_block *b, const struct bnb_optim_args *a, int rule, int bits,
                                       const struct optim_shared *shared, struct optim_copy *copy)
{
    struct optim_values v;
    decode_states(b, a, rule_states(rule), bits, copy->decoded, &v);
    if (rule_is_plain(&shared->scalars))
        update_values(b, &v, rule, bits, true, &shared->scalars);
    else
        update_values(b, &v, rule, bits, false, &shared->scalars);
    if (bits != 8)
        return;
    /* no loop: the tables of the encoders stay in registers only where the index is known early */
    encode_one(b, a, rule, 0, &v, &shared->encoder1);
    if (rule_states(rule) > 1)
        encode_one(b, a, rule, 1, &v, &shared->encoder2);
    if (rule_states(rule) > 2)
        encode_one(b, a, rule, 2, &v, &shared->encoder1);
}

/* ---- blocks in storage */

static ALWAYS_INLINE void widen(int dtype, const void *x, int64_t n, float *out)
{
    if (dtype == 0)
        widen_f32(x, n, out);
    else if (dtype == 1)
        widen_f16(x, n, out);
    else
        widen_bf16(x, n, out);
}

static ALWAYS_INLINE void narrow_random(const float *x, int64_t n, void *out, int dtype, uint32_t key)
{
    bnb_f16 *f16 = out;
    bnb_bf16 *bf16 = out;
    for (int64_t i = 0; i < n && dtype == 1; i++)
        f16[i] = bnb_to_f16_random(x[i], bnb_random32(key, (uint32_t)i));
    for (int64_t i = 0; i < n && dtype == 2; i++)
        bf16[i] = bnb_to_bf16_random(x[i], bnb_random32(key, (uint32_t)i));
}

static ALWAYS_INLINE void narrow(const struct bnb_optim_args *a, int64_t block, const float *x, int64_t n, void *out)
{
    if (a->dtype == 0)
        memcpy(out, x, (size_t)n * sizeof(float));
    else if (a->stochastic)
        narrow_random(x, n, out, a->dtype, (uint32_t)(bnb_mix64(a->key + (uint64_t)block) >> 32));
    else if (a->dtype == 1)
        narrow_f16(x, n, out);
    else
        narrow_bf16(x, n, out);
}

static ALWAYS_INLINE char *at(const void *base, int64_t i, int64_t size) { return (char *)(uintptr_t)base + i * size; }

/* Block `index` of a tensor, copied and filled up with zeros where it must be. */
static ALWAYS_INLINE struct optim_block open_block(const struct bnb_optim_args *a, int64_t index, int states, int bits,
                                                   struct optim_copy *copy)
{
    const int64_t low = index * OPTIM_BLOCK, n = a->n - low, size = a->dtype == 0 ? 4 : 2;
    const bool whole = n >= OPTIM_BLOCK;
    struct optim_block b = {.n = whole ? OPTIM_BLOCK : (int)n,
                            .p = (float *)(void *)at(a->p, low, size),
                            .g = (const float *)(void *)at(a->g, low, size)};
    if (!whole)
        memset(copy, 0, sizeof *copy);
    if (a->dtype != 0 || !whole) {
        widen(a->dtype, b.p, b.n, copy->p);
        widen(a->dtype, b.g, b.n, copy->g);
        b.p = copy->p;
        b.g = copy->g;
    }
    for (int k = 0; k < states; k++) {
        b.state[k] = at(a->state[k], low, bits / 8);
        if (bits == 8)
            b.absmax[k] = a->absmax[k] + index;
        if (whole)
            continue;
        memcpy(copy->state[k], b.state[k], (size_t)(n * (bits / 8)));
        b.state[k] = copy->state[k];
    }
    return b;
}

static ALWAYS_INLINE void close_block(const struct bnb_optim_args *a, int64_t index, int states, int bits,
                                      const struct optim_copy *copy)
{
    const int64_t low = index * OPTIM_BLOCK, n = a->n - low < OPTIM_BLOCK ? a->n - low : OPTIM_BLOCK;
    if (a->dtype != 0 || n < OPTIM_BLOCK)
        narrow(a, index, copy->p, n, at(a->p, low, a->dtype == 0 ? 4 : 2));
    for (int k = 0; k < states && n < OPTIM_BLOCK; k++)
        memcpy(at(a->state[k], low, bits / 8), copy->state[k], (size_t)(n * (bits / 8)));
}

static ALWAYS_INLINE void update_blocks(const struct bnb_optim_args *a, int64_t first, int64_t end, int rule, int bits,
                                        int kind1, int kind2)
{
    const int states = rule_states(rule);
    struct optim_shared shared = {.scalars = rule_load(&a->s)};
    _Alignas(64) struct optim_copy copy;
    if (bits == 8)
        shared.encoder1 = encoder8_load(&a->map[0], kind1);
    if (bits == 8 && states > 1)
        shared.encoder2 = encoder8_load(&a->map[1], kind2);
    for (int64_t i = first; i < end; i++) {
        const struct optim_block b = open_block(a, i, states, bits, &copy);
        update_block(&b, a, rule, bits, &shared, &copy);
        close_block(a, i, states, bits, &copy);
    }
}

/* ---- norms */

/* The sum of the squares of 256 values: 8 lanes in turn, folded in half three times (NUMERICS rule 27). */
static ALWAYS_INLINE double sum_of_squares(const float x[OPTIM_BLOCK])
{
    double lane[8] = {0};
    for (int i = 0; i < OPTIM_BLOCK; i += 8)
        for (int j = 0; j < 8; j++)
            lane[j] += (double)x[i + j] * (double)x[i + j];
    for (int width = 4; width > 0; width /= 2)
        for (int j = 0; j < width; j++)
            lane[j] += lane[j + width];
    return lane[0];
}

/* sums += {u^2, p^2} of the blocks, in order.  Writes nothing else. */
static ALWAYS_INLINE void measure_blocks(const struct bnb_optim_args *a, int64_t first, int64_t end, int rule, int bits,
                                         double sums[2])
{
    const int states = rule_states(rule);
    const struct rule_scalars scalars = rule_load(&a->s);
    _Alignas(64) struct optim_copy copy;
    for (int64_t index = first; index < end; index++) {
        const struct optim_block b = open_block(a, index, states, bits, &copy);
        struct optim_values v;
        float u[OPTIM_BLOCK];
        decode_states(&b, a, states, bits, copy.decoded, &v);
        for (int i = 0; i < OPTIM_BLOCK; i += VF_LANES) {
            struct rule_state x = {.p = vf_load_f32(b.p + i)};
            load_states(&x, states, bits, &v, i);
            rule_step(rule, bits, false, vf_load_f32(b.g + i), &x, &scalars);
            vf_store_f32(u + i, x.u);
        }
        for (int i = b.n; i < OPTIM_BLOCK; i++)
            u[i] = 0.0f; /* behind the end, where it may be 0 / 0 */
        sums[0] += sum_of_squares(u);
        sums[1] += sum_of_squares(b.p);
    }
}

static double square_blocks(int dtype, const void *x, int64_t n)
{
    double sum = 0.0;
    for (int64_t low = 0; low < n; low += OPTIM_BLOCK) {
        float block[OPTIM_BLOCK] = {0};
        widen(dtype, at(x, low, dtype == 0 ? 4 : 2), n - low < OPTIM_BLOCK ? n - low : OPTIM_BLOCK, block);
        sum += sum_of_squares(block);
    }
    return sum;
}

/* ---- the table: one function per rule and precision of state */

/* Maps other than the default ones came with a checkpoint. */
#define OPTIM_RULE(name, rule)                                                                           \
    static void optim8_##name(const struct bnb_optim_args *a, int64_t first, int64_t end)                \
    {                                                                                                    \
        enum { KIND = (rule) == BNB_RULE_RMSPROP ? ENCODE_UNSIGNED : ENCODE_SIGNED };                    \
        const bool one = rule_states(rule) == 1;                                                         \
        if (encode_kind(&a->map[0]) == KIND && (one || encode_kind(&a->map[1]) == ENCODE_UNSIGNED))      \
            update_blocks(a, first, end, rule, 8, KIND, ENCODE_UNSIGNED);                                \
        else                                                                                             \
            update_blocks(a, first, end, rule, 8, ENCODE_SORTED, ENCODE_SORTED);                         \
    }                                                                                                    \
    static void optim32_##name(const struct bnb_optim_args *a, int64_t first, int64_t end)               \
    {                                                                                                    \
        update_blocks(a, first, end, rule, 32, 0, 0);                                                    \
    }                                                                                                    \
    static void norms_##name(const struct bnb_optim_args *a, int64_t first, int64_t end, double sums[2]) \
    {                                                                                                    \
        if (a->bits == 8)                                                                                \
            measure_blocks(a, first, end, rule, 8, sums);                                                \
        else                                                                                             \
            measure_blocks(a, first, end, rule, 32, sums);                                               \
    }

OPTIM_RULE(adam, BNB_RULE_ADAM)
OPTIM_RULE(ademamix, BNB_RULE_ADEMAMIX)
OPTIM_RULE(momentum, BNB_RULE_MOMENTUM)
OPTIM_RULE(lion, BNB_RULE_LION)
OPTIM_RULE(rmsprop, BNB_RULE_RMSPROP)

#define ALL_RULES(kernel)                     \
    {[BNB_RULE_ADAM] = kernel##_adam,         \
     [BNB_RULE_ADEMAMIX] = kernel##_ademamix, \
     [BNB_RULE_MOMENTUM] = kernel##_momentum, \
     [BNB_RULE_LION] = kernel##_lion,         \
     [BNB_RULE_RMSPROP] = kernel##_rmsprop}

#endif
