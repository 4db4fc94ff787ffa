/*
 * scales.cu - nested statistics: the mean by the tree of NUMERICS rule 9, the centred scales, and back
 */
#include "cuda/kernels/device.cuh"

/* A warp sums one run of 1024 values: lane l takes the values l, l + 32, ... in order; the lanes are folded in half. */
extern "C" __global__ void __launch_bounds__(256) bnb_k_sum(const struct bnb_cuda_sum s)
{
    const int64_t runs = (s.n + 1023) / 1024;
    const int lane = (int)threadIdx.x % 32;
    for (int64_t run = (int64_t)blockIdx.x * 8 + (int)threadIdx.x / 32; run < runs; run += (int64_t)gridDim.x * 8) {
        const int64_t end = s.n < (run + 1) * 1024 ? s.n : (run + 1) * 1024;
        double sum = 0.0;
        for (int64_t i = run * 1024 + lane; i < end; i += 32)
            sum += s.x ? (double)s.x[i] : s.partial[i];
        for (int width = 16; width > 0; width /= 2)
            sum += __shfl_down_sync(0xffffffffu, sum, width);
        if (lane == 0)
            s.sums[run] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(256) bnb_k_centre(const struct bnb_cuda_centre c)
{
    const float mean = (float)(*c.total / (double)c.n);
    const int64_t first = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (first == 0)
        *c.offset = mean;
    for (int64_t i = first; i < c.n; i += (int64_t)gridDim.x * 256)
        c.centred[i] = c.x[i] - mean;
}

extern "C" __global__ void __launch_bounds__(256) bnb_k_expand(const struct bnb_cuda_expand e)
{
    for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < e.n; i += (int64_t)gridDim.x * 256)
        e.out[i] = bnb_block_scale(&e.scale, i);
}
