/*
 * simd_avx2.h - the vector vocabulary of the kernels for AVX2, FMA and F16C: 8 lanes.  simd_scalar.h gives the meanings.
 */
#ifndef BNB_SIMD_AVX2_H
#define BNB_SIMD_AVX2_H

#include <immintrin.h>
#include <stdbool.h>

#include "core/half.h"

#define VF_LANES 8

typedef __m256 vf;
typedef __m256i vi;
typedef __m256 vm;
typedef __m256 lut8;
typedef __m256i lut8i;
typedef struct { __m256 low, high; } lut16;

static inline vf vf_set(float x) { return _mm256_set1_ps(x); }
static inline vi vi_set(int x) { return _mm256_set1_epi32(x); }

static inline vf vf_load_f32(const float *p) { return _mm256_loadu_ps(p); }
static inline void vf_store_f32(float *p, vf x) { _mm256_storeu_ps(p, x); }

static inline vf vf_load_bf16(const bnb_bf16 *p)
{
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

static inline void vf_store_bf16(bnb_bf16 *p, vf x)
{
    const __m256i u = _mm256_castps_si256(x);
    const __m256i upper = _mm256_srli_epi32(u, 16);
    const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    const __m256i r = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), quiet, _mm256_castps_si256(nan));
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
    _mm_storeu_si128((__m128i *)(void *)p, _mm256_castsi256_si128(packed));
}

static inline vf vf_load_f16(const bnb_f16 *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}

static inline void vf_store_f16(bnb_f16 *p, vf x)
{
    _mm_storeu_si128((__m128i *)(void *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

static inline vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
static inline vf vf_sqrt(vf a) { return _mm256_sqrt_ps(a); }
static inline vf vf_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }

static inline float vf_hmax(vf a)
{
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    m = _mm_max_ss(m, _mm_movehdup_ps(m));
    return _mm_cvtss_f32(m);
}

static inline vm vf_lt(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
static inline vm vf_le(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
static inline vm vf_gt(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
static inline vm vf_eq(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
static inline vm vf_is_nan(vf a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
static inline vm vm_and(vm a, vm b) { return _mm256_and_ps(a, b); }
static inline bool vm_any(vm m) { return _mm256_movemask_ps(m) != 0; }
static inline vf vf_select(vm m, vf yes, vf no) { return _mm256_blendv_ps(no, yes, m); }
static inline vf vf_where(vm m, vf x) { return _mm256_and_ps(m, x); }
static inline vi vi_where_not(vm m, vi x) { return _mm256_andnot_si256(_mm256_castps_si256(m), x); }

static inline vi vi_of_mask(vm m) { return _mm256_castps_si256(m); }
static inline vi vi_sign(vf a) { return _mm256_srai_epi32(_mm256_castps_si256(a), 31); }
static inline vi vi_bits(vf a) { return _mm256_castps_si256(a); }
static inline vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
static inline vi vi_sub(vi a, vi b) { return _mm256_sub_epi32(a, b); }
static inline vi vi_mul16(vi a) { return _mm256_slli_epi32(a, 4); }
static inline vi vi_div16(vi a) { return _mm256_srli_epi32(a, 4); }
static inline vi vi_xor(vi a, vi b) { return _mm256_xor_si256(a, b); }
static inline vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
static inline vi vi_or(vi a, vi b) { return _mm256_or_si256(a, b); }
static inline vi vi_min(vi a, vi b) { return _mm256_min_epi32(a, b); }
static inline vi vi_max(vi a, vi b) { return _mm256_max_epi32(a, b); }
static inline vm vi_eq(vi a, vi b) { return _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b)); }
static inline vf vf_of_vi(vi a) { return _mm256_cvtepi32_ps(a); }
static inline vi vi_trunc(vf a) { return _mm256_cvttps_epi32(a); }

static inline vf vf_gather(const float *table, vi i) { return _mm256_i32gather_ps(table, i, 4); }
static inline lut8 lut8_load(const float *p) { return _mm256_loadu_ps(p); }
static inline vf lut8_at(lut8 t, vi i) { return _mm256_permutevar8x32_ps(t, i); }
static inline lut8i lut8i_load(const int *p) { return _mm256_loadu_si256((const __m256i *)(const void *)p); }
static inline vi lut8i_at(lut8i t, vi i) { return _mm256_permutevar8x32_epi32(t, i); }
static inline lut16 lut16_load(const float *p) { return (lut16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }

static inline vf lut16_at(lut16 t, vi i)
{
    const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, i), _mm256_permutevar8x32_ps(t.high, i), bit3);
}

static inline vi vi_load_u8(const uint8_t *p)
{
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p));
}

/* 32 codes of 0..255 as bytes, in order */
static inline __m256i group_bytes(const vi c[4])
{
    const __m256i low = _mm256_packs_epi32(c[0], c[1]), high = _mm256_packs_epi32(c[2], c[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
}

static inline void group_store_u8(uint8_t *p, const vi c[4])
{
    _mm256_storeu_si256((__m256i *)(void *)p, group_bytes(c));
}

static inline void group_store_u4(uint8_t *p, const vi c[4])
{
    const __m256i pairs = _mm256_maddubs_epi16(group_bytes(c), _mm256_set1_epi16(0x0110)); /* 16 even + odd */
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
    _mm_storeu_si128((__m128i *)(void *)p, _mm256_castsi256_si128(bytes));
}

static inline void group_load_u4(const uint8_t *p, vi c[4])
{
    const __m128i packed = _mm_loadu_si128((const __m128i *)(const void *)p), mask = _mm_set1_epi8(15);
    const __m128i even = _mm_and_si128(_mm_srli_epi16(packed, 4), mask), odd = _mm_and_si128(packed, mask);
    const __m128i first = _mm_unpacklo_epi8(even, odd), second = _mm_unpackhi_epi8(even, odd);
    c[0] = _mm256_cvtepu8_epi32(first);
    c[1] = _mm256_cvtepu8_epi32(_mm_srli_si128(first, 8));
    c[2] = _mm256_cvtepu8_epi32(second);
    c[3] = _mm256_cvtepu8_epi32(_mm_srli_si128(second, 8));
}

/* ---- matrix products */

enum { TILE_M = 3, TILE_M8 = 3, TILE_N = 4, AXPY_M = 3, AXPY_V = 4 };

static inline vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }

static inline float vf_hsum(vf a)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

static inline vi vi_round(vf a) { return _mm256_cvtps_epi32(a); }

static inline vf vf_load_i8(const int8_t *p)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p)));
}

