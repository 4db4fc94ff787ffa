/*
 * gemm8_wide.cu - int8 products of many tokens on compute capability 9.0a: tiles of 128 rows and 128 or 256 tokens
 *
 * Blocks stay and take tile after tile, so that the copies of the next one run while results are written.  Two blocks may
 * form a cluster, with neighbouring rows and the same tokens: each loads half of these for both.
 */
#include "cuda/kernels/gemm8_ring.cuh"

enum { STAGES = TILE8_WIDE_STAGES, CHUNKS = TILE8_WIDE_CHUNKS };

#if BNB_IS_HOPPER

/* The tiles of this block: those of its cluster, of which it has every share-th row. */
struct walk8 { int rows, columns, next, step, steps; };

DEVICE struct walk8 walk8_of(const struct bnb_cuda_product8 &p, int tokens)
{
    struct walk8 w;
    const int rows = (int)((p.g.n + TILE8_ROWS - 1) / TILE8_ROWS);
    w.rows = (rows + p.share - 1) / p.share;
    w.columns = (int)((p.g.m + tokens - 1) / tokens);
    w.next = (int)blockIdx.x / p.share;
    w.step = (int)gridDim.x / p.share;
    w.steps = (int)((p.g.k + TILE8_DEPTH - 1) / TILE8_DEPTH);
    return w;
}

/* The first row and token of the next tile; false: there is none. */
DEVICE bool next_tile8(const struct bnb_cuda_product8 &p, struct walk8 &w, int tokens, int rank, int *row, int *token)
{
    if (w.next >= w.rows * w.columns)
        return false;
    bnb_tile8_place(w.next, w.rows, w.columns, p.group, row, token);
    *row = (*row * p.share + rank) * TILE8_ROWS;
    *token *= tokens;
    w.next += w.step;
    return true;
}

template <int TOKENS, class Ring> DEVICE void copy_wide8(const struct bnb_cuda_product8 &p, const Ring &ring, int rank)
{
    struct walk8 walk = walk8_of(p, TOKENS);
    struct turn8 turn = {0, 0};
    int row, token;
    while (next_tile8(p, walk, TOKENS, rank, &row, &token))
        for (int k = 0; k < walk.steps; k++) {
            barrier_wait(ring.empty + turn.at, turn.parity ^ 1u);
            copy_rows8(p, ring, turn.at, k, row);
            copy_tokens8<TOKENS>(p, ring, turn.at, k, token, (unsigned)rank);
            advance<STAGES>(turn);
        }
}

template <int TOKENS, class Ring>
DEVICE void gather_wide8(const struct bnb_cuda_product8 &p, const Ring &ring, int rank)
{
    struct walk8 walk = walk8_of(p, TOKENS);
    struct turn8 turn = {0, 0};
    int row, token;
    while (lists8(p) && next_tile8(p, walk, TOKENS, rank, &row, &token))
        gather8<TOKENS, CHUNKS>(p, ring, {row, token, 0, TOKENS}, turn);
}

template <int TOKENS, class Ring>
DEVICE void multiply_wide8(const struct bnb_cuda_product8 &p, const Ring &ring, int rank)
{
    struct walk8 walk = walk8_of(p, TOKENS);
    struct turn8 stage = {0, 0}, chunk = {0, 0};
    const int group = warpgroup8() - 1, first = ((int)threadIdx.x / 32 - 4) * 16;
    float *stats = ring.stats + group * TOKENS;
    int row, token;
    while (next_tile8(p, walk, TOKENS, rank, &row, &token)) {
        int d[TOKENS / 2] = {}; /* or the sums of the tile before would be kept */
        named_barrier(1 + group, 128); /* statistics were read for the tile before */
        bring_stats8<TOKENS>(p.g, stats, token);
        const struct lane8 lane = lane8_of(p.g, row + first);
        sum8<STAGES>(ring, group, walk.steps, p.share, stage, d);
        named_barrier(1 + group, 128);
        finish_tile8<CHUNKS>(p, ring, {row + first, token, 0, TOKENS}, stats, lane, chunk, d);
    }
}

template <int TOKENS> DEVICE void wide8(const struct bnb_cuda_product8 &p)
{
    extern __shared__ char dynamic[];
    __shared__ uint64_t barriers[2 * STAGES + 2 * CHUNKS];
    const struct ring8<TOKENS, STAGES, CHUNKS> ring(dynamic, barriers);
    const int rank = p.share > 1 ? (int)cluster_rank() : 0;
    if (threadIdx.x == 0) {
        prefetch_map(&p.weight);
        prefetch_map(&p.tokens);
        ring.init(p.share);
    }
    __syncthreads();
    if (p.share > 1) { /* nobody's barriers are met before they are there */
        cluster_arrive();
        cluster_wait();
    }
    wait_for_launch_before();
    if (threadIdx.x < 128) {
        registers_shrink<56>();
        if (threadIdx.x == 0)
            copy_wide8<TOKENS>(p, ring, rank);
        else if (threadIdx.x >= 32)
            gather_wide8<TOKENS>(p, ring, rank);
    } else {
        registers_grow<224>();
        multiply_wide8<TOKENS>(p, ring, rank);
    }
    if (p.share > 1) { /* nor after they are gone */
        cluster_arrive();
        cluster_wait();
    }
}

#endif

extern "C" __global__ void __launch_bounds__(TILE8_THREADS, 1)
    bnb_k_gemm8_wide128(const __grid_constant__ struct bnb_cuda_product8 p)
{
#if BNB_IS_HOPPER
    wide8<128>(p);
#endif
}

extern "C" __global__ void __launch_bounds__(TILE8_THREADS, 1)
    bnb_k_gemm8_wide256(const __grid_constant__ struct bnb_cuda_product8 p)
{
#if BNB_IS_HOPPER
    wide8<256>(p);
#endif
}
