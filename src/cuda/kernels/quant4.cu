/*
 * quant4.cu - 4-bit quantisation and its inverse, for f32, f16 and bf16
 */
#include "cuda/kernels/device.cuh"

/* Values of bnb_type4. */
enum { TYPE_FP4 = 1, TYPE_NF4 = 2 };

/* How many thresholds lie below v: adding 1.5 2^23 rounds to the number of a bin, and leaves it in the low bits. */
DEVICE int count_below(float v, float offset, const struct bnb_bin4 *bins)
{
    const struct bnb_bin4 bin = bins[__float_as_uint(__fmaf_rn(v, 16.0f, offset)) & 63u];
    return bin.base + (v > bin.threshold ? 1 : 0);
}

DEVICE unsigned encode_nf4(float u, const struct bnb_bin4 *bins)
{
    return (unsigned)count_below(u, 12582912.0f + 16.0f, bins);
}

DEVICE unsigned encode_fp4(float u, const struct bnb_bin4 *bins)
{
    const unsigned count = (unsigned)count_below(fabsf(u), 12582912.0f, bins);
    const unsigned code = __byte_perm(BNB_FP4_ORDER_LOW, BNB_FP4_ORDER_HIGH, count); /* byte `count` of eight */
    return u < 0.0f ? code | 8u : code;
}

/* Eight codes as they lie in memory: element 0 in the high nibble of the lowest byte.  NUMERICS rules 3, 6 and 7.
 * SPECIAL: a value may be NaN or infinite, so that u is NaN, whose code is 0. */
template <int TYPE, bool SPECIAL> DEVICE unsigned encode4_codes(const float v[8], float r, const struct bnb_bin4 *bins)
{
    unsigned word = 0;
#pragma unroll
    for (int j = 7; j >= 0; j--) {
        float u = v[j ^ 1] * r;
        const bool nan = SPECIAL && !(u == u);
        u = nan ? 0.0f : u;
        const unsigned code = TYPE == TYPE_NF4 ? encode_nf4(u, bins) : encode_fp4(u, bins);
        word = word * 16 + (nan ? 0u : code);
    }
    return word;
}

template <int TYPE> DEVICE unsigned encode4_word(const float v[8], float r, bool special, const struct bnb_bin4 *bins)
{
    return special ? encode4_codes<TYPE, true>(v, r, bins) : encode4_codes<TYPE, false>(v, r, bins);
}

/* The codes of `count` of eight elements, or of four. */
DEVICE unsigned load_codes4(const uint8_t *p, int whole, int count, int vector)
{
    unsigned word = 0;
    if (vector && count == whole)
        return whole == 8 ? __ldcs((const unsigned *)p) : __ldcs((const unsigned short *)p);
    for (int i = 0; i < (count + 1) / 2; i++)
        word |= (unsigned)p[i] << 8 * i;
    return word;
}

#if BNB_HAS_DTYPE(BNB_CUDA_F32)
#define T float
#define NAME(f) f##_f32
#include "cuda/kernels/quant4.tmpl.cuh"
#undef T
#undef NAME
#endif
#if BNB_HAS_DTYPE(BNB_CUDA_F16)
#define T f16
#define NAME(f) f##_f16
#include "cuda/kernels/quant4.tmpl.cuh"
#undef T
#undef NAME
#endif
#if BNB_HAS_DTYPE(BNB_CUDA_BF16)
#define T bf16
#define NAME(f) f##_bf16
#include "cuda/kernels/quant4.tmpl.cuh"
#undef T
#undef NAME
#endif
