/*
 * gemm8_ring.cuh - the loops of the int8 products of compute capability 9.0a: who copies, who gathers, who multiplies
 *
 * A block is three warpgroups.  Of the first, one thread copies tiles of both operands into a ring of stages in shared
 * memory, and three warps gather outlier columns into chunks beside it, while the other two warpgroups, 64 rows of the
 * weight each, multiply.  A stage is `full` when its bytes have come and `empty` when eight warps have read it; a chunk
 * is `ready` when 96 threads have written it and `used` when eight warps have read it.  A barrier's phase has the parity of
 * how often the ring went round; one that was never waited for counts as empty.
 */
#ifndef BNB_CUDA_GEMM8_RING_CUH
#define BNB_CUDA_GEMM8_RING_CUH

#include "cuda/kernels/gemm8_tile.cuh"
#include "cuda/kernels/hopper.cuh"

#if BNB_IS_HOPPER

enum { GATHERERS = 96 };

/* A place in a ring. */
struct turn8 {
    int at;
    unsigned parity;
};

template <int LENGTH> DEVICE void advance(struct turn8 &t)
{
    if (++t.at == LENGTH)
        t.at = 0, t.parity ^= 1u;
}

/* Shared memory of a block: BNB_TILE8_SHARED() bytes, and the barriers. */
template <int TOKENS, int STAGES, int CHUNKS> struct ring8 {
    enum { STAGE = BNB_TILE8_STAGE(TOKENS), CHUNK = BNB_TILE8_CHUNK(TOKENS) };
    char *stages, *chunks, *turned;
    float *stats;
    int *taken, *counts; /* columns that each gathering warp has taken; of the chunks */
    uint64_t *full, *empty, *ready, *used;

    __device__ __forceinline__ ring8(char *dynamic, uint64_t *barriers)
    {
        stages = dynamic + (-(int)shared_address(dynamic) & 1023);
        chunks = stages + STAGES * STAGE;
        turned = chunks + CHUNKS * CHUNK;
        stats = (float *)(turned + TILE8_WORKERS / 32 * 2 * TILE8_TURN);
        taken = (int *)(stats + 2 * TOKENS);
        counts = taken + GATHERERS / 32 * TILE8_COLUMNS;
        full = barriers, empty = full + STAGES, ready = empty + STAGES, used = ready + CHUNKS;
    }

    /* By one thread; share: blocks that copy into each other's stages. */
    __device__ __forceinline__ void init(int share) const
    {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, TILE8_WORKERS / 32 * share);
        }
        for (int i = 0; i < CHUNKS; i++) {
            barrier_init(ready + i, GATHERERS);
            barrier_init(used + i, TILE8_WORKERS / 32);
        }
        barrier_init_done();
    }
};

/* This thread's warpgroup, as a number that the compiler knows to be the warp's. */
DEVICE int warpgroup8() { return __shfl_sync(0xffffffffu, (int)threadIdx.x / 128, 0); }

/* ---------------------------------------------------------------- the thread that copies */

template <class Ring>
DEVICE void copy_rows8(const struct bnb_cuda_product8 &p, const Ring &ring, int stage, int step, int row)
{
    barrier_expect(ring.full + stage, Ring::STAGE);
    bulk_load(ring.stages + stage * Ring::STAGE, &p.weight, step * TILE8_DEPTH, row, ring.full + stage);
}

/* Of the tokens, this block's part of what the blocks that share them load. */
template <int TOKENS, class Ring>
DEVICE void copy_tokens8(const struct bnb_cuda_product8 &p, const Ring &ring, int stage, int step, int token,
                         unsigned rank)
{
    const int first = (int)rank * (TOKENS / p.share);
    char *to = ring.stages + stage * Ring::STAGE + (TILE8_ROWS + first) * TILE8_DEPTH;
    if (p.share == 1)
        bulk_load(to, &p.tokens, step * TILE8_DEPTH, token, ring.full + stage);
    else
        bulk_load_many(to, &p.tokens, step * TILE8_DEPTH, token + first, ring.full + stage, (1u << p.share) - 1);
}

/* ---------------------------------------------------------------- the warps that gather */

/* All chunks of one tile; the last says that it has fewer than 16 columns, or none. */
template <int TOKENS, int CHUNKS, class Ring>
DEVICE void gather8(const struct bnb_cuda_product8 &p, const Ring &ring, const struct place8 &at, struct turn8 &turn)
{
    const int thread = (int)threadIdx.x - 32, pieces = pieces8(p);
    int *taken = ring.taken + thread / 32 * TILE8_COLUMNS, count;
    struct columns8 columns = {};
    do {
        count = take8(p, columns, taken);
        for (int piece = 0; piece < pieces; piece++) {
            barrier_wait(ring.used + turn.at, turn.parity ^ 1u);
            if (count > 0)
                fill_chunk8<TOKENS>(p, ring.chunks + turn.at * Ring::CHUNK, taken, count, piece, at.row, at.token,
                                    at.first, at.end, thread, GATHERERS);
            if (thread == 0)
                ring.counts[turn.at] = count;
            barrier_arrive(ring.ready + turn.at);
            advance<CHUNKS>(turn);
        }
    } while (count == TILE8_COLUMNS);
}

