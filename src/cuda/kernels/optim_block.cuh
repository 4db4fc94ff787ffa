/*
 * optim_block.cuh - a block of 256 elements of an optimizer step: the rules, how a lane's eight elements lie, loads and stores
 *
 * The rules are core/rules.h, in words of one float.
 */
#ifndef BNB_CUDA_OPTIM_BLOCK_CUH
#define BNB_CUDA_OPTIM_BLOCK_CUH

#include "core/random.h"
#include "cuda/kernels/encode8.cuh"

#define ALWAYS_INLINE __device__ __forceinline__
#define FLT_MAX FLOAT_MAX

typedef float vf;
typedef bool vm;
DEVICE vf vf_set(float x) { return x; }
DEVICE vf vf_add(vf a, vf b) { return a + b; }
DEVICE vf vf_sub(vf a, vf b) { return a - b; }
DEVICE vf vf_mul(vf a, vf b) { return a * b; }
DEVICE vf vf_abs(vf a) { return fabsf(a); }
DEVICE vm vf_lt(vf a, vf b) { return a < b; }
DEVICE vm vf_le(vf a, vf b) { return a <= b; }
DEVICE vm vf_eq(vf a, vf b) { return a == b; }
DEVICE vm vm_and(vm a, vm b) { return a && b; }
DEVICE vf vf_select(vm m, vf yes, vf no) { return m ? yes : no; }
DEVICE vf vf_where(vm m, vf x) { return m ? x : 0.0f; }

/* The rules twice: with IEEE roots and quotients, and with approximate ones for 16-bit parameters (NUMERICS rule 22). */
namespace ieee {
DEVICE vf vf_div(vf a, vf b) { return a / b; }
DEVICE vf vf_sqrt(vf a) { return sqrtf(a); }
#include "core/rules.h"
} // namespace ieee
#undef BNB_CORE_RULES_H
#undef OPTIM_BLOCK

namespace approximate {
DEVICE vf vf_div(vf a, vf b) /* b is no subnormal */
{
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
    return a * inverse;
}
DEVICE vf vf_sqrt(vf a) /* 0 for a subnormal: eps must be larger than its root */
{
    float root;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(a));
    return root;
}
#include "core/rules.h"
} // namespace approximate

using ieee::rule_is_signed;
using ieee::rule_states;

struct ieee_rules {
    typedef ieee::rule_scalars scalars;
    typedef ieee::rule_state state;
    static __device__ __forceinline__ scalars load(const struct bnb_optim_scalars *s) { return ieee::rule_load(s); }
    static __device__ __forceinline__ void step(int rule, int bits, bool plain, float g, state *x, const scalars *k)
    {
        ieee::rule_step(rule, bits, plain, g, x, k);
    }
};

template <typename T> struct rules {
    typedef approximate::rule_scalars scalars;
    typedef approximate::rule_state state;
    static __device__ __forceinline__ scalars load(const struct bnb_optim_scalars *s)
    {
        return approximate::rule_load(s);
    }
    static __device__ __forceinline__ void step(int rule, int bits, bool plain, float g, state *x, const scalars *k)
    {
        approximate::rule_step(rule, bits, plain, g, x, k);
    }
};

template <> struct rules<float> : ieee_rules {};

DEVICE constexpr int rule_kind(int rule, int k)
{
    return k != 1 && rule != BNB_RULE_RMSPROP ? ENCODE_SIGNED : ENCODE_UNSIGNED;
}

/* The maps of a rule: of state 0, and 2 of ademamix, and of state 1. */
template <int RULE, bool TWO = (RULE == BNB_RULE_ADAM || RULE == BNB_RULE_ADEMAMIX)> struct maps_of_rule {
    struct map8<BNB_CELLS_SIGNED> first;
    struct map8<BNB_CELLS_UNSIGNED> second;
};
template <int RULE> struct maps_of_rule<RULE, false> { struct map8<BNB_CELLS_SIGNED> first; };
template <> struct maps_of_rule<BNB_RULE_RMSPROP, false> { struct map8<BNB_CELLS_UNSIGNED> first; };

/*
 * How a lane's eight elements lie in a block of 256 that begins at p.  ANY: one behind the other, `count` of them, however
 * aligned.  RUN: all, one behind the other, aligned.  SPREAD: as spread_load() says, where f32 is among the arrays.
 */
enum { ANY, RUN, SPREAD };

template <int LAY> DEVICE uint2 load_codes(const uint8_t *p, int count)
{
    const int lane = (int)threadIdx.x % 32;
    if constexpr (LAY == RUN) {
        return __ldcs((const uint2 *)p + lane);
    } else if constexpr (LAY == SPREAD) {
        return make_uint2(__ldcs((const unsigned *)p + lane), __ldcs((const unsigned *)p + 32 + lane));
    } else {
        p += 8 * lane;
        unsigned word[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < 8; i++)
            word[i / 4] |= i < count ? (unsigned)p[i] << 8 * (i % 4) : 0u;
        return make_uint2(word[0], word[1]);
    }
}

