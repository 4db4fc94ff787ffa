/*
 * optim_norms.cuh - sums of squares on CUDA: of updates and parameters, which trust clipping needs
 *
 * The order of a sum is that of NUMERICS rule 27, so that its bits are those of the CPU.
 */
#ifndef BNB_CUDA_OPTIM_NORMS_CUH
#define BNB_CUDA_OPTIM_NORMS_CUH

#include "cuda/kernels/optim.cuh"

/* A run is 64 blocks; a warp sums it, four blocks at a time.  It lays the values of four blocks out in shared memory, then
 * eight threads share a block: thread j takes the values j, j + 8, ... in order, the eight are folded in half, and the
 * blocks are added in order (NUMERICS rule 27). */
enum { RUN_BLOCKS = 64, NORM_WARPS = 4, NORM_STRIDE = OPTIM_BLOCK + 8 };

/* sum += the squares of four blocks; every thread of the warp gives those of its 32 values of block lane / 8. */
DEVICE double add_four(double sum, double lane_sum)
{
    for (int width = 4; width > 0; width /= 2)
        lane_sum += __shfl_down_sync(0xffffffffu, lane_sum, width, 8);
    for (int b = 0; b < 4; b++)
        sum += __shfl_sync(0xffffffffu, lane_sum, 8 * b);
    return sum;
}

/* The squares of a thread's 32 values.  A square of f32 is exact in double, so the fused sum is the plain one. */
DEVICE double squares_of(const float *four)
{
    const float *x = four + (int)threadIdx.x % 32 / 8 * NORM_STRIDE + (int)threadIdx.x % 8;
    double sum = 0.0;
#pragma unroll 8
    for (int i = 0; i < OPTIM_BLOCK / 8; i++)
        sum = __fma_rn((double)x[8 * i], (double)x[8 * i], sum);
    return sum;
}

/* A lane's eight values as the b-th of four blocks. */
template <int LAY> DEVICE void lay_out(float *four, int b, const float v[8])
{
    const int lane = (int)threadIdx.x % 32;
    float4 *to = (float4 *)(four + b * NORM_STRIDE);
    to[LAY == SPREAD ? lane : 2 * lane] = make_float4(v[0], v[1], v[2], v[3]);
    to[LAY == SPREAD ? lane + 32 : 2 * lane + 1] = make_float4(v[4], v[5], v[6], v[7]);
}

/* u, p and the new states of a lane's eight elements of a block. */
template <int RULE, typename T, int BITS, bool PLAIN, bool CAREFUL>
DEVICE void measure_lane(const struct block_in_flight<T, BITS> &b, int count, const typename rules<T>::scalars *k,
                         const float *const map[2], float u[8], float p[8], float s[][8])
{
    float g[8];
    raw8_values(b.p, p);
    raw8_values(b.g, g);
#pragma unroll
    for (int j = 0; j < rule_states(RULE); j++)
        decode_state<1>(b.state[j], map[j == 1], count, s[j]);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        typename rules<T>::state x;
        x.p = p[i];
#pragma unroll
        for (int j = 0; j < rule_states(RULE); j++)
            x.s[j] = s[j][i];
        rules<T>::step(RULE, CAREFUL ? BITS : 32, PLAIN, g[i], &x, k);
        u[i] = i < count ? x.u : 0.0f; /* behind the end it may be 0 / 0 */
#pragma unroll
        for (int j = 0; j < rule_states(RULE); j++)
            s[j][i] = x.s[j];
    }
}

/* Four blocks that are laid out, added to the sums. */
DEVICE void add_laid_out(const float *updates, const float *parameters, double sums[2])
{
    __syncwarp();
    sums[0] = add_four(sums[0], squares_of(updates));
    sums[1] = add_four(sums[1], squares_of(parameters));
    __syncwarp();
}

/* A run of whole blocks, aligned, without skip_zeros.  False: a new state is not finite, and the sums are worth nothing. */
template <int RULE, typename T, int BITS, bool PLAIN>
DEVICE bool measure_whole(const struct bnb_cuda_tensor *t, int64_t run, const struct bnb_optim_scalars *scalars,
                          const float *const map[2], float *updates, float *parameters, double sums[2])
{
    const typename rules<T>::scalars k = rules<T>::load(scalars);
    unsigned largest = 0;
    for (int64_t block = run * RUN_BLOCKS; block < (run + 1) * RUN_BLOCKS; block += 4) {
#pragma unroll 1
        for (int i = 0; i < 4; i++) {
            struct block_in_flight<T, BITS> b;
            float u[8], p[8], s[BNB_MAX_STATES][8];
            block_load<RULE, SPREAD>(&b, t, block + i, 8);
            measure_lane<RULE, T, BITS, PLAIN, false>(b, 8, &k, map, u, p, s);
#pragma unroll
            for (int j = 0; j < rule_states(RULE); j++)
                largest = max(largest, absmax8_bits(s[j]));
            lay_out<SPREAD>(updates, i, u);
            lay_out<SPREAD>(parameters, i, p);
        }
        add_laid_out(updates, parameters, sums);
    }
    return BITS == 32 || warp_max(largest) < INFINITE;
}

