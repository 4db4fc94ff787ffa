/*
 * optim.cuh - optimizer steps on CUDA: decode, update and requantise in registers, so every byte is read and written once
 *
 * One launch covers all tensors of a step.  Their chunks of 2048 elements form one range, of which each block of threads
 * takes a run: it finds its first tensor by bisection, the next ones by walking.  A warp takes a block of 256 elements,
 * a lane eight consecutive ones.  The rules are core/rules.h, in words of one float.
 * Source: Dettmers et al. 2021, section 2; numbers: NUMERICS rules 20 and on.
 */
#ifndef BNB_CUDA_OPTIM_CUH
#define BNB_CUDA_OPTIM_CUH

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
DEVICE vf vf_sqrt(vf a)
{
    float root;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(a));
    return root;
}
#include "core/rules.h"
} // namespace approximate

using ieee::rule_is_signed;
using ieee::rule_states;

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

template <> struct rules<float> {
    typedef ieee::rule_scalars scalars;
    typedef ieee::rule_state state;
    static __device__ __forceinline__ scalars load(const struct bnb_optim_scalars *s) { return ieee::rule_load(s); }
    static __device__ __forceinline__ void step(int rule, int bits, bool plain, float g, state *x, const scalars *k)
    {
        ieee::rule_step(rule, bits, plain, g, x, k);
    }
};

