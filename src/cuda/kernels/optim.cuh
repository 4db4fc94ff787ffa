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

#include "cuda/kernels/optim_block.cuh"

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

/* New parameters and states.  CAREFUL: elements whose new 8-bit state is not finite are put back (NUMERICS rule 23). */
template <typename RULES, int RULE, typename T, int BITS, bool PLAIN, bool CAREFUL>
DEVICE void block_update(const struct block_in_flight<T, BITS> &b, int count, const typename RULES::scalars *k,
                         const float *const map[2], float p[8], float s[][8])
{
    float g[8];
    raw8_values(b.p, p);
    raw8_values(b.g, g);
#pragma unroll
    for (int j = 0; j < rule_states(RULE); j++)
        decode_state<MAP_COPIES>(b.state[j], map[j == 1], count, s[j]);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        typename RULES::state x;
        x.p = p[i];
#pragma unroll
        for (int j = 0; j < rule_states(RULE); j++)
            x.s[j] = s[j][i];
        RULES::step(RULE, CAREFUL ? BITS : 32, PLAIN, g[i], &x, k);
        p[i] = x.p;
#pragma unroll
        for (int j = 0; j < rule_states(RULE); j++)
            s[j][i] = x.s[j];
    }
}

/* The largest magnitude of each new state in this warp's block, as bits; returns the largest of all. */
template <int STATES> DEVICE unsigned measure_states(const float s[][8], unsigned absmax[STATES])
{
    unsigned largest = 0;
#pragma unroll
    for (int j = 0; j < STATES; j++) {
        absmax[j] = warp_max(absmax8_bits(s[j]));
        largest = max(largest, absmax[j]);
    }
    return largest;
}

template <int RULE, int LAY, typename MAPS>
DEVICE void store_states8(const struct bnb_cuda_tensor *t, int64_t block, const float s[][8], const unsigned absmax[],
                          int count, const MAPS *maps)
{
    requantise<RULE, 0, LAY>(t, block, __uint_as_float(absmax[0]), s[0], count, &maps->first);
    if constexpr (RULE == BNB_RULE_ADAM || RULE == BNB_RULE_ADEMAMIX)
        requantise<RULE, 1, LAY>(t, block, __uint_as_float(absmax[1]), s[1], count, &maps->second);
    if constexpr (RULE == BNB_RULE_ADEMAMIX)
        requantise<RULE, 2, LAY>(t, block, __uint_as_float(absmax[2]), s[2], count, &maps->first);
}

template <int RULE, int LAY>
DEVICE void store_states32(const struct bnb_cuda_tensor *t, int64_t block, const float s[][8], int count)
{
#pragma unroll
    for (int j = 0; j < rule_states(RULE); j++)
        store_values<LAY>((float *)t->state[j] + block * OPTIM_BLOCK, count, s[j]);
}

/* The values of both maps, this thread's copies. */
template <int RULE, typename MAPS> DEVICE void map_values(const MAPS *maps, const float *map[2])
{
    map[0] = map[1] = &maps->first.value[0][threadIdx.x % MAP_COPIES];
    if constexpr (RULE == BNB_RULE_ADAM || RULE == BNB_RULE_ADEMAMIX)
        map[1] = &maps->second.value[0][threadIdx.x % MAP_COPIES];
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
    const ieee_rules::scalars k = ieee_rules::load(scalars);
    map_values<RULE>(maps, map);
    block_load<RULE, ANY>(&b, t, block, count);
    block_update<ieee_rules, RULE, T, BITS, false, true>(b, count, &k, map, p, s);
    store_parameters<T, ANY>(t, block, p, count, stochastic);
    if constexpr (BITS == 8) {
        unsigned absmax[BNB_MAX_STATES];
        measure_states<rule_states(RULE)>(s, absmax);
        store_states8<RULE, ANY>(t, block, s, absmax, count, maps);
    } else {
        store_states32<RULE, ANY>(t, block, s, count);
    }
}

/* The whole blocks of a tensor from `block` to `last`, `step` apart, by one warp.  Returns where it stopped: at a block with
 * a state that is not finite, which it has left as it was, or behind the last. */
