/*
 * gemm8_narrow.cu - int8 products of few tokens on compute capability 9.0a: tiles of 128 rows and 8 to 128 tokens
 *
 * Here the weight's way from memory is everything.  A tile belongs to a cluster of 1, 2, 4 or 8 blocks, each with a part of
 * the sum; at the end they read each other's int32 sums, which are exact in any order, and each finishes a part of the
 * tokens.  The weight's first stages are under way before the activations are quantised, which the launch before does.
 */
#include "cuda/kernels/gemm8_ring.cuh"

enum { CHUNKS = TILE8_NARROW_CHUNKS };

#if BNB_IS_HOPPER

/* What this block does. */
struct share8 {
    int row, token;     /* the first of its tile                     */
    int step, steps;    /* of the sum                                */
    int first, end;     /* of the tile's tokens, those that it finishes */
};

DEVICE struct share8 share8_of(const struct bnb_cuda_product8 &p, int tokens, int rank)
{
    struct share8 s;
    const int steps = (int)((p.g.k + TILE8_DEPTH - 1) / TILE8_DEPTH), tile = (int)blockIdx.x / p.split;
    const int columns = (int)((p.g.m + tokens - 1) / tokens);
    s.row = tile / columns * TILE8_ROWS;
    s.token = tile % columns * tokens;
    s.step = bnb_tile8_first(steps, p.split, rank);
    s.steps = bnb_tile8_first(steps, p.split, rank + 1) - s.step;
    s.first = bnb_tile8_token(tokens, p.split, rank);
    s.end = bnb_tile8_token(tokens, p.split, rank + 1);
    return s;
}

template <int TOKENS, int STAGES, class Ring>
DEVICE void copy_narrow8(const struct bnb_cuda_product8 &p, const Ring &ring, const struct share8 &s)
{
    struct turn8 turn = {0, 0};
    const int ahead = s.steps < STAGES ? s.steps : STAGES;
    for (int k = 0; k < ahead; k++)
        copy_rows8(p, ring, k, s.step + k, s.row);
    wait_for_launch_before();
    for (int k = 0; k < s.steps; k++) {
        if (k >= ahead) {
            barrier_wait(ring.empty + turn.at, turn.parity ^ 1u);
            copy_rows8(p, ring, turn.at, s.step + k, s.row);
        }
        copy_tokens8<TOKENS>(p, ring, turn.at, s.step + k, s.token, 0);
        advance<STAGES>(turn);
    }
}

/* Of a sum that blocks share, the stages are free: by all warps that read them. */
DEVICE void stages_free8(const struct bnb_cuda_product8 &p)
{
    named_barrier(3, TILE8_WORKERS + (picks8(p) ? GATHERERS - PICKER : 0));
}

/* The values of the first `picked` columns of a tile, by the threads that do not pick: each has eight columns of a token,
 * twice, on its way at a time. */
template <class Ring>
DEVICE void fill_picked8(const struct bnb_cuda_product8 &p, const Ring &ring, const struct place8 &at, int picked)
{
    enum { AT_ONCE = 2 };
    const int tokens = at.end - at.first, items = (picked + TILE8_COLUMNS - 1) / TILE8_COLUMNS * 2 * tokens;
#pragma unroll 1
    for (int first = thread_here() - 32; first < items; first += AT_ONCE * PICKER) {
        struct coming8 c[AT_ONCE] = {};
        int half[AT_ONCE], token[AT_ONCE];
#pragma unroll
        for (int e = 0; e < AT_ONCE; e++) {
            const int i = min(first + e * PICKER, items - 1); /* or the last once more */
            half[e] = i / tokens;
            token[e] = at.first + i - half[e] * tokens;
            load_token8(p, ring.list + half[e] * LOADED8, picked - half[e] * LOADED8, at.token + token[e], c[e]);
        }
#pragma unroll
        for (int e = 0; e < AT_ONCE; e++)
            put_token8(p, ring.chunks + half[e] / 2 * Ring::CHUNK + bnb_tile8_values(token[e], half[e] % 2 * 2),
                       picked - half[e] * LOADED8, 0, at.token + token[e], c[e]);
    }
    ready8<CHUNKS>(ring, picked, {0, 0});
}

/* Outlier columns.  The warp that picks has codes from this block's part of the sum alone, and gives them to all blocks that
 * finish tokens, when these are there; they have all of them when the cluster meets next. */
template <int TOKENS, int STAGES, class Ring>
DEVICE void gather_narrow8(const struct bnb_cuda_product8 &p, const Ring &ring, const struct share8 &s)
{
    struct turn8 stage = {0, 0}, chunk = {0, 0};
    const struct place8 at = {s.row, s.token, s.first, s.end};
    const int total = lists8(p) ? list8<false>(p, ring, CHUNKS * TILE8_COLUMNS) : 0;
    const int picked = picks8(p) ? min(total, CHUNKS * TILE8_COLUMNS) : 0;
    const bool picker = picks8(p) && thread_here() >= 32 + PICKER;
    if (p.split > 1)
        cluster_wait();
    if (picker)
        pick_tile8<STAGES, CHUNKS>(ring, picked, s.step, s.steps, p.split > 1 ? min(p.split, TOKENS / 8) : 0, stage,
                                   chunk);
    if (picker && p.split > 1)
        stages_free8(p);
    if (p.split > 1)
        cluster_arrive();
    if (s.first >= s.end)
        return;
    if (!picker && p.list)
        copy_picked8<CHUNKS>(p, ring, at, picked, chunk);
    else if (!picker)
        fill_picked8(p, ring, at, picked);
    gather8<TOKENS, CHUNKS>(p, ring, at, total, picked, chunk);
}

