/*
 * launch_gemm.c - products with a 4-bit weight on CUDA: few rows of activations or tiles, and what can be read in wide
 * accesses
 */
#include "cuda/cuda.h"

/* Threads of a block; rows of the weight that one takes at a time; sides of a tile; rows of activations that are few. */
enum { THREADS = 256, WARPS = 8, TILE = 64, FEW = 8 };

static int64_t tiles_of(int64_t m, int64_t n) { return bnb_blocks(m, TILE) * bnb_blocks(n, TILE); }

/* 0: the values are memory of the device. */
static int type_of(const float *code)
{
    return code == bnb_map4(BNB_NF4) ? (int)BNB_NF4 : code == bnb_map4(BNB_FP4) ? (int)BNB_FP4 : 0;
}

bnb_status bnb_cuda_gemm4(const bnb_exec *ex, const struct bnb_gemm4_block *g, bnb_dtype dtype)
{
    static struct bnb_cuda_kernel few[] = BNB_CUDA_VARIANTS("gemm4", "bnb_k_gemv4", THREADS);
    static struct bnb_cuda_kernel many[] = BNB_CUDA_VARIANTS("gemm4", "bnb_k_gemm4", THREADS);
    static struct bnb_cuda_kernel grad[] = BNB_CUDA_VARIANTS("gemm4", "bnb_k_gemm4_grad", THREADS);
    const int64_t inner = g->grad ? g->n : g->k, outer = g->grad ? g->k : g->n;
    struct bnb_cuda_gemm4 p = {*g, type_of(g->code), __builtin_ctzll((unsigned long long)g->block), 0, 0, 0};
    p.whole = g->k % 8 == 0 && bnb_cuda_aligned(g->codes, 4);
    p.vector = inner % 8 == 0 && bnb_cuda_aligned(g->x, 16);
    p.store = outer % 4 == 0 && bnb_cuda_aligned(g->out, 16);
    if (g->grad)
        return bnb_cuda_run(ex, "gemm4_grad", &grad[dtype], tiles_of(g->m, outer), &p);
    if (g->m > FEW)
        return bnb_cuda_run(ex, "gemm4", &many[dtype], tiles_of(g->m, outer), &p);
    p.vector = p.vector && g->k % 32 == 0 && bnb_cuda_aligned(g->codes, 16);
    return bnb_cuda_run(ex, "gemm4", &few[dtype], bnb_blocks(g->n, WARPS), &p);
}
