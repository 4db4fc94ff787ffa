/*
 * simd_scalar.h - the vector vocabulary of the kernels with one lane: plain C, the meaning of every word
 *
 * vf: floats, vi: 32-bit integers, vm: lane masks (0 or all ones).  lut8 and lut16 are small tables kept in registers.
 * A group is 4 vectors: the unit in which 8-bit and 4-bit codes are read and written.
 */
#ifndef BNB_SIMD_SCALAR_H
#define BNB_SIMD_SCALAR_H

#include <math.h>
#include <stdbool.h>

#include "core/half.h"

#define VF_LANES 1

typedef float vf;
typedef int32_t vi;
typedef int32_t vm;
typedef const float *lut8;
typedef const float *lut16;
typedef const int *lut8i;

static inline vf vf_set(float x) { return x; }
static inline vi vi_set(int x) { return x; }

static inline vf vf_load_f32(const float *p) { return *p; }
static inline vf vf_load_bf16(const bnb_bf16 *p) { return bnb_from_bf16(*p); }
static inline vf vf_load_f16(const bnb_f16 *p) { return bnb_from_f16(*p); }
static inline void vf_store_f32(float *p, vf x) { *p = x; }
static inline void vf_store_bf16(bnb_bf16 *p, vf x) { *p = bnb_to_bf16(x); }
static inline void vf_store_f16(bnb_f16 *p, vf x) { *p = bnb_to_f16(x); }

static inline vf vf_add(vf a, vf b) { return a + b; }
static inline vf vf_sub(vf a, vf b) { return a - b; }
static inline vf vf_mul(vf a, vf b) { return a * b; }
static inline vf vf_div(vf a, vf b) { return a / b; }
static inline vf vf_sqrt(vf a) { return sqrtf(a); }
static inline vf vf_abs(vf a) { return fabsf(a); }
/* b where either is NaN: vf_max(x, m) drops a NaN in x */
static inline vf vf_max(vf a, vf b) { return a > b ? a : b; }
static inline float vf_hmax(vf a) { return a; }

static inline vm vf_lt(vf a, vf b) { return -(a < b); }
static inline vm vf_le(vf a, vf b) { return -(a <= b); }
static inline vm vf_gt(vf a, vf b) { return -(a > b); }
static inline vm vf_eq(vf a, vf b) { return -(a == b); }
static inline vm vf_is_nan(vf a) { return -(a != a); }
static inline vm vm_and(vm a, vm b) { return a & b; }
static inline bool vm_any(vm m) { return m != 0; }
static inline vf vf_select(vm m, vf yes, vf no) { return m ? yes : no; }
static inline vf vf_where(vm m, vf x) { return m ? x : 0.0f; } /* x, or +0 */
static inline vi vi_where_not(vm m, vi x) { return ~m & x; }   /* x, or 0  */

static inline vi vi_of_mask(vm m) { return m; } /* -1 or 0 */
static inline vi vi_sign(vf a) { return bnb_bits_of(a) >> 31 ? -1 : 0; }
static inline vi vi_bits(vf a) { return (int32_t)bnb_bits_of(a); }
static inline vi vi_add(vi a, vi b) { return a + b; }
static inline vi vi_sub(vi a, vi b) { return a - b; }
static inline vi vi_mul16(vi a) { return a * 16; }
static inline vi vi_div16(vi a) { return a >> 4; }
static inline vi vi_xor(vi a, vi b) { return a ^ b; }
static inline vi vi_and(vi a, vi b) { return a & b; }
static inline vi vi_or(vi a, vi b) { return a | b; }
static inline vi vi_min(vi a, vi b) { return a < b ? a : b; }
static inline vi vi_max(vi a, vi b) { return a > b ? a : b; }
static inline vm vi_eq(vi a, vi b) { return -(a == b); }
static inline vf vf_of_vi(vi a) { return (float)a; }
static inline vi vi_trunc(vf a) { return (int32_t)a; } /* a is within int32_t */

static inline vf vf_gather(const float *table, vi i) { return table[i]; }
static inline lut8 lut8_load(const float *p) { return p; }
static inline vf lut8_at(lut8 t, vi i) { return t[i & 7]; }
static inline lut8i lut8i_load(const int *p) { return p; }
static inline vi lut8i_at(lut8i t, vi i) { return t[i & 7]; }
static inline lut16 lut16_load(const float *p) { return p; }
static inline vf lut16_at(lut16 t, vi i) { return t[i & 15]; } /* the low four bits of i alone count */

static inline vi vi_load_u8(const uint8_t *p) { return *p; }

static inline void group_store_u8(uint8_t *p, const vi c[4])
{
    for (int k = 0; k < 4; k++)
        p[k] = (uint8_t)c[k];
}

static inline void group_store_u4(uint8_t *p, const vi c[4])
{
    p[0] = (uint8_t)(c[0] << 4 | c[1]);
    p[1] = (uint8_t)(c[2] << 4 | c[3]);
}

static inline void group_load_u4(const uint8_t *p, vi c[4])
{
    c[0] = p[0] >> 4;
    c[1] = p[0] & 15;
    c[2] = p[1] >> 4;
    c[3] = p[1] & 15;
}

/* ---- matrix products: tiles of TILE_M rows by TILE_N columns of dot products */

enum { TILE_M = 2, TILE_M8 = 2, TILE_N = 2, AXPY_M = 2, AXPY_V = 4 };

static inline vf vf_fma(vf a, vf b, vf c) { return a * b + c; } /* products may contract: NUMERICS rule 30 */
static inline float vf_hsum(vf a) { return a; }
static inline vi vi_round(vf a) { return (int32_t)rintf(a); } /* to nearest even */
static inline vf vf_load_i8(const int8_t *p) { return (float)*p; }

static inline void group_store_i8(int8_t *p, const vi c[4])
{
    for (int k = 0; k < 4; k++)
        p[k] = (int8_t)c[k];
}

/* Integer dot products: DOT_LANES elements of each operand a step.  A packed value of a is the value plus DOT_SHIFT. */
enum { DOT_LANES = 1, DOT_SHIFT = 0 };
typedef int16_t dot_a;
typedef int16_t dot_b;
static inline vi dot_load(const int16_t *p) { return *p; }
static inline vi dot_step(vi sum, vi a, vi b) { return sum + a * b; }
static inline int32_t vi_hsum(vi a) { return a; }

#endif
