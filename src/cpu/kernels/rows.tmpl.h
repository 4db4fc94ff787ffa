/*
 * rows.tmpl.h - LLM.int8()'s row-wise quantisation (template: included once per dtype)
 *
 * A code is x (127 / stats), rounded to nearest even; NUMERICS rule 33.  In: T, NAME, LOAD, STORE.
 * Source: Dettmers et al. 2022, "LLM.int8()", section 3.
 */

/* The largest magnitude below `limit` of a row, NaN if it holds one; marks the columns that hold one at or above it. */
static float NAME(row_stat)(const struct bnb_rows_args *a, const T *x, float limit)
{
    const int64_t n = a->cols;
    vf m = vf_set(0.0f);
    bool poisoned = false;
    const vf bound = vf_set(limit);
    for (int64_t i = 0; i < n; i += VF_LANES) {
        T rest[VF_LANES] = {0};
        const T *p = x + i;
        if (i + VF_LANES > n) {
            memcpy(rest, p, (size_t)(n - i) * sizeof(T));
            p = rest;
        }
        const vf size = vf_abs(LOAD(p));
        const vm above = vf_le(bound, size);
        poisoned = poisoned || vm_any(vf_is_nan(size));
        m = vf_max(vf_select(above, vf_set(0.0f), size), m);
        if (a->outlier && vm_any(above)) {
            float value[VF_LANES];
            vf_store_f32(value, size);
            for (int64_t j = 0; j < VF_LANES && i + j < n; j++)
                if (value[j] >= limit)
                    __atomic_store_n(a->outlier + i + j, 1, __ATOMIC_RELAXED); /* other rows may mark it too */
        }
    }
    return poisoned ? NAN : vf_hmax(m);
}

static ALWAYS_INLINE void NAME(row_group)(const T *x, vf r, vf bound, int8_t *codes)
{
    vi c[4];
    for (int k = 0; k < 4; k++) {
        const vf value = LOAD(x + k * VF_LANES);
        const vf u = vf_where(vf_lt(vf_abs(value), bound), vf_mul(value, r)); /* outliers and NaN are coded as 0 */
        c[k] = vi_round(u);
    }
    group_store_i8(codes, c);
}

static void NAME(row_codes)(const T *x, int64_t n, float stat, float limit, int8_t *codes)
{
    enum { GROUP = 4 * VF_LANES };
    const float r = 127.0f / stat;
    if (!(r <= FLT_MAX)) {
        memset(codes, 0, (size_t)n);
        return;
    }
    int64_t i = 0;
    for (; i + GROUP <= n; i += GROUP)
        NAME(row_group)(x + i, vf_set(r), vf_set(limit), codes + i);
    if (i < n) {
        T rest[GROUP] = {0};
        int8_t out[GROUP];
        memcpy(rest, x + i, (size_t)(n - i) * sizeof(T));
        NAME(row_group)(rest, vf_set(r), vf_set(limit), out);
        memcpy(codes + i, out, (size_t)(n - i));
    }
}

/* Rows first .. end - 1.  The columns of outliers are cleared by the launcher, when all rows are known. */
static void NAME(quant_rows)(const struct bnb_rows_args *a, int64_t first, int64_t end)
{
    const float limit = a->threshold > 0.0f ? a->threshold : INFINITY;
    for (int64_t i = first; i < end; i++) {
        const T *x = (const T *)a->x + i * a->cols;
        a->stats[i] = NAME(row_stat)(a, x, a->threshold > 0.0f ? limit : NAN); /* NaN: none above */
        NAME(row_codes)(x, a->cols, a->stats[i], limit, a->codes + i * a->cols);
    }
}

static void NAME(dequant_rows)(const struct bnb_derows_args *a, int64_t first, int64_t end)
{
    for (int64_t i = first; i < end; i++) {
        const int8_t *codes = a->codes + i * a->cols;
        T *out = (T *)a->out + i * a->cols;
        const vf stat = vf_set(a->stats[i]), part = vf_set(1.0f / 127.0f);
        int64_t j = 0;
        for (; j + VF_LANES <= a->cols; j += VF_LANES)
            STORE(out + j, vf_mul(vf_mul(vf_load_i8(codes + j), stat), part));
        if (j < a->cols) {
            int8_t rest[VF_LANES] = {0};
            T value[VF_LANES];
            memcpy(rest, codes + j, (size_t)(a->cols - j));
            STORE(value, vf_mul(vf_mul(vf_load_i8(rest), stat), part));
            memcpy(out + j, value, (size_t)(a->cols - j) * sizeof(T));
        }
    }
}
