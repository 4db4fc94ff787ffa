/*
 * simd_avx512.h - the vector vocabulary of the kernels for AVX-512 F, BW, DQ and VL: 16 lanes, masks in mask registers.
 * simd_scalar.h gives the meanings.
 */
#ifndef BNB_SIMD_AVX512_H
#define BNB_SIMD_AVX512_H

#include <immintrin.h>
#include <stdbool.h>

#include "core/half.h"

#define VF_LANES 16

typedef __m512 vf;
typedef __m512i vi;
typedef __mmask16 vm;
typedef __m512 lut8; /* the 8 entries twice */
typedef __m512i lut8i;
typedef __m512 lut16;

static inline vf vf_set(float x) { return _mm512_set1_ps(x); }
static inline vi vi_set(int x) { return _mm512_set1_epi32(x); }

static inline vf vf_load_f32(const float *p) { return _mm512_loadu_ps(p); }
static inline void vf_store_f32(float *p, vf x) { _mm512_storeu_ps(p, x); }

static inline vf vf_load_bf16(const bnb_bf16 *p)
{
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

static inline void vf_store_bf16(bnb_bf16 *p, vf x)
{
    const __m512i u = _mm512_castps_si512(x);
    const __m512i upper = _mm512_srli_epi32(u, 16);
    const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
    const __m512i r = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtepi32_epi16(r));
}

static inline vf vf_load_f16(const bnb_f16 *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}

static inline void vf_store_f16(bnb_f16 *p, vf x)
{
    const __m256i half = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256((__m256i *)(void *)p, half);
}

static inline vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf vf_sqrt(vf a) { return _mm512_sqrt_ps(a); }
static inline vf vf_abs(vf a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), a); }
static inline vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline float vf_hmax(vf a) { return _mm512_reduce_max_ps(a); }

static inline vm vf_lt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
static inline vm vf_le(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
static inline vm vf_gt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
static inline vm vf_eq(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
static inline vm vf_is_nan(vf a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
static inline vm vm_and(vm a, vm b) { return (vm)(a & b); }
static inline bool vm_any(vm m) { return m != 0; }
static inline vf vf_select(vm m, vf yes, vf no) { return _mm512_mask_blend_ps(m, no, yes); }
static inline vf vf_where(vm m, vf x) { return _mm512_maskz_mov_ps(m, x); }
static inline vi vi_where_not(vm m, vi x) { return _mm512_maskz_mov_epi32((vm)~m, x); }

static inline vi vi_of_mask(vm m) { return _mm512_movm_epi32(m); }
static inline vi vi_sign(vf a) { return _mm512_srai_epi32(_mm512_castps_si512(a), 31); }
static inline vi vi_bits(vf a) { return _mm512_castps_si512(a); }
static inline vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
static inline vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
static inline vi vi_mul16(vi a) { return _mm512_slli_epi32(a, 4); }
static inline vi vi_div16(vi a) { return _mm512_srli_epi32(a, 4); }
static inline vi vi_xor(vi a, vi b) { return _mm512_xor_si512(a, b); }
static inline vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
static inline vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
static inline vi vi_min(vi a, vi b) { return _mm512_min_epi32(a, b); }
static inline vi vi_max(vi a, vi b) { return _mm512_max_epi32(a, b); }
static inline vm vi_eq(vi a, vi b) { return _mm512_cmpeq_epi32_mask(a, b); }
static inline vf vf_of_vi(vi a) { return _mm512_cvtepi32_ps(a); }
static inline vi vi_trunc(vf a) { return _mm512_cvttps_epi32(a); }

static inline vf vf_gather(const float *table, vi i) { return _mm512_i32gather_ps(i, table, 4); }
static inline lut8 lut8_load(const float *p) { return _mm512_broadcast_f32x8(_mm256_loadu_ps(p)); }
static inline vf lut8_at(lut8 t, vi i) { return _mm512_permutexvar_ps(i, t); }

static inline lut8i lut8i_load(const int *p)
{
    return _mm512_broadcast_i32x8(_mm256_loadu_si256((const __m256i *)(const void *)p));
}

static inline vi lut8i_at(lut8i t, vi i) { return _mm512_permutexvar_epi32(i, t); }
static inline lut16 lut16_load(const float *p) { return _mm512_loadu_ps(p); }
static inline vf lut16_at(lut16 t, vi i) { return _mm512_permutexvar_ps(i, t); }

static inline vi vi_load_u8(const uint8_t *p)
{
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
}

static inline void group_store_u8(uint8_t *p, const vi c[4])
{
    for (int k = 0; k < 4; k++)
        _mm_storeu_si128((__m128i *)(void *)(p + 16 * k), _mm512_cvtepi32_epi8(c[k]));
}

/* Codes 2i and 2i + 1 are neighbouring dwords: shift the even one up, merge, keep the low byte of each pair. */
static inline void group_store_u4(uint8_t *p, const vi c[4])
{
    for (int k = 0; k < 4; k++) {
        const __m512i pairs = _mm512_or_si512(_mm512_slli_epi64(c[k], 4), _mm512_srli_epi64(c[k], 32));
        _mm_storel_epi64((__m128i *)(void *)(p + 8 * k), _mm512_cvtepi64_epi8(pairs));
    }
}

static inline void group_load_u4(const uint8_t *p, vi c[4])
{
    for (int k = 0; k < 4; k++) {
        const __m128i packed = _mm_loadl_epi64((const __m128i *)(const void *)(p + 8 * k)), mask = _mm_set1_epi8(15);
        const __m128i even = _mm_and_si128(_mm_srli_epi16(packed, 4), mask), odd = _mm_and_si128(packed, mask);
        c[k] = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(even, odd));
    }
}

/* ---- matrix products */

enum { TILE_M = 4, TILE_M8 = 2, TILE_N = 6, AXPY_M = 6, AXPY_V = 4 };

static inline vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline float vf_hsum(vf a) { return _mm512_reduce_add_ps(a); }
static inline vi vi_round(vf a) { return _mm512_cvtps_epi32(a); }

static inline vf vf_load_i8(const int8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)));
}

