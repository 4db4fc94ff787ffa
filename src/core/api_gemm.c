/*
 * api_gemm.c - the public matrix products: check everything, call the device
 */
#include <math.h>
#include <stdio.h>

#include "core/check.h"
#include "core/internal.h"
#include "core/plan_gemm4.h"

/* Product of two sizes in elements, refused where the bytes of the largest dtype would overflow. */
static bnb_status check_sizes(const char *f, int64_t m, int64_t n, int64_t k)
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

static bnb_status check_gemm4(const char *f, const bnb_gemm4_args *g, struct bnb_gemm4_block *b, bool grad)
{
    if (!g)
        return bnb_fail(BNB_EINVAL, "%s: args is NULL, expected a bnb_gemm4_args", f);
    if (g->size < sizeof *g)
        return bnb_fail(BNB_EINVAL, "%s: args->size is %zu, expected at least sizeof(bnb_gemm4_args) = %zu", f, g->size,
                        sizeof *g);
    BNB_CHECK(bnb_core_check_float(f, g->dtype));
    BNB_CHECK(check_sizes(f, g->m, g->n, g->k));
    BNB_CHECK(bnb_core_check_block4(f, g->block));
    if (!g->values)
        BNB_CHECK(bnb_core_check_type4(f, g->type));
    if (g->first && (g->experts < 1 || g->experts > INT32_MAX ||
                     (g->n > 0 && g->k > 0 && g->experts > INT64_MAX / 8 / g->n / g->k)))
        return bnb_fail(BNB_EINVAL, "%s: experts is %lld, expected 1 or more, and a weight that fits into memory", f,
                        (long long)g->experts);
    if (grad && g->bias)
        return bnb_fail(BNB_EINVAL, "%s: bias is given, expected NULL: it has no part in the gradient of the input", f);
    *b = (struct bnb_gemm4_block){.x = g->x,
                                  .codes = g->codes,
                                  .bias = g->bias,
                                  .out = g->out,
                                  .m = g->m,
                                  .n = g->n,
                                  .k = g->k,
                                  .block = g->block,
                                  .code = g->values ? NULL : bnb_map4(g->type),
                                  .grad = grad,
                                  .exact = g->exact || g->dtype == BNB_F32,
                                  .first = g->first,
                                  .experts = g->experts};
    const int64_t inner = grad ? g->n : g->k, outer = grad ? g->k : g->n;
    if (g->m == 0 || outer == 0)
        return BNB_OK;
    BNB_CHECK(bnb_core_check_ptr(f, "out", g->out));
    if (inner == 0)
        return BNB_OK;
    BNB_CHECK(bnb_core_check_ptr(f, "x", g->x));
    BNB_CHECK(bnb_core_check_ptr(f, "codes", g->codes));
    return bnb_core_check_scales(f, g->scales, &b->scale);
}

/* The values of the codes, where a caller gives them: on the CPU as the type that they are of. */
static bnb_status set_values(const char *f, const bnb_exec *ex, const float *values, struct bnb_gemm4_block *b)
{
    bnb_type4 type = BNB_NF4;
    if (ex && ex->device != BNB_CPU) {
        b->code = values;
        return BNB_OK;
    }
    if (bnb_find_4bit_map(values, &type))
        return bnb_fail(BNB_ENOTSUP, "%s: values are not those of a 4-bit type, expected those of NF4 or FP4", f);
    b->code = bnb_map4(type);
    return BNB_OK;
}

static bnb_status run_gemm4(const bnb_exec *ex, const bnb_gemm4_args *g, bool grad)
{
    const char *f = grad ? "gemm4_grad" : "gemm4";
    struct bnb_gemm4_block b;
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    BNB_CHECK(check_gemm4(f, g, &b, grad));
    if (g->values)
        BNB_CHECK(set_values(f, ex, g->values, &b));
    if (g->m == 0 || (grad ? g->k : g->n) == 0)
        return BNB_OK;
    BNB_CHECK(bnb_core_check_member(f, device->gemm4 != NULL));
    return device->gemm4(ex, &b, g->dtype);
}