/* This warpgroup's sums to where the others read them, in the stages: four of a thread side by side, block by block. */
template <class Ring, int R> DEVICE void lay_out8(const Ring &ring, const int (&d)[R])
{
    int4 *to = (int4 *)ring.stages + ((int)threadIdx.x - 128);
#pragma unroll
    for (int j = 0; j < R / 4; j++)
        to[j * TILE8_WORKERS] = make_int4(d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]);
}

/* The sums of the blocks of tokens that this block finishes, over the SPLIT blocks of the cluster; the others as they are. */
template <int SPLIT, class Ring, int R> DEVICE void add_up8(const Ring &ring, const struct share8 &s, int (&d)[R])
{
    enum { AT_ONCE = SPLIT > 2 && R > 32 ? 2 : SPLIT }; /* as registers allow */
    const int4 *from = (const int4 *)ring.stages + ((int)threadIdx.x - 128);
#pragma unroll
    for (int j = 0; j < R / 4; j++) {
        if (8 * j < s.first || 8 * j >= s.end)
            continue;
        int4 v[AT_ONCE], sum = make_int4(0, 0, 0, 0);
#pragma unroll
        for (int first = 0; first < SPLIT; first += AT_ONCE) {
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                v[i] = cluster_load(from + j * TILE8_WORKERS, (unsigned)(first + i));
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                sum.x += v[i].x, sum.y += v[i].y, sum.z += v[i].z, sum.w += v[i].w;
        }
        d[4 * j] = sum.x, d[4 * j + 1] = sum.y, d[4 * j + 2] = sum.z, d[4 * j + 3] = sum.w;
    }
}

template <int TOKENS, int STAGES, class Ring>
DEVICE void multiply_narrow8(const struct bnb_cuda_product8 &p, const Ring &ring, const struct share8 &s)
{
    struct turn8 stage = {0, 0}, chunk = {0, 0};
    const int group = warpgroup8() - 1, first = s.row + ((int)threadIdx.x / 32 - 4) * 16;
    float *stats = ring.stats + group * TOKENS;
    int d[TOKENS / 2];
    bring_stats8<TOKENS>(p.g, stats, s.token);
    const struct lane8 lane = lane8_of(p.g, first);
    named_barrier(1 + group, 128);
    sum8<STAGES>(ring, group, s.steps, 1, stage, d);
    if (p.split > 1) {
        stages_free8(p);
        lay_out8(ring, d);
        cluster_wait();
        cluster_arrive();
        cluster_wait();
        if (p.split == 8)
            add_up8<8>(ring, s, d);
        else if (p.split == 4)
            add_up8<4>(ring, s, d);
        else
            add_up8<2>(ring, s, d);
    }
    if (s.first < s.end)
        finish_tile8<CHUNKS>(p, ring, {first, s.token, s.first, s.end}, stats, lane, chunk, d);
}

template <int TOKENS, int STAGES> DEVICE void narrow8(const struct bnb_cuda_product8 &p)
{
    extern __shared__ char dynamic[];
    __shared__ uint64_t barriers[BNB_RING8_BARRIERS(STAGES, CHUNKS)];
    const struct ring8<TOKENS, STAGES, CHUNKS> ring(dynamic, barriers);
    const struct share8 s = share8_of(p, TOKENS, p.split > 1 ? (int)cluster_rank() : 0);
    if (threadIdx.x == 0) {
        prefetch_map(&p.weight);
        prefetch_map(&p.tokens);
        ring.init(1, picks8(p));
    }
    __syncthreads();
    if (p.split > 1) /* nobody is written to before it is there */
        cluster_arrive_empty();
    let_next_launch_come();
    if (threadIdx.x < 32) {
        if (threadIdx.x == 0)
            copy_narrow8<TOKENS, STAGES>(p, ring, s);
        if (p.split > 1) {
            cluster_wait();
            cluster_arrive_empty();
        }
    } else if (threadIdx.x < 128) {
        wait_for_launch_before();
        gather_narrow8<TOKENS, STAGES>(p, ring, s);
    } else {
        wait_for_launch_before();
        multiply_narrow8<TOKENS, STAGES>(p, ring, s);
    }
    if (p.split > 1) { /* nobody leaves while others read its sums */
        if (threadIdx.x < 128)
            cluster_wait();
        cluster_arrive_empty();
        cluster_wait();
    }
}

#endif

extern "C" __global__ void __launch_bounds__(TILE8_THREADS, 2)
    bnb_k_gemm8_narrow8(const IN_PLACE struct bnb_cuda_product8 p)
{
#if BNB_IS_HOPPER
    narrow8<8, TILE8_STAGES_8>(p);
#endif
}

extern "C" __global__ void __launch_bounds__(TILE8_THREADS, 2)
    bnb_k_gemm8_narrow16(const IN_PLACE struct bnb_cuda_product8 p)
{
#if BNB_IS_HOPPER
    narrow8<16, TILE8_STAGES_16>(p);
#endif
}

extern "C" __global__ void __launch_bounds__(TILE8_THREADS, 2)
    bnb_k_gemm8_narrow32(const IN_PLACE struct bnb_cuda_product8 p)
{
#if BNB_IS_HOPPER
    narrow8<32, TILE8_STAGES_32>(p);
#endif
}

extern "C" __global__ void __launch_bounds__(TILE8_THREADS, 1)
    bnb_k_gemm8_narrow64(const IN_PLACE struct bnb_cuda_product8 p)
{
#if BNB_IS_HOPPER
    narrow8<64, TILE8_STAGES_64>(p);
#endif
}

extern "C" __global__ void __launch_bounds__(TILE8_THREADS, 1)
    bnb_k_gemm8_narrow128(const IN_PLACE struct bnb_cuda_product8 p)
{
#if BNB_IS_HOPPER
    narrow8<128, TILE8_STAGES_128>(p);
#endif
}
