/*
 * launch_linear8.c - an int8 layer on CUDA: quantise and multiply, in two launches; more where there may be outliers
 *
 * All of them may come to the card early: each waits, by itself, for the one before.
 *   few activations   codes and flags of outlier columns, by different blocks; product
 *   many              no flags so far; codes and flags, by rows' blocks; product
 * Before the product of many tokens, the columns are listed, and what activations have there is gathered, by one more.
 */
#include "cuda/cuda.h"
#include "cuda/kernels/tile8.h"

/* Threads of a block; the longest row that a block holds without many registers; memory of the list, before the values. */
enum { THREADS = 256, SHORT_ROW = 4096, LIST_BYTES = 512 };

static struct bnb_cuda_kernel *holder_of(int64_t cols, bnb_dtype dtype)
{
    static struct bnb_cuda_kernel rows[] = BNB_CUDA_VARIANTS("rows8_linear", "bnb_k_linear8_rows", THREADS);
    static struct bnb_cuda_kernel longer[] = BNB_CUDA_VARIANTS("rows8_linear", "bnb_k_linear8_long", THREADS);
    return cols > SHORT_ROW ? &longer[dtype] : &rows[dtype];
}

/* A block to a row, or to some; and one to each word of flags that they do not set themselves. */
static bnb_status hold_early(const struct bnb_cuda_call *c, struct bnb_cuda_held8 q, bool with_columns, bnb_dtype dtype)
{
    struct bnb_cuda_kernel *rows = holder_of(q.a.cols, dtype);
    const int64_t words = BNB_CUDA_MASK_WORDS(q.a.cols);
    const struct bnb_cuda_manner manner = {.early = true,
                                           .shared = q.mask && !with_columns ? (int)words * (int)sizeof(unsigned) : 0};
    int resident = 0;
    const bnb_status status = bnb_cuda_resident(c, rows, &resident);
    const int64_t blocks = q.a.rows < resident ? q.a.rows : resident;
    q.row_blocks = with_columns ? blocks : 0;
    return status ? status : bnb_cuda_launch_as(c, rows, blocks + (with_columns ? words : 0), manner, &q);
}

bnb_status bnb_cuda_hold_rows(const struct bnb_cuda_call *c, const struct bnb_rows_args *a, float *column_stats,
                              bnb_dtype dtype)
{
    static struct bnb_cuda_kernel both[] = BNB_CUDA_VARIANTS("rows8_linear", "bnb_k_both8", THREADS);
    const struct bnb_cuda_held8 q = {.a = *a, .column_stats = column_stats, .vector = bnb_cuda_rows_aligned(a)};
    return bnb_cuda_launch_over(c, column_stats ? &both[dtype] : holder_of(a->cols, dtype), a->rows, &q);
}

/* Of many activations: no flags, while rows are read, then those of the rows. */
static bnb_status hold_flagged(const struct bnb_cuda_call *c, const struct bnb_cuda_held8 *q, bnb_dtype dtype)
{
    static struct bnb_cuda_kernel clean[] = {
        {.image = "rows8_linear", .name = "bnb_k_linear8_clean", .dtype = BNB_F32, .threads = THREADS},
        {.image = "rows8_linear", .name = "bnb_k_linear8_clean", .dtype = BNB_F16, .threads = THREADS},
        {.image = "rows8_linear", .name = "bnb_k_linear8_clean", .dtype = BNB_BF16, .threads = THREADS}};
    const bnb_status status = bnb_cuda_launch_as(c, &clean[dtype], bnb_blocks(q->a.cols, THREADS),
                                                 (struct bnb_cuda_manner){.early = true}, q);
    return status ? status : hold_early(c, *q, false, dtype);
}

/* The list of the first columns, and the values in them. */
static bnb_status list_columns(const struct bnb_cuda_call *c, const struct bnb_cuda_product8 *p)
{
    static struct bnb_cuda_kernel list = {
        .image = "gemm8_list", .name = "bnb_k_gemm8_list", .dtype = -1, .threads = THREADS};
    const int64_t work = bnb_blocks(p->g.m * TILE8_ROOM / 8, THREADS), most = 8 * (int64_t)c->card->sms;
    return bnb_cuda_launch_as(c, &list, work < most ? work : most, (struct bnb_cuda_manner){.early = true}, p);
}