template <int LAY> DEVICE void store_codes(uint8_t *p, int count, const unsigned word[2])
{
    const int lane = (int)threadIdx.x % 32;
    if constexpr (LAY == RUN) {
        __stcs((uint2 *)p + lane, make_uint2(word[0], word[1]));
    } else if constexpr (LAY == SPREAD) {
        __stcs((unsigned *)p + lane, word[0]);
        __stcs((unsigned *)p + 32 + lane, word[1]);
    } else {
        p += 8 * lane;
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < count)
                p[i] = (uint8_t)(word[i / 4] >> 8 * (i % 4));
    }
}

template <int LAY, typename T> DEVICE struct raw8<T> load_values(const T *p, int count)
{
    if constexpr (LAY == SPREAD)
        return spread_load(p);
    else
        return raw8_load(p + threadIdx.x % 32 * 8, LAY == RUN ? 8 : count, LAY == RUN);
}

/* Where it is fast, a NaN of 16 bits becomes the one that the card makes. */
template <int LAY, typename T> DEVICE void store_values(T *p, int count, const float v[8])
{
    if constexpr (LAY == SPREAD)
        spread_store(p, v);
    else if constexpr (LAY == RUN && sizeof(T) == 2)
        __stcs((uint4 *)p + threadIdx.x % 32, make_uint4(quick_pair(p, v[0], v[1]), quick_pair(p, v[2], v[3]),
                                                         quick_pair(p, v[4], v[5]), quick_pair(p, v[6], v[7])));
    else
        store8_some(p + threadIdx.x % 32 * 8, LAY == RUN ? 8 : count, LAY == RUN, v);
}

/* The code of a new state: where it may be negative it keeps its sign (NUMERICS rule 24). */
template <int KIND, bool SIGNED, int CELLS> DEVICE int encode_state(float value, float r, const struct map8<CELLS> *map)
{
    if (KIND == ENCODE_SORTED) {
        const int code = encode_sorted(value * r, map);
        if (!SIGNED)
            return code;
        const float entry = map->value[code][0];
        const int step = value < 0.0f && entry >= 0.0f ? -1 : value > 0.0f && entry < 0.0f ? 1 : 0;
        return min(max(code + step, 0), 255);
    }
    if (!SIGNED)
        return encode_magnitude<ENCODE_UNSIGNED>(value * r, map);
    const int code = encode_magnitude<ENCODE_SIGNED>(fabsf(value * r), map);
    return value < 0.0f ? max(127 - max(code, 1), 0) : 127 + code; /* there is no -1.0 */
}

template <int KIND, bool SIGNED, int CELLS>
DEVICE void encode_states(const float s[8], float r, const struct map8<CELLS> *map, unsigned word[2])
{
#pragma unroll
    for (int i = 7; i >= 0; i--)
        word[i / 4] = word[i / 4] * 256 + (unsigned)encode_state<KIND, SIGNED>(s[i], r, map);
}

/* Lane's eight new states as codes, and the scale of the block.  Not ANY: the map is the rule's default one, too. */
template <int RULE, int K, int LAY, int CELLS>
DEVICE void requantise(const struct bnb_cuda_tensor *t, int64_t block, float absmax, const float s[8], int count,
                       const struct map8<CELLS> *map)
{
    enum { KIND = K != 1 && RULE != BNB_RULE_RMSPROP ? ENCODE_SIGNED : ENCODE_UNSIGNED };
    const int lane = (int)threadIdx.x % 32;
    const float r = 1.0f / absmax;
    unsigned word[2] = {0, 0};
    if (!(r <= FLOAT_MAX))
        word[0] = word[1] = (unsigned)map->zero * 0x01010101u;
    else if (LAY != ANY || map->kind == KIND)
        encode_states<KIND, KIND == ENCODE_SIGNED>(s, r, map, word);
    else
        encode_states<ENCODE_SORTED, KIND == ENCODE_SIGNED>(s, r, map, word);
    store_codes<LAY>((uint8_t *)t->state[K] + block * OPTIM_BLOCK, count, word);
    if (lane == 0)
        t->absmax[K][block] = absmax;
}

DEVICE void set_random(float *p, float x, uint32_t) { *p = x; }
DEVICE void set_random(f16 *p, float x, uint32_t random) { *p = bnb_to_f16_random(x, random); }
DEVICE void set_random(bf16 *p, float x, uint32_t random) { *p = bnb_to_bf16_random(x, random); }

