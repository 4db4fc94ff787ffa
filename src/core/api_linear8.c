/*
 * api_linear8.c - a linear layer with an int8 weight: activations quantised and multiplied in one call
 */
#include <stdlib.h>

#include "core/check.h"
#include "core/internal.h"

static bnb_status check_sizes(const char *f, const bnb_linear8_args *l)
{
    const struct {
        const char *name;
        int64_t value;
    } size[] = {{"m", l->m}, {"n", l->n}, {"k", l->k}};
    for (int i = 0; i < 3; i++)
        if (size[i].value < 0)
            return bnb_fail(BNB_EINVAL, "%s: %s is %lld, expected 0 or more", f, size[i].name,
                            (long long)size[i].value);
    for (int i = 0; i < 3; i++) {
        const int64_t a = size[i].value, b = size[(i + 1) % 3].value;
        if (a > 0 && b > INT64_MAX / 8 / a)
            return bnb_fail(BNB_EINVAL, "%s: m, n, k are %lld, %lld, %lld, expected a product that fits into memory", f,
                            (long long)l->m, (long long)l->n, (long long)l->k);
    }
    if (l->k > BNB_MAX_K8)
        return bnb_fail(BNB_ENOTSUP, "%s: k is %lld, expected at most %d: int32 sums could overflow", f,
                        (long long)l->k, BNB_MAX_K8);
    return BNB_OK;
}

static bnb_status check_linear8(const char *f, const bnb_linear8_args *l)
{
    if (!l)
        return bnb_fail(BNB_EINVAL, "%s: args is NULL, expected a bnb_linear8_args", f);
    if (l->size < sizeof *l)
        return bnb_fail(BNB_EINVAL, "%s: args->size is %zu, expected at least sizeof(bnb_linear8_args) = %zu", f,
                        l->size, sizeof *l);
    BNB_CHECK(bnb_core_check_float(f, l->dtype));
    BNB_CHECK(check_sizes(f, l));
    if (!(l->threshold >= 0.0))
        return bnb_fail(BNB_EINVAL, "%s: threshold is %g, expected 0 or more", f, l->threshold);
    if (l->bias && l->bias_dtype != BNB_F32 && l->bias_dtype != BNB_F16 && l->bias_dtype != BNB_BF16)
        return bnb_fail(BNB_EDTYPE, "%s: bias_dtype is %d, expected f32, f16 or bf16", f, (int)l->bias_dtype);
    if (l->threshold > 0.0 && l->k > 0)
        BNB_CHECK(bnb_core_check_ptr(f, "outlier", l->outlier));
    if (l->m > 0 && l->k > 0)
        BNB_CHECK(bnb_core_check_ptr(f, "x", l->x));
    if (l->m == 0 || l->n == 0)
        return BNB_OK;
    BNB_CHECK(bnb_core_check_ptr(f, "out", l->out));
    BNB_CHECK(bnb_core_check_ptr(f, "col_stats", l->col_stats));
    return l->k > 0 ? bnb_core_check_ptr(f, "b", l->b) : BNB_OK;
}

/* With workspace of the host, for a device that is one. */
static bnb_status in_two_steps(const bnb_exec *ex, const struct bnb_device_ops *device,
                               const struct bnb_linear8_block *l, bnb_dtype dtype)
{
    const size_t count = (size_t)l->m * (size_t)l->k, bytes = (size_t)l->m * sizeof(float) + count;
    float *stats = malloc(bytes > 0 ? bytes : 1);
    if (!stats)
        return bnb_fail(BNB_ENOMEM, "linear8: no %zu bytes of workspace", bytes);
    int8_t *codes = (int8_t *)(stats + l->m);
    const struct bnb_rows_args a = {l->x, codes, stats, l->outlier, l->m, l->k, l->threshold, 0};
    const struct bnb_gemm8_block g = {.a = codes,
                                      .b = l->b,
                                      .row_stats = stats,
                                      .col_stats = l->col_stats,
                                      .bias = l->bias,
                                      .bias_dtype = l->bias_dtype,
                                      .x = l->x,
                                      .outlier = l->k > 0 ? l->outlier : NULL,
                                      .out = l->out,
                                      .m = l->m,
                                      .n = l->n,
                                      .k = l->k};
    bnb_status status = device->quantize_rows(ex, &a, dtype);
    if (!status && l->m > 0 && l->n > 0)
        status = device->gemm8(ex, &g, dtype);
    free(stats);
    return status;
}

bnb_status bnb_linear8(const bnb_exec *ex, const bnb_linear8_args *l)
{
    const char *f = "linear8";
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    BNB_CHECK(check_linear8(f, l));
    const struct bnb_linear8_block b = {.x = l->x,
                                        .b = l->b,
                                        .col_stats = l->col_stats,
                                        .bias = l->bias,
                                        .bias_dtype = (int)l->bias_dtype,
                                        .outlier = l->threshold > 0.0 ? l->outlier : NULL,
                                        .out = l->out,
                                        .m = l->m,
                                        .n = l->n,
                                        .k = l->k,
                                        .threshold = (float)l->threshold};
    if (device->linear8)
        return device->linear8(ex, &b, l->dtype);
    BNB_CHECK(bnb_core_check_member(f, device->quantize_rows && device->gemm8));
    return in_two_steps(ex, device, &b, l->dtype);
}
