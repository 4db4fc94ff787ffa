/*
 * api_quant.c - the public quantisers: check everything, fill the argument block, call the device
 */
#include "core/check.h"
#include "core/internal.h"

bnb_status bnb_quantize8(const bnb_exec *ex, const void *x, bnb_dtype dtype, int64_t n, int64_t block,
                         const float *code, uint8_t *codes, float *absmax)
{
    const char *f = "quantize8";
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    BNB_CHECK(bnb_core_check_float(f, dtype));
    BNB_CHECK(bnb_core_check_n(f, n));
    BNB_CHECK(bnb_core_check_block(f, block));
    if (n == 0)
        return BNB_OK;
    BNB_CHECK(bnb_core_check_ptr(f, "x", x));
    BNB_CHECK(bnb_core_check_ptr(f, "code", code));
    BNB_CHECK(bnb_core_check_ptr(f, "codes", codes));
    BNB_CHECK(bnb_core_check_ptr(f, "absmax", absmax));
    const struct bnb_quant8_args a = {
        .x = x, .codes = codes, .absmax = absmax, .n = n, .block = block, .map = {.code = code}};
    BNB_CHECK(bnb_core_check_member(f, device->quantize8 != NULL));
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
    BNB_CHECK(bnb_core_check_float(f, dtype));
    BNB_CHECK(bnb_core_check_n(f, n));
    BNB_CHECK(bnb_core_check_block(f, block));
    if (n == 0)
        return BNB_OK;
    BNB_CHECK(bnb_core_check_ptr(f, "codes", codes));
    BNB_CHECK(bnb_core_check_ptr(f, "code", code));
    BNB_CHECK(bnb_core_check_ptr(f, "out", out));
    BNB_CHECK(bnb_core_check_scales(f, scales, &a.scale));
    BNB_CHECK(bnb_core_check_member(f, device->dequantize8 != NULL));
    return device->dequantize8(ex, &a, dtype);
}

bnb_status bnb_quantize4(const bnb_exec *ex, const void *x, bnb_dtype dtype, int64_t n, int64_t block, bnb_type4 type,
                         uint8_t *codes, float *absmax)
{
    const char *f = "quantize4";
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    BNB_CHECK(bnb_core_check_float(f, dtype));
    BNB_CHECK(bnb_core_check_n(f, n));
    BNB_CHECK(bnb_core_check_block4(f, block));
    BNB_CHECK(bnb_core_check_type4(f, type));
    if (n == 0)
        return BNB_OK;
    BNB_CHECK(bnb_core_check_ptr(f, "x", x));
    BNB_CHECK(bnb_core_check_ptr(f, "codes", codes));
    BNB_CHECK(bnb_core_check_ptr(f, "absmax", absmax));
    const struct bnb_quant4_args a = {
        .x = x, .codes = codes, .absmax = absmax, .n = n, .block = block, .type = (int)type};
    BNB_CHECK(bnb_core_check_member(f, device->quantize4 != NULL));
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
    BNB_CHECK(bnb_core_check_float(f, dtype));
    BNB_CHECK(bnb_core_check_n(f, n));
    BNB_CHECK(bnb_core_check_block4(f, block));
    BNB_CHECK(bnb_core_check_type4(f, type));
    if (n == 0)
        return BNB_OK;
    BNB_CHECK(bnb_core_check_ptr(f, "codes", codes));
    BNB_CHECK(bnb_core_check_ptr(f, "out", out));
    BNB_CHECK(bnb_core_check_scales(f, scales, &a.scale));
    a.code = bnb_map4(type);
    BNB_CHECK(bnb_core_check_member(f, device->dequantize4 != NULL));
    return device->dequantize4(ex, &a, dtype);
}

bnb_status bnb_quantize_scales(const bnb_exec *ex, const float *absmax, int64_t n, int64_t block, const float *code,
                               uint8_t *codes, float *absmax2, float *offset)
{
    const char *f = "quantize_scales";
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    BNB_CHECK(bnb_core_check_n(f, n));
    BNB_CHECK(bnb_core_check_block(f, block));
    BNB_CHECK(bnb_core_check_ptr(f, "offset", offset));
    if (n > 0) {
        BNB_CHECK(bnb_core_check_ptr(f, "absmax", absmax));
        BNB_CHECK(bnb_core_check_ptr(f, "code", code));
        BNB_CHECK(bnb_core_check_ptr(f, "codes", codes));
        BNB_CHECK(bnb_core_check_ptr(f, "absmax2", absmax2));
    }
    BNB_CHECK(bnb_core_check_member(f, device->quantize_scales != NULL));
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
    BNB_CHECK(bnb_core_check_n(f, n));
    if (n == 0)
        return BNB_OK;
    BNB_CHECK(bnb_core_check_scales(f, scales, &a));
    BNB_CHECK(bnb_core_check_ptr(f, "out", out));
    if (!a.absmax2)
        return bnb_fail(BNB_EINVAL, "%s: scales->block2 is 0, expected 1 or more: plain scales need no expansion", f);
    BNB_CHECK(bnb_core_check_member(f, device->expand_scales != NULL));
    return device->expand_scales(ex, &a, n, out);
}
