/*
 * quant8.tmpl.h - block-wise 8-bit quantisation (template: included once per dtype)
 *
 * Two passes over a block, the second from the first-level cache: its largest magnitude, then u = x * (1 / absmax)
 * and the nearest code of u.  A short last group is padded with zeros in a local buffer, so there is no scalar tail.
 * In: T, NAME, LOAD.  Source: Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization", section 2.
 */

static ALWAYS_INLINE float NAME(block_absmax)(const T *restrict x, int64_t n)
{
    vf m0 = vf_set(0.0f), m1 = m0;
    int64_t i = 0;
    for (; i + 2 * VF_LANES <= n; i += 2 * VF_LANES) {
        m0 = vf_max(vf_abs(LOAD(x + i)), m0); /* this operand order drops NaN */
        m1 = vf_max(vf_abs(LOAD(x + i + VF_LANES)), m1);
    }
    if (i < n) {
        T rest[2 * VF_LANES] = {0};
        memcpy(rest, x + i, (size_t)(n - i) * sizeof(T));
        m0 = vf_max(vf_abs(LOAD(rest)), m0);
        m1 = vf_max(vf_abs(LOAD(rest + VF_LANES)), m1);
    }
    return vf_hmax(vf_max(m0, m1));
}

static ALWAYS_INLINE void NAME(encode8_group)(const T *x, vf r, uint8_t *codes, const struct encoder8 *e)
{
    vi c[4];
    for (int k = 0; k < 4; k++) {
        const vf u = vf_mul(LOAD(x + k * VF_LANES), r);
        const vm nan = vf_is_nan(u);
        c[k] = vi_where_not(nan, encode8(vf_select(nan, vf_set(0.0f), u), e));
    }
    group_store_u8(codes, c);
}

static ALWAYS_INLINE void NAME(quant8_blocks)(const struct bnb_quant8_args *a, int64_t first, int64_t end, int kind)
{
    enum { GROUP = 4 * VF_LANES };
    const struct encoder8 e = encoder8_load(&a->map, kind);
    for (int64_t b = first; b < end; b++) {
        const int64_t low = b * a->block, n = a->n - low < a->block ? a->n - low : a->block;
        const T *x = (const T *)a->x + low;
        uint8_t *codes = a->codes + low;
        const float absmax = NAME(block_absmax)(x, n), r = 1.0f / absmax;
        a->absmax[b] = absmax;
        if (!(r <= FLT_MAX)) { /* zero or subnormal: every code is that of zero */
            memset(codes, a->map.zero, (size_t)n);
            continue;
        }
        int64_t i = 0;
        for (; i + GROUP <= n; i += GROUP)
            NAME(encode8_group)(x + i, vf_set(r), codes + i, &e);
        if (i < n) {
            T rest[GROUP] = {0};
            uint8_t out[GROUP];
            memcpy(rest, x + i, (size_t)(n - i) * sizeof(T));
            NAME(encode8_group)(rest, vf_set(r), out, &e);
            memcpy(codes + i, out, (size_t)(n - i));
        }
    }
}

static void NAME(quant8)(const struct bnb_quant8_args *a, int64_t first, int64_t end)
{
    switch (encode_kind(&a->map)) {
    case ENCODE_SIGNED:
        NAME(quant8_blocks)(a, first, end, ENCODE_SIGNED);
        break;
    case ENCODE_UNSIGNED:
        NAME(quant8_blocks)(a, first, end, ENCODE_UNSIGNED);
        break;
    default:
        NAME(quant8_blocks)(a, first, end, ENCODE_SORTED);
    }
}

/* out[i] = table[codes[i]].  Plain loads: a gather is no faster than these on any core measured (docs/KERNELS.md). */
static ALWAYS_INLINE void NAME(look_up)(const T *restrict table, const uint8_t *restrict codes, int64_t n,
                                        T *restrict out)
{
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        out[i] = table[codes[i]];
        out[i + 1] = table[codes[i + 1]];
        out[i + 2] = table[codes[i + 2]];
        out[i + 3] = table[codes[i + 3]];
        KEEP_SCALAR();
    }
    for (; i < n; i++)
        out[i] = table[codes[i]];
}

/* The 256 possible results of a block, then one look-up per element; worth it from 256 elements on. */
static ALWAYS_INLINE void NAME(dequant8_table)(const uint8_t *codes, int64_t n, const float *code, vf scale, T *out)
{
    T table[256];
    for (int k = 0; k < 256; k += VF_LANES)
        STORE(table + k, vf_mul(vf_load_f32(code + k), scale));
    NAME(look_up)(table, codes, n, out);
}

static ALWAYS_INLINE void NAME(dequant8_gather)(const uint8_t *codes, int64_t n, const float *code, vf scale, T *out)
{
    int64_t i = 0;
    for (; i + VF_LANES <= n; i += VF_LANES)
        STORE(out + i, vf_mul(vf_gather(code, vi_load_u8(codes + i)), scale));
    if (i < n) {
        uint8_t rest[VF_LANES] = {0};
        T decoded[VF_LANES];
        memcpy(rest, codes + i, (size_t)(n - i));
        STORE(decoded, vf_mul(vf_gather(code, vi_load_u8(rest)), scale));
        memcpy(out + i, decoded, (size_t)(n - i) * sizeof(T));
    }
}

static void NAME(dequant8)(const struct bnb_dequant8_args *a, int64_t first, int64_t end)
{
    for (int64_t b = first; b < end; b++) {
        const int64_t low = b * a->block, n = a->n - low < a->block ? a->n - low : a->block;
        const vf scale = vf_set(bnb_block_scale(&a->scale, b));
        if (n >= 256)
            NAME(dequant8_table)(a->codes + low, n, a->code, scale, (T *)a->out + low);
        else
            NAME(dequant8_gather)(a->codes + low, n, a->code, scale, (T *)a->out + low);
    }
}
