/*
 * api_gemm8.c - LLM.int8(): quantisers, products and layers: check everything, call the device
 */
#include <stdlib.h>

#include "core/check.h"
#include "core/internal.h"

/* ---- quantising */

static bnb_status check_matrix(const char *f, bnb_dtype dtype, int64_t rows, int64_t cols, double threshold)
{
    BNB_CHECK(bnb_core_check_float(f, dtype));
    if (rows < 0 || cols < 0)
        return bnb_fail(BNB_EINVAL, "%s: %s is %lld, expected 0 or more", f, rows < 0 ? "rows" : "cols",
                        (long long)(rows < 0 ? rows : cols));
    if (rows > 0 && cols > INT64_MAX / 8 / rows)
        return bnb_fail(BNB_EINVAL, "%s: rows, cols are %lld, %lld, expected a product that fits into memory", f,
                        (long long)rows, (long long)cols);
    if (!(threshold >= 0.0))
        return bnb_fail(BNB_EINVAL, "%s: threshold is %g, expected 0 or more", f, threshold);
    return BNB_OK;
}

static bnb_status check_quantize(const char *f, const struct bnb_rows_args *a, bnb_dtype dtype, double threshold)
{
    BNB_CHECK(check_matrix(f, dtype, a->rows, a->cols, threshold));
    if (a->rows > 0 && a->cols > 0) {
        BNB_CHECK(bnb_core_check_ptr(f, "x", a->x));
        BNB_CHECK(bnb_core_check_ptr(f, "codes", a->codes));
    }
    if ((a->by_column ? a->cols : a->rows) > 0)
        BNB_CHECK(bnb_core_check_ptr(f, "stats", a->stats));
    if (!a->by_column && threshold > 0.0 && a->cols > 0)
        BNB_CHECK(bnb_core_check_ptr(f, "outlier", a->outlier));
    return BNB_OK;
}

static bnb_status run_quantize(const bnb_exec *ex, const char *f, const struct bnb_rows_args *a, bnb_dtype dtype,
                               double threshold)
{
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    BNB_CHECK(check_quantize(f, a, dtype, threshold));
    BNB_CHECK(bnb_core_check_member(f, device->quantize_rows != NULL));
    return device->quantize_rows(ex, a, dtype);
}

static struct bnb_rows_args rows_args(const bnb_matrix *x, double threshold, int8_t *codes, float *stats,
                                      uint8_t *outlier)
{
    return (struct bnb_rows_args){.x = x->data,
                                  .codes = codes,
                                  .stats = stats,
                                  .rows = x->rows,
                                  .cols = x->cols,
                                  .outlier = threshold > 0.0 ? outlier : NULL,
                                  .threshold = (float)threshold};
}

bnb_status bnb_quantize_rows(const bnb_exec *ex, const bnb_matrix *x, double threshold, int8_t *codes, float *stats,
                             uint8_t *outlier)
{
    const char *f = "quantize_rows";
    BNB_CHECK(bnb_core_check_ptr(f, "x", x));
    const struct bnb_rows_args a = rows_args(x, threshold, codes, stats, outlier);
    return run_quantize(ex, f, &a, x->dtype, threshold);
}

bnb_status bnb_quantize_both(const bnb_exec *ex, const bnb_matrix *x, double threshold, int8_t *codes[2],
                             float *stats[2], uint8_t *outlier)
{
    const char *f = "quantize_both";
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    BNB_CHECK(bnb_core_check_ptr(f, "x", x));
    BNB_CHECK(bnb_core_check_ptr(f, "codes", codes));
    BNB_CHECK(bnb_core_check_ptr(f, "stats", stats));
    struct bnb_rows_args a[2] = {rows_args(x, threshold, codes[0], stats[0], outlier),
                                 rows_args(x, threshold, codes[1], stats[1], NULL)};
    a[1].by_column = 1;
    for (int i = 0; i < 2; i++)
        BNB_CHECK(check_quantize(f, &a[i], x->dtype, threshold));
    if (device->quantize_both)
        return device->quantize_both(ex, a, x->dtype);
    if (!device->quantize_rows)
        return bnb_core_check_member(f, false);
    BNB_CHECK(device->quantize_rows(ex, &a[0], x->dtype));
    return device->quantize_rows(ex, &a[1], x->dtype);
}

bnb_status bnb_quantize_columns(const bnb_exec *ex, const bnb_matrix *x, double threshold, int8_t *codes, float *stats)
{
    const char *f = "quantize_columns";
    BNB_CHECK(bnb_core_check_ptr(f, "x", x));
    struct bnb_rows_args a = rows_args(x, threshold, codes, stats, NULL);
    a.by_column = 1;
    return run_quantize(ex, f, &a, x->dtype, threshold);
}

