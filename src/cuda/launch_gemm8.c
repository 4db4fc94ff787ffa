/*
 * launch_gemm8.c - products with an int8 weight on CUDA: the plan's kernel, its tensor maps, its grid
 */
#include <stdlib.h>

#include "core/plan_gemm8.h"
#include "cuda/cuda.h"
#include "cuda/kernels/tile8.h"

/* Threads of a block; rows of the weight that one takes at a time; sides of a tile; rows of activations that are few. */
enum { THREADS = 256, WARPS = 8, TILE = 64, FEW = 8 };

static int64_t tiles_of(int64_t m, int64_t n) { return bnb_blocks(m, TILE) * bnb_blocks(n, TILE); }

static bnb_status grad8(const bnb_exec *ex, const struct bnb_gemm8_block *g, bnb_dtype dtype)
{
    static struct bnb_cuda_kernel grad[] = BNB_CUDA_VARIANTS("gemm8", "bnb_k_gemm8_grad", THREADS);
    struct bnb_cuda_gemm8 p = {.g = *g};
    p.codes = g->k % 8 == 0 && bnb_cuda_aligned(g->b, 8);
    p.vector = g->n % 8 == 0 && bnb_cuda_aligned(g->x, 16);
    p.store = g->k % 4 == 0 && bnb_cuda_aligned(g->out, 16);
    return bnb_cuda_run(ex, "gemm8_grad", &grad[dtype], tiles_of(g->m, g->k), &p);
}

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
          BNB_TILE8_SHARED(tokens, TILE8_WIDE_STAGES, TILE8_WIDE_CHUNKS))

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

/* codes [rows, k] as boxes of `lines` rows and 128 bytes, in the layout of hopper.cuh; zeros beyond. */
static bnb_status map_of(const struct bnb_cuda_call *c, const int8_t *codes, int64_t rows, int64_t k, int lines,
                         struct bnb_cuda_map *map)
{
    const uint64_t sizes[2] = {(uint64_t)k, (uint64_t)rows}, stride = (uint64_t)k;
    const unsigned box[2] = {TILE8_DEPTH, (unsigned)lines}, steps[2] = {1, 1};
    return bnb_cuda_check(c->card->cu,
                          c->card->cu->encode_map(map, CU_MAP_UINT8, 2, (void *)(uintptr_t)codes, sizes, &stride, box,
                                                  steps, 0, CU_MAP_SWIZZLE_128, CU_MAP_PROMOTE_256, 0),
                          c->function, "cuTensorMapEncodeTiled");
}

static bnb_status run_tiles(const struct bnb_cuda_call *c, const struct bnb_cuda_gemm8 *p, bnb_dtype dtype,
                            const struct bnb_gemm8_plan *plan, bool early)
{
    struct bnb_cuda_product8 q = {.g = p->g,
                                  .threshold = p->threshold,
                                  .dtype = (int)dtype,
                                  .store = p->g.n % 8 == 0 && bnb_cuda_aligned(p->g.out, 16),
                                  .split = plan->split,
                                  .share = plan->share,
                                  .group = plan->group};
    struct bnb_cuda_kernel *kernel = kernel_of(plan);
    const int64_t tiles = bnb_blocks(p->g.n, TILE8_ROWS) * bnb_blocks(p->g.m, plan->tokens);
    if (plan->way == BNB_GEMM8_MMA)
        return bnb_cuda_launch_over(c, kernel, tiles, &q);
    bnb_status status = map_of(c, p->g.b, p->g.n, p->g.k, TILE8_ROWS, &q.weight);
    if (!status)
        status = map_of(c, p->g.a, p->g.m, p->g.k, plan->tokens / plan->share, &q.tokens);
    if (status)
        return status;
    if (plan->way == BNB_GEMM8_NARROW)
        return bnb_cuda_launch_as(c, kernel, tiles * plan->split, (struct bnb_cuda_manner){plan->split, early}, &q);
    const int64_t clusters = c->card->sms / plan->share;
    const int64_t work = bnb_blocks(bnb_blocks(p->g.n, TILE8_ROWS), plan->share) * bnb_blocks(p->g.m, plan->tokens);
    return bnb_cuda_launch_as(c, kernel, (work < clusters ? work : clusters) * plan->share,
                              (struct bnb_cuda_manner){plan->share, early}, &q);
}

/* The plan, or the one that BNB_GEMM8 names, for measurements.  Where a build has no code for the card, a plan without. */
static bnb_status plan_for(const struct bnb_cuda_call *c, const struct bnb_cuda_gemm8 *p, struct bnb_gemm8_plan *plan)
{
    const struct bnb_driver *cu = c->card->cu;
    struct bnb_gemm8_card card = {c->card->capability, c->card->sms, cu->launch_as && cu->encode_map};
    const struct bnb_gemm8_shape shape = {p->g.m, p->g.n, p->g.k, p->codes && !p->g.product};
    for (;;) {
        int blocks = 1;
        *plan = bnb_plan_gemm8(&shape, &card);
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

bnb_status bnb_cuda_product8(const struct bnb_cuda_call *c, const struct bnb_gemm8_block *g, float threshold,
                             bnb_dtype dtype, bool early)
{
    struct bnb_cuda_gemm8 p = {.g = *g, .threshold = threshold};
    struct bnb_gemm8_plan plan;
    p.codes = g->k % 16 == 0 && bnb_cuda_aligned(g->a, 16) && bnb_cuda_aligned(g->b, 16);
    p.store = g->n % 4 == 0 && bnb_cuda_aligned(g->out, 16);
    const bnb_status status = plan_for(c, &p, &plan);
    if (status)
        return status;
    return plan.way == BNB_GEMM8_PLAIN ? run_plain(c, &p, dtype) : run_tiles(c, &p, dtype, &plan, early);
}

bnb_status bnb_cuda_gemm8(const bnb_exec *ex, const struct bnb_gemm8_block *g, bnb_dtype dtype)
{
    struct bnb_cuda_call c;
    if (g->grad)
        return grad8(ex, g, dtype);
    bnb_status status = bnb_cuda_begin(&c, ex, g->sums ? "matmul8" : "gemm8");
    if (status)
        return status;
    status = bnb_cuda_product8(&c, g, 0.0f, dtype, false);
    bnb_cuda_end(&c);
    return status;
}
