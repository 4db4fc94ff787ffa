/*
 * scale.h - the scale of a block, plain or nested: NUMERICS rule 8
 */
#ifndef BNB_CORE_SCALE_H
#define BNB_CORE_SCALE_H

#include "core/args.h"

#ifdef __CUDACC__
#define BNB_LOG2(power) (__ffsll(power) - 1)
#else
#define BNB_LOG2(power) __builtin_ctzll((unsigned long long)(power))
#endif

BNB_EITHER_DEVICE float bnb_block_scale(const struct bnb_scale_args *s, int64_t b)
{
    if (!s->absmax2)
        return ((const float *)s->absmax)[b];
    const int power_of_two = (s->block2 & (s->block2 - 1)) == 0; /* a shift is much faster than a division */
    const int64_t outer = power_of_two ? b >> BNB_LOG2(s->block2) : b / s->block2;
    const float entry = s->code[((const uint8_t *)s->absmax)[b]];
#ifdef __CUDACC__ /* some files may fuse, this may not */
    return __fadd_rn(__fmul_rn(entry, s->absmax2[outer]), *s->offset);
#else
    const float product = entry * s->absmax2[outer];
    return product + *s->offset;
#endif
}

#endif
