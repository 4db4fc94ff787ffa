/*
 * launch_rows.c - LLM.int8()'s quantisers on CUDA, and the values of outlier columns
 */
#include "cuda/cuda.h"

/* Threads of a block; the width of a row above which a block holds it, and that it holds whole; rows that a thread reads of a
 * column, and looks at where codes are cleared. */
enum { THREADS = 256, LONG_ROW = 1024, HELD = 16384, COLUMN_ROWS = 16, CLEAR_ROWS = 64 };

static bnb_status clear(const struct bnb_cuda_call *c, void *memory, size_t bytes)
{
    const cu_address to = (cu_address)(uintptr_t)memory;
    return bytes == 0 ? BNB_OK
                      : bnb_cuda_check(c->card->cu, c->card->cu->set_bytes(to, 0, bytes, c->stream), c->function,
                                       "cuMemsetD8Async");
}

bool bnb_cuda_rows_aligned(const struct bnb_rows_args *a)
{
    return a->cols % 8 == 0 && bnb_cuda_aligned(a->x, 16) && bnb_cuda_aligned(a->codes, 8);
}

/* When all rows are known: the codes of the columns that hold an outlier. */
static bnb_status clear_codes(const struct bnb_cuda_call *c, const struct bnb_rows_args *a, bnb_dtype dtype)
{
    static struct bnb_cuda_kernel clear8[] = {
        {.image = "rows8", .name = "bnb_k_clear8", .dtype = BNB_F32, .threads = THREADS},
        {.image = "rows8", .name = "bnb_k_clear8", .dtype = BNB_F16, .threads = THREADS},
        {.image = "rows8", .name = "bnb_k_clear8", .dtype = BNB_BF16, .threads = THREADS}};
    if (!a->outlier || a->rows <= 1 || a->cols == 0)
        return BNB_OK;
    return bnb_cuda_launch_over(c, &clear8[dtype],
                                bnb_blocks(bnb_blocks(a->cols, 4) * bnb_blocks(a->rows, CLEAR_ROWS), THREADS), a);
}

static bnb_status by_rows(const struct bnb_cuda_call *c, const struct bnb_rows_args *a, bnb_dtype dtype)
{
    static struct bnb_cuda_kernel codes[] = BNB_CUDA_VARIANTS("rows8", "bnb_k_rows8", THREADS);
    const struct bnb_cuda_rows8 q = {*a, bnb_cuda_rows_aligned(a)};
    bnb_status status = a->outlier ? clear(c, a->outlier, (size_t)a->cols) : BNB_OK;
    if (!status && a->rows > 0 && a->cols > LONG_ROW)
        status = bnb_cuda_hold_rows(c, a, NULL, dtype);
    else if (!status && a->rows > 0)
        status = bnb_cuda_launch_over(c, &codes[dtype], bnb_blocks(a->rows, THREADS / 32), &q);
    return status ? status : clear_codes(c, a, dtype);
}

static bnb_status column_codes(const struct bnb_cuda_call *c, const struct bnb_rows_args *a, bnb_dtype dtype)
{
    static struct bnb_cuda_kernel codes[] = BNB_CUDA_VARIANTS("rows8", "bnb_k_column_codes8", THREADS);
    const int64_t work = bnb_blocks(a->cols, 8) * bnb_blocks(a->rows, COLUMN_ROWS);
    const struct bnb_cuda_rows8 q = {*a, bnb_cuda_rows_aligned(a)};
    return work > 0 ? bnb_cuda_launch_over(c, &codes[dtype], bnb_blocks(work, THREADS), &q) : BNB_OK;
}

static bnb_status by_columns(const struct bnb_cuda_call *c, const struct bnb_rows_args *a, bnb_dtype dtype)
{
    static struct bnb_cuda_kernel stats[] = BNB_CUDA_VARIANTS("rows8", "bnb_k_column_stats8", THREADS);
    const int64_t work = bnb_blocks(a->cols, 8) * bnb_blocks(a->rows, COLUMN_ROWS);
    const struct bnb_cuda_rows8 q = {*a, bnb_cuda_rows_aligned(a)};
    bnb_status status = clear(c, a->stats, (size_t)a->cols * sizeof *a->stats);
    if (!status && work > 0)
        status = bnb_cuda_launch_over(c, &stats[dtype], bnb_blocks(work, THREADS), &q);
    return status ? status : column_codes(c, a, dtype);
}

/* A block that holds a row knows its share of the columns' statistics too. */
static bnb_status by_both(const struct bnb_cuda_call *c, const struct bnb_rows_args a[2], bnb_dtype dtype)
{
    if (a->rows == 0 || a->cols <= LONG_ROW || a->cols > HELD) {
        const bnb_status rows = by_rows(c, &a[0], dtype);
        return rows ? rows : by_columns(c, &a[1], dtype);
    }
    bnb_status status = a->outlier ? clear(c, a->outlier, (size_t)a->cols) : BNB_OK;
    if (!status)
        status = clear(c, a[1].stats, (size_t)a->cols * sizeof *a[1].stats);
    if (!status)
        status = bnb_cuda_hold_rows(c, a, a[1].stats, dtype);
    if (!status)
        status = clear_codes(c, a, dtype);
    return status ? status : column_codes(c, &a[1], dtype);
}

bnb_status bnb_cuda_quantize_both(const bnb_exec *ex, const struct bnb_rows_args a[2], bnb_dtype dtype)
{
    struct bnb_cuda_call c;
    bnb_status status = bnb_cuda_begin(&c, ex, "quantize_both");
    if (status)
        return status;
    status = by_both(&c, a, dtype);
    bnb_cuda_end(&c);
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
    const struct bnb_cuda_derows8 q = {*a, bnb_cuda_aligned(a->out, 16) && bnb_cuda_aligned(a->codes, 8)};
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
