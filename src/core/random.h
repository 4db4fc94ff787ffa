/*
 * random.h - stochastic rounding: random bits from a counter, and the conversions that use them (NUMERICS rule 29)
 *
 * The bits depend on the seed, the update and the position alone, so a run can be repeated, in any order, on any device.
 */
#ifndef BNB_CORE_RANDOM_H
#define BNB_CORE_RANDOM_H

#include "core/half.h"

/* The output function of SplitMix64 (Steele, Lea & Flood 2014). */
BNB_EITHER_DEVICE uint64_t bnb_mix64(uint64_t z)
{
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* 32 random bits for element i of a block whose key is `key`: the 32-bit finaliser of MurmurHash3 (Appleby 2011). */
BNB_EITHER_DEVICE uint32_t bnb_random32(uint32_t key, uint32_t i)
{
    uint32_t h = key + i * 0x9e3779b9u;
    h = (h ^ (h >> 16)) * 0x85ebca6bu;
    h = (h ^ (h >> 13)) * 0xc2b2ae35u;
    return h ^ (h >> 16);
}

/* One of the two neighbours of x, the nearer one more often: noise below the last place is added, the rest cut off.
 * Infinities and NaN are converted as ever. */
BNB_EITHER_DEVICE bnb_bf16 bnb_to_bf16_random(float x, uint32_t random)
{
    const uint32_t u = bnb_bits_of(x);
    const uint32_t rounded = (u + (random & 0xffffu)) >> 16, plain = bnb_to_bf16(x).bits;
    return bnb_bf16_of((u & 0x7f800000u) == 0x7f800000u ? plain : rounded);
}

BNB_EITHER_DEVICE bnb_f16 bnb_to_f16_random(float x, uint32_t random)
{
    const uint32_t u = bnb_bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    if (magnitude >= 0x477fe000u) /* 65504 and above, NaN */
        return bnb_to_f16(x);
    if (magnitude >= 0x38800000u)
        return bnb_f16_of(sign | (((magnitude + (random & 0x1fffu)) >> 13) - 0x1c000u));
    const uint32_t steps = (uint32_t)(bnb_float_of(magnitude) * 0x1p40f); /* subnormal: units of 2^-40, 16 below one */
    return bnb_f16_of(sign | ((steps + (random & 0xffffu)) >> 16));
}

#endif
