/*
 * gemm8_ring.cuh - the loops of the int8 products of compute capability 9.0a: who copies, who gathers, who multiplies
 *
 * A block is three warpgroups.  Of the first, one thread copies tiles of both operands into a ring of stages in shared
 * memory, and three warps bring outlier columns into chunks beside it, while the other two warpgroups, 64 rows of the
 * weight each, multiply.  A stage is `full` when its bytes have come and `empty` when eight warps have read it, or nine; a
 * chunk is `ready` when 96 threads have written it and `used` when eight warps have read it.  A barrier's phase has the
 * parity of how often the ring went round; one that was never waited for counts as empty.
 *
 * While tiles stream in, loads from memory wait long behind them.  So the columns are listed once, and of the first, as many
 * as the chunks have room for, one warp picks the weight's codes out of the stages as they pass, while the other two see to
 * the activations' values.  The columns beyond are loaded by all three, chunk by chunk.
 */
#ifndef BNB_CUDA_GEMM8_RING_CUH
#define BNB_CUDA_GEMM8_RING_CUH

#include "cuda/kernels/gemm8_tile.cuh"
#include "cuda/kernels/hopper.cuh"
#include "cuda/kernels/rows8_list.cuh"

#if BNB_IS_HOPPER

/* Threads that gather, from thread 32 of the block on; the first of them that picks. */
enum { GATHERERS = 96, PICKER = 64 };

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
    float4 *rows; /* scales and bias, where there is memory for them */
    int *taken, *list,
        *total; /* columns that each gathering warp has taken; the first of all; how many, and three sums */
    uint64_t *full, *empty, *ready, *used, *listed;

    __device__ __forceinline__ ring8(char *dynamic, uint64_t *barriers)
    {
        stages = dynamic + (-(int)shared_address(dynamic) & 1023);
        chunks = stages + STAGES * STAGE;
        turned = chunks + CHUNKS * CHUNK;
        stats = (float *)(turned + TILE8_WORKERS / 32 * 2 * TILE8_TURN);
        taken = (int *)(stats + 2 * TOKENS);
        list = taken + GATHERERS / 32 * TILE8_COLUMNS;
        total = list + TILE8_ROOM;
        rows = (float4 *)(total + 4);
        full = barriers, empty = full + STAGES, ready = empty + STAGES, used = ready + CHUNKS, listed = used + CHUNKS;
    }

    /* By one thread; share: blocks that copy into each other's stages; picks: a warp of this block picks from them. */
    __device__ __forceinline__ void init(int share, bool picks) const
    {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, TILE8_WORKERS / 32 * share + (picks ? 1 : 0));
        }
        barrier_init(listed, GATHERERS);
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

/* Barriers of a ring. */
#define BNB_RING8_BARRIERS(stages, chunks) (2 * (stages) + 2 * (chunks) + 1)

/* Are codes picked?  Not where f32 activations make three chunks of the same columns, nor by a list from the caller, which
 * may have any order. */
DEVICE bool picks8(const struct bnb_cuda_product8 &p) { return p.mask && p.dtype != BNB_CUDA_F32; }

/* They meet. */
struct gatherers8 {
    static __device__ __forceinline__ void meet() { named_barrier(4, GATHERERS); }
};

/* By all of them: the list, as far as there is room, and how many columns there are.  LISTED_BEFORE: it has been made. */
template <bool LISTED_BEFORE, class Ring>
DEVICE int list8(const struct bnb_cuda_product8 &p, const Ring &ring, int room)
{
    const int thread = thread_here() - 32;
    int total;
    if (!LISTED_BEFORE && p.mask && !p.list) {
        total = list_mask8<GATHERERS, gatherers8>(p.mask, p.g.k, ring.list, ring.total + 1, room, thread);
    } else {
        total = p.mask ? __ldcg(p.list + TILE8_ROOM) : (int)p.g.outliers;
        for (int i = thread; i < room; i += GATHERERS)
            ring.list[i] = p.mask ? __ldcg(p.list + i) : i < total ? (int)p.g.columns[i] : 0;
    }
    if (thread == 0)
        *ring.total = total;
    barrier_arrive(ring.listed);
    gatherers8::meet();
    return total;
}

/* By a warp: codes of column 0 .. 127 of a stage, of all rows, to this block or to the first `ranks` of the cluster.  A
 * stage waits for this, so that all loads are under way before the first store. */
