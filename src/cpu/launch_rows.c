/*
 * launch_rows.c - LLM.int8()'s quantisers on the CPU
 *
 * Rows are independent but for the columns of outliers, which are cleared when all rows are known.
 */
#include <float.h>
#include <math.h>
#include <string.h>

#include "cpu/cpu.h"

struct rows_task {
    const struct bnb_cpu_ops *ops;
    const struct bnb_rows_args *args;
    bnb_dtype dtype;
};

static void run_quant_rows(void *arg, int64_t begin, int64_t end)
{
    const struct rows_task *t = arg;
    t->ops->quant_rows[t->dtype](t->args, begin, end);
}

static void run_clear(void *arg, int64_t begin, int64_t end)
{
    const struct bnb_rows_args *a = ((const struct rows_task *)arg)->args;
    for (int64_t i = begin; i < end; i++)
        for (int64_t j = 0; j < a->cols; j++)
            if (a->outlier[j])
                a->codes[i * a->cols + j] = 0;
}

/* Columns begin .. end - 1, in strips that are widened row by row. */
static void run_quant_columns(void *arg, int64_t begin, int64_t end)
{
    enum { STRIP = 64 };
    const struct rows_task *t = arg;
    const struct bnb_rows_args *a = t->args;
    const float limit = a->threshold > 0.0f ? a->threshold : INFINITY;
    const size_t size = bnb_dtype_size(t->dtype);
    for (int64_t low = begin; low < end; low += STRIP) {
        const int64_t n = end - low < STRIP ? end - low : STRIP;
        float value[STRIP], stat[STRIP] = {0};
        for (int pass = 0; pass < 2; pass++)
            for (int64_t i = 0; i < a->rows; i++) {
                t->ops->widen[t->dtype]((const char *)a->x + (size_t)(i * a->cols + low) * size, n, value);
                for (int64_t j = 0; j < n; j++) {
                    const float magnitude = fabsf(value[j]), r = 127.0f / stat[j];
                    const bool inside = magnitude < limit;
                    if (pass == 0 && magnitude != magnitude)
                        stat[j] = NAN; /* and so it stays */
                    else if (pass == 0)
                        stat[j] = (inside || a->threshold <= 0.0f) && magnitude > stat[j] ? magnitude : stat[j];
                    else
                        a->codes[i * a->cols + low + j] =
                            inside && r <= FLT_MAX ? (int8_t)rintf(value[j] * r) : (int8_t)0;
                }
            }
        memcpy(a->stats + low, stat, (size_t)n * sizeof(float));
    }
}

bnb_status bnb_cpu_quantize_rows(const bnb_exec *ex, const struct bnb_rows_args *a, bnb_dtype dtype)
{
    struct rows_task t = {bnb_cpu_ops_in_use(), a, dtype};
    if (a->by_column) {
        bnb_cpu_parallel(ex, a->cols, BNB_GRAIN / (a->rows < BNB_GRAIN ? a->rows + 1 : BNB_GRAIN), run_quant_columns,
                         &t);
        return BNB_OK;
    }
    const int64_t grain = BNB_GRAIN / (a->cols < BNB_GRAIN ? a->cols + 1 : BNB_GRAIN);
    if (a->outlier)
        memset(a->outlier, 0, (size_t)a->cols);
    bnb_cpu_parallel(ex, a->rows, grain, run_quant_rows, &t);
    if (a->outlier && a->rows > 1 && memchr(a->outlier, 1, (size_t)a->cols))
        bnb_cpu_parallel(ex, a->rows, grain, run_clear, &t);
    return BNB_OK;
}

struct derows_task {
    const struct bnb_cpu_ops *ops;
    const struct bnb_derows_args *args;
    bnb_dtype dtype;
};

static void run_dequant_rows(void *arg, int64_t begin, int64_t end)
{
    const struct derows_task *t = arg;
    t->ops->dequant_rows[t->dtype](t->args, begin, end);
}

bnb_status bnb_cpu_dequantize_rows(const bnb_exec *ex, const struct bnb_derows_args *a, bnb_dtype dtype)
{
    struct derows_task t = {bnb_cpu_ops_in_use(), a, dtype};
    bnb_cpu_parallel(ex, a->rows, BNB_GRAIN / (a->cols < BNB_GRAIN ? a->cols + 1 : BNB_GRAIN), run_dequant_rows, &t);
    return BNB_OK;
}

bnb_status bnb_cpu_gather_columns(const bnb_exec *ex, const bnb_matrix *x, const int64_t *columns, int64_t count,
                                  void *out)
{
    const size_t size = bnb_dtype_size(x->dtype);
    (void)ex;
    for (int64_t i = 0; i < x->rows; i++)
        for (int64_t j = 0; j < count; j++)
            memcpy((char *)out + (size_t)(i * count + j) * size,
                   (const char *)x->data + (size_t)(i * x->cols + columns[j]) * size, size);
    return BNB_OK;
}
