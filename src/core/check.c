/*
 * check.c - the argument checks of check.h
 */
#include "core/check.h"

bnb_status bnb_core_check_member(const char *f, bool present)
{
    if (!present)
        return bnb_fail(BNB_EDEVICE, "%s: this build has no CUDA kernel for it; move the tensors to the CPU", f);
    return BNB_OK;
}

bnb_status bnb_core_check_float(const char *f, bnb_dtype dtype)
{
    if (dtype != BNB_F32 && dtype != BNB_F16 && dtype != BNB_BF16)
        return bnb_fail(BNB_EDTYPE, "%s: dtype is %d, expected f32, f16 or bf16", f, (int)dtype);
    return BNB_OK;
}

bnb_status bnb_core_check_n(const char *f, int64_t n)
{
    return n >= 0 ? BNB_OK : bnb_fail(BNB_EINVAL, "%s: n is %lld, expected 0 or more", f, (long long)n);
}

bnb_status bnb_core_check_block(const char *f, int64_t block)
{
    return block > 0 ? BNB_OK : bnb_fail(BNB_EINVAL, "%s: block is %lld, expected 1 or more", f, (long long)block);
}

bnb_status bnb_core_check_block4(const char *f, int64_t block)
{
    if (block < 32 || block > 4096 || (block & (block - 1)) != 0)
        return bnb_fail(BNB_EINVAL, "%s: block is %lld, expected a power of two, 32..4096", f, (long long)block);
    return BNB_OK;
}

bnb_status bnb_core_check_type4(const char *f, bnb_type4 type)
{
    if (type != BNB_NF4 && type != BNB_FP4)
        return bnb_fail(BNB_EINVAL, "%s: type is %d, expected BNB_FP4 (1) or BNB_NF4 (2)", f, (int)type);
    return BNB_OK;
}

bnb_status bnb_core_check_ptr(const char *f, const char *name, const void *ptr)
{
    return ptr ? BNB_OK : bnb_fail(BNB_EINVAL, "%s: %s is NULL, expected a buffer", f, name);
}

bnb_status bnb_core_check_scales(const char *f, const bnb_scales *s, struct bnb_scale_args *a)
{
    if (!s || !s->absmax)
        return bnb_fail(BNB_EINVAL, "%s: scales%s is NULL, expected a buffer", f, s ? "->absmax" : "");
    if (s->block2 < 0)
        return bnb_fail(BNB_EINVAL, "%s: scales->block2 is %lld, expected 0 (plain) or more", f, (long long)s->block2);
    if (s->block2 == 0 && (s->code || s->absmax2 || s->offset))
        return bnb_fail(BNB_EINVAL, "%s: scales->block2 is 0, expected more: the other members say nested", f);
    if (s->block2 > 0 && (!s->code || !s->absmax2 || !s->offset))
        return bnb_fail(BNB_EINVAL, "%s: scales->%s is NULL, expected a buffer: block2 %lld says nested", f,
                        !s->code      ? "code"
                        : !s->absmax2 ? "absmax2"
                                      : "offset",
                        (long long)s->block2);
    *a = (struct bnb_scale_args){s->absmax, s->code, s->absmax2, s->offset, s->block2};
    return BNB_OK;
}

bnb_status bnb_core_check_product(const char *f, int64_t m, int64_t n, int64_t k)
{
    const struct {
        const char *name;
        int64_t value;
    } size[] = {{"m", m}, {"n", n}, {"k", k}};
    for (int i = 0; i < 3; i++)
        if (size[i].value < 0)
            return bnb_fail(BNB_EINVAL, "%s: %s is %lld, expected 0 or more", f, size[i].name,
                            (long long)size[i].value);
    const int64_t pair[3][2] = {{m, n}, {m, k}, {n, k}};
    for (int i = 0; i < 3; i++)
        if (pair[i][0] > 0 && pair[i][1] > INT64_MAX / 8 / pair[i][0])
            return bnb_fail(BNB_EINVAL, "%s: m, n, k are %lld, %lld, %lld, expected a product that fits into memory", f,
                            (long long)m, (long long)n, (long long)k);
    return BNB_OK;
}