template <typename T, int LAY>
DEVICE void store_parameters(const struct bnb_cuda_tensor *t, int64_t block, const float p[8], int count,
                             int stochastic)
{
    T *out = (T *)t->p + block * OPTIM_BLOCK;
    if (LAY != ANY || !stochastic || sizeof(T) == sizeof(float)) {
        store_values<LAY>(out, count, p);
        return;
    }
    const int lane = (int)threadIdx.x % 32;
    const uint32_t key = (uint32_t)(bnb_mix64(t->key + (uint64_t)block) >> 32);
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < count)
            set_random(out + lane * 8 + i, p[i], bnb_random32(key, (uint32_t)(lane * 8 + i)));
}

/* The old states of a lane as they are stored. */
template <int BITS> struct raw_state { struct raw8<float> value; };
template <> struct raw_state<8> {
    uint2 codes;
    float absmax;
};

template <int LAY>
DEVICE void load_state(struct raw_state<32> *s, const struct bnb_cuda_tensor *t, int k, int64_t block, int count)
{
    s->value = load_values<LAY>((const float *)t->state[k] + block * OPTIM_BLOCK, count);
}

template <int LAY>
DEVICE void load_state(struct raw_state<8> *s, const struct bnb_cuda_tensor *t, int k, int64_t block, int count)
{
    s->codes = load_codes<LAY>((const uint8_t *)t->state[k] + block * OPTIM_BLOCK, count);
    s->absmax = t->absmax[k][block];
}

template <int COPIES> DEVICE void decode_state(const struct raw_state<32> &s, const float *, int, float value[8])
{
    raw8_values(s.value, value);
}

/* map: [256][COPIES], from this thread's copy on. */
template <int COPIES>
DEVICE void decode_state(const struct raw_state<8> &s, const float *map, int count, float value[8])
{
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float entry = map[((i < 4 ? s.codes.x : s.codes.y) >> 8 * (i % 4) & 255u) * COPIES];
        value[i] = i < count ? entry * s.absmax : 0.0f; /* a map need not have a code of zero */
    }
}

/* What a lane of a warp works on. */
template <typename T, int BITS> struct block_in_flight {
    struct raw8<T> p, g;
    struct raw_state<BITS> state[BNB_MAX_STATES];
};

template <int RULE, int LAY, typename T, int BITS>
DEVICE void block_load(struct block_in_flight<T, BITS> *b, const struct bnb_cuda_tensor *t, int64_t block, int count)
{
    b->p = load_values<LAY>((const T *)t->p + block * OPTIM_BLOCK, count);
    b->g = load_values<LAY>((const T *)t->g + block * OPTIM_BLOCK, count);
#pragma unroll
    for (int k = 0; k < rule_states(RULE); k++)
        load_state<LAY>(&b->state[k], t, k, block, count);
}

/*
 * A waiting room in shared memory, of each lane its own: while a block is worked on in registers, the next one is on its
 * way here by asynchronous copies.  For 16-bit parameters with 8-bit state: others wait for memory alone.  The copies exist
 * from compute capability 8.0 on; before, blocks are loaded when needed.  Rooms that do not begin with a line of shared memory
 * cost 5 % of the speed of a step.
 */
template <int RULE> struct __align__(128) waiting_room {
    uint4 p[32], g[32];
    uint2 codes[rule_states(RULE)][32];
    float absmax[rule_states(RULE)][32];
    struct bnb_cuda_tensor tensor; /* that the warp is at */
};

#if __CUDA_ARCH__ >= 800
template <int BYTES> DEVICE void copy_async(void *to, const void *from)
{
    unsigned address;
    asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(address) : "l"(to));
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(BYTES) : "memory");
}

DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#else
template <int BYTES> DEVICE void copy_async(void *to, const void *from)
{
    for (int i = 0; i < BYTES / 4; i++)
        ((unsigned *)to)[i] = ((const unsigned *)from)[i];
}

DEVICE void wait_for_copies() {}
#endif

template <int RULE, typename T>
DEVICE void room_fill(struct waiting_room<RULE> *room, const struct bnb_cuda_tensor *t, int64_t block)
{
    const int lane = (int)threadIdx.x % 32;
    const int64_t at = block * OPTIM_BLOCK + lane * 8;
    copy_async<16>(&room->p[lane], (const T *)t->p + at);
    copy_async<16>(&room->g[lane], (const T *)t->g + at);
#pragma unroll
    for (int k = 0; k < rule_states(RULE); k++) {
        copy_async<8>(&room->codes[k][lane], (const char *)t->state[k] + at);
        copy_async<4>(&room->absmax[k][lane], t->absmax[k] + block);
    }
}

template <int RULE, typename T>
DEVICE void room_empty(struct block_in_flight<T, 8> *b, const struct waiting_room<RULE> *room)
{
    const int lane = (int)threadIdx.x % 32;
    wait_for_copies();
    b->p.word[0] = room->p[lane];
    b->g.word[0] = room->g[lane];
#pragma unroll
    for (int k = 0; k < rule_states(RULE); k++) {
        b->state[k].codes = room->codes[k][lane];
        b->state[k].absmax = room->absmax[k][lane];
    }
}

#endif
