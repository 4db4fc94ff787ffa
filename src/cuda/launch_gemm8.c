/*
 * launch_gemm8.c - products with an int8 weight on CUDA: the plan's kernel, its tensor maps, its grid
 */
#include <pthread.h>
#include <stdlib.h>

#include "cuda/cuda.h"
#include "cuda/kernels/tile8.h"

/* Threads of a block; rows of the weight that one takes at a time; sides of a tile; rows of activations that are few. */
enum { THREADS = 256, WARPS = 8, TILE = 64, FEW = 8 };

static int64_t tiles_of(int64_t m, int64_t n) { return bnb_blocks(m, TILE) * bnb_blocks(n, TILE); }

/* ---------------------------------------------------------------- any shape */

/* The list of the flagged columns behind its length, which stay on the device, in memory [k + 1]. */
static bnb_status list_outliers(const struct bnb_cuda_call *c, struct bnb_cuda_gemm8 *p, int64_t *memory)
{
    static struct bnb_cuda_kernel kernel = {
        .image = "rows8_outliers", .name = "bnb_k_outliers8", .dtype = -1, .threads = 1024};
    const struct bnb_cuda_outliers8 q = {p->g.outlier, memory + 1, memory, p->g.k};
    p->g.columns = memory + 1;
    p->count = memory;
    return bnb_cuda_launch(c, &kernel, 1, &q);
}

static bnb_status launch_plain(const struct bnb_cuda_call *c, const struct bnb_cuda_gemm8 *p, bnb_dtype dtype)
{
    static struct bnb_cuda_kernel few[] = BNB_CUDA_VARIANTS("gemm8", "bnb_k_gemv8", THREADS);
    static struct bnb_cuda_kernel many[] = BNB_CUDA_VARIANTS("gemm8", "bnb_k_gemm8", THREADS);
    static struct bnb_cuda_kernel scale[] = BNB_CUDA_VARIANTS("gemm8", "bnb_k_scale8", THREADS);
    if (p->g.product && !p->g.columns)
        return bnb_cuda_launch_over(c, &scale[dtype], bnb_blocks(p->g.m * bnb_blocks(p->g.n, 8), THREADS), p);
    if (p->g.m > FEW || p->g.product)
        return bnb_cuda_launch_over(c, &many[dtype], tiles_of(p->g.m, p->g.n), p);
    return bnb_cuda_launch_over(c, &few[dtype], bnb_blocks(p->g.n, WARPS), p);
}

static bnb_status run_plain(const struct bnb_cuda_call *c, struct bnb_cuda_gemm8 *p, bnb_dtype dtype)
{
    const size_t bytes = p->g.outlier && p->g.k > 0 ? ((size_t)p->g.k + 1) * sizeof(int64_t) : 0;
    void *memory = NULL;
    bnb_status status = bytes > 0 ? bnb_cuda_alloc(c, bytes, &memory) : BNB_OK;
    if (!status && memory)
        status = list_outliers(c, p, memory);
    if (!status)
        status = launch_plain(c, p, dtype);
    bnb_cuda_free(c, memory, bytes);
    return status;
}

/* ---------------------------------------------------------------- matrix units */

#define TILES(file, entry, count, bytes) \
    {.image = file, .name = entry, .dtype = -1, .threads = count, .shared = bytes, .special = true}