bnb_status bnb_dequantize_rows(const bnb_exec *ex, const int8_t *codes, const float *stats, int64_t rows, int64_t cols,
                               void *out, bnb_dtype dtype)
{
    const char *f = "dequantize_rows";
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    BNB_CHECK(check_matrix(f, dtype, rows, cols, 0.0));
    if (rows == 0 || cols == 0)
        return BNB_OK;
    BNB_CHECK(bnb_core_check_ptr(f, "codes", codes));
    BNB_CHECK(bnb_core_check_ptr(f, "stats", stats));
    BNB_CHECK(bnb_core_check_ptr(f, "out", out));
    const struct bnb_derows_args a = {.codes = codes, .stats = stats, .out = out, .rows = rows, .cols = cols};
    BNB_CHECK(bnb_core_check_member(f, device->dequantize_rows != NULL));
    return device->dequantize_rows(ex, &a, dtype);
}

/* ---- products */

bnb_status bnb_matmul8(const bnb_exec *ex, const int8_t *a, const int8_t *b, int64_t m, int64_t n, int64_t k,
                       int32_t *out)
{
    const char *f = "matmul8";
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    BNB_CHECK(bnb_core_check_product(f, m, n, k));
    if (k > BNB_MAX_K8)
        return bnb_fail(BNB_ENOTSUP, "%s: k is %lld, expected at most %d: int32 sums could overflow", f, (long long)k,
                        BNB_MAX_K8);
    if (m == 0 || n == 0)
        return BNB_OK;
    BNB_CHECK(bnb_core_check_ptr(f, "out", out));
    if (k > 0) {
        BNB_CHECK(bnb_core_check_ptr(f, "a", a));
        BNB_CHECK(bnb_core_check_ptr(f, "b", b));
    }
    const struct bnb_gemm8_block g = {.a = a, .b = b, .sums = out, .m = m, .n = n, .k = k};
    BNB_CHECK(bnb_core_check_member(f, device->gemm8 != NULL));
    return device->gemm8(ex, &g, BNB_F32);
}

static bnb_status check_gemm8(const char *f, const bnb_gemm8_args *g)
{
    if (!g)
        return bnb_fail(BNB_EINVAL, "%s: args is NULL, expected a bnb_gemm8_args", f);
    if (g->size < sizeof *g)
        return bnb_fail(BNB_EINVAL, "%s: args->size is %zu, expected at least sizeof(bnb_gemm8_args) = %zu", f, g->size,
                        sizeof *g);
    BNB_CHECK(bnb_core_check_float(f, g->dtype));
    BNB_CHECK(bnb_core_check_product(f, g->m, g->n, g->k));
    if (g->k > BNB_MAX_K8)
        return bnb_fail(BNB_ENOTSUP, "%s: k is %lld, expected at most %d: int32 sums could overflow", f,
                        (long long)g->k, BNB_MAX_K8);
    return BNB_OK;
}

static bnb_status check_bias(const char *f, const bnb_gemm8_args *g)
{
    if (g->bias && g->bias_dtype != BNB_F32 && g->bias_dtype != BNB_F16 && g->bias_dtype != BNB_BF16)
        return bnb_fail(BNB_EDTYPE, "%s: bias_dtype is %d, expected f32, f16 or bf16", f, (int)g->bias_dtype);
    return BNB_OK;
}

bnb_status bnb_gemm8(const bnb_exec *ex, const bnb_gemm8_args *g)
{
    const char *f = "gemm8";
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    BNB_CHECK(check_gemm8(f, g));
    if (g->outliers < 0 || g->outliers > g->k)
        return bnb_fail(BNB_EINVAL, "%s: outliers is %lld, expected 0..k = %lld", f, (long long)g->outliers,
                        (long long)g->k);
    if (g->outlier && g->outliers > 0)
        return bnb_fail(BNB_EINVAL, "%s: outliers is %lld, expected 0 where the flags `outlier` are given", f,
                        (long long)g->outliers);
    BNB_CHECK(check_bias(f, g));
    if (g->m == 0 || g->n == 0)
        return BNB_OK;
    BNB_CHECK(bnb_core_check_ptr(f, "out", g->out));
    BNB_CHECK(bnb_core_check_ptr(f, "row_stats", g->row_stats));
    BNB_CHECK(bnb_core_check_ptr(f, "col_stats", g->col_stats));
    if (g->k > 0 && !g->product) {
        BNB_CHECK(bnb_core_check_ptr(f, "a", g->a));
        BNB_CHECK(bnb_core_check_ptr(f, "b", g->b));
    }
    if (g->outliers > 0) {
        BNB_CHECK(bnb_core_check_ptr(f, "x", g->x));
        BNB_CHECK(bnb_core_check_ptr(f, "b", g->b));
        BNB_CHECK(bnb_core_check_ptr(f, "columns", g->columns));
    }
    if (g->outlier && g->k > 0) {
        BNB_CHECK(bnb_core_check_ptr(f, "x", g->x));
        BNB_CHECK(bnb_core_check_ptr(f, "b", g->b));
    }
    const struct bnb_gemm8_block b = {.a = g->a,
                                      .b = g->b,
                                      .product = g->product,
                                      .row_stats = g->row_stats,
                                      .col_stats = g->col_stats,
                                      .bias = g->bias,
                                      .bias_dtype = (int)g->bias_dtype,
                                      .x = g->x,
                                      .columns = g->columns,
                                      .outliers = g->outliers,
                                      .outlier = g->outlier,
                                      .out = g->out,
                                      .m = g->m,
                                      .n = g->n,
                                      .k = g->k};
    BNB_CHECK(bnb_core_check_member(f, device->gemm8 != NULL));
    return device->gemm8(ex, &b, g->dtype);
}