/* The last tensor whose first chunk is not above `chunk`: tensors without chunks are passed over. */
template <typename E> DEVICE int entry_of(const E *entries, int count, int64_t chunk)
{
    int low = 0;
    for (int high = count; high - low > 1;) {
        const int middle = (low + high) / 2;
        if (entries[middle].first <= chunk)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* State k of a tensor: where it lies, and its scales. */
template <int BITS> DEVICE char *state_of(const struct bnb_cuda_tensor *t, int k)
{
    return k == 1 ? (char *)t->state2 : (char *)t->state1 + (k == 2 ? t->n * (BITS / 8) : 0);
}

DEVICE float *absmax_of(const struct bnb_cuda_tensor *t, int k)
{
    return k == 1 ? t->absmax2 : t->absmax1 + (k == 2 ? (t->n + OPTIM_BLOCK - 1) / OPTIM_BLOCK : 0);
}

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

/* FULL, here and below: all eight elements are there, and aligned for the widest access. */
template <bool FULL> DEVICE uint2 load_codes(const uint8_t *p, int count)
{
    if constexpr (FULL) {
        return __ldcs((const uint2 *)p);
    } else {
        unsigned word[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < 8; i++)
            word[i / 4] |= i < count ? (unsigned)p[i] << 8 * (i % 4) : 0u;
        return make_uint2(word[0], word[1]);
    }
}

template <bool FULL> DEVICE void store_codes(uint8_t *p, int count, const unsigned word[2])
{
    if constexpr (FULL) {
        __stcs((uint2 *)p, make_uint2(word[0], word[1]));
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < count)
                p[i] = (uint8_t)(word[i / 4] >> 8 * (i % 4));
    }
}

/* The code of a new state: where it may be negative it keeps its sign (NUMERICS rule 24). */
template <int KIND, bool SIGNED, int CELLS> DEVICE int encode_state(float value, float r, const struct map8<CELLS> *map)
{
    if (KIND == ENCODE_SORTED) {
        const int code = encode_sorted(value * r, map);
        if (!SIGNED)
            return code;
        const float entry = map->value[code];
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

/* Lane's eight new states as codes, and the scale of the block.  FULL: the map is the rule's default one, too. */
template <int RULE, int K, bool FULL, int CELLS>
DEVICE void requantise(const struct bnb_cuda_tensor *t, int64_t block, float absmax, const float s[8], int count,
                       const struct map8<CELLS> *map)
{
    enum { KIND = K != 1 && RULE != BNB_RULE_RMSPROP ? ENCODE_SIGNED : ENCODE_UNSIGNED };
    const int lane = (int)threadIdx.x % 32;
    const float r = 1.0f / absmax;
    unsigned word[2] = {0, 0};
    if (!(r <= FLOAT_MAX))
        word[0] = word[1] = (unsigned)map->zero * 0x01010101u;
    else if (FULL || map->kind == KIND)
        encode_states<KIND, KIND == ENCODE_SIGNED>(s, r, map, word);
    else
        encode_states<ENCODE_SORTED, KIND == ENCODE_SIGNED>(s, r, map, word);
    store_codes<FULL>((uint8_t *)state_of<8>(t, K) + block * OPTIM_BLOCK + lane * 8, count, word);
    if (lane == 0)
        absmax_of(t, K)[block] = absmax;
}

DEVICE void set_random(float *p, float x, uint32_t) { *p = x; }
DEVICE void set_random(f16 *p, float x, uint32_t random) { *p = bnb_to_f16_random(x, random); }
DEVICE void set_random(bf16 *p, float x, uint32_t random) { *p = bnb_to_bf16_random(x, random); }

template <typename T, bool FULL>
DEVICE void store_parameters(const struct bnb_cuda_tensor *t, int64_t block, const float p[8], int count,
                             int stochastic)
{
    const int lane = (int)threadIdx.x % 32;
    T *out = (T *)t->p + block * OPTIM_BLOCK + lane * 8;
    if (FULL || !stochastic || sizeof(T) == sizeof(float)) {
        store8_some(out, FULL ? 8 : count, FULL, p);
        return;
    }
    const uint32_t key = (uint32_t)(bnb_mix64(t->key + (uint64_t)block) >> 32);
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < count)
            set_random(out + i, p[i], bnb_random32(key, (uint32_t)(lane * 8 + i)));
}

/* The old states of a lane as they are stored. */
template <int BITS> struct raw_state { struct raw8<float> value; };
template <> struct raw_state<8> {
    uint2 codes;
    float absmax;
};

template <bool FULL>
DEVICE void load_state(struct raw_state<32> *s, const struct bnb_cuda_tensor *t, int k, int64_t at, int count)
{
    s->value = raw8_load((const float *)state_of<32>(t, k) + at, FULL ? 8 : count, FULL);
}

template <bool FULL>
DEVICE void load_state(struct raw_state<8> *s, const struct bnb_cuda_tensor *t, int k, int64_t at, int count)
{
    s->codes = load_codes<FULL>((const uint8_t *)state_of<8>(t, k) + at, count);
    s->absmax = absmax_of(t, k)[at / OPTIM_BLOCK];
}

DEVICE void decode_state(const struct raw_state<32> &s, const float *, int, float value[8])
{
    raw8_values(s.value, value);
}

DEVICE void decode_state(const struct raw_state<8> &s, const float *map, int count, float value[8])
{
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float entry = map[(i < 4 ? s.codes.x : s.codes.y) >> 8 * (i % 4) & 255u];
        value[i] = i < count ? entry * s.absmax : 0.0f; /* a map need not have a code of zero */
    }
}

/* What a lane of a warp works on. */
template <typename T, int BITS> struct block_in_flight {
    struct raw8<T> p, g;
    struct raw_state<BITS> state[BNB_MAX_STATES];
};

template <int RULE, bool FULL, typename T, int BITS>
DEVICE void block_load(struct block_in_flight<T, BITS> *b, const struct bnb_cuda_tensor *t, int64_t block, int count)
{
    const int64_t at = block * OPTIM_BLOCK + (int)threadIdx.x % 32 * 8;
    b->p = raw8_load((const T *)t->p + at, FULL ? 8 : count, FULL);
    b->g = raw8_load((const T *)t->g + at, FULL ? 8 : count, FULL);
#pragma unroll
    for (int k = 0; k < rule_states(RULE); k++)
        load_state<FULL>(&b->state[k], t, k, at, count);
}

/* New parameters and states.  CAREFUL: elements whose new 8-bit state is not finite are put back (NUMERICS rule 23). */
template <int RULE, typename T, int BITS, bool PLAIN, bool CAREFUL>
DEVICE void block_update(const struct block_in_flight<T, BITS> &b, int count, const typename rules<T>::scalars *k,
                         const float *const map[2], float p[8], float s[][8])
{
    float g[8];
    raw8_values(b.p, p);
    raw8_values(b.g, g);
#pragma unroll
    for (int j = 0; j < rule_states(RULE); j++)
        decode_state(b.state[j], map[j == 1], count, s[j]);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        typename rules<T>::state x;
        x.p = p[i];
#pragma unroll
        for (int j = 0; j < rule_states(RULE); j++)
            x.s[j] = s[j][i];
        rules<T>::step(RULE, CAREFUL ? BITS : 32, PLAIN, g[i], &x, k);
        p[i] = x.p;
#pragma unroll
        for (int j = 0; j < rule_states(RULE); j++)
            s[j][i] = x.s[j];
    }
}