static inline void group_store_i8(int8_t *p, const vi c[4])
{
    const __m256i low = _mm256_packs_epi32(c[0], c[1]), high = _mm256_packs_epi32(c[2], c[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    _mm256_storeu_si256((__m256i *)(void *)p, bytes);
}

enum { DOT_LANES = 16, DOT_SHIFT = 0 };
typedef int16_t dot_a;
typedef int16_t dot_b;

static inline vi dot_load(const int16_t *p) { return _mm256_loadu_si256((const __m256i *)(const void *)p); }
static inline vi dot_step(vi sum, vi a, vi b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }

static inline int32_t vi_hsum(vi a)
{
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

/* ---- bytes: VB_BYTES of them; look-ups and zips work within each 16 */

enum { VB_BYTES = 32 };

typedef __m256i vb;

static inline vb vb_load(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)(const void *)p); }
static inline vb vb_table(const uint8_t t[16])
{
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)t));
}
static inline vb vb_low_nibbles(vb a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
static inline vb vb_high_nibbles(vb a) { return vb_low_nibbles(_mm256_srli_epi16(a, 4)); }
static inline vb vb_lookup(vb table, vb i) { return _mm256_shuffle_epi8(table, i); }
static inline vb vb_zip_first(vb a, vb b) { return _mm256_unpacklo_epi8(a, b); }
static inline vb vb_zip_second(vb a, vb b) { return _mm256_unpackhi_epi8(a, b); }

/* products of 16-bit integers, added in pairs */
static inline vf vf_dot16(vb w, const int16_t *x)
{
    const __m256i a = _mm256_loadu_si256((const __m256i *)(const void *)x);
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(w, a));
}

/* absmax[r] scale[r] where run r of 64 elements ends up */
static inline vf vf_units(const float absmax[1], const float *scale) { return vf_set(absmax[0] * scale[0]); }

#endif