bnb_status bnb_gemm8_grad(const bnb_exec *ex, const bnb_gemm8_args *g)
{
    const char *f = "gemm8_grad";
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    BNB_CHECK(check_gemm8(f, g));
    if (g->m == 0 || g->k == 0)
        return BNB_OK;
    BNB_CHECK(bnb_core_check_ptr(f, "out", g->out));
    if (g->n > 0) {
        BNB_CHECK(bnb_core_check_ptr(f, "x", g->x));
        BNB_CHECK(bnb_core_check_ptr(f, "b", g->b));
        BNB_CHECK(bnb_core_check_ptr(f, "col_stats", g->col_stats));
    }
    const struct bnb_gemm8_block b = {
        .b = g->b, .col_stats = g->col_stats, .x = g->x, .out = g->out, .m = g->m, .n = g->n, .k = g->k, .grad = 1};
    BNB_CHECK(bnb_core_check_member(f, device->gemm8 != NULL));
    return device->gemm8(ex, &b, g->dtype);
}

bnb_status bnb_gather_columns(const bnb_exec *ex, const bnb_matrix *x, const int64_t *columns, int64_t count, void *out)
{
    const char *f = "gather_columns";
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    BNB_CHECK(bnb_core_check_ptr(f, "x", x));
    BNB_CHECK(check_matrix(f, x->dtype, x->rows, x->cols, 0.0));
    if (count < 0 || count > x->cols)
        return bnb_fail(BNB_EINVAL, "%s: count is %lld, expected 0..x->cols = %lld", f, (long long)count,
                        (long long)x->cols);
    if (x->rows == 0 || count == 0)
        return BNB_OK;
    BNB_CHECK(bnb_core_check_ptr(f, "x->data", x->data));
    BNB_CHECK(bnb_core_check_ptr(f, "columns", columns));
    BNB_CHECK(bnb_core_check_ptr(f, "out", out));
    BNB_CHECK(bnb_core_check_member(f, device->gather_columns != NULL));
    return device->gather_columns(ex, x, columns, count, out);
}

/* ---- layers */

static bnb_status check_linear8(const char *f, const bnb_gemm8_args *l, double threshold, const uint8_t *outlier)
{
    BNB_CHECK(check_gemm8(f, l));
    if (!(threshold >= 0.0))
        return bnb_fail(BNB_EINVAL, "%s: threshold is %g, expected 0 or more", f, threshold);
    BNB_CHECK(check_bias(f, l));
    if (threshold > 0.0 && l->k > 0)
        BNB_CHECK(bnb_core_check_ptr(f, "outlier", outlier));
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

bnb_status bnb_linear8(const bnb_exec *ex, const bnb_gemm8_args *l, double threshold, uint8_t *outlier)
{
    const char *f = "linear8";
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    BNB_CHECK(check_linear8(f, l, threshold, outlier));
    const struct bnb_linear8_block b = {.x = l->x,
                                        .b = l->b,
                                        .col_stats = l->col_stats,
                                        .bias = l->bias,
                                        .bias_dtype = (int)l->bias_dtype,
                                        .outlier = threshold > 0.0 ? outlier : NULL,
                                        .out = l->out,
                                        .m = l->m,
                                        .n = l->n,
                                        .k = l->k,
                                        .threshold = (float)threshold};
    if (device->linear8)
        return device->linear8(ex, &b, l->dtype);
    BNB_CHECK(bnb_core_check_member(f, device->quantize_rows && device->gemm8));
    return in_two_steps(ex, device, &b, l->dtype);
}