DEVICE void pick8(const char *stage, unsigned column, char *to, int ranks)
{
    enum { ROWS = TILE8_ROWS / 32 };
    const unsigned lane = (unsigned)lane_here();
    const char *from = stage + lane * TILE8_DEPTH + (column / 16 ^ (lane & 7)) * 16 + column % 16;
    unsigned char code[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++)
        code[i] = *(const unsigned char *)(from + i * 32 * TILE8_DEPTH);
    to += bnb_tile8_codes(0, (int)lane, 0);
#pragma unroll
    for (int i = 0; i < ROWS; i++)
        if (ranks == 0)
            *(unsigned char *)(to + bnb_tile8_codes(0, i * 32, 0)) = code[i];
#pragma unroll 1
    for (int r = 0; r < ranks; r++)
#pragma unroll
        for (int i = 0; i < ROWS; i++)
            cluster_store(to + bnb_tile8_codes(0, i * 32, 0), (unsigned)r, code[i]);
}

/* The chunks of the first `picked` columns of a tile: until all of them may be written; this thread has written all. */
template <int CHUNKS, class Ring> DEVICE void wait_used8(const Ring &ring, int picked, struct turn8 chunk)
{
    for (int i = 0; i < picked; i += TILE8_COLUMNS, advance<CHUNKS>(chunk))
        barrier_wait(ring.used + chunk.at, chunk.parity ^ 1u);
}

template <int CHUNKS, class Ring> DEVICE void ready8(const Ring &ring, int picked, struct turn8 chunk)
{
    for (int i = 0; i < picked; i += TILE8_COLUMNS, advance<CHUNKS>(chunk))
        barrier_arrive(ring.ready + chunk.at);
}

/* Column i of the list, or one beyond all. */
enum { NO_COLUMN8 = 0x7fffffff };

template <class Ring> DEVICE int listed8(const Ring &ring, int i, int picked)
{
    return i < picked ? ring.list[i] : NO_COLUMN8;
}

/* By the warp that picks: the first `picked` columns of a tile, from `steps` steps of its sum from `step` on.  The
 * others of the sum's columns are other blocks' work; they are all here when the cluster meets. */
template <int STAGES, int CHUNKS, class Ring>
DEVICE void pick_tile8(const Ring &ring, int picked, int step, int steps, int ranks, struct turn8 &stage,
                       struct turn8 chunk)
{
    const int codes = Ring::CHUNK - TILE8_ROWS * TILE8_COLUMNS;
    int next = 0, column;
    wait_used8<CHUNKS>(ring, picked, chunk);
    while ((column = listed8(ring, next, picked)) < step * TILE8_DEPTH)
        next++;
    for (int k = step; k < step + steps; k++) {
        barrier_wait(ring.full + stage.at, stage.parity);
        for (; column < (k + 1) * TILE8_DEPTH; column = listed8(ring, ++next, picked)) {
            const unsigned at = ((unsigned)chunk.at + (unsigned)next / TILE8_COLUMNS) % CHUNKS;
            pick8(ring.stages + stage.at * Ring::STAGE, (unsigned)(column - k * TILE8_DEPTH),
                  ring.chunks + at * Ring::CHUNK + codes + next % TILE8_COLUMNS, ranks);
        }
        __syncwarp();
        if (lane_here() == 0)
            barrier_arrive(ring.empty + stage.at);
        advance<STAGES>(stage);
    }
    ready8<CHUNKS>(ring, picked, chunk);
}

/* The values of the first `picked` columns of a tile, by the threads that do not pick: one of them copies. */
template <int CHUNKS, class Ring>
DEVICE void copy_picked8(const struct bnb_cuda_product8 &p, const Ring &ring, const struct place8 &at, int picked,
                         struct turn8 chunk)
{
    const int64_t token = at.token + at.first, left = p.g.m - token;
    const int tokens = left < at.end - at.first ? (int)left : at.end - at.first;
    const bool copies = thread_here() == 32 && tokens > 0;
    for (int i = 0; i < picked; i += TILE8_COLUMNS, advance<CHUNKS>(chunk)) {
        barrier_wait(ring.used + chunk.at, chunk.parity ^ 1u); /* nobody arrives for two phases at once */
        if (!copies) {
            barrier_arrive(ring.ready + chunk.at);
            continue;
        }
        barrier_expect(ring.ready + chunk.at, BNB_TILE8_VALUES(tokens));
        bulk_copy(ring.chunks + chunk.at * Ring::CHUNK + bnb_tile8_values(at.first, 0),
                  (const char *)p.values + BNB_TILE8_VALUES(i / TILE8_COLUMNS * p.g.m + token),
                  BNB_TILE8_VALUES(tokens), ring.ready + chunk.at);
    }
}