#define NARROW(tokens)                                                 \
    TILES("gemm8_narrow", "bnb_k_gemm8_narrow" #tokens, TILE8_THREADS, \
          BNB_TILE8_SHARED(tokens, TILE8_STAGES_##tokens, TILE8_NARROW_CHUNKS))
#define WIDE(tokens)                                               \
    TILES("gemm8_wide", "bnb_k_gemm8_wide" #tokens, TILE8_THREADS, \
          BNB_TILE8_SHARED(tokens, TILE8_WIDE_STAGES, TILE8_WIDE_CHUNKS) + TILE8_ROW_SCALES)

static struct bnb_cuda_kernel *kernel_of(const struct bnb_gemm8_plan *plan)
{
    static struct bnb_cuda_kernel mma = TILES("gemm8_mma", "bnb_k_gemm8_mma", THREADS, TILE8_SHARED);
    static struct bnb_cuda_kernel narrow[] = {NARROW(8), NARROW(16), NARROW(32), NARROW(64), NARROW(128)};
    static struct bnb_cuda_kernel wide[] = {WIDE(128), WIDE(256)};
    if (plan->way == BNB_GEMM8_MMA)
        return &mma;
    return plan->way == BNB_GEMM8_NARROW ? &narrow[__builtin_ctz((unsigned)plan->tokens) - 3]
                                         : &wide[plan->tokens == 256];
}

/* A matrix of bytes or 16-bit elements [rows, k] as boxes of `lines` rows and 128 bytes, in the layout of hopper.cuh; zeros
 * beyond. */
static bnb_status map_of(const struct bnb_cuda_call *c, const void *matrix, int size, int64_t rows, int64_t k,
                         int lines, struct bnb_cuda_map *map)
{
    const uint64_t sizes[2] = {(uint64_t)k, (uint64_t)rows}, stride = (uint64_t)(k * size);
    const unsigned box[2] = {TILE8_DEPTH / (unsigned)size, (unsigned)lines}, steps[2] = {1, 1};
    return bnb_cuda_check(c->card->cu,
                          c->card->cu->tensor_map(map, size == 1 ? CU_MAP_UINT8 : CU_MAP_UINT16, 2,
                                                  (void *)(uintptr_t)matrix, sizes, &stride, box, steps, 0,
                                                  CU_MAP_SWIZZLE_128, CU_MAP_PROMOTE_256, 0),
                          c->function, "cuTensorMapEncodeTiled");
}

/* With the tensor maps. */
static bnb_status run_bulk(const struct bnb_cuda_call *c, struct bnb_cuda_product8 *q,
                           const struct bnb_gemm8_plan *plan, bool early)
{
    const int64_t rows = bnb_blocks(q->g.n, TILE8_ROWS), columns = bnb_blocks(q->g.m, plan->tokens);
    const int64_t clusters = c->card->sms / plan->share, work = bnb_blocks(rows, plan->share) * columns;
    const int64_t blocks = plan->way == BNB_GEMM8_NARROW ? rows * columns * plan->split
                                                         : (work < clusters ? work : clusters) * plan->share;
    bnb_status status = map_of(c, q->g.b, 1, q->g.n, q->g.k, TILE8_ROWS, &q->weight);
    if (!status)
        status = map_of(c, q->g.a, 1, q->g.m, q->g.k, plan->tokens / plan->share, &q->tokens);
    if (!status)
        status = bnb_cuda_launch_as(c, kernel_of(plan), blocks,
                                    (struct bnb_cuda_manner){.cluster = plan->split * plan->share, .early = early}, q);
    return status;
}

static bnb_status run_tiles(const struct bnb_cuda_call *c, struct bnb_cuda_product8 q,
                            const struct bnb_gemm8_plan *plan, bool early)
{
    const int64_t tiles = bnb_blocks(q.g.n, TILE8_ROWS) * bnb_blocks(q.g.m, plan->tokens);
    q.store = q.g.n % 8 == 0 && bnb_cuda_aligned(q.g.out, 16);
    q.split = plan->split;
    q.share = plan->share;
    q.group = plan->group;
    return plan->way == BNB_GEMM8_MMA ? bnb_cuda_launch_over(c, kernel_of(plan), tiles, &q)
                                      : run_bulk(c, &q, plan, early);
}

static struct bnb_gemm8_card card_of(const struct bnb_cuda_call *c)
{
    const struct bnb_driver *cu = c->card->cu;
    return (struct bnb_gemm8_card){c->card->capability, c->card->sms, cu->launch_as && cu->tensor_map};
}

static bool measuring;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void see_wish(void) { measuring = getenv("BNB_GEMM8") != NULL; }

/* With what can be read and written in wide accesses. */
static struct bnb_cuda_gemm8 widths_of(const struct bnb_gemm8_block *g)
{
    struct bnb_cuda_gemm8 p = {.g = *g};
    p.codes = g->k % 16 == 0 && bnb_cuda_aligned(g->a, 16) && bnb_cuda_aligned(g->b, 16);
    p.store = g->n % 4 == 0 && bnb_cuda_aligned(g->out, 16);
    p.vector = g->product && g->n % 8 == 0 && bnb_cuda_aligned(g->product, 16) && p.store;
    return p;
}

/* The plan, or the one that BNB_GEMM8 names, for measurements: if it is set at the first product, it is read at each.  Where
 * a build has no code for the card, a plan without. */
bnb_status bnb_cuda_plan8(const struct bnb_cuda_call *c, const struct bnb_gemm8_block *g, struct bnb_gemm8_plan *plan)
{
    struct bnb_gemm8_card card = card_of(c);
    const struct bnb_gemm8_shape shape = {g->m, g->n, g->k, widths_of(g).codes && !g->product};
    pthread_once(&once, see_wish);
    for (;;) {
        int blocks = 1;
        *plan = bnb_plan_gemm8(&shape, &card);
        if (measuring)
            bnb_plan_gemm8_named(getenv("BNB_GEMM8"), &shape, &card, plan);
        if (plan->way == BNB_GEMM8_PLAIN)
            return BNB_OK;
        const bnb_status status = bnb_cuda_resident(c, kernel_of(plan), &blocks);
        if (status || blocks > 0)
            return status;
        if (plan->way == BNB_GEMM8_MMA)
            card.capability = 0;
        card.bulk = false;
    }
}

bnb_status bnb_cuda_run8(const struct bnb_cuda_call *c, const struct bnb_gemm8_plan *plan,
                         const struct bnb_cuda_product8 *q, bool early)
{
    struct bnb_cuda_gemm8 p = widths_of(&q->g);
    p.threshold = q->threshold;
    return plan->way == BNB_GEMM8_PLAIN ? run_plain(c, &p, (bnb_dtype)q->dtype) : run_tiles(c, *q, plan, early);
}

/* ---------------------------------------------------------------- the gradient */

#define GRAD(tokens, suffix, type)                                        \
    {.image = "gemm8_grad",                                               \
     .name = "bnb_k_gemm8_grad" #tokens "_" suffix,                       \
     .dtype = type,                                                       \
     .threads = TILE8_THREADS,                                            \
     .shared = BNB_TILE8_GRAD_SHARED(tokens, TILE8_GRAD_STAGES_##tokens), \
     .special = true}

/* By whole tiles, where the card, the shape and the build allow; *done: they did. */
static bnb_status grad_tiles(const struct bnb_cuda_call *c, const struct bnb_cuda_gemm8 *p, bnb_dtype dtype, bool *done)
{
    static struct bnb_cuda_kernel kernels[][2] = {{GRAD(128, "f16", BNB_F16), GRAD(256, "f16", BNB_F16)},
                                                  {GRAD(128, "bf16", BNB_BF16), GRAD(256, "bf16", BNB_BF16)}};
    const struct bnb_gemm8_card card = card_of(c);
    const struct bnb_gemm8_shape shape = {p->g.m, p->g.n, p->g.k,
                                          bnb_cuda_aligned(p->g.b, 16) && p->vector && p->store};
    const int tokens = dtype == BNB_F32 ? 0 : bnb_plan_gemm8_grad(&shape, &card);
    int blocks = 0;
    if (tokens == 0)
        return BNB_OK;
    struct bnb_cuda_kernel *kernel = &kernels[dtype == BNB_BF16][tokens == 256];
    struct bnb_cuda_product8 q = {.g = p->g, .dtype = (int)dtype, .split = 1, .share = 1, .group = 16};
    bnb_status status = bnb_cuda_resident(c, kernel, &blocks);
    if (status || blocks == 0)
        return status;
    *done = true;
    status = map_of(c, p->g.b, 1, p->g.n, p->g.k, TILE8_GRAD_DEPTH, &q.weight);
    if (!status)
        status = map_of(c, p->g.x, 2, p->g.m, p->g.n, tokens, &q.tokens);
    if (!status)
        status = bnb_cuda_launch_over(c, kernel, bnb_blocks(p->g.k, TILE8_ROWS) * bnb_blocks(p->g.m, tokens), &q);
    return status;
}

static bnb_status grad8(const struct bnb_cuda_call *c, const struct bnb_gemm8_block *g, bnb_dtype dtype)
{
    static struct bnb_cuda_kernel plain[] = BNB_CUDA_VARIANTS("gemm8", "bnb_k_gemm8_grad", THREADS);
    struct bnb_cuda_gemm8 p = {.g = *g};
    bool done = false;
    p.codes = g->k % 8 == 0 && bnb_cuda_aligned(g->b, 8);
    p.vector = g->n % 8 == 0 && bnb_cuda_aligned(g->x, 16);
    p.store = g->k % 4 == 0 && bnb_cuda_aligned(g->out, 16);
    const bnb_status status = grad_tiles(c, &p, dtype, &done);
    return status || done ? status : bnb_cuda_launch_over(c, &plain[dtype], tiles_of(g->m, g->k), &p);
}

bnb_status bnb_cuda_gemm8(const bnb_exec *ex, const struct bnb_gemm8_block *g, bnb_dtype dtype)
{
    struct bnb_cuda_call c;
    bnb_status status = bnb_cuda_begin(&c, ex, g->grad ? "gemm8_grad" : g->sums ? "matmul8" : "gemm8");
    if (status)
        return status;
    if (g->grad) {
        status = grad8(&c, g, dtype);
    } else {
        const struct bnb_cuda_product8 q = {.g = *g, .dtype = (int)dtype};
        struct bnb_gemm8_plan plan;
        status = bnb_cuda_plan8(&c, g, &plan);
        status = status ? status : bnb_cuda_run8(&c, &plan, &q, false);
    }
    bnb_cuda_end(&c);
    return status;
}
