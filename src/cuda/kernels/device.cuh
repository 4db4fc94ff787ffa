/*
 * device.cuh - what every kernel starts from: 16-bit floats as storage, groups of eight elements, the largest of a block
 *
 * Device code includes no header of CUDA's or the system's, so that the run-time compiler needs nothing but this text.
 * No contraction, no flushing of subnormals (NUMERICS rule 1).
 */
#ifndef BNB_CUDA_DEVICE_CUH
#define BNB_CUDA_DEVICE_CUH

#include "core/args.h"
#include "core/half.h"
#include "core/scale.h"
#include "cuda/kernels/launch_args.h"

/* The values of bnb_dtype; one variant alone is compiled where BNB_ONLY_DTYPE names it. */
#define BNB_CUDA_F32 0
#define BNB_CUDA_F16 1
#define BNB_CUDA_BF16 2
#ifdef BNB_ONLY_DTYPE
#define BNB_HAS_DTYPE(dtype) (BNB_ONLY_DTYPE == (dtype))
#else
#define BNB_HAS_DTYPE(dtype) 1
#endif

#define DEVICE static __device__ __forceinline__
#define FLOAT_MAX 0x1.fffffep+127f

/* Before a kernel's argument that is read at places known at run time: it stays where the launch put it. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 700
#define IN_PLACE
#else
#define IN_PLACE __grid_constant__
#endif

typedef bnb_f16 f16;
typedef bnb_bf16 bf16;

/* The thresholds of a 4-bit type: see tools/device_tables.c. */
struct __align__(8) bnb_bin4 {
    float threshold;
    int base;
};

#include "tables.cuh"

/* ---------------------------------------------------------------- 16-bit floats: NUMERICS rule 11 */

DEVICE float f16_value(unsigned bits)
{
    float x;
    asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(x) : "r"(bits));
    return x;
}

DEVICE unsigned f16_bits(float x)
{
    unsigned bits;
    asm("{ .reg .b16 h; cvt.rn.f16.f32 h, %1; cvt.u32.u16 %0, h; }" : "=r"(bits) : "f"(x));
    const unsigned u = __float_as_uint(x);
    return x == x ? bits : (u >> 16 & 0x8000u) | 0x7e00u | (u >> 13 & 0x03ffu);
}

DEVICE unsigned bf16_bits(float x) { return bnb_to_bf16(x).bits; }

/* Two at once, the first in the low half; the type of the pointer says which.  A NaN becomes the card's own. */
DEVICE unsigned quick_pair(const bf16 *, float a, float b)
{
#if __CUDA_ARCH__ >= 800
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
    return pair;
#else
    return bf16_bits(a) | bf16_bits(b) << 16;
#endif
}

DEVICE unsigned quick_pair(const f16 *, float a, float b)
{
#if __CUDA_ARCH__ >= 800
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
    return pair;
#else
    return f16_bits(a) | f16_bits(b) << 16;
#endif
}

/* The same, by NUMERICS rule 11. */
DEVICE unsigned bf16_pair(float a, float b)
{
    return a == a && b == b ? quick_pair((const bf16 *)nullptr, a, b) : bf16_bits(a) | bf16_bits(b) << 16;
}

DEVICE unsigned f16_pair(float a, float b)
{
    return a == a && b == b ? quick_pair((const f16 *)nullptr, a, b) : f16_bits(a) | f16_bits(b) << 16;
}

DEVICE float value_of(const float *p) { return *p; }
DEVICE float value_of(const f16 *p) { return f16_value(p->bits); }
DEVICE float value_of(const bf16 *p) { return __uint_as_float((unsigned)p->bits << 16); }

DEVICE void set_value(float *p, float x) { *p = x; }
DEVICE void set_value(f16 *p, float x) { p->bits = (unsigned short)f16_bits(x); }
DEVICE void set_value(bf16 *p, float x) { p->bits = (unsigned short)bf16_bits(x); }

/* ---------------------------------------------------------------- eight elements of a thread, in accesses of 16 bytes */

/* Eight elements as they lie in memory. */
template <typename T> struct raw8 { uint4 word[sizeof(T) / 2]; };

DEVICE void raw8_values(const struct raw8<float> &raw, float v[8])
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        v[4 * i] = __uint_as_float(raw.word[i].x), v[4 * i + 1] = __uint_as_float(raw.word[i].y);
        v[4 * i + 2] = __uint_as_float(raw.word[i].z), v[4 * i + 3] = __uint_as_float(raw.word[i].w);
    }
}