static inline void group_store_i8(int8_t *p, const vi c[4])
{
    for (int k = 0; k < 4; k++)
        _mm_storeu_si128((__m128i *)(void *)(p + 16 * k), _mm512_cvtepi32_epi8(c[k]));
}

#if defined(__AVX512VNNI__)
/* Unsigned by signed bytes, four products a lane; sums wrap, so taking the shift back at the end is exact. */
enum { DOT_LANES = 64, DOT_SHIFT = 128 };
typedef uint8_t dot_a;
typedef int8_t dot_b;

static inline vi dot_step(vi sum, vi a, vi b) { return _mm512_dpbusd_epi32(sum, a, b); }
#else
enum { DOT_LANES = 32, DOT_SHIFT = 0 };
typedef int16_t dot_a;
typedef int16_t dot_b;

static inline vi dot_step(vi sum, vi a, vi b) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }
#endif

static inline vi dot_load(const void *p) { return _mm512_loadu_si512(p); }

static inline int32_t vi_hsum(vi a) { return _mm512_reduce_add_epi32(a); }

/* ---- bytes: VB_BYTES of them; look-ups and zips work within each 16 */

enum { VB_BYTES = 64 };

typedef __m512i vb;

static inline vb vb_load(const uint8_t *p) { return _mm512_loadu_si512((const __m512i *)(const void *)p); }
static inline vb vb_table(const uint8_t t[16])
{
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)t));
}
static inline vb vb_low_nibbles(vb a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
static inline vb vb_high_nibbles(vb a) { return vb_low_nibbles(_mm512_srli_epi16(a, 4)); }
static inline vb vb_lookup(vb table, vb i) { return _mm512_shuffle_epi8(table, i); }
static inline vb vb_zip_first(vb a, vb b) { return _mm512_unpacklo_epi8(a, b); }
static inline vb vb_zip_second(vb a, vb b) { return _mm512_unpackhi_epi8(a, b); }

/* products of 16-bit integers, added in pairs */
static inline vf vf_dot16(vb w, const int16_t *x)
{
    const __m512i a = _mm512_loadu_si512((const __m512i *)(const void *)x);
    return _mm512_cvtepi32_ps(_mm512_madd_epi16(w, a));
}

/* absmax[r] scale[r] where run r of 64 elements ends up */
static inline vf vf_units(const float absmax[2], const float *scale)
{
    return _mm512_mask_blend_ps(0xff00, vf_set(absmax[0] * scale[0]), vf_set(absmax[1] * scale[1]));
}

#endif
