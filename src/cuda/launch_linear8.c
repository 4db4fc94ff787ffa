/*
 * launch_linear8.c - an int8 layer on CUDA: quantise and multiply, in two launches, or three where there may be outliers
 *
 * All of them may come to the card early: each waits, by itself, for the one before.  Flags are cleared by a launch of their
 * own: while the product's first tiles stream in, what the quantiser still writes takes long.
 */
#include "cuda/cuda.h"

/* Threads of a block; the longest row that a block holds without many registers. */
enum { THREADS = 256, SHORT_ROW = 4096 };

static struct bnb_cuda_kernel *holder_of(int64_t cols, bnb_dtype dtype)
{
    static struct bnb_cuda_kernel rows[] = BNB_CUDA_VARIANTS("rows8_linear", "bnb_k_linear8_rows", THREADS);
    static struct bnb_cuda_kernel longer[] = BNB_CUDA_VARIANTS("rows8_linear", "bnb_k_linear8_long", THREADS);
    return cols > SHORT_ROW ? &longer[dtype] : &rows[dtype];
}

/* A block to a row, or to some. */
static bnb_status hold_early(const struct bnb_cuda_call *c, const struct bnb_cuda_held8 *q, bnb_dtype dtype)
{
    struct bnb_cuda_kernel *rows = holder_of(q->a.cols, dtype);
    int blocks = 0;
    const bnb_status status = bnb_cuda_resident(c, rows, &blocks);
    return status ? status
                  : bnb_cuda_launch_as(c, rows, q->a.rows < blocks ? q->a.rows : blocks,
                                       (struct bnb_cuda_manner){.early = true}, q);
}

bnb_status bnb_cuda_hold_rows(const struct bnb_cuda_call *c, const struct bnb_rows_args *a, float *column_stats,
                              bnb_dtype dtype)
{
    static struct bnb_cuda_kernel both[] = BNB_CUDA_VARIANTS("rows8_linear", "bnb_k_both8", THREADS);
    const struct bnb_cuda_held8 q = {.a = *a, .column_stats = column_stats, .vector = bnb_cuda_rows_aligned(a)};
    return bnb_cuda_launch_over(c, column_stats ? &both[dtype] : holder_of(a->cols, dtype), a->rows, &q);
}

/* No flags, while the rows are read; then those of the rows. */
static bnb_status hold_flagged(const struct bnb_cuda_call *c, const struct bnb_cuda_held8 *q, bnb_dtype dtype)
{
    static struct bnb_cuda_kernel clean[] = {
        {.image = "rows8_linear", .name = "bnb_k_linear8_clean", .dtype = BNB_F32, .threads = THREADS},
        {.image = "rows8_linear", .name = "bnb_k_linear8_clean", .dtype = BNB_F16, .threads = THREADS},
        {.image = "rows8_linear", .name = "bnb_k_linear8_clean", .dtype = BNB_BF16, .threads = THREADS}};
    const bnb_status status = bnb_cuda_launch_as(c, &clean[dtype], bnb_blocks(q->a.cols, THREADS),
                                                 (struct bnb_cuda_manner){.early = true}, q);
    return status ? status : hold_early(c, q, dtype);
}

static bnb_status run(const struct bnb_cuda_call *c, const struct bnb_linear8_block *l, int8_t *codes, unsigned *bits,
                      float *stats, bnb_dtype dtype)
{
    uint8_t *outlier = l->k > 0 ? l->outlier : NULL;
    unsigned *mask = outlier ? bits : NULL;
    const struct bnb_rows_args a = {.x = l->x,
                                    .codes = codes,
                                    .stats = stats,
                                    .outlier = outlier,
                                    .rows = l->m,
                                    .cols = l->k,
                                    .threshold = l->threshold};
    const struct bnb_gemm8_block g = {.a = codes,
                                      .b = l->b,
                                      .row_stats = stats,
                                      .col_stats = l->col_stats,
                                      .bias = l->bias,
                                      .bias_dtype = l->bias_dtype,
                                      .x = l->x,
                                      .outlier = outlier,
                                      .out = l->out,
                                      .m = l->m,
                                      .n = l->n,
                                      .k = l->k};
    const struct bnb_cuda_held8 q = {.a = a, .mask = mask, .vector = bnb_cuda_rows_aligned(&a)};
    const bnb_status status = mask ? hold_flagged(c, &q, dtype) : hold_early(c, &q, dtype);
    if (status || l->n == 0)
        return status;
    return bnb_cuda_product8(c, &g, mask, outlier ? l->threshold : 0.0f, dtype, true);
}

/* Workspace: codes, the bits of outlier columns from a multiple of 256 bytes on, statistics. */
bnb_status bnb_cuda_linear8(const bnb_exec *ex, const struct bnb_linear8_block *l, bnb_dtype dtype)
{
    const size_t codes = ((size_t)l->m * (size_t)l->k + 255) / 256 * 256;
    const size_t stats = codes + BNB_CUDA_MASK_WORDS((size_t)l->k) * sizeof(unsigned);
    const size_t bytes = stats + (size_t)l->m * sizeof(float);
    struct bnb_cuda_call c;
    void *memory = NULL;
    bnb_status status = bnb_cuda_begin(&c, ex, "linear8");
    if (status)
        return status;
    if (l->m > 0)
        status = bnb_cuda_alloc(&c, bytes, &memory);
    else if (l->outlier && l->k > 0)
        status = bnb_cuda_check(c.card->cu,
                                c.card->cu->set_bytes((cu_address)(uintptr_t)l->outlier, 0, (size_t)l->k, c.stream),
                                c.function, "cuMemsetD8Async");
    if (!status && memory)
        status = run(&c, l, memory, (unsigned *)((char *)memory + codes), (float *)((char *)memory + stats), dtype);
    bnb_cuda_free(&c, memory, bytes);
    bnb_cuda_end(&c);
    return status;
}