/* ---------------------------------------------------------------- the warpgroups that multiply */

/* This warp has read a stage. */
template <class Ring> DEVICE void release8(const Ring &ring, int stage, int share)
{
    const int lane = (int)threadIdx.x % 32;
    if (share > 1 && lane < share)
        barrier_arrive_at(ring.empty + stage, (unsigned)lane);
    else if (lane == 0)
        barrier_arrive(ring.empty + stage);
}

/* d += the next `steps` steps, one or more; group: 0 or 1, the half of the rows.  A stage is given back when the products
 * of the one after it have been started and its own are done. */
template <int STAGES, class Ring, int R>
DEVICE void sum8(const Ring &ring, int group, int steps, int share, struct turn8 &turn, int (&d)[R])
{
    int before = 0;
    for (int k = 0; k < steps; k++) {
        const char *stage = ring.stages + turn.at * Ring::STAGE;
        const uint64_t a = operand_at(stage + group * 64 * TILE8_DEPTH),
                       b = operand_at(stage + TILE8_ROWS * TILE8_DEPTH);
        barrier_wait(ring.full + turn.at, turn.parity);
        wgmma_begin();
#pragma unroll
        for (int q = 0; q < TILE8_DEPTH / 32; q++)
            wgmma8(d, a + 2 * q, b + 2 * q, k > 0 || q > 0);
        wgmma_commit();
        if (k > 0) {
            wgmma_wait<1>();
            release8(ring, before, share);
        }
        before = turn.at;
        advance<STAGES>(turn);
    }
    wgmma_wait<0>();
    settle(d);
    release8(ring, before, share);
}

/* Statistics of the tile's tokens, this warpgroup's copy; a barrier of it before and after. */
template <int TOKENS> DEVICE void bring_stats8(const struct bnb_gemm8_block &g, float *stats, int64_t token)
{
    for (int i = (int)threadIdx.x % 128; i < TOKENS; i += 128)
        stats[i] = !g.sums && token + i < g.m ? g.row_stats[token + i] : 0.0f;
}

/* How many columns the next chunk has, when it is there. */
template <class Ring> DEVICE int meet_chunk8(const Ring &ring, const struct turn8 &turn)
{
    barrier_wait(ring.ready + turn.at, turn.parity);
    return ring.counts[turn.at];
}

/* This warp has read a chunk. */
template <int CHUNKS, class Ring> DEVICE void pass_chunk8(const Ring &ring, struct turn8 &turn)
{
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        barrier_arrive(ring.used + turn.at);
    advance<CHUNKS>(turn);
}

/* The outlier columns of a tile are added; count: of the first chunk. */
template <int CHUNKS, class Ring, int R>
DEVICE void add_outliers8(const struct bnb_cuda_product8 &p, const Ring &ring, int count, struct turn8 &turn,
                          float (&f)[R])
{
    const int warp = (int)threadIdx.x / 32 - 4, pieces = pieces8(p);
    for (int piece = 0;;) {
        if (count > 0)
            add_chunk8(f, ring.chunks + turn.at * Ring::CHUNK, R * 2, warp * 16, 0, p.dtype == BNB_CUDA_F16);
        pass_chunk8<CHUNKS>(ring, turn);
        piece = piece + 1 < pieces ? piece + 1 : 0;
        if (piece == 0 && count < TILE8_COLUMNS)
            break;
        count = meet_chunk8(ring, turn);
    }
}

/* The results of a warp from its sums. */
template <int CHUNKS, class Ring, int R>
DEVICE void finish_tile8(const struct bnb_cuda_product8 &p, const Ring &ring, const struct place8 &at,
                         const float *stats, const struct lane8 &lane, struct turn8 &turn, const int (&d)[R])
{
    const int warp = (int)threadIdx.x / 32 - 4;
    char *buffers = ring.turned + warp * 2 * TILE8_TURN;
    if (p.g.sums) {
        store_sums8(p, at, d);
        return;
    }
    const int count = lists8(p) ? meet_chunk8(ring, turn) : 0;
    if (count > 0) {
        float f[R];
        begin8(d, f, stats);
        add_outliers8<CHUNKS>(p, ring, count, turn, f);
        store8<R>(p, at, buffers, begun8<R>{f, under8(lane, 127.0f)});
        return;
    }
    for (int piece = 0; lists8(p) && piece < pieces8(p); piece++) {
        meet_chunk8(ring, turn);
        pass_chunk8<CHUNKS>(ring, turn);
    }
    store8<R>(p, at, buffers, plain8<R>{d, stats, under8(lane, 16129.0f)});
}

#endif
#endif