bnb_status bnb_gemm4(const bnb_exec *ex, const bnb_gemm4_args *args) { return run_gemm4(ex, args, false); }

bnb_status bnb_gemm4_grad(const bnb_exec *ex, const bnb_gemm4_args *args) { return run_gemm4(ex, args, true); }

static _Thread_local struct bnb_gemm4_plan last_plan;
static _Thread_local bool planned;

void bnb_gemm4_note(const struct bnb_gemm4_plan *plan)
{
    last_plan = *plan;
    planned = true;
}

const char *bnb_gemm4_plan(void)
{
    static _Thread_local char text[128];
    const struct bnb_gemm4_plan *p = &last_plan;
    if (planned)
        snprintf(text, sizeof text, "%s splits %d bands %d slices %d steps %d depth %d",
                 bnb_gemm4_kernel_name[p->kernel], p->splits, p->bands, p->slices, p->steps, p->depth);
    return text;
}

/* ---- int8 */

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

static bnb_status run_quantize(const bnb_exec *ex, const char *f, const struct bnb_rows_args *a, bnb_dtype dtype,
                               double threshold)
{
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    BNB_CHECK(check_matrix(f, dtype, a->rows, a->cols, threshold));
    if (a->rows > 0 && a->cols > 0) {
        BNB_CHECK(bnb_core_check_ptr(f, "x", a->x));
        BNB_CHECK(bnb_core_check_ptr(f, "codes", a->codes));
    }
    if ((a->by_column ? a->cols : a->rows) > 0)
        BNB_CHECK(bnb_core_check_ptr(f, "stats", a->stats));
    if (!a->by_column && threshold > 0.0 && a->cols > 0)
        BNB_CHECK(bnb_core_check_ptr(f, "outlier", a->outlier));
    BNB_CHECK(bnb_core_check_member(f, device->quantize_rows != NULL));
    return device->quantize_rows(ex, a, dtype);
}

bnb_status bnb_quantize_rows(const bnb_exec *ex, const bnb_matrix *x, double threshold, int8_t *codes, float *stats,
                             uint8_t *outlier)
{
    const char *f = "quantize_rows";
    BNB_CHECK(bnb_core_check_ptr(f, "x", x));
    const struct bnb_rows_args a = {.x = x->data,
                                    .codes = codes,
                                    .stats = stats,
                                    .rows = x->rows,
                                    .cols = x->cols,
                                    .outlier = threshold > 0.0 ? outlier : NULL,
                                    .threshold = (float)threshold};
    return run_quantize(ex, f, &a, x->dtype, threshold);
}

bnb_status bnb_quantize_columns(const bnb_exec *ex, const bnb_matrix *x, double threshold, int8_t *codes, float *stats)
{
    const char *f = "quantize_columns";
    BNB_CHECK(bnb_core_check_ptr(f, "x", x));
    const struct bnb_rows_args a = {.x = x->data,
                                    .codes = codes,
                                    .stats = stats,
                                    .rows = x->rows,
                                    .cols = x->cols,
                                    .threshold = (float)threshold,
                                    .by_column = 1};
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

bnb_status bnb_matmul8(const bnb_exec *ex, const int8_t *a, const int8_t *b, int64_t m, int64_t n, int64_t k,
                       int32_t *out)
{
    const char *f = "matmul8";
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    BNB_CHECK(check_sizes(f, m, n, k));
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
    BNB_CHECK(check_sizes(f, g->m, g->n, g->k));
    if (g->k > BNB_MAX_K8)
        return bnb_fail(BNB_ENOTSUP, "%s: k is %lld, expected at most %d: int32 sums could overflow", f,
                        (long long)g->k, BNB_MAX_K8);
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
    if (g->bias && g->bias_dtype != BNB_F32 && g->bias_dtype != BNB_F16 && g->bias_dtype != BNB_BF16)
        return bnb_fail(BNB_EDTYPE, "%s: bias_dtype is %d, expected f32, f16 or bf16", f, (int)g->bias_dtype);
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