/* The columns of one tile beyond those that were picked, chunk by chunk. */
template <int TOKENS, int CHUNKS, class Ring>
DEVICE void gather8(const struct bnb_cuda_product8 &p, const Ring &ring, const struct place8 &at, int total, int picked,
                    struct turn8 &turn)
{
    const int thread = thread_here() - 32, pieces = pieces8(p), room = CHUNKS * TILE8_COLUMNS;
    int *taken = ring.taken + thread / 32 * TILE8_COLUMNS;
    struct columns8 columns = {};
    for (int i = 0; i < total; i += TILE8_COLUMNS) {
        const int count = min(total - i, (int)TILE8_COLUMNS);
        const int *numbers = total > room ? taken : ring.list + i;
        if (total > room)
            take8(p, columns, taken);
        for (int piece = 0; piece < pieces; piece++, advance<CHUNKS>(turn)) {
            char *chunk = ring.chunks + turn.at * Ring::CHUNK;
            if (i < picked)
                continue;
            barrier_wait(ring.used + turn.at, turn.parity ^ 1u);
            fill_tokens8(p, chunk, numbers, count, piece, at, thread, GATHERERS);
            fill_rows8<TOKENS>(p, chunk, numbers, count, at, thread, GATHERERS);
            barrier_arrive(ring.ready + turn.at);
        }
    }
}

/* ---------------------------------------------------------------- the warpgroups that multiply */

/* This warp has read a stage. */
template <class Ring> DEVICE void release8(const Ring &ring, int stage, int share)
{
    const int lane = lane_here();
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
    for (int i = thread_here() % 128; i < TOKENS; i += 128)
        stats[i] = !g.sums && token + i < g.m ? g.row_stats[token + i] : 0.0f;
}

/* How many outlier columns there are, when it is known. */
template <class Ring> DEVICE int outliers8(const struct bnb_cuda_product8 &p, const Ring &ring)
{
    if (!lists8(p))
        return 0;
    barrier_wait(ring.listed, 0);
    return *ring.total;
}

/* This warp has read a chunk. */
template <int CHUNKS, class Ring> DEVICE void pass_chunk8(const Ring &ring, struct turn8 &turn)
{
    __syncwarp();
    if (lane_here() == 0)
        barrier_arrive(ring.used + turn.at);
    advance<CHUNKS>(turn);
}

/* The `total` outlier columns of a tile are added. */
template <int CHUNKS, class Ring, int R>
DEVICE void add_outliers8(const struct bnb_cuda_product8 &p, const Ring &ring, int total, struct turn8 &turn,
                          float (&f)[R])
{
    const int warp = thread_here() / 32 - 4;
    for (int i = (total + TILE8_COLUMNS - 1) / TILE8_COLUMNS * pieces8(p); i > 0; i--) {
        barrier_wait(ring.ready + turn.at, turn.parity);
        add_chunk8(f, ring.chunks + turn.at * Ring::CHUNK, R * 2, warp * 16, 0, p.dtype == BNB_CUDA_F16);
        pass_chunk8<CHUNKS>(ring, turn);
    }
}

/* The results of a warp from its sums. */
template <int CHUNKS, class Ring, int R>
DEVICE void finish_tile8(const struct bnb_cuda_product8 &p, const Ring &ring, const struct place8 &at,
                         const float *stats, const struct lane8 &lane, struct turn8 &turn, const int (&d)[R])
{
    const int warp = thread_here() / 32 - 4;
    char *buffers = ring.turned + warp * 2 * TILE8_TURN;
    if (p.g.sums) {
        store_sums8(p, at, d);
        return;
    }
    const int total = outliers8(p, ring);
    if (total > 0) {
        float f[R];
        begin8(d, f, stats);
        add_outliers8<CHUNKS>(p, ring, total, turn, f);
        store8<R>(p, at, buffers, begun8<R>{f, lane});
        return;
    }
    store8<R>(p, at, buffers, plain8<R>{d, own_stats8(stats), lane});
}

#endif
#endif