/* Is a new state of this warp's block NaN or infinite? */
template <int STATES> DEVICE bool has_infinite(const float s[][8])
{
    float m = 0.0f;
#pragma unroll
    for (int j = 0; j < STATES; j++)
#pragma unroll
        for (int i = 0; i < 8; i++)
            m = max_or_nan(m, fabsf(s[j][i]));
    return __any_sync(0xffffffffu, !(m <= FLOAT_MAX));
}

template <int RULE, int BITS, bool FULL, typename MAPS>
DEVICE void store_states(const struct bnb_cuda_tensor *t, int64_t block, const float s[][8], int count,
                         const MAPS *maps)
{
    const int states = rule_states(RULE);
    const int64_t at = block * OPTIM_BLOCK + (int)threadIdx.x % 32 * 8;
    if (BITS == 32) {
#pragma unroll
        for (int j = 0; j < states; j++)
            store8_some((float *)state_of<32>(t, j) + at, FULL ? 8 : count, FULL, s[j]);
        return;
    }
    requantise<RULE, 0, FULL>(t, block, group_max(finite_max8(s[0]), 32, nullptr), s[0], count, &maps->first);
    if constexpr (RULE == BNB_RULE_ADAM || RULE == BNB_RULE_ADEMAMIX)
        requantise<RULE, 1, FULL>(t, block, group_max(finite_max8(s[1]), 32, nullptr), s[1], count, &maps->second);
    if constexpr (RULE == BNB_RULE_ADEMAMIX)
        requantise<RULE, 2, FULL>(t, block, group_max(finite_max8(s[2]), 32, nullptr), s[2], count, &maps->first);
}

/* The values of both maps. */
template <int RULE, typename MAPS> DEVICE void map_values(const MAPS *maps, const float *map[2])
{
    map[0] = map[1] = maps->first.value;
    if constexpr (RULE == BNB_RULE_ADAM || RULE == BNB_RULE_ADEMAMIX)
        map[1] = maps->second.value;
}

/* Any block: the end of a tensor, memory that is not aligned, stochastic rounding, states that are not finite. */
template <int RULE, typename T, int BITS, typename MAPS>
static __device__ __noinline__ void update_any(const struct bnb_cuda_tensor *t, int64_t block,
                                               const struct bnb_optim_scalars *scalars, const MAPS *maps,
                                               int stochastic)
{
    struct block_in_flight<T, BITS> b;
    float p[8], s[BNB_MAX_STATES][8];
    const float *map[2];
    const int count = count8(t->n, block * OPTIM_BLOCK + (int)threadIdx.x % 32 * 8);
    const typename rules<T>::scalars k = rules<T>::load(scalars);
    map_values<RULE>(maps, map);
    block_load<RULE, false>(&b, t, block, count);
    block_update<RULE, T, BITS, false, true>(b, count, &k, map, p, s);
    store_parameters<T, false>(t, block, p, count, stochastic);
    store_states<RULE, BITS, false>(t, block, s, count, maps);
}

/* The whole blocks of a tensor from `block` to `last`, `step` apart, by one warp.  Returns where it stopped: at a block with
 * a state that is not finite, which it has left as it was, or behind the last. */
template <int RULE, typename T, int BITS, bool PLAIN, typename MAPS>
DEVICE int64_t update_whole(const struct bnb_cuda_tensor *t, int64_t block, int64_t last, int step,
                            const struct bnb_optim_scalars *scalars, const MAPS *maps)
{
    const typename rules<T>::scalars k = rules<T>::load(scalars);
    const float *map[2];
    map_values<RULE>(maps, map);
    for (; block < last; block += step) {
        struct block_in_flight<T, BITS> b;
        float p[8], s[BNB_MAX_STATES][8];
        block_load<RULE, true>(&b, t, block, 8);
        block_update<RULE, T, BITS, PLAIN, false>(b, 8, &k, map, p, s);
        if (BITS == 8 && has_infinite<rule_states(RULE)>(s))
            break;
        store_parameters<T, true>(t, block, p, 8, 0);
        store_states<RULE, BITS, true>(t, block, s, 8, maps);
    }
    return block;
}