DEVICE void raw8_values(const struct raw8<f16> &raw, float v[8])
{
    const unsigned w[4] = {raw.word[0].x, raw.word[0].y, raw.word[0].z, raw.word[0].w};
#pragma unroll
    for (int i = 0; i < 4; i++)
        v[2 * i] = f16_value(w[i] & 0xffffu), v[2 * i + 1] = f16_value(w[i] >> 16);
}

DEVICE void raw8_values(const struct raw8<bf16> &raw, float v[8])
{
    const unsigned w[4] = {raw.word[0].x, raw.word[0].y, raw.word[0].z, raw.word[0].w};
#pragma unroll
    for (int i = 0; i < 4; i++)
        v[2 * i] = __uint_as_float(w[i] << 16), v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
}

DEVICE unsigned bits_of(float x) { return __float_as_uint(x); }
DEVICE unsigned bits_of(f16 x) { return x.bits; }
DEVICE unsigned bits_of(bf16 x) { return x.bits; }

/* The first `count` of eight, the rest zero; whole and aligned ones at once. */
template <typename T> DEVICE struct raw8<T> raw8_load(const T *p, int count, int vector)
{
    struct raw8<T> raw;
    if (vector && count == 8) {
#pragma unroll
        for (int i = 0; i < (int)(sizeof(T) / 2); i++)
            raw.word[i] = __ldcs((const uint4 *)p + i);
        return raw;
    }
    unsigned w[2 * sizeof(T)] = {};
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < count)
            w[i * sizeof(T) / 4] |= bits_of(p[i]) << (sizeof(T) == 2 ? 16 * (i % 2) : 0);
#pragma unroll
    for (int i = 0; i < (int)(sizeof(T) / 2); i++)
        raw.word[i] = make_uint4(w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]);
    return raw;
}

/*
 * A warp's 256 elements, where f32 is among the arrays: lane l has the four from 4 l on and the four from 128 + 4 l on, so
 * that each access of a warp is one run of memory.  All are there, and aligned.
 */
DEVICE struct raw8<float> spread_load(const float *p)
{
    struct raw8<float> raw;
    raw.word[0] = __ldcs((const uint4 *)p + threadIdx.x % 32);
    raw.word[1] = __ldcs((const uint4 *)p + 32 + threadIdx.x % 32);
    return raw;
}

template <typename T> DEVICE struct raw8<T> spread_load(const T *p)
{
    struct raw8<T> raw;
    const uint2 a = __ldcs((const uint2 *)p + threadIdx.x % 32), b = __ldcs((const uint2 *)p + 32 + threadIdx.x % 32);
    raw.word[0] = make_uint4(a.x, a.y, b.x, b.y);
    return raw;
}

/* Sixteen bytes of elements: four of f32, eight of the others. */
DEVICE void store16(float *p, const float v[4]) { __stcs((float4 *)p, make_float4(v[0], v[1], v[2], v[3])); }

DEVICE void store16(f16 *p, const float v[8])
{
    __stcs((uint4 *)p,
           make_uint4(f16_pair(v[0], v[1]), f16_pair(v[2], v[3]), f16_pair(v[4], v[5]), f16_pair(v[6], v[7])));
}

DEVICE void store16(bf16 *p, const float v[8])
{
    __stcs((uint4 *)p,
           make_uint4(bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3]), bf16_pair(v[4], v[5]), bf16_pair(v[6], v[7])));
}

DEVICE void spread_store(float *p, const float v[8])
{
    store16(p + threadIdx.x % 32 * 4, v);
    store16(p + 128 + threadIdx.x % 32 * 4, v + 4);
}

DEVICE void spread_store(f16 *p, const float v[8])
{
    __stcs((uint2 *)p + threadIdx.x % 32, make_uint2(f16_pair(v[0], v[1]), f16_pair(v[2], v[3])));
    __stcs((uint2 *)p + 32 + threadIdx.x % 32, make_uint2(f16_pair(v[4], v[5]), f16_pair(v[6], v[7])));
}

DEVICE void spread_store(bf16 *p, const float v[8])
{
    __stcs((uint2 *)p + threadIdx.x % 32, make_uint2(bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3])));
    __stcs((uint2 *)p + 32 + threadIdx.x % 32, make_uint2(bf16_pair(v[4], v[5]), bf16_pair(v[6], v[7])));
}

template <typename T> DEVICE void store16_some(T *p, int count, int vector, const float *v)
{
    enum { WHOLE = 16 / sizeof(T) };
    if (vector && count == WHOLE) {
        store16(p, v);
        return;
    }
#pragma unroll
    for (int i = 0; i < WHOLE; i++)
        if (i < count)
            set_value(p + i, v[i]);
}