/* Any run. */
template <int RULE, typename T, int BITS>
static __device__ __noinline__ void measure_any(const struct bnb_cuda_tensor *t, int64_t run,
                                                const struct bnb_optim_scalars *scalars, const float *const map[2],
                                                float *updates, float *parameters, double sums[2])
{
    const typename rules<T>::scalars k = rules<T>::load(scalars);
    const int64_t blocks = (t->n + OPTIM_BLOCK - 1) / OPTIM_BLOCK, end = (run + 1) * RUN_BLOCKS;
    sums[0] = sums[1] = 0.0;
    for (int64_t block = run * RUN_BLOCKS; block < end && block < blocks; block += 4) {
        for (int i = 0; i < 4; i++) {
            struct block_in_flight<T, BITS> b;
            float u[8], p[8], s[BNB_MAX_STATES][8];
            const int count = count8(t->n, (block + i) * OPTIM_BLOCK + (int)threadIdx.x % 32 * 8);
            block_load<RULE, ANY>(&b, t, block + i < blocks ? block + i : block, count);
            measure_lane<RULE, T, BITS, false, true>(b, count, &k, map, u, p, s);
            lay_out<ANY>(updates, i, u);
            lay_out<ANY>(parameters, i, p);
        }
        add_laid_out(updates, parameters, sums);
    }
}

template <int RULE, typename T, int BITS>
DEVICE void measure_run(const struct bnb_cuda_tensor *t, int64_t run, const struct bnb_optim_scalars *scalars,
                        const float *const map[2], float *updates, float *parameters, double sums[2])
{
    const bool simple = t->vector && !scalars->skip_zeros && (run + 1) * RUN_BLOCKS * OPTIM_BLOCK <= t->n;
    bool known = false;
    if (simple && scalars->coupled > 0.0f)
        known = measure_whole<RULE, T, BITS, false>(t, run, scalars, map, updates, parameters, sums);
    else if (simple)
        known = measure_whole<RULE, T, BITS, true>(t, run, scalars, map, updates, parameters, sums);
    if (!known)
        measure_any<RULE, T, BITS>(t, run, scalars, map, updates, parameters, sums);
}

/* A warp takes a run at a time; 128 threads. */
template <int RULE> DEVICE void optim_norms(const struct bnb_cuda_optim &o)
{
    __shared__ float values[2][256];
    __shared__ float4 laid_out[NORM_WARPS][2][NORM_STRIDE];
    const int warp = (int)threadIdx.x / 32;
    const float *const map[2] = {values[0], values[1]};
    float *updates = (float *)laid_out[warp][0], *parameters = (float *)laid_out[warp][1];
    for (int i = (int)threadIdx.x; i < 256; i += 32 * NORM_WARPS) {
        values[0][i] = o.map1 ? o.map1[i] : 0.0f;
        values[1][i] = o.map2 ? o.map2[i] : 0.0f;
    }
    __syncthreads();
    for (int64_t run = (int64_t)blockIdx.x * NORM_WARPS + warp; run < o.chunks;
         run += (int64_t)gridDim.x * NORM_WARPS) {
        const struct bnb_cuda_tensor *t = &o.tensors[entry_of(o.tensors, o.count, run)];
        const struct bnb_optim_plan *plan = &o.plans[t->plan];
        const struct bnb_optim_scalars *k = &plan->scalars;
        const int64_t own = run - t->first;
        double sums[2] = {0.0, 0.0};
        if (t->dtype == BNB_CUDA_BF16 && t->bits == 8)
            measure_run<RULE, bf16, 8>(t, own, k, map, updates, parameters, sums);
        else if (t->dtype == BNB_CUDA_BF16)
            measure_run<RULE, bf16, 32>(t, own, k, map, updates, parameters, sums);
        else if (t->dtype == BNB_CUDA_F16 && t->bits == 8)
            measure_run<RULE, f16, 8>(t, own, k, map, updates, parameters, sums);
        else if (t->dtype == BNB_CUDA_F16)
            measure_run<RULE, f16, 32>(t, own, k, map, updates, parameters, sums);
        else if (t->bits == 8)
            measure_run<RULE, float, 8>(t, own, k, map, updates, parameters, sums);
        else
            measure_run<RULE, float, 32>(t, own, k, map, updates, parameters, sums);
        if (threadIdx.x % 32 == 0) {
            o.partial[2 * run] = sums[0] * (plan->direction * plan->direction);
            o.partial[2 * run + 1] = sums[1];
        }
    }
}

#endif
