/*
 * launch_linear8.c - an int8 layer on CUDA: quantise, list the outlier columns, multiply, in two launches where it can be
 *
 * Of the launches, all but the first may come to the card early: each waits, by itself, for the one before.
 */
#include "cuda/cuda.h"

/* Threads of a block; rows up to which one cluster does everything, and its blocks. */
enum { THREADS = 256, FEW_ROWS = 64, CLUSTER = 8 };

static struct bnb_cuda_kernel hold[] = BNB_CUDA_VARIANTS("rows8_linear", "bnb_k_linear8_rows", THREADS);

static bool is_vector(const struct bnb_rows_args *a)
{
    return a->cols % 8 == 0 && bnb_cuda_aligned(a->x, 16) && bnb_cuda_aligned(a->codes, 8);
}

static int64_t at_once(const struct bnb_cuda_call *c, struct bnb_cuda_kernel *kernel, int64_t work, bnb_status *status)
{
    int blocks = 0;
    *status = bnb_cuda_resident(c, kernel, &blocks);
    return work < blocks ? work : blocks;
}

bnb_status bnb_cuda_hold_rows(const struct bnb_cuda_call *c, const struct bnb_rows_args *a, bnb_dtype dtype)
{
    const struct bnb_cuda_linear8 q = {.a = *a, .vector = is_vector(a)};
    return bnb_cuda_launch_over(c, &hold[dtype], a->rows, &q);
}

/* Flags and ticket made zero, the rows, and where there are more than one, the codes of the listed columns. */
static bnb_status many_rows(const struct bnb_cuda_call *c, const struct bnb_cuda_linear8 *q, bnb_dtype dtype)
{
    static struct bnb_cuda_kernel clean[] = BNB_CUDA_VARIANTS("rows8_linear", "bnb_k_linear8_clean", THREADS);
    static struct bnb_cuda_kernel clear[] = BNB_CUDA_VARIANTS("rows8_linear", "bnb_k_linear8_clear", THREADS);
    const struct bnb_cuda_manner early = {1, true};
    bnb_status status = bnb_cuda_launch_over(c, &clean[dtype], bnb_blocks(q->a.cols, THREADS), q);
    if (status)
        return status;
    const int64_t blocks = at_once(c, &hold[dtype], q->a.rows, &status);
    if (!status)
        status = bnb_cuda_launch_as(c, &hold[dtype], blocks, early, q);
    if (!status && q->a.rows > 1)
        status = bnb_cuda_launch_as(c, &clear[dtype], 2 * (int64_t)c->card->sms, early, q);
    return status;
}

static bnb_status quantise(const struct bnb_cuda_call *c, struct bnb_cuda_linear8 *q, bnb_dtype dtype)
{
    static struct bnb_cuda_kernel few[] = {{.image = "rows8_linear",
                                            .name = "bnb_k_linear8_cluster_f32",
                                            .dtype = BNB_F32,
                                            .threads = THREADS,
                                            .special = true},
                                           {.image = "rows8_linear",
                                            .name = "bnb_k_linear8_cluster_f16",
                                            .dtype = BNB_F16,
                                            .threads = THREADS,
                                            .special = true},
                                           {.image = "rows8_linear",
                                            .name = "bnb_k_linear8_cluster_bf16",
                                            .dtype = BNB_BF16,
                                            .threads = THREADS,
                                            .special = true}};
    int built = 0;
    if (!q->a.outlier)
        return bnb_cuda_launch_over(c, &hold[dtype], q->a.rows, q);
    if (c->card->capability >= 90 && c->card->cu->launch_as && q->a.rows <= FEW_ROWS) {
        const bnb_status status = bnb_cuda_resident(c, &few[dtype], &built);
        if (status)
            return status;
    }
    if (built == 0)
        return many_rows(c, q, dtype);
    for (q->cluster = 1; q->cluster < CLUSTER && q->cluster < q->a.rows;)
        q->cluster *= 2;
    return bnb_cuda_launch_as(c, &few[dtype], q->cluster, (struct bnb_cuda_manner){q->cluster, false}, q);
}

/* Workspace: codes, statistics, list, its length, a ticket, each from a multiple of 256 bytes on. */
struct workspace { size_t codes, stats, columns, count, bytes; };

static struct workspace workspace_of(const struct bnb_linear8_block *l)
{
    struct workspace w = {.codes = 0};
    w.stats = w.codes + ((size_t)l->m * (size_t)l->k + 255) / 256 * 256;
    w.columns = w.stats + ((size_t)l->m * sizeof(float) + 255) / 256 * 256;
    w.count = w.columns + (l->outlier ? ((size_t)l->k * sizeof(int64_t) + 255) / 256 * 256 : 0);
    w.bytes = w.count + 256;
    return w;
}

static bnb_status run(const struct bnb_cuda_call *c, const struct bnb_linear8_block *l, const struct workspace *w,
                      char *memory, bnb_dtype dtype)
{
    const bool listed = l->outlier && l->k > 0;
    struct bnb_cuda_linear8 q = {.a = {.x = l->x,
                                       .codes = (int8_t *)(memory + w->codes),
                                       .stats = (float *)(memory + w->stats),
                                       .outlier = listed ? l->outlier : NULL,
                                       .rows = l->m,
                                       .cols = l->k,
                                       .threshold = l->threshold},
                                 .columns = listed ? (int64_t *)(memory + w->columns) : NULL,
                                 .count = (int64_t *)(memory + w->count),
                                 .ticket = (unsigned *)(memory + w->count + 8)};
    q.vector = is_vector(&q.a);
    const struct bnb_gemm8_block g = {.a = q.a.codes,
                                      .b = l->b,
                                      .row_stats = q.a.stats,
                                      .col_stats = l->col_stats,
                                      .bias = l->bias,
                                      .bias_dtype = l->bias_dtype,
                                      .x = l->x,
                                      .columns = q.columns,
                                      .out = l->out,
                                      .m = l->m,
                                      .n = l->n,
                                      .k = l->k};
    const bnb_status status = quantise(c, &q, dtype);
    if (status || l->n == 0)
        return status;
    return bnb_cuda_product8(c, &g, listed ? q.count : NULL, dtype, true);
}

bnb_status bnb_cuda_linear8(const bnb_exec *ex, const struct bnb_linear8_block *l, bnb_dtype dtype)
{
    const struct workspace w = workspace_of(l);
    struct bnb_cuda_call c;
    void *memory = NULL;
    bnb_status status = bnb_cuda_begin(&c, ex, "linear8");
    if (status)
        return status;
    if (l->m > 0)
        status = bnb_cuda_alloc(&c, w.bytes, &memory);
    else if (l->outlier && l->k > 0)
        status = bnb_cuda_check(c.card->cu,
                                c.card->cu->set_bytes((cu_address)(uintptr_t)l->outlier, 0, (size_t)l->k, c.stream),
                                c.function, "cuMemsetD8Async");
    if (!status && memory)
        status = run(&c, l, &w, memory, dtype);
    bnb_cuda_free(&c, memory, w.bytes);
    bnb_cuda_end(&c);
    return status;
}
