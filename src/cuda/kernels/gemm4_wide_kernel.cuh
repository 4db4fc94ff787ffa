/*
 * gemm4_wide_kernel.cuh - the kernel of gemm4_wide.cuh: threads that multiply, and after them a few that bring
 */
#ifndef BNB_CUDA_GEMM4_WIDE_KERNEL_CUH
#define BNB_CUDA_GEMM4_WIDE_KERNEL_CUH

#include "cuda/kernels/gemm4_wide_steps.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <class S>
DEVICE struct wide_thread wide_thread_of(const struct bnb_cuda_gemm4_fast &p, int warp, unsigned char *memory)
{
    struct wide_thread w = {};
    w.memory = memory;
    w.offset = p.g.scale.absmax2 ? __ldg(p.g.scale.offset) : 0.0f;
    w.way = warp / 8, w.group = warp / 4 % 2, w.warp = warp % 4, w.lane = (int)threadIdx.x % 32;
    const int g = w.lane / 4;
    w.first = w.group * 64 + (S::GRAD ? w.warp / 2 * 32 + g * 4 + w.warp % 2 * 2 : w.warp * 16 + g);
    w.second = w.first + (S::GRAD ? 1 : 8);
    w.x.at = w.line.at = w.way;
    w.at = (unsigned)w.lane * 4;
    w.selector = !S::GRAD ? pair_selector(w.lane % 4) : w.warp % 2 ? 0x7531u : 0x6420u;
    w.grad_codes = w.lane * 64 + ((w.group * 2 + w.warp / 2) ^ w.lane / 2 % 4) * 16;
    w.grad_scales = w.group * 512 + (wide_grad_halves(p) ? w.warp / 2 * 256 : 0) + w.lane % 4 * 8;
    return w;
}

/* Of a tile, the steps of way w.way. */
template <class S>
DEVICE bool wide_next_of_way(const struct bnb_cuda_gemm4_fast &p, const struct wide_thread &w, struct walk<int> *walk,
                             struct wide_tile *t)
{
    if (!wide_next_of_warp<S>(p, walk, t))
        return false;
    t->all = t->steps;
    if (S::WAYS == 2)
        t->step += w.way, t->steps = (t->steps + 1 - w.way) / 2;
    return true;
}

/* After an odd number of steps, the first slots of the ways have changed places. */
template <class S> DEVICE void wide_align(const struct wide_tile &t, struct wide_thread *w)
{
    if (S::WAYS == 1 || t.all % 2 == 0)
        return;
    wide_advance<S::RING>(&w->x, w->way ? 1 : -1);
    wide_advance<S::LINE>(&w->line, w->way ? 1 : -1);
}

/* The sums of the second way are added to those of the first, 16 of each thread at a time. */
template <class S> DEVICE void wide_meet_ways(const struct wide_thread &w, float (&sums)[S::SUMS])
{
    float4 *at = (float4 *)(w.memory + S::STAGING_AT + w.group * S::STAGING) + w.warp * 32 + w.lane;
#pragma unroll
    for (int c = 0; c < S::SUMS; c += 16) {
        some_barrier(WIDE_WAYS + w.group, 256); /* what was there has been read */
#pragma unroll
        for (int i = 0; i < 4 && w.way == 1; i++)
            at[i * 128] = {sums[c + 4 * i], sums[c + 4 * i + 1], sums[c + 4 * i + 2], sums[c + 4 * i + 3]};
        some_barrier(WIDE_WAYS + w.group, 256);
#pragma unroll
        for (int i = 0; i < 4 && w.way == 0; i++) {
            const float4 v = at[i * 128];
            sums[c + 4 * i] += v.x, sums[c + 4 * i + 1] += v.y;
            sums[c + 4 * i + 2] += v.z, sums[c + 4 * i + 3] += v.w;
        }
    }
}

/* Half of the sums goes to the other block, by way of memory that lies in the second-level cache, and its half of the same
 * tokens is added to the other half.  Two numbers have one sum, whoever adds.  parity: of the tile's number. */
template <class S>
DEVICE void wide_meet_blocks(const struct bnb_cuda_gemm4_fast &p, const struct wide_tile &t,
                             const struct wide_thread &w, unsigned parity, float (&sums)[S::SUMS])
{
    enum { HALF = S::SUMS / 2, APART = S::WORKERS };
    const int rank = (int)cluster_rank(), down = ((int)p.g.m + S::TOKENS - 1) / S::TOKENS;
    const int64_t tile =
        ((int64_t)t.at.split * down + t.at.token / S::TOKENS) * ((wide_outer<S>(p) + 127) / 128) + t.at.column;
    float4 *room = (float4 *)p.meet + tile * (S::SUMS / 4 * APART) + (w.group * 4 + w.warp) * 32 + w.lane;
    float4 *to = room + (1 - rank) * (HALF / 4 * APART);
    const float4 *from = room + rank * (HALF / 4 * APART);
#pragma unroll
    for (int i = 0; i < HALF; i += 4) {
        const float4 first = {sums[i], sums[i + 1], sums[i + 2], sums[i + 3]};
        const float4 last = {sums[HALF + i], sums[HALF + i + 1], sums[HALF + i + 2], sums[HALF + i + 3]};
        __stcg(to + i / 4 * APART, rank ? first : last);
    }
    __threadfence();
    __syncwarp();
    if (w.lane == 0)
        barrier_give_to(wide_met<S>(w.memory), (unsigned)(1 - rank));
    barrier_take(wide_met<S>(w.memory), parity);
#pragma unroll
    for (int i = 0; i < HALF; i += 4) {
        const float4 v = __ldcg(from + i / 4 * APART);
        if (rank)
            sums[HALF + i] += v.x, sums[HALF + i + 1] += v.y, sums[HALF + i + 2] += v.z, sums[HALF + i + 3] += v.w;
        else
            sums[i] += v.x, sums[i + 1] += v.y, sums[i + 2] += v.z, sums[i + 3] += v.w;
    }
}