/* How many of the `WHOLE` elements from `at` on there are. */
template <int WHOLE> DEVICE int count_of(int64_t n, int64_t at)
{
    return n - at >= WHOLE ? WHOLE : n > at ? (int)(n - at) : 0;
}

template <typename T> DEVICE void store8_some(T *p, int count, int vector, const float v[8])
{
    enum { WHOLE = 16 / sizeof(T) };
#pragma unroll
    for (int i = 0; i < 8; i += WHOLE)
        store16_some(p + i, min(max(count - i, 0), (int)WHOLE), vector, v + i);
}

DEVICE int count8(int64_t n, int64_t at) { return count_of<8>(n, at); }

/* ---------------------------------------------------------------- the largest magnitude */

/* The larger one; NaN if either is. */
DEVICE float max_or_nan(float a, float b)
{
#if __CUDA_ARCH__ >= 800
    float m;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
    return m;
#else
    return a != a ? a : b != b ? b : fmaxf(a, b);
#endif
}

/* Bits of the largest magnitude; above INFINITE where one is NaN, equal to it where one is infinite. */
enum { INFINITE = 0x7f800000 };
DEVICE unsigned absmax8_bits(const float v[8])
{
    float m = fabsf(v[0]);
#pragma unroll
    for (int i = 1; i < 8; i++)
        m = max_or_nan(m, fabsf(v[i]));
    return __float_as_uint(m) & 0x7fffffffu;
}

/* The same, but NaN does not count (NUMERICS rule 2). */
DEVICE unsigned absmax8_bits_no_nan(const float v[8])
{
    float m = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++)
        m = fmaxf(m, fabsf(v[i]));
    return __float_as_uint(m);
}

/* Over a warp. */
DEVICE unsigned warp_max(unsigned m)
{
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(0xffffffffu, m);
#else
#pragma unroll
    for (int o = 1; o < 32; o *= 2)
        m = max(m, __shfl_xor_sync(0xffffffffu, m, o));
    return m;
#endif
}

/* Over each aligned group of `lanes` threads of a warp, 4 to 32. */
DEVICE unsigned lanes_max(unsigned m, int lanes)
{
    if (lanes == 32)
        return warp_max(m);
    m = max(m, __shfl_xor_sync(0xffffffffu, m, 1));
    m = max(m, __shfl_xor_sync(0xffffffffu, m, 2));
    if (lanes > 4)
        m = max(m, __shfl_xor_sync(0xffffffffu, m, 4));
    if (lanes > 8)
        m = max(m, __shfl_xor_sync(0xffffffffu, m, 8));
    return m;
}

/* A barrier of each aligned group of `lanes` threads, 32 or more; a block of threads has at most 8 groups, or is one. */
DEVICE void group_barrier(int lanes)
{
    asm volatile("bar.sync %0, %1;" ::"r"(1 + (int)threadIdx.x / lanes), "r"(lanes) : "memory");
}

/* Over each aligned group of `lanes` threads, 64 to 512, a power of two, given the largest of each warp.  They meet in
 * partial [threads / 32], which the caller does not use again before another barrier. */
DEVICE unsigned warps_max(unsigned m, int lanes, unsigned *partial)
{
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, others = lanes / 32 - 1;
    if (lane == 0)
        partial[warp] = m;
    group_barrier(lanes);
    m = partial[(warp & ~others) + (lane & others)];
    for (int o = 1; o <= others; o *= 2)
        m = max(m, __shfl_xor_sync(0xffffffffu, m, o));
    return m;
}

/* The largest magnitude of a block of values, eight to a thread in each of PARTS, `lanes` threads (4 to 512), NaN not
 * counted.  *special: this warp has NaN or an infinity. */
template <int PARTS> DEVICE float block_absmax(const float v[][8], int lanes, unsigned *partial, bool *special)
{
    const int within = lanes < 32 ? lanes : 32;
    unsigned m = 0;
#pragma unroll
    for (int p = 0; p < PARTS; p++)
        m = max(m, absmax8_bits(v[p]));
    m = lanes_max(m, within);
    *special = __any_sync(0xffffffffu, m >= INFINITE);
    if (*special) {
        m = 0;
#pragma unroll
        for (int p = 0; p < PARTS; p++)
            m = max(m, absmax8_bits_no_nan(v[p]));
        m = lanes_max(m, within);
    }
    if (lanes > 32)
        m = warps_max(m, lanes, partial);
    return __uint_as_float(m);
}

#endif
