/*
 * rows8.cuh - what LLM.int8()'s quantisers share: outliers, statistics, codes.  NUMERICS rule 33
 *
 * Magnitudes are compared by their bits, whose order is that of the values, with NaN above all.
 */
#ifndef BNB_CUDA_ROWS8_CUH
#define BNB_CUDA_ROWS8_CUH

#include "cuda/kernels/device.cuh"

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
    return inside ? __float2int_rn(__fmul_rn(x, r)) : 0;
}

/* What is left of x without its code: half a step of the quantiser at most, but for an outlier, whose code is 0. */
DEVICE float rest8_of(float x, float stat, float r, float threshold)
{
    return __fmaf_rn((float)code8_of(x, r, threshold), -(stat / 127.0f), x);
}

#endif