template <typename T, class S>
DEVICE void wide_store_tile(const struct bnb_cuda_gemm4_wide &p, const struct wide_tile &t, const struct wide_thread &w,
                            unsigned parity, float (&sums)[S::SUMS])
{
    if constexpr (S::MEETS)
        wide_meet_blocks<S>(p.fast, t, w, parity, sums);
    if constexpr (S::WAYS == 2) {
        wide_meet_ways<S>(w, sums);
        if (w.way == 1)
            return;
    }
    if (p.fast.partial)
        wide_store_split<S>(p.fast, t, w, sums);
    else
        wide_store<T, S>(p, t, w, sums);
}

template <typename T, class S>
DEVICE void wide_multiply_forward(const struct bnb_cuda_gemm4_wide &p, struct wide_thread &w)
{
    struct walk<int> walk = wide_start();
    struct wide_tile t, next;
    struct wide_forward d = {};
    bool there = wide_next_of_way<S>(p.fast, w, &walk, &next);
    unsigned parity = 0;
    if (there)
        wide_rows_begin<S>(p.fast, next, w, &d.rows);
    while (there) {
        float sums[S::SUMS];
        t = next;
        if constexpr (S::MODE == WIDE_SUMS)
            wide_steps_sums<T, S>(p.fast, t, &w, &d, sums);
        else
            wide_steps<T, S>(p.fast, t, &w, &d, sums);
        wide_align<S>(t, &w);
        there = wide_next_of_way<S>(p.fast, w, &walk, &next);
        if (there) /* its scales come while these results go */
            wide_rows_begin<S>(p.fast, next, w, &d.rows);
        wide_store_tile<T, S>(p, t, w, parity, sums);
        parity ^= 1;
    }
}

template <typename T, class S>
DEVICE void wide_multiply_grad(const struct bnb_cuda_gemm4_wide &p, struct wide_thread &w)
{
    struct walk<int> walk = wide_start();
    struct wide_tile t;
    struct wide_grad d = {};
    while (wide_next_of_way<S>(p.fast, w, &walk, &t)) {
        float sums[S::SUMS];
        wide_steps<T, S>(p.fast, t, &w, &d, sums);
        wide_align<S>(t, &w);
        wide_store_tile<T, S>(p, t, w, 0, sums);
    }
}

/* Values of the table: scaled ones are rounded to T only then. */
template <typename T, class S> DEVICE void wide_table(const struct bnb_cuda_gemm4_fast &p, unsigned char *pairs)
{
    if (S::MODE == WIDE_SUMS)
        pairs_fill((const T *)nullptr, p, pairs, threadIdx.x, S::THREADS);
    else
        pairs_fill((const f16 *)nullptr, p, pairs, threadIdx.x, S::THREADS);
}

template <typename T, class S> DEVICE void wide_product(const struct bnb_cuda_gemm4_wide &p)
{
    SHARED_MEMORY(memory);
    const int warp = warp_number();
    let_next_launch_come();
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::RING; i++) {
            barrier_init(wide_full<S>(memory) + i, 1);
            barrier_init(wide_empty<S>(memory) + i, S::MEETS ? 8 : 16); /* eight warps of each block that shares it */
        }
        for (int i = 0; i < S::LINE; i++) {
            barrier_init(wide_codes_full<S>(memory) + i, S::GRAD ? 3 : 1);
            barrier_init(wide_codes_empty<S>(memory) + i, 8);
        }
        if (S::MEETS)
            barrier_init(wide_met<S>(memory), 8);
        barriers_ready();
    }
    wide_table<T, S>(p.fast, memory);
    wait_for_launch_before();
    map2_fill(p.fast, (float *)(memory + S::MAP2_AT), threadIdx.x, S::THREADS);
    __syncthreads();
    cluster_barrier();
    if (warp >= S::WORKERS / 32) {
        const int bringer = warp - S::WORKERS / 32, lane = (int)threadIdx.x % 32;
        registers_down_to<S::BRINGER_REGISTERS>();
        if (bringer == 0 && lane == 0)
            wide_bring<S>(p, memory);
        if (bringer == 1 && lane == 0)
            wide_bring_codes<S>(p, memory);
        if constexpr (S::GRAD)
            if (bringer >= 2)
                wide_bring_scales<S>(p.fast, bringer - 2, memory);
        __syncwarp();
    } else {
        registers_to<S::WORKER_REGISTERS>();
        struct wide_thread w = wide_thread_of<S>(p.fast, warp, memory);
        if constexpr (S::GRAD)
            wide_multiply_grad<T, S>(p, w);
        else
            wide_multiply_forward<T, S>(p, w);
    }
    cluster_barrier();
}

#endif

#endif
