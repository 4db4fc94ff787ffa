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

/* Columns whose bits a thread looks at. */
enum { THREADS = 256, LISTED = 256 };

/* The columns of this thread's bits, from number `at` of the list on. */
DEVICE void list_bits8(int *list, int at, int column, const unsigned (&bits)[LISTED / 32])
{
#pragma unroll
    for (int i = 0; i < LISTED / 32; i++)
        for (unsigned b = bits[i]; b && at < TILE8_ROOM; b &= b - 1)
            list[at++] = column + 32 * i + __ffs((int)b) - 1;
}

/* By the block: the first columns, in ascending order; how many there are in all. */
DEVICE int list8(const struct bnb_cuda_product8 &p, int *list, int *sums)
{
    const int thread = (int)threadIdx.x, lane = thread % 32;
    int total = 0;
    for (int64_t first = 0; first < p.g.k; first += THREADS * LISTED) {
        const int64_t column = first + thread * LISTED;
        unsigned bits[LISTED / 32] = {};
        int count = 0;
        if (column < p.g.k) {
            const uint4 *from = (const uint4 *)(p.mask + column / 32);
            const uint4 a = __ldcg(from), b = __ldcg(from + 1);
            bits[0] = a.x, bits[1] = a.y, bits[2] = a.z, bits[3] = a.w;
            bits[4] = b.x, bits[5] = b.y, bits[6] = b.z, bits[7] = b.w;
        }
#pragma unroll
        for (int i = 0; i < LISTED / 32; i++)
            count += __popc(bits[i]);
        int end = count;
#pragma unroll
        for (int o = 1; o < 32; o *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, end, o);
            end += lane >= o ? other : 0;
        }
        __syncthreads(); /* sums were read for the columns before */
        if (lane == 31)
            sums[thread / 32] = end;
        __syncthreads();
        int at = total + end - count;
#pragma unroll
        for (int w = 0; w < THREADS / 32; w++) {
            at += w < thread / 32 ? sums[w] : 0;
            total += sums[w];
        }
        list_bits8(list, at, (int)column, bits);
    }
    __syncthreads();
    return total;
}

/* Eight columns of a token for each thread. */
extern "C" __global__ void __launch_bounds__(256) bnb_k_gemm8_list(const __grid_constant__ struct bnb_cuda_product8 p)
{
    __shared__ int list[TILE8_ROOM], sums[THREADS / 32];
    wait_for_launch_before();
    const int total = list8(p, list, sums), picked = min(total, (int)TILE8_ROOM);
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
        let_next_launch_come();
        put_token8(p, (char *)p.values + (half / 2 * p.g.m + token) * BNB_TILE8_VALUES(1) + half % 2 * 16, count, 0,
                   token, c);
    }
}
