/*
 * launch_rows.c - LLM.int8()'s quantisers on CUDA, and the values of outlier columns
 */
#include "cuda/cuda.h"

/* Threads of a block; the width of a row above which a block holds it; rows that a thread sees of a column. */
enum { THREADS = 256, LONG_ROW = 1024, COLUMN_ROWS = 64 };

static bnb_status clear(const struct bnb_cuda_call *c, void *memory, size_t bytes)
{
    const cu_address to = (cu_address)(uintptr_t)memory;
    return bytes == 0 ? BNB_OK
                      : bnb_cuda_check(c->card->cu, c->card->cu->set_bytes(to, 0, bytes, c->stream), c->function,
                                       "cuMemsetD8Async");
}

static bnb_status by_rows(const struct bnb_cuda_call *c, const struct bnb_rows_args *a, bnb_dtype dtype)
{
    static struct bnb_cuda_kernel codes[] = BNB_CUDA_VARIANTS("rows8", "bnb_k_rows8", THREADS);
    static struct bnb_cuda_kernel clear8[] = {
        {.image = "rows8", .name = "bnb_k_clear8", .dtype = BNB_F32, .threads = THREADS},
        {.image = "rows8", .name = "bnb_k_clear8", .dtype = BNB_F16, .threads = THREADS},
        {.image = "rows8", .name = "bnb_k_clear8", .dtype = BNB_BF16, .threads = THREADS}};
    struct bnb_cuda_rows8 q = {*a, 0};
    q.vector = a->cols % 8 == 0 && bnb_cuda_aligned(a->x, 16) && bnb_cuda_aligned(a->codes, 8);
    bnb_status status = a->outlier ? clear(c, a->outlier, (size_t)a->cols) : BNB_OK;
    if (!status && a->rows > 0 && a->cols > LONG_ROW)
        status = bnb_cuda_hold_rows(c, a, dtype);
    else if (!status && a->rows > 0)
        status = bnb_cuda_launch_over(c, &codes[dtype], bnb_blocks(a->rows, THREADS / 32), &q);
    if (!status && a->outlier && a->rows > 1 && a->cols > 0)
        status = bnb_cuda_launch_over(
            c, &clear8[dtype], bnb_blocks(bnb_blocks(a->cols, 4) * bnb_blocks(a->rows, COLUMN_ROWS), THREADS), a);
    return status;
}

static bnb_status by_columns(const struct bnb_cuda_call *c, const struct bnb_rows_args *a, bnb_dtype dtype)
{
    static struct bnb_cuda_kernel stats[] = BNB_CUDA_VARIANTS("rows8", "bnb_k_column_stats8", THREADS);
    static struct bnb_cuda_kernel codes[] = BNB_CUDA_VARIANTS("rows8", "bnb_k_column_codes8", THREADS);
    const int64_t work = bnb_blocks(a->cols, THREADS) * bnb_blocks(a->rows, COLUMN_ROWS);
    bnb_status status = clear(c, a->stats, (size_t)a->cols * sizeof *a->stats);
    if (!status && work > 0)
        status = bnb_cuda_launch_over(c, &stats[dtype], work, a);
    if (!status && work > 0)
        status = bnb_cuda_launch_over(c, &codes[dtype], work, a);
    return status;
}

bnb_status bnb_cuda_quantize_rows(const bnb_exec *ex, const struct bnb_rows_args *a, bnb_dtype dtype)
{
    struct bnb_cuda_call c;
    bnb_status status = bnb_cuda_begin(&c, ex, a->by_column ? "quantize_columns" : "quantize_rows");
    if (status)
        return status;
    status = a->by_column ? by_columns(&c, a, dtype) : by_rows(&c, a, dtype);
    bnb_cuda_end(&c);
    return status;
}

bnb_status bnb_cuda_dequantize_rows(const bnb_exec *ex, const struct bnb_derows_args *a, bnb_dtype dtype)
{
    static struct bnb_cuda_kernel kernels[] = BNB_CUDA_VARIANTS("rows8", "bnb_k_derows8", THREADS);
    const struct bnb_cuda_derows8 q = {*a, bnb_cuda_aligned(a->out, 16)};
    return bnb_cuda_run(ex, "dequantize_rows", &kernels[dtype], bnb_blocks(a->rows * a->cols, THREADS * 8), &q);
}

bnb_status bnb_cuda_gather_columns(const bnb_exec *ex, const bnb_matrix *x, const int64_t *columns, int64_t count,
                                   void *out)
{
    static struct bnb_cuda_kernel kernel = {
        .image = "rows8_outliers", .name = "bnb_k_gather8", .dtype = -1, .threads = THREADS};
    const struct bnb_cuda_gather8 q = {x->data, columns, out, x->rows, x->cols, count, x->dtype == BNB_F32 ? 4 : 2};
    return bnb_cuda_run(ex, "gather_columns", &kernel, bnb_blocks(x->rows * count, THREADS), &q);
}
