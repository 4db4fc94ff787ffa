/*
 * gemm8_list.cu - before an int8 product of compute capability 9.0a: which columns have outliers, and what the activations
 * have there beside their codes
 *
 * While a product's tiles stream in, its own loads wait long behind them, and its tiles would load the same values over and
 * over.  So the first columns, as many as a product may have room for, are gathered here, once: sixteen columns of
 * all tokens side by side, as chunks of gemm8_outliers.cuh hold them.  Of f32 there is the list alone.
 */
#include "cuda/kernels/early.cuh"
#include "cuda/kernels/gemm8_outliers.cuh"
#include "cuda/kernels/rows8_list.cuh"

enum { THREADS = 256 };

/* Eight columns of a token for each thread. */
extern "C" __global__ void __launch_bounds__(256) bnb_k_gemm8_list(const IN_PLACE struct bnb_cuda_product8 p)
{
    __shared__ int list[TILE8_ROOM], sums[THREADS / 32];
    wait_for_launch_before();
    let_next_launch_come();
    const int total = list_mask8<THREADS, whole_block>(p.mask, p.g.k, list, sums, TILE8_ROOM, (int)threadIdx.x);
    const int picked = min(total, (int)TILE8_ROOM);
    const int halves = p.dtype == BNB_CUDA_F32 ? 0 : (picked + TILE8_COLUMNS - 1) / TILE8_COLUMNS * 2;
    const int64_t work = p.g.m * halves;
    if (blockIdx.x == 0 && threadIdx.x < picked)
        p.list[threadIdx.x] = list[threadIdx.x];
    if (blockIdx.x == 0 && threadIdx.x == 0)
        p.list[TILE8_ROOM] = total;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < work; i += (int64_t)gridDim.x * THREADS) {
        const int64_t token = i / halves;
        const int half = (int)(i - token * halves), count = picked - half * LOADED8;
        struct coming8 c = {};
        load_token8(p, list + half * LOADED8, count, token, c);
        put_token8(p, (char *)p.values + (half / 2 * p.g.m + token) * BNB_TILE8_VALUES(1) + half % 2 * 16, count, 0,
                   token, c);
    }
}