template <int RULE, typename T, int BITS, bool PLAIN, typename MAPS>
DEVICE int update_whole(const struct bnb_cuda_tensor *t, int block, int last, int step,
                        const struct bnb_optim_scalars *scalars, const MAPS *maps, struct waiting_room<RULE> *room)
{
    enum { LAY = BITS == 32 || sizeof(T) == sizeof(float) ? SPREAD : RUN };
    const typename rules<T>::scalars k = rules<T>::load(scalars);
    const float *map[2];
    map_values<RULE>(maps, map);
    constexpr bool WAITS = BITS == 8 && sizeof(T) == 2;
    if (WAITS && block < last)
        room_fill<RULE, T>(room, t, block);
    for (; block < last; block += step) {
        struct block_in_flight<T, BITS> b;
        float p[8], s[BNB_MAX_STATES][8];
        if constexpr (WAITS) {
            room_empty<RULE>(&b, room);
            if (block + step < last)
                room_fill<RULE, T>(room, t, block + step);
        } else {
            block_load<RULE, LAY>(&b, t, block, 8);
        }
        block_update<rules<T>, RULE, T, BITS, PLAIN, false>(b, 8, &k, map, p, s);
        if constexpr (BITS == 8) {
            unsigned absmax[BNB_MAX_STATES];
            if (measure_states<rule_states(RULE)>(s, absmax) >= INFINITE)
                break;
            store_parameters<T, LAY>(t, block, p, 8, 0);
            store_states8<RULE, LAY>(t, block, s, absmax, 8, maps);
        } else {
            store_parameters<T, LAY>(t, block, p, 8, 0);
            store_states32<RULE, LAY>(t, block, s, 8);
        }
    }
    return block;
}

/* Below this, approximate roots of small numbers would show. */
#define LEAST_EPS 1e-14f

/* Does the fast way serve, but for the last block? */
template <int RULE, typename T, typename MAPS>
DEVICE bool is_simple(const struct bnb_cuda_tensor *t, const struct bnb_optim_scalars *scalars, const MAPS *maps,
                      int stochastic)
{
    bool simple = t->vector && !scalars->skip_zeros && (!stochastic || sizeof(T) == sizeof(float));
    if (sizeof(T) == 2 && RULE != BNB_RULE_MOMENTUM && RULE != BNB_RULE_LION)
        simple = simple && scalars->eps >= LEAST_EPS;
    if (t->bits == 8)
        simple = simple && maps->first.kind == rule_kind(RULE, 0);
    if constexpr (RULE == BNB_RULE_ADAM || RULE == BNB_RULE_ADEMAMIX)
        if (t->bits == 8)
            simple = simple && maps->second.kind == rule_kind(RULE, 1);
    return simple;
}

template <int RULE, typename T, int BITS, typename MAPS>
DEVICE void update_blocks(const struct bnb_cuda_tensor *t, int block, int last, int step,
                          const struct bnb_optim_scalars *scalars, const MAPS *maps, int stochastic,
                          struct waiting_room<RULE> *room)
{
    const int all = (int)(t->n / OPTIM_BLOCK), whole = last < all ? last : all;
    const bool simple = is_simple<RULE, T>(t, scalars, maps, stochastic), plain = !(scalars->coupled > 0.0f);
    while (block < last) {
        if (simple && plain)
            block = update_whole<RULE, T, BITS, true>(t, block, whole, step, scalars, maps, room);
        else if (simple)
            block = update_whole<RULE, T, BITS, false>(t, block, whole, step, scalars, maps, room);
        if (block < last)
            update_any<RULE, T, BITS>(t, block, scalars, maps, stochastic);
        block += step;
    }
}

template <int RULE, typename T, typename MAPS>
DEVICE void update_some(const struct bnb_cuda_tensor *t, int block, int last, int step,
                        const struct bnb_optim_scalars *scalars, const MAPS *maps, int stochastic,
                        struct waiting_room<RULE> *room)
{
    if (t->bits == 8)
        update_blocks<RULE, T, 8>(t, block, last, step, scalars, maps, stochastic, room);
    else
        update_blocks<RULE, T, 32>(t, block, last, step, scalars, maps, stochastic, room);
}

/*
 * What the threads of a block know of the run of chunks that they work on: eight tensors together and the scalars, which
 * most tensors share, so that small tensors do not each cost the way to memory and back.  In shared memory, where it takes
 * no registers from the update.
 */
