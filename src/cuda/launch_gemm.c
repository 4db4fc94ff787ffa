/*
 * launch_gemm.c - int8 matrix products on CUDA: few rows of activations or tiles, and what can be read in wide accesses
 */
#include "cuda/cuda.h"

/* Threads of a block; rows of the weight that one takes at a time; sides of a tile; rows of activations that are few. */
enum { THREADS = 256, WARPS = 8, TILE = 64, FEW = 8 };

static int64_t tiles_of(int64_t m, int64_t n) { return bnb_blocks(m, TILE) * bnb_blocks(n, TILE); }

/* ---------------------------------------------------------------- int8 */

static bnb_status grad8(const bnb_exec *ex, const struct bnb_gemm8_block *g, bnb_dtype dtype)
{
    static struct bnb_cuda_kernel grad[] = BNB_CUDA_VARIANTS("gemm8", "bnb_k_gemm8_grad", THREADS);
    struct bnb_cuda_gemm8 p = {.g = *g};
    p.codes = g->k % 8 == 0 && bnb_cuda_aligned(g->b, 8);
    p.vector = g->n % 8 == 0 && bnb_cuda_aligned(g->x, 16);
    p.store = g->k % 4 == 0 && bnb_cuda_aligned(g->out, 16);
    return bnb_cuda_run(ex, "gemm8_grad", &grad[dtype], tiles_of(g->m, g->k), &p);
}

/* The list of the flagged columns and its length, which stay on the device, in memory [k + 1]. */
static bnb_status list_outliers(const struct bnb_cuda_call *c, struct bnb_cuda_gemm8 *p, int64_t *memory)
{
    static struct bnb_cuda_kernel kernel = {
        .image = "rows8_outliers", .name = "bnb_k_outliers8", .dtype = -1, .threads = 1024};
    const struct bnb_cuda_outliers8 q = {p->g.outlier, memory + 1, memory, p->g.k};
    p->g.columns = memory + 1;
    p->count = memory;
    return bnb_cuda_launch(c, &kernel, 1, &q);
}

static bnb_status launch8(const struct bnb_cuda_call *c, const struct bnb_cuda_gemm8 *p, bnb_dtype dtype)
{
    static struct bnb_cuda_kernel few[] = BNB_CUDA_VARIANTS("gemm8", "bnb_k_gemv8", THREADS);
    static struct bnb_cuda_kernel many[] = BNB_CUDA_VARIANTS("gemm8", "bnb_k_gemm8", THREADS);
    if (p->g.m > FEW || p->g.product)
        return bnb_cuda_launch_over(c, &many[dtype], tiles_of(p->g.m, p->g.n), p);
    return bnb_cuda_launch_over(c, &few[dtype], bnb_blocks(p->g.n, WARPS), p);
}

bnb_status bnb_cuda_gemm8(const bnb_exec *ex, const struct bnb_gemm8_block *g, bnb_dtype dtype)
{
    if (g->grad)
        return grad8(ex, g, dtype);
    struct bnb_cuda_gemm8 p = {.g = *g};
    p.codes = g->k % 16 == 0 && bnb_cuda_aligned(g->a, 16) && bnb_cuda_aligned(g->b, 16);
    p.store = g->n % 4 == 0 && bnb_cuda_aligned(g->out, 16);
    const size_t bytes = g->outlier && g->k > 0 ? ((size_t)g->k + 1) * sizeof(int64_t) : 0;
    struct bnb_cuda_call c;
    void *memory = NULL;
    bnb_status status = bnb_cuda_begin(&c, ex, g->sums ? "matmul8" : "gemm8");
    if (status)
        return status;
    if (bytes > 0)
        status = bnb_cuda_alloc(&c, bytes, &memory);
    if (!status && memory)
        status = list_outliers(&c, &p, memory);
    if (!status)
        status = launch8(&c, &p, dtype);
    bnb_cuda_free(&c, memory, bytes);
    bnb_cuda_end(&c);
    return status;
}
