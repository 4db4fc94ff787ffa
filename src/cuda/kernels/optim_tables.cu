/*
 * optim_tables.cu - what surrounds a step: tables carried to the device, scalars made there, sums of squares, clipping
 */
#include "cuda/kernels/optim_norms.cuh"

/* A few thousand bytes travel in the arguments of a launch: the way that a captured graph can repeat. */
extern "C" __global__ void __launch_bounds__(256) bnb_k_carry(const struct bnb_cuda_carry c)
{
    for (int i = (int)threadIdx.x; i < c.words; i += 256)
        ((unsigned *)c.to)[i] = c.word[i];
}

/* One thread for each tensor. */
extern "C" __global__ void __launch_bounds__(256) bnb_k_plan(const struct bnb_cuda_planner q)
{
    const int i = (int)(blockIdx.x * 256 + threadIdx.x);
    if (i >= q.count)
        return;
    const struct bnb_cuda_origin origin = q.origins[i];
    const int64_t t = origin.step_count ? (int64_t)*origin.step_count + 1 : origin.step;
    const double lr = q.lr_value ? (double)*q.lr_value : q.lr;
    const double scale = origin.gnorm_scale ? (double)*origin.gnorm_scale : 1.0;
    const double *norms = q.norms && q.recipe.max_unorm > 0.0 ? q.norms + 2 * i : nullptr;
    q.plans[i] = bnb_optim_plan_of(&q.recipe, lr, t, scale, norms);
    for (int j = 0; j < origin.pieces; j++)
        q.tensors[origin.piece + j].key += bnb_mix64(bnb_mix64(origin.seed) + (uint64_t)t);
    if (!q.advance)
        return;
    if (origin.step_count)
        *origin.step_count += 1.0f;
    if (origin.unorm && norms)
        *origin.unorm = (float)norms[0];
}

template <typename T> DEVICE double square_run(const T *x, int64_t n, int64_t run)
{
    const int lane = (int)threadIdx.x % 32;
    const int64_t blocks = (n + OPTIM_BLOCK - 1) / OPTIM_BLOCK, first = run * RUN_BLOCKS;
    double sum = 0.0;
    for (int64_t b = first; b < first + RUN_BLOCKS && b < blocks; b += 4) {
        double squares = 0.0;
#pragma unroll 16
        for (int i = 0; i < OPTIM_BLOCK / 8; i++) {
            const int64_t at = (b + lane / 8) * OPTIM_BLOCK + i * 8 + lane % 8;
            const double value = at < n ? (double)value_of(x + at) : 0.0;
            squares += value * value;
        }
        sum = add_four(sum, squares);
    }
    return sum;
}

/* A warp takes a run of a gradient at a time; partial is [runs][2]. */
extern "C" __global__ void __launch_bounds__(256) bnb_k_squares(const struct bnb_cuda_squares s)
{
    for (int64_t run = (int64_t)blockIdx.x * 8 + (int)threadIdx.x / 32; run < s.runs; run += (int64_t)gridDim.x * 8) {
        const struct bnb_cuda_gradient g = s.gradients[entry_of(s.gradients, s.count, run)];
        const int64_t own = run - g.first;
        const double sum = g.dtype == BNB_CUDA_BF16  ? square_run((const bf16 *)g.g, g.n, own)
                           : g.dtype == BNB_CUDA_F16 ? square_run((const f16 *)g.g, g.n, own)
                                                     : square_run((const float *)g.g, g.n, own);
        if (threadIdx.x % 32 == 0)
            s.partial[2 * run] = sum;
    }
}

/* A warp adds up the runs of a tensor, in order: all lanes fetch, one lane for each of the sums adds. */
extern "C" __global__ void __launch_bounds__(256) bnb_k_total(const struct bnb_cuda_total q)
{
    enum { FETCH = 64 };
    __shared__ double fetched[8][2 * FETCH];
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, i = (int)(blockIdx.x * 8) + warp;
    if (i >= q.count)
        return;
    const int64_t first = 2 * q.first[i], end = 2 * q.first[i + 1];
    double sum = 0.0;
    for (int64_t at = first; at < end; at += 2 * FETCH) {
#pragma unroll
        for (int j = lane; j < 2 * FETCH; j += 32)
            fetched[warp][j] = at + j < end ? q.partial[at + j] : 0.0; /* adding 0 changes no sum of squares */
        __syncwarp();
        if (lane < q.width) {
#pragma unroll 16
            for (int j = 0; j < FETCH; j++)
                sum += fetched[warp][2 * j + lane];
        }
        __syncwarp();
    }
    if (lane < q.width)
        q.norms[(int64_t)q.width * i + lane] = sum;
}

/* 128 threads for each gradient: its norm enters the history, and the limit is found by counting what is smaller. */
extern "C" __global__ void __launch_bounds__(128) bnb_k_clip(const struct bnb_cuda_clip q)
{
    enum { HISTORY = 100 };
    __shared__ float sorted[HISTORY];
    const struct bnb_cuda_history h = q.tensors[blockIdx.x];
    const int slot = (int)threadIdx.x;
    const int64_t t = h.step_count ? (int64_t)*h.step_count + 1 : h.step;
    const float square = (float)q.norms[blockIdx.x], old = slot < HISTORY ? h.history[slot] : 0.0f;
    const bool fresh = !__syncthreads_or(old != 0.0f);
    const float now = t == 1 || fresh || slot == (int)(t % HISTORY) ? square : old;
    if (slot < HISTORY) {
        h.history[slot] = now;
        sorted[slot] = now == now ? now : __int_as_float(0x7f800000);
    }
    __syncthreads();
    if (slot >= HISTORY)
        return;
    int below = 0;
    for (int i = 0; i < HISTORY; i++)
        below += sorted[i] < sorted[slot] || (sorted[i] == sorted[slot] && i < slot);
    if (below != q.percentile)
        return;
    const float norm = sqrtf(square), limit = sqrtf(sorted[slot]);
    float *report = q.report + 3 * (int64_t)blockIdx.x;
    report[0] = norm;
    report[1] = limit;
    report[2] = norm > limit && norm <= FLOAT_MAX ? limit / norm : 1.0f;
}
