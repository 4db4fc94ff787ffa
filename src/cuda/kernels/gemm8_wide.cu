/*
 * gemm8_wide.cu - int8 products of many tokens on compute capability 9.0a: tiles of 128 rows and 128 or 256 tokens
 *
 * Blocks stay and take tile after tile, so that the copies of the next one run while results are written.  Two blocks may
 * form a cluster, with neighbouring rows and the same tokens: each loads half of these for both.
 */
#include "cuda/kernels/gemm8_ring.cuh"

enum { STAGES = TILE8_WIDE_STAGES, CHUNKS = TILE8_WIDE_CHUNKS };

#if BNB_IS_HOPPER

/* The first row and token of the tile that is `next` in the order of clusters; false: there is none.  A cluster's tiles are
 * grid / share apart, and of a tile its blocks have every share-th row.  No more than the number is kept between tiles: the
 * warps that gather have few registers. */
DEVICE bool tile_at8(const struct bnb_cuda_product8 &p, int next, int tokens, int rank, int *row, int *token)
{
    const int rows = (int)(((unsigned)p.g.n + (TILE8_ROWS - 1)) / TILE8_ROWS + p.share - 1) / p.share;
    const int columns = (int)(((unsigned)p.g.m + ((unsigned)tokens - 1)) / (unsigned)tokens);
    if (next >= rows * columns)
        return false;
    bnb_tile8_place(next, rows, columns, p.group, row, token);
    *row = (*row * p.share + rank) * TILE8_ROWS;
    *token *= tokens;
    return true;
}

DEVICE int first_tile8(const struct bnb_cuda_product8 &p) { return (int)blockIdx.x / p.share; }
DEVICE int tiles_apart8(const struct bnb_cuda_product8 &p) { return (int)gridDim.x / p.share; }
DEVICE int steps8(const struct bnb_cuda_product8 &p) { return (int)((p.g.k + TILE8_DEPTH - 1) / TILE8_DEPTH); }

template <int TOKENS, class Ring> DEVICE void copy_wide8(const struct bnb_cuda_product8 &p, const Ring &ring, int rank)
{
    const int steps = steps8(p), apart = tiles_apart8(p);
    struct turn8 turn = {0, 0};
    int row, token;
    for (int next = first_tile8(p); tile_at8(p, next, TOKENS, rank, &row, &token); next += apart)
        for (int k = 0; k < steps; k++) {
            barrier_wait(ring.empty + turn.at, turn.parity ^ 1u);
            copy_rows8(p, ring, turn.at, k, row);
            copy_tokens8<TOKENS>(p, ring, turn.at, k, token, (unsigned)rank);
            advance<STAGES>(turn);
        }
}

template <int TOKENS, class Ring>
DEVICE void gather_wide8(const struct bnb_cuda_product8 &p, const Ring &ring, int rank)
{
    struct turn8 stage = {0, 0}, chunk = {0, 0};
    int row, token;
    if (!lists8(p))
        return;
    const bool picker = picks8(p) && thread_here() >= 32 + PICKER;
    const int total = list8<true>(p, ring, CHUNKS * TILE8_COLUMNS);
    const int picked = picks8(p) ? min(total, CHUNKS * TILE8_COLUMNS) : 0;
    for (int next = first_tile8(p); tile_at8(p, next, TOKENS, rank, &row, &token); next += tiles_apart8(p)) {
        if (picker)
            pick_tile8<STAGES, CHUNKS>(ring, picked, 0, steps8(p), 0, stage, chunk);
        else
            copy_picked8<CHUNKS>(p, ring, {row, token, 0, TOKENS}, picked, chunk);
        gather8<TOKENS, CHUNKS>(p, ring, {row, token, 0, TOKENS}, total, picked, chunk);
    }
}

/* Scales and bias of this warpgroup's 64 rows from `row` on.  They wait in shared memory: the sums leave few registers. */
DEVICE void bring_rows8(const struct bnb_gemm8_block &g, float4 *rows, int64_t row)
{
    const int i = thread_here() % 128;
    if (i < 64)
        rows[i] = row8_of(g, row + i);
}

/* A number of which nothing is known, so that what was made of it is not kept. */
DEVICE int forgotten(int i)
{
    asm volatile("" : "+r"(i));
    return i;
}

/* Those of this lane. */
DEVICE struct lane8 brought8(const float4 *rows)
{
    const int thread = thread_here(), i = thread / 32 % 4 * 16 + thread % 32 / 4;
    return pair8(rows[i], rows[i + 8]);
}

template <int TOKENS, class Ring>
DEVICE void multiply_wide8(const struct bnb_cuda_product8 &p, const Ring &ring, int rank)
{
    struct turn8 stage = {0, 0}, chunk = {0, 0};
    const int group = warpgroup8() - 1;
    float *stats = ring.stats + group * TOKENS;
    int row, token;
    for (int next = first_tile8(p); tile_at8(p, next, TOKENS, rank, &row, &token); next += tiles_apart8(p)) {
        int d[TOKENS / 2] = {}; /* or the sums of the tile before would be kept */
        named_barrier(1 + group, 128); /* statistics were read for the tile before */
        bring_stats8<TOKENS>(p.g, stats, token);
        bring_rows8(p.g, ring.rows + group * 64, row + group * 64);
        sum8<STAGES>(ring, group, steps8(p), p.share, stage, d);
        named_barrier(1 + group, 128);
        tile_at8(p, forgotten(next), TOKENS, rank, &row, &token);
        finish_tile8<CHUNKS>(p, ring, {row + (thread_here() / 32 - 4) * 16, token, 0, TOKENS}, stats,
                             brought8(ring.rows + group * 64), chunk, d);
    }
}

template <int TOKENS> DEVICE void wide8(const struct bnb_cuda_product8 &p)
{
    extern __shared__ char dynamic[];
    __shared__ uint64_t barriers[BNB_RING8_BARRIERS(STAGES, CHUNKS)];
    const struct ring8<TOKENS, STAGES, CHUNKS> ring(dynamic, barriers);
    const int rank = p.share > 1 ? (int)cluster_rank() : 0;
    if (threadIdx.x == 0) {
        prefetch_map(&p.weight);
        prefetch_map(&p.tokens);
        ring.init(p.share, picks8(p));
    }
    __syncthreads();
    if (p.share > 1) { /* nobody's barriers are met before they are there */
        cluster_arrive();
        cluster_wait();
    }
    let_next_launch_come();
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
    bnb_k_gemm8_wide128(const IN_PLACE struct bnb_cuda_product8 p)
{
#if BNB_IS_HOPPER
    wide8<128>(p);
#endif
}

extern "C" __global__ void __launch_bounds__(TILE8_THREADS, 1)
    bnb_k_gemm8_wide256(const IN_PLACE struct bnb_cuda_product8 p)
{
#if BNB_IS_HOPPER
    wide8<256>(p);
#endif
}
