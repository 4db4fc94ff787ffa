/*
 * quant8.cu - 8-bit quantisation and its inverse, for f32, f16 and bf16
 */
#include "cuda/kernels/encode8.cuh"

/* Four codes; SPECIAL: a value may be NaN or infinite, so that u is NaN, whose code is 0. */
template <int KIND, bool SPECIAL, int CELLS>
DEVICE unsigned encode8_codes(const float v[4], float r, const struct map8<CELLS> *map)
{
    unsigned word = 0;
#pragma unroll
    for (int i = 3; i >= 0; i--) {
        const float u = v[i] * r;
        const bool nan = SPECIAL && !(u == u);
        const int code = encode8<KIND>(nan ? 0.0f : u, map);
        word = word * 256 + (unsigned)(nan ? 0 : code);
    }
    return word;
}

template <int KIND, int CELLS>
DEVICE unsigned encode8_word(const float v[4], float r, bool special, const struct map8<CELLS> *map)
{
    return special ? encode8_codes<KIND, true>(v, r, map) : encode8_codes<KIND, false>(v, r, map);
}

/* The codes of `count` of eight elements, or of four. */
DEVICE uint2 load_codes8(const uint8_t *p, int whole, int count, int vector)
{
    unsigned word[2] = {0, 0};
    if (vector && count == whole)
        return whole == 8 ? __ldcs((const uint2 *)p) : make_uint2(__ldcs((const unsigned *)p), 0u);
#pragma unroll
    for (int i = 0; i < 8; i++)
        word[i / 4] |= i < count ? (unsigned)p[i] << 8 * (i % 4) : 0u;
    return make_uint2(word[0], word[1]);
}

DEVICE void store_codes8(uint8_t *p, int count, const unsigned word[2])
{
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < count)
            p[i] = (uint8_t)(word[i / 4] >> 8 * (i % 4));
}

#if BNB_HAS_DTYPE(BNB_CUDA_F32)
#define T float
#define NAME(f) f##_f32
#include "cuda/kernels/quant8.tmpl.cuh"
#undef T
#undef NAME
#endif
#if BNB_HAS_DTYPE(BNB_CUDA_F16)
#define T f16
#define NAME(f) f##_f16
#include "cuda/kernels/quant8.tmpl.cuh"
#undef T
#undef NAME
#endif
#if BNB_HAS_DTYPE(BNB_CUDA_BF16)
#define T bf16
#define NAME(f) f##_bf16
#include "cuda/kernels/quant8.tmpl.cuh"
#undef T
#undef NAME
#endif
