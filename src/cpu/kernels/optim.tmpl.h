/*
 * optim.tmpl.h - one optimizer update (template: included once per dtype of parameter and gradient)
 *
 * 8-bit state: a block of 256 elements is decoded, updated, measured and encoded again while it sits in registers and
 * the first-level cache, so every byte is read and written once.  32-bit state: the same rule on plain arrays.  The
 * rule itself is written once, in rules.h.  A short last block is padded with zeros in local buffers.
 * In: T, NAME, LOAD, STORE.  Source: Dettmers et al. 2021, section 2; numbers: NUMERICS rules 20 and on.
 */

/* One block in flight: parameters, gradients, codes (or f32 state) of `OPTIM_BLOCK` elements. */
struct NAME(block8) {
    T *p;
    const T *g;
    uint8_t *codes1, *codes2;
    float *absmax1, *absmax2;
};

static ALWAYS_INLINE void NAME(update8)(const struct NAME(block8) * b, const struct bnb_optim_args *a, int rule,
                                        const struct encoder8 *e1, const struct encoder8 *e2)
{
    float state1[OPTIM_BLOCK], state2[OPTIM_BLOCK];
    const struct rule_scalars s = rule_load(&a->s);
    const vf old1 = vf_set(*b->absmax1), old2 = vf_set(*b->absmax2);
    vf max1 = vf_set(0.0f), max2 = max1;
    look_up_f32(a->map1.code, b->codes1, OPTIM_BLOCK, state1);
    look_up_f32(a->map2.code, b->codes2, OPTIM_BLOCK, state2);
    for (int i = 0; i < OPTIM_BLOCK; i += VF_LANES) {
        const vf g = LOAD(b->g + i), p = LOAD(b->p + i);
        struct rule_state x = {p, vf_mul(vf_load_f32(state1 + i), old1), vf_mul(vf_load_f32(state2 + i), old2)};
        const struct rule_state before = x;
        rule_update(rule, g, &x, &s);
        const vm finite = vm_and(vf_le(vf_abs(x.s1), vf_set(FLT_MAX)), vf_le(vf_abs(x.s2), vf_set(FLT_MAX)));
        x = (struct rule_state){vf_select(finite, x.p, p), vf_where(finite, x.s1), vf_where(finite, x.s2)};
        if (a->s.skip_zeros)
            rule_keep(vf_eq(g, vf_set(0.0f)), &before, &x);
        max1 = vf_max(vf_abs(x.s1), max1);
        max2 = vf_max(vf_abs(x.s2), max2);
        STORE(b->p + i, x.p);
        vf_store_f32(state1 + i, x.s1);
        vf_store_f32(state2 + i, x.s2);
    }
    *b->absmax1 = vf_hmax(max1);
    *b->absmax2 = vf_hmax(max2);
    encode_state(state1, *b->absmax1, &a->map1, e1, true, b->codes1);
    encode_state(state2, *b->absmax2, &a->map2, e2, false, b->codes2);
}

static ALWAYS_INLINE void NAME(optim8_blocks)(const struct bnb_optim_args *a, int64_t first, int64_t end, int rule,
                                              int kind1, int kind2)
{
    const struct encoder8 e1 = encoder8_load(&a->map1, kind1), e2 = encoder8_load(&a->map2, kind2);
    for (int64_t b = first; b < end; b++) {
        const int64_t low = b * OPTIM_BLOCK, n = a->n - low;
        struct NAME(block8)
            block = {(T *)a->p + low, (const T *)a->g + low, (uint8_t *)a->state1 + low, (uint8_t *)a->state2 + low,
                     a->absmax1 + b,  a->absmax2 + b};
        if (n >= OPTIM_BLOCK) {
            NAME(update8)(&block, a, rule, &e1, &e2);
            continue;
        }
        T p[OPTIM_BLOCK] = {0}, g[OPTIM_BLOCK] = {0};
        uint8_t codes1[OPTIM_BLOCK], codes2[OPTIM_BLOCK];
        memset(codes1, a->map1.zero, sizeof codes1);
        memset(codes2, a->map2.zero, sizeof codes2);
        memcpy(p, block.p, (size_t)n * sizeof(T));
        memcpy(g, block.g, (size_t)n * sizeof(T));
        memcpy(codes1, block.codes1, (size_t)n);
        memcpy(codes2, block.codes2, (size_t)n);
        const struct NAME(block8) padded = {p, g, codes1, codes2, block.absmax1, block.absmax2};
        NAME(update8)(&padded, a, rule, &e1, &e2);
        memcpy(block.p, p, (size_t)n * sizeof(T));
        memcpy(block.codes1, codes1, (size_t)n);
        memcpy(block.codes2, codes2, (size_t)n);
    }
}

static void NAME(optim8_adam)(const struct bnb_optim_args *a, int64_t first, int64_t end)
{
    if (encode_kind(&a->map1) == ENCODE_SIGNED && encode_kind(&a->map2) == ENCODE_UNSIGNED)
        NAME(optim8_blocks)(a, first, end, BNB_RULE_ADAM, ENCODE_SIGNED, ENCODE_UNSIGNED);
    else /* maps that came with a checkpoint */
        NAME(optim8_blocks)(a, first, end, BNB_RULE_ADAM, ENCODE_SORTED, ENCODE_SORTED);
}

static ALWAYS_INLINE void NAME(update32)(T *p, const T *g, float *state1, float *state2, int rule,
                                         const struct rule_scalars *s, int skip_zeros)
{
    const vf gradient = LOAD(g);
    struct rule_state x = {LOAD(p), vf_load_f32(state1), vf_load_f32(state2)};
    const struct rule_state before = x;
    rule_update(rule, gradient, &x, s);
    if (skip_zeros)
        rule_keep(vf_eq(gradient, vf_set(0.0f)), &before, &x);
    STORE(p, x.p);
    vf_store_f32(state1, x.s1);
    vf_store_f32(state2, x.s2);
}

static void NAME(optim32_adam)(const struct bnb_optim_args *a, int64_t first, int64_t end)
{
    const struct rule_scalars s = rule_load(&a->s);
    const int64_t stop = a->n < end * OPTIM_BLOCK ? a->n : end * OPTIM_BLOCK;
    T *p = a->p;
    const T *g = a->g;
    float *state1 = a->state1, *state2 = a->state2;
    int64_t i = first * OPTIM_BLOCK;
    for (; i + VF_LANES <= stop; i += VF_LANES)
        NAME(update32)(p + i, g + i, state1 + i, state2 + i, BNB_RULE_ADAM, &s, a->s.skip_zeros);
    if (i < stop) {
        const size_t left = (size_t)(stop - i);
        T p_rest[VF_LANES] = {0}, g_rest[VF_LANES] = {0};
        float rest1[VF_LANES] = {0}, rest2[VF_LANES] = {0};
        memcpy(p_rest, p + i, left * sizeof(T));
        memcpy(g_rest, g + i, left * sizeof(T));
        memcpy(rest1, state1 + i, left * sizeof(float));
        memcpy(rest2, state2 + i, left * sizeof(float));
        NAME(update32)(p_rest, g_rest, rest1, rest2, BNB_RULE_ADAM, &s, a->s.skip_zeros);
        memcpy(p + i, p_rest, left * sizeof(T));
        memcpy(state1 + i, rest1, left * sizeof(float));
        memcpy(state2 + i, rest2, left * sizeof(float));
    }
}