/* Workspace: codes, bits of outlier columns, their list, values in them, statistics; each from a multiple of 256 bytes on. */
struct room8 { size_t mask, list, values, stats, bytes; };

static struct room8 room_of(const struct bnb_linear8_block *l)
{
    struct room8 r;
    r.mask = ((size_t)l->m * (size_t)l->k + 255) / 256 * 256;
    r.list = r.mask + (BNB_CUDA_MASK_WORDS((size_t)l->k) * sizeof(unsigned) + 255) / 256 * 256;
    r.values = r.list + LIST_BYTES;
    r.stats = r.values + (l->outlier ? (size_t)l->m * BNB_TILE8_VALUES(TILE8_ROOM / TILE8_COLUMNS) : 0);
    r.bytes = r.stats + (size_t)l->m * sizeof(float);
    return r;
}

static bnb_status run(const struct bnb_cuda_call *c, const struct bnb_linear8_block *l, char *memory,
                      const struct room8 *room, bnb_dtype dtype)
{
    uint8_t *outlier = l->k > 0 ? l->outlier : NULL;
    struct bnb_gemm8_plan plan;
    const struct bnb_rows_args a = {.x = l->x,
                                    .codes = (int8_t *)memory,
                                    .stats = (float *)(memory + room->stats),
                                    .outlier = outlier,
                                    .rows = l->m,
                                    .cols = l->k,
                                    .threshold = l->threshold};
    const struct bnb_gemm8_block g = {.a = a.codes,
                                      .b = l->b,
                                      .row_stats = a.stats,
                                      .col_stats = l->col_stats,
                                      .bias = l->bias,
                                      .bias_dtype = l->bias_dtype,
                                      .x = l->x,
                                      .outlier = outlier,
                                      .out = l->out,
                                      .m = l->m,
                                      .n = l->n,
                                      .k = l->k};
    struct bnb_cuda_held8 q = {.a = a, .vector = bnb_cuda_rows_aligned(&a)};
    struct bnb_cuda_product8 p = {.g = g, .threshold = outlier ? l->threshold : 0.0f, .dtype = (int)dtype};
    bnb_status status = bnb_cuda_plan8(c, &g, &plan);
    if (outlier)
        p.mask = q.mask = (unsigned *)(memory + room->mask);
    if (!status && (!outlier || bnb_plan_linear8_twice(l->m * l->k * (dtype == BNB_F32 ? 4 : 2))))
        status = hold_early(c, q, outlier != NULL, dtype);
    else if (!status)
        status = hold_flagged(c, &q, dtype);
    if (status || l->n == 0)
        return status;
    if (outlier && bnb_plan_linear8_lists(&plan, l->k)) {
        p.list = (int *)(memory + room->list);
        p.values = memory + room->values;
        status = list_columns(c, &p);
    }
    return status ? status : bnb_cuda_run8(c, &plan, &p, true);
}

bnb_status bnb_cuda_linear8(const bnb_exec *ex, const struct bnb_linear8_block *l, bnb_dtype dtype)
{
    const struct room8 room = room_of(l);
    struct bnb_cuda_call c;
    void *memory = NULL;
    bnb_status status = bnb_cuda_begin(&c, ex, "linear8");
    if (status)
        return status;
    if (l->m > 0)
        status = bnb_cuda_alloc(&c, room.bytes, &memory);
    else if (l->outlier && l->k > 0)
        status = bnb_cuda_check(c.card->cu,
                                c.card->cu->set_bytes((cu_address)(uintptr_t)l->outlier, 0, (size_t)l->k, c.stream),
                                c.function, "cuMemsetD8Async");
    if (!status && memory)
        status = run(&c, l, memory, &room, dtype);
    bnb_cuda_free(&c, memory, room.bytes);
    bnb_cuda_end(&c);
    return status;
}
