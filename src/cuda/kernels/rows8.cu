/*
 * rows8.cu - LLM.int8()'s quantisers by row and by column, and the inverse, for f32, f16 and bf16: NUMERICS rule 33
 *
 * Magnitudes are compared by their bits, whose order is that of the values, with NaN above all.
 */
#include "cuda/kernels/device.cuh"

#define INFINITE_BITS 0x7f800000u
#define NAN_BITS 0x7fc00000u

/* 0: no threshold, under which no element lies at or above it, and infinities alone are not coded. */
DEVICE bool is_outlier(float magnitude, float threshold) { return threshold > 0.0f && magnitude >= threshold; }

/* What an element adds to the largest magnitude of its row or column. */
DEVICE unsigned stat_bits(float x, float threshold)
{
    const float magnitude = fabsf(x);
    return magnitude != magnitude ? NAN_BITS : is_outlier(magnitude, threshold) ? 0u : __float_as_uint(magnitude);
}

/* The code of x under r = 127 / stat. */
DEVICE int code8_of(float x, float r, float threshold)
{
    const float magnitude = fabsf(x);
    const bool inside = magnitude <= FLOAT_MAX && !is_outlier(magnitude, threshold) && r <= FLOAT_MAX;
    return inside ? __float2int_rn(x * r) : 0;
}

/* Eight codes as they lie in memory. */
DEVICE void store_codes8(int8_t *p, int count, int vector, const int c[8])
{
    if (vector && count == 8) {
        unsigned w[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < 8; i++)
            w[i / 4] |= (unsigned)(c[i] & 255) << 8 * (i % 4);
        *(uint2 *)p = make_uint2(w[0], w[1]);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < count)
            p[i] = (int8_t)c[i];
}

/* The largest over each aligned group of `lanes` threads, 32 or all 256. */
DEVICE unsigned largest_bits(unsigned m, int lanes, unsigned partial[8])
{
    for (int o = 16; o > 0; o /= 2)
        m = max(m, __shfl_xor_sync(0xffffffffu, m, o));
    if (lanes == 32)
        return m;
    __syncthreads(); /* partial was read for the row before */
    if (threadIdx.x % 32 == 0)
        partial[threadIdx.x / 32] = m;
    __syncthreads();
    for (int w = 0; w < 8; w++)
        m = max(m, partial[w]);
    return m;
}

/* When all rows are known: the codes of the columns whose flag is set become 0.  A thread looks at four columns of 64
 * rows. */
extern "C" __global__ void __launch_bounds__(256) bnb_k_clear8(const struct bnb_rows_args a)
{
    const int64_t groups = (a.cols + 3) / 4, work = groups * ((a.rows + 63) / 64);
    for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < work; i += (int64_t)gridDim.x * 256) {
        const int64_t column = i % groups * 4, first = i / groups * 64;
        const int64_t end = first + 64 < a.rows ? first + 64 : a.rows;
        for (int64_t c = column; c < column + 4 && c < a.cols; c++)
            for (int64_t r = first; a.outlier[c] && r < end; r++)
                a.codes[r * a.cols + c] = 0;
    }
}

#if BNB_HAS_DTYPE(BNB_CUDA_F32)
#define T float
#define NAME(f) f##_f32
#include "cuda/kernels/rows8.tmpl.cuh"
#undef T
#undef NAME
#endif
#if BNB_HAS_DTYPE(BNB_CUDA_F16)
#define T f16
#define NAME(f) f##_f16
#include "cuda/kernels/rows8.tmpl.cuh"
#undef T
#undef NAME
#endif
#if BNB_HAS_DTYPE(BNB_CUDA_BF16)
#define T bf16
#define NAME(f) f##_bf16
#include "cuda/kernels/rows8.tmpl.cuh"
#undef T
#undef NAME
#endif