/* Does the fast way serve, but for the last block? */
template <int RULE, typename T, typename MAPS>
DEVICE bool is_simple(const struct bnb_cuda_tensor *t, const struct bnb_optim_scalars *scalars, const MAPS *maps,
                      int stochastic)
{
    bool simple = t->vector && !scalars->skip_zeros && (!stochastic || sizeof(T) == sizeof(float));
    if (t->bits == 8)
        simple = simple && maps->first.kind == rule_kind(RULE, 0);
    if constexpr (RULE == BNB_RULE_ADAM || RULE == BNB_RULE_ADEMAMIX)
        if (t->bits == 8)
            simple = simple && maps->second.kind == rule_kind(RULE, 1);
    return simple;
}

template <int RULE, typename T, int BITS, typename MAPS>
DEVICE void update_blocks(const struct bnb_cuda_tensor *t, int64_t block, int64_t last, int step,
                          const struct bnb_optim_scalars *scalars, const MAPS *maps, int stochastic)
{
    const int64_t all = t->n / OPTIM_BLOCK, whole = last < all ? last : all;
    const bool simple = is_simple<RULE, T>(t, scalars, maps, stochastic), plain = !(scalars->coupled > 0.0f);
    while (block < last) {
        if (simple && plain)
            block = update_whole<RULE, T, BITS, true>(t, block, whole, step, scalars, maps);
        else if (simple)
            block = update_whole<RULE, T, BITS, false>(t, block, whole, step, scalars, maps);
        if (block < last)
            update_any<RULE, T, BITS>(t, block, scalars, maps, stochastic);
        block += step;
    }
}

template <int RULE, typename T, typename MAPS>
DEVICE void update_some(const struct bnb_cuda_tensor *t, int64_t block, int64_t last, int step,
                        const struct bnb_optim_scalars *scalars, const MAPS *maps, int stochastic)
{
    if (t->bits == 8)
        update_blocks<RULE, T, 8>(t, block, last, step, scalars, maps, stochastic);
    else
        update_blocks<RULE, T, 32>(t, block, last, step, scalars, maps, stochastic);
}

template <int RULE> DEVICE void optim_step(const struct bnb_cuda_optim &o)
{
    __shared__ struct maps_of_rule<RULE> maps;
    __shared__ struct bnb_cuda_tensor tensor;
    __shared__ struct bnb_optim_scalars scalars;
    if (o.map1)
        map8_load(&maps.first, o.map1, rule_kind(RULE, 0));
    if constexpr (RULE == BNB_RULE_ADAM || RULE == BNB_RULE_ADEMAMIX)
        if (o.map2)
            map8_load(&maps.second, o.map2, rule_kind(RULE, 1));
    enum { WARPS = BNB_CUDA_CHUNK / OPTIM_BLOCK };
    const int64_t begin = o.chunks * blockIdx.x / gridDim.x, end = o.chunks * (blockIdx.x + 1) / gridDim.x;
    int index = entry_of(o.tensors, o.count, begin);
    for (int64_t chunk = begin; chunk < end;) {
        while (index + 1 < o.count && o.tensors[index + 1].first <= chunk)
            index++;
        __syncthreads();
        if (threadIdx.x == 0) {
            tensor = o.tensors[index];
            scalars = o.plans[tensor.plan].scalars;
        }
        __syncthreads();
        const int64_t stop = index + 1 < o.count && o.tensors[index + 1].first < end ? o.tensors[index + 1].first : end;
        const int64_t blocks = (tensor.n + OPTIM_BLOCK - 1) / OPTIM_BLOCK, until = (stop - tensor.first) * WARPS;
        const int64_t block = (chunk - tensor.first) * WARPS + (int)threadIdx.x / 32,
                      last = until < blocks ? until : blocks;
        if (tensor.dtype == BNB_CUDA_BF16)
            update_some<RULE, bf16>(&tensor, block, last, WARPS, &scalars, &maps, o.stochastic);
        else if (tensor.dtype == BNB_CUDA_F16)
            update_some<RULE, f16>(&tensor, block, last, WARPS, &scalars, &maps, o.stochastic);
        else
            update_some<RULE, float>(&tensor, block, last, WARPS, &scalars, &maps, o.stochastic);
        chunk = stop;
    }
}

#endif