struct run_in_flight {
    enum { MOST = 8, WORDS = sizeof(struct bnb_cuda_tensor) / 4 };
    struct bnb_cuda_tensor tensor[MOST];
    struct bnb_optim_scalars scalars;
    int64_t begin, end; /* the chunks of the run */
    int index, count;   /* tensors index, ..., index + count - 1 have these scalars, and begin before the end */
};

DEVICE void run_begin(struct run_in_flight *f, const struct bnb_cuda_optim &o)
{
    if (threadIdx.x == 0) {
        f->begin = o.chunks * blockIdx.x / gridDim.x;
        f->end = o.chunks * (blockIdx.x + 1) / gridDim.x;
        f->index = entry_of(o.tensors, o.count, f->begin);
        f->count = 0;
    }
}

/* Fetch the next tensors of the run; false: there are none. */
DEVICE bool run_next(struct run_in_flight *f, const struct bnb_cuda_optim &o)
{
    enum { MOST = run_in_flight::MOST, WORDS = run_in_flight::WORDS };
    __syncthreads();
    if (threadIdx.x == 0)
        f->index += f->count;
    __syncthreads();
    const int index = f->index, left = o.count - index, most = left < MOST ? left : MOST;
    for (int i = (int)threadIdx.x; i < most * WORDS; i += (int)blockDim.x)
        ((unsigned *)f->tensor)[i] = ((const unsigned *)(o.tensors + index))[i];
    __syncthreads();
    if (threadIdx.x == 0) {
        const int plan = f->tensor[0].plan;
        int count = 0;
        while (count < most && f->tensor[count].plan == plan && f->tensor[count].first < f->end)
            count++;
        f->count = count;
        if (count > 0)
            f->scalars = o.plans[plan].scalars;
    }
    __syncthreads();
    return f->count > 0;
}

/* The chunks of tensor i that lie in the run, a block of elements to each warp in turn.  Blocks are counted by 32 bits, up to
 * 2^39 elements: registers are scarce here.  The warp has a copy of what there
 * is to know of the tensor, at an address that costs no register of its own. */
template <int RULE, typename MAPS>
DEVICE void update_chunks(const struct run_in_flight *f, int i, const MAPS *maps, int stochastic,
                          struct waiting_room<RULE> *room)
{
    enum { WARPS = BNB_CUDA_CHUNK / OPTIM_BLOCK };
    const struct bnb_cuda_tensor *t = &room->tensor;
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    __syncwarp();
    if (lane < run_in_flight::WORDS)
        ((unsigned *)&room->tensor)[lane] = ((const unsigned *)&f->tensor[i])[lane];
    __syncwarp();
    const int from = f->begin > t->first ? (int)(f->begin - t->first) * WARPS : 0;
    const int until = (int)(f->end - t->first) * WARPS, blocks = (int)((t->n + OPTIM_BLOCK - 1) / OPTIM_BLOCK);
    const int last = until < blocks ? until : blocks;
    const int block = from + ((warp - f->index - i) & (WARPS - 1)); /* small tensors begin with different warps */
    if (t->dtype == BNB_CUDA_BF16)
        update_some<RULE, bf16>(t, block, last, WARPS, &f->scalars, maps, stochastic, room);
    else if (t->dtype == BNB_CUDA_F16)
        update_some<RULE, f16>(t, block, last, WARPS, &f->scalars, maps, stochastic, room);
    else
        update_some<RULE, float>(t, block, last, WARPS, &f->scalars, maps, stochastic, room);
}

template <int RULE> DEVICE void optim_step(const struct bnb_cuda_optim &o)
{
    __shared__ struct maps_of_rule<RULE> maps;
    __shared__ struct run_in_flight flight;
    __shared__ struct waiting_room<RULE> rooms[BNB_CUDA_CHUNK / OPTIM_BLOCK];
    run_begin(&flight, o);
    if (o.map1)
        map8_load(&maps.first, o.map1, rule_kind(RULE, 0));
    if constexpr (RULE == BNB_RULE_ADAM || RULE == BNB_RULE_ADEMAMIX)
        if (o.map2)
            map8_load(&maps.second, o.map2, rule_kind(RULE, 1));
    while (run_next(&flight, o))
#pragma unroll 1
        for (int i = 0; i < flight.count; i++)
            update_chunks<RULE>(&flight, i, &maps, o.stochastic, &rooms[threadIdx.x / 32]);
}

#endif
