/*
 * quant4.tmpl.h - block-wise 4-bit quantisation, NF4 and FP4 (template: included once per dtype, after quant8.tmpl.h)
 *
 * As quant8, with the 15 (NF4) or 7 (FP4) thresholds in registers: each level of the tree is one table look-up by the
 * bits found so far and one comparison.  Element 2i goes to the high nibble of byte i.
 * In: T, NAME, LOAD, STORE.  Source: Dettmers et al. 2023, "QLoRA", section 3.
 */

static ALWAYS_INLINE void NAME(encode4_group)(const T *x, vf r, uint8_t *codes, int type, const struct tree4 *t)
{
    vi c[4];
    for (int k = 0; k < 4; k++) {
        const vf u = vf_mul(LOAD(x + k * VF_LANES), r);
        c[k] = type == TYPE_NF4 ? tree4_count(u, t) : encode_fp4(u, t);
    }
    group_store_u4(codes, c);
}

static ALWAYS_INLINE void NAME(quant4_blocks)(const struct bnb_quant4_args *a, int64_t first, int64_t end, int type)
{
    enum { GROUP = 4 * VF_LANES };
    const struct tree4 t = tree4_load(a->thresholds);
    for (int64_t b = first; b < end; b++) {
        const int64_t low = b * a->block, n = a->n - low < a->block ? a->n - low : a->block;
        const T *x = (const T *)a->x + low;
        uint8_t *codes = a->codes + low / 2;
        const float absmax = NAME(block_absmax)(x, n), r = 1.0f / absmax;
        a->absmax[b] = absmax;
        if (!(r <= FLT_MAX)) { /* zero or subnormal: every code is that of zero */
            memset(codes, type == TYPE_NF4 ? 0x77 : 0, (size_t)(n + 1) / 2);
            continue;
        }
        int64_t i = 0;
        for (; i + GROUP <= n; i += GROUP)
            NAME(encode4_group)(x + i, vf_set(r), codes + i / 2, type, &t);
        if (i < n) { /* padding zeros encode to the code of zero, as an odd last nibble must */
            T rest[GROUP] = {0};
            uint8_t out[GROUP / 2];
            memcpy(rest, x + i, (size_t)(n - i) * sizeof(T));
            NAME(encode4_group)(rest, vf_set(r), out, type, &t);
            memcpy(codes + i / 2, out, (size_t)(n - i + 1) / 2);
        }
    }
}

static void NAME(quant4)(const struct bnb_quant4_args *a, int64_t first, int64_t end)
{
    if (a->type == TYPE_NF4)
        NAME(quant4_blocks)(a, first, end, TYPE_NF4);
    else
        NAME(quant4_blocks)(a, first, end, TYPE_FP4);
}

static ALWAYS_INLINE void NAME(decode4_group)(const uint8_t *codes, lut16 value, T *out)
{
    vi c[4];
    group_load_u4(codes, c);
    for (int k = 0; k < 4; k++)
        STORE(out + k * VF_LANES, lut16_at(value, c[k]));
}

static void NAME(dequant4)(const struct bnb_dequant4_args *a, int64_t first, int64_t end)
{
    enum { GROUP = 4 * VF_LANES };
    for (int64_t b = first; b < end; b++) {
        const int64_t low = b * a->block, n = a->n - low < a->block ? a->n - low : a->block;
        const uint8_t *codes = a->codes + low / 2;
        T *out = (T *)a->out + low;
        const float scale = bnb_block_scale(&a->scale, b);
        float product[16]; /* the 16 possible results of this block */
        for (int k = 0; k < 16; k++)
            product[k] = a->code[k] * scale;
        const lut16 value = lut16_load(product);
        int64_t i = 0;
        for (; i + GROUP <= n; i += GROUP)
            NAME(decode4_group)(codes + i / 2, value, out + i);
        if (i < n) {
            uint8_t rest[GROUP / 2] = {0};
            T decoded[GROUP];
            memcpy(rest, codes + i / 2, (size_t)(n - i + 1) / 2);
            NAME(decode4_group)(rest, value, decoded);
            memcpy(out + i, decoded, (size_t)(n - i) * sizeof(T));
        }
    }
}
