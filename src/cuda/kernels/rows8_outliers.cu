/*
 * rows8_outliers.cu - outlier columns on the device: from flags to an ascending list, and the values of a list of columns
 */
#include "cuda/kernels/device.cuh"

/* Sums of x over the threads below this one; *total of all 1024. */
DEVICE int sum_below(int x, int warp_sums[32], int *total)
{
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    int below = x;
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, below, o);
        below += lane >= o ? other : 0;
    }
    if (lane == 31)
        warp_sums[warp] = below;
    __syncthreads();
    int before = 0, all = 0;
    for (int w = 0; w < 32; w++) {
        before += w < warp ? warp_sums[w] : 0;
        all += warp_sums[w];
    }
    __syncthreads(); /* warp_sums is written again */
    *total = all;
    return before + below - x;
}

/* columns: the numbers of the flags that are set, ascending; *count of them.  One block, each thread for eight flags. */
extern "C" __global__ void __launch_bounds__(1024) bnb_k_outliers8(const struct bnb_cuda_outliers8 q)
{
    __shared__ int warp_sums[32];
    int64_t found = 0;
    for (int64_t base = 0; base < q.n; base += 1024 * 8) {
        const int64_t at = base + threadIdx.x * 8;
        const int count = count8(q.n, at);
        unsigned set = 0;
        int total;
#pragma unroll
        for (int i = 0; i < 8; i++)
            set |= i < count && q.flags[at + i] ? 1u << i : 0u;
        int64_t to = found + sum_below(__popc(set), warp_sums, &total);
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (set >> i & 1u)
                q.columns[to++] = at + i;
        found += total;
    }
    if (threadIdx.x == 0)
        *q.count = found;
}

/* out [rows, count] = x[:, columns], elements of 2 or 4 bytes. */
extern "C" __global__ void __launch_bounds__(256) bnb_k_gather8(const struct bnb_cuda_gather8 q)
{
    const int64_t n = q.rows * q.count;
    for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < n; i += (int64_t)gridDim.x * 256) {
        const int64_t from = i / q.count * q.cols + q.columns[i % q.count];
        if (q.size == 2)
            ((uint16_t *)q.out)[i] = ((const uint16_t *)q.x)[from];
        else
            ((uint32_t *)q.out)[i] = ((const uint32_t *)q.x)[from];
    }
}
