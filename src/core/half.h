/*
 * half.h - 16-bit floats: storage types and conversions for one value
 *
 * Rounding is to nearest even; a NaN stays a NaN, made quiet, with the upper bits of its payload (NUMERICS rule 11).
 * These are the bits that F16C and the vector code produce as well.
 */
#ifndef BNB_CORE_HALF_H
#define BNB_CORE_HALF_H

#include "core/args.h"

typedef struct { uint16_t bits; } bnb_bf16;
typedef struct { uint16_t bits; } bnb_f16;

#if defined(__CUDACC__)
BNB_EITHER_DEVICE uint32_t bnb_bits_of(float x) { return __float_as_uint(x); }
BNB_EITHER_DEVICE float bnb_float_of(uint32_t u) { return __uint_as_float(u); }
#else
#include <string.h>

static inline uint32_t bnb_bits_of(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static inline float bnb_float_of(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}
#endif

BNB_EITHER_DEVICE bnb_bf16 bnb_bf16_of(uint32_t bits)
{
    bnb_bf16 h;
    h.bits = (uint16_t)bits;
    return h;
}

BNB_EITHER_DEVICE bnb_f16 bnb_f16_of(uint32_t bits)
{
    bnb_f16 h;
    h.bits = (uint16_t)bits;
    return h;
}

BNB_EITHER_DEVICE float bnb_from_bf16(bnb_bf16 h) { return bnb_float_of((uint32_t)h.bits << 16); }

BNB_EITHER_DEVICE bnb_bf16 bnb_to_bf16(float x)
{
    const uint32_t u = bnb_bits_of(x);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const uint32_t quiet = (u >> 16) | 0x0040u;
    return bnb_bf16_of(x == x ? rounded : quiet);
}

BNB_EITHER_DEVICE float bnb_from_f16(bnb_f16 h)
{
    const uint32_t sign = (uint32_t)(h.bits & 0x8000u) << 16;
    const uint32_t magnitude = h.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) /* Inf, NaN (made quiet) */
        return bnb_float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13) | (magnitude > 0x7c00u ? 0x400000u : 0u));
    if (magnitude >= 0x0400u)
        return bnb_float_of(sign | ((magnitude << 13) + 0x38000000u));
    const float value = (float)magnitude * 0x1p-24f; /* subnormal: exact */
    return bnb_float_of(sign | bnb_bits_of(value));
}

BNB_EITHER_DEVICE bnb_f16 bnb_to_f16(float x)
{
    const uint32_t u = bnb_bits_of(x);
    const uint32_t sign = (u >> 16) & 0x8000u;
    const uint32_t magnitude = u & 0x7fffffffu;
    uint32_t h;
    if (magnitude > 0x7f800000u) {
        h = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
    } else if (magnitude >= 0x477ff000u) { /* 65520 and above rounds to Inf */
        h = 0x7c00u;
    } else if (magnitude >= 0x38800000u) { /* normal: 2^-14 and above */
        h = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    } else {
        /* Subnormal: adding 0.5 leaves the multiple of 2^-24, rounded to nearest even, in the low bits. */
        h = bnb_bits_of(bnb_float_of(magnitude) + 0.5f) - 0x3f000000u;
    }
    return bnb_f16_of(sign | h);
}

#endif
