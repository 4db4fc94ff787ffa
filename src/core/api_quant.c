/*
 * api_quant.c - the public quantisers: check everything, fill the argument block, call the device
 */
#include <math.h>

#include "core/internal.h"

static bnb_status check_float(const char *f, bnb_dtype dtype)
{
    if (dtype != BNB_F32 && dtype != BNB_F16 && dtype != BNB_BF16)
        return bnb_fail(BNB_EDTYPE, "%s: dtype is %d, expected f32, f16 or bf16", f, (int)dtype);
    return BNB_OK;
}

static bnb_status check_n(const char *f, int64_t n)
{
    return n >= 0 ? BNB_OK : bnb_fail(BNB_EINVAL, "%s: n is %lld, expected 0 or more", f, (long long)n);
}

static bnb_status check_block(const char *f, int64_t block)
{
    return block > 0 ? BNB_OK : bnb_fail(BNB_EINVAL, "%s: block is %lld, expected 1 or more", f, (long long)block);
}

static bnb_status check_block4(const char *f, int64_t block)
{
    if (block < 32 || block > 4096 || (block & (block - 1)) != 0)
        return bnb_fail(BNB_EINVAL, "%s: block is %lld, expected a power of two, 32..4096", f, (long long)block);
    return BNB_OK;
}

static bnb_status check_type4(const char *f, bnb_type4 type)
{
    if (type != BNB_NF4 && type != BNB_FP4)
        return bnb_fail(BNB_EINVAL, "%s: type is %d, expected BNB_FP4 (1) or BNB_NF4 (2)", f, (int)type);
    return BNB_OK;
}

static bnb_status check_ptr(const char *f, const char *name, const void *ptr)
{
    return ptr ? BNB_OK : bnb_fail(BNB_EINVAL, "%s: %s is NULL, expected a buffer", f, name);
}

/* Plain or nested, complete either way; fills the argument block. */
static bnb_status check_scales(const char *f, const bnb_scales *s, struct bnb_scale_args *a)
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

#define CHECK(expression)                    \
    do {                                     \
        const bnb_status check = expression; \
        if (check)                           \
            return check;                    \
    } while (0)

bnb_status bnb_quantize8(const bnb_exec *ex, const void *x, bnb_dtype dtype, int64_t n, int64_t block,
                         const float *code, uint8_t *codes, float *absmax)
{
    const char *f = "quantize8";
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    CHECK(check_float(f, dtype));
    CHECK(check_n(f, n));
    CHECK(check_block(f, block));
    if (n == 0)
        return BNB_OK;
    CHECK(check_ptr(f, "x", x));
    CHECK(check_ptr(f, "code", code));
    CHECK(check_ptr(f, "codes", codes));
    CHECK(check_ptr(f, "absmax", absmax));
    const struct bnb_quant8_args a = {
        .x = x, .codes = codes, .absmax = absmax, .n = n, .block = block, .map = {.code = code}};
    return device->quantize8(ex, &a, dtype);
}

bnb_status bnb_dequantize8(const bnb_exec *ex, const uint8_t *codes, int64_t n, int64_t block, const float *code,
                           const bnb_scales *scales, void *out, bnb_dtype dtype)
{
    const char *f = "dequantize8";
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    struct bnb_dequant8_args a = {.codes = codes, .out = out, .n = n, .block = block, .code = code};
    CHECK(check_float(f, dtype));
    CHECK(check_n(f, n));
    CHECK(check_block(f, block));
    if (n == 0)
        return BNB_OK;
    CHECK(check_ptr(f, "codes", codes));
    CHECK(check_ptr(f, "code", code));
    CHECK(check_ptr(f, "out", out));
    CHECK(check_scales(f, scales, &a.scale));
    return device->dequantize8(ex, &a, dtype);
}

bnb_status bnb_quantize4(const bnb_exec *ex, const void *x, bnb_dtype dtype, int64_t n, int64_t block, bnb_type4 type,
                         uint8_t *codes, float *absmax)
{
    const char *f = "quantize4";
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    CHECK(check_float(f, dtype));
    CHECK(check_n(f, n));
    CHECK(check_block4(f, block));
    CHECK(check_type4(f, type));
    if (n == 0)
        return BNB_OK;
    CHECK(check_ptr(f, "x", x));
    CHECK(check_ptr(f, "codes", codes));
    CHECK(check_ptr(f, "absmax", absmax));
    const struct bnb_quant4_args a = {
        .x = x, .codes = codes, .absmax = absmax, .n = n, .block = block, .type = (int)type};
    return device->quantize4(ex, &a, dtype);
}

bnb_status bnb_dequantize4(const bnb_exec *ex, const uint8_t *codes, int64_t n, int64_t block, bnb_type4 type,
                           const bnb_scales *scales, void *out, bnb_dtype dtype)
{
    const char *f = "dequantize4";
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    struct bnb_dequant4_args a = {.codes = codes, .out = out, .n = n, .block = block};
    CHECK(check_float(f, dtype));
    CHECK(check_n(f, n));
    CHECK(check_block4(f, block));
    CHECK(check_type4(f, type));
    if (n == 0)
        return BNB_OK;
    CHECK(check_ptr(f, "codes", codes));
    CHECK(check_ptr(f, "out", out));
    CHECK(check_scales(f, scales, &a.scale));
    a.code = bnb_map4(type);
    return device->dequantize4(ex, &a, dtype);
}

bnb_status bnb_quantize_scales(const bnb_exec *ex, const float *absmax, int64_t n, int64_t block, const float *code,
                               uint8_t *codes, float *absmax2, float *offset)
{
    const char *f = "quantize_scales";
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    CHECK(check_n(f, n));
    CHECK(check_block(f, block));
    CHECK(check_ptr(f, "offset", offset));
    if (n > 0) {
        CHECK(check_ptr(f, "absmax", absmax));
        CHECK(check_ptr(f, "code", code));
        CHECK(check_ptr(f, "codes", codes));
        CHECK(check_ptr(f, "absmax2", absmax2));
    }
    return device->quantize_scales(
        ex, absmax, offset,
        &(struct bnb_quant8_args){.codes = codes, .absmax = absmax2, .n = n, .block = block, .map = {.code = code}});
}

bnb_status bnb_dequantize_scales(const bnb_exec *ex, const bnb_scales *scales, int64_t n, float *out)
{
    const char *f = "dequantize_scales";
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    struct bnb_scale_args a = {0};
    CHECK(check_n(f, n));
    if (n == 0)
        return BNB_OK;
    CHECK(check_scales(f, scales, &a));
    CHECK(check_ptr(f, "out", out));
    if (!a.absmax2)
        return bnb_fail(BNB_EINVAL, "%s: scales->block2 is 0, expected 1 or more: plain scales need no expansion", f);
    return device->expand_scales(ex, &a, n, out);
}
