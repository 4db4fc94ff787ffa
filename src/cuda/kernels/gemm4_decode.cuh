/*
 * gemm4_decode.cuh - two 4-bit weights at once: a byte of codes is the index of a pair of 16-bit values
 *
 * The table of the 256 pairs lies in shared memory once for each lane, so that no look-up meets another in a bank.  Its
 * entries are 256 bytes apart: the address of one is a byte of codes beside the byte of the lane, one byte permutation.
 *
 * Lane 4 g + j of a warp holds, of rows g and g + 8 of an operand of m16k16, the elements 2j, 2j + 1, 2j + 8 and 2j + 9:
 * byte j of each four bytes of codes, as they lie in memory (DESIGN of PTX's mma, and of wgmma's registers).
 */
#ifndef BNB_CUDA_GEMM4_DECODE_CUH
#define BNB_CUDA_GEMM4_DECODE_CUH

#include "cuda/kernels/gemm_ptx.cuh"

enum { PAIRS = 65536 }; /* bytes of the table */

/* What picks byte `byte` of codes as the entry and the lowest byte of the second word as the lane. */
DEVICE unsigned pair_selector(int byte) { return 0x5504u | (unsigned)byte << 4; }

DEVICE unsigned pair_at(const unsigned char *pairs, unsigned codes, unsigned lane, unsigned selector)
{
    return *(const unsigned *)(pairs + __byte_perm(codes, lane, selector));
}

/* By `count` threads, this one the `thread`-th; a barrier must follow. */
template <typename T>
DEVICE void pairs_fill(const T *tag, const struct bnb_cuda_gemm4_fast &p, unsigned char *pairs, unsigned thread,
                       unsigned count)
{
    for (unsigned e = thread; e < 256; e += count) {
        const unsigned pair = quick_pair(tag, p.values[e >> 4], p.values[e & 15]);
#pragma unroll
        for (unsigned i = 0; i < 8; i++) /* in turn, lest the threads of a warp meet in a bank */
            *(uint4 *)(pairs + e * 256 + (i + e) % 8 * 16) = make_uint4(pair, pair, pair, pair);
    }
}

/* The scale of the block that holds element `at` of the weight: NUMERICS rule 8.  map2: g.scale.code in shared memory. */
struct scale4 {
    float scale; /* plain: the scale itself; nested: that of its block of scales */
    unsigned code;
};

DEVICE struct scale4 scale4_load(const struct bnb_cuda_gemm4_fast &p, int64_t at)
{
    const int64_t b = at >> p.shift;
    struct scale4 s = {0.0f, 0};
    if (p.g.scale.absmax2) {
        s.code = __ldg((const uint8_t *)p.g.scale.absmax + b);
        s.scale = __ldg(p.g.scale.absmax2 + (b >> p.shift2));
    } else {
        s.scale = __ldg((const float *)p.g.scale.absmax + b);
    }
    return s;
}

DEVICE float scale4_value(const struct bnb_cuda_gemm4_fast &p, struct scale4 s, const float *map2, float offset)
{
    return p.g.scale.absmax2 ? __fadd_rn(__fmul_rn(map2[s.code], s.scale), offset) : s.scale;
}

/* map2 [256] of nested scales, by `count` threads; a barrier must follow. */
DEVICE void map2_fill(const struct bnb_cuda_gemm4_fast &p, float *map2, unsigned thread, unsigned count)
{
    if (p.g.scale.absmax2)
        for (unsigned i = thread; i < 256; i += count)
            map2[i] = __ldg(p.g.scale.code + i);
}

/* A pair of f16 times a scale each, in f32, rounded to T. */
template <typename T> DEVICE unsigned scale_pair(const T *tag, unsigned pair, float first, float second)
{
    float low, high;
    f16_pair_values(pair, &low, &high);
    return quick_pair(tag, low * first, high * second);
}

#endif
