/*
 * convert.tmpl.h - arrays of one dtype to f32 and back (template: included once per dtype)
 *
 * Widening is exact; narrowing rounds to nearest even (NUMERICS rule 11).  In: T, NAME, LOAD, STORE.
 */

static void NAME(widen)(const void *x, int64_t n, float *out)
{
    const T *p = x;
    int64_t i = 0;
    for (; i + VF_LANES <= n; i += VF_LANES)
        vf_store_f32(out + i, LOAD(p + i));
    if (i < n) {
        T rest[VF_LANES] = {0};
        float wide[VF_LANES];
        memcpy(rest, p + i, (size_t)(n - i) * sizeof(T));
        vf_store_f32(wide, LOAD(rest));
        memcpy(out + i, wide, (size_t)(n - i) * sizeof(float));
    }
}

static ALWAYS_INLINE void NAME(narrow)(const float *x, int64_t n, T *out)
{
    int64_t i = 0;
    for (; i + VF_LANES <= n; i += VF_LANES)
        STORE(out + i, vf_load_f32(x + i));
    if (i < n) {
        float rest[VF_LANES] = {0};
        T small[VF_LANES];
        memcpy(rest, x + i, (size_t)(n - i) * sizeof(float));
        STORE(small, vf_load_f32(rest));
        memcpy(out + i, small, (size_t)(n - i) * sizeof(T));
    }
}
