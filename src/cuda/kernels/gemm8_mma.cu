/*
 * gemm8_mma.cu - int8 products on the matrix units of compute capability 8.0 and above: tiles of 128 rows and 128 tokens
 *
 * A ring of three steps of 64 bytes comes by asynchronous copies.  Of eight warps, each multiplies 32 rows by 64 tokens.
 */
#include "cuda/kernels/gemm8_tile.cuh"

enum { THREADS = 256, OPERAND = TILE8_SIDE * TILE8_STEP };

#if __CUDA_ARCH__ >= 800

DEVICE unsigned shared_at(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }

/* Sixteen bytes, or as many zeros. */
DEVICE void copy_piece(char *to, const int8_t *from, bool there)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_at(to)), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}

DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int COUNT> DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(COUNT) : "memory"); }

/* 128 lines of a matrix [lines, k] from `first` on, at `at`: four pieces each. */
DEVICE void copy_lines(char *to, const int8_t *from, int64_t lines, int64_t k, int64_t first, int64_t at)
{
#pragma unroll
    for (int i = 0; i < TILE8_SIDE * 4 / THREADS; i++) {
        const int line = i * (THREADS / 4) + (int)threadIdx.x / 4, piece = (int)threadIdx.x % 4;
        const bool there = first + line < lines && at + piece * 16 < k;
        copy_piece(to + bnb_tile8_piece(line, piece), there ? from + (first + line) * k + at + piece * 16 : from,
                   there);
    }
}

DEVICE void copy_step(const struct bnb_gemm8_block &g, char *stage, int64_t row, int64_t token, int64_t at)
{
    if (at < g.k) {
        copy_lines(stage, g.b, g.n, g.k, row, at);
        copy_lines(stage + OPERAND, g.a, g.m, g.k, token, at);
    }
    copies_commit();
}

DEVICE void load_matrices(unsigned r[4], const char *p)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_at(p))
                 : "memory");
}

DEVICE void multiply8(int *d, const unsigned a[4], const unsigned b[2])
{
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* The products of a step: 32 rows from `row` on, 64 tokens from `token` on. */
DEVICE void multiply_step(const char *stage, int row, int token, int (&d)[2][32])
{
    const int lane = (int)threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        unsigned a[2][4];
        load_matrices(a[0], stage + bnb_tile8_matrix(lane, row, 2 * half, true));
        load_matrices(a[1], stage + bnb_tile8_matrix(lane, row + 16, 2 * half, true));
#pragma unroll
        for (int j = 0; j < 4; j++) {
            unsigned b[4];
            load_matrices(b, stage + OPERAND + bnb_tile8_matrix(lane, token + 16 * j, 2 * half, false));
#pragma unroll
            for (int i = 0; i < 2; i++) {
                multiply8(d[i] + 8 * j, a[i], b);
                multiply8(d[i] + 8 * j + 4, a[i], b + 2);
            }
        }
    }
}

DEVICE void sum_tile(const struct bnb_gemm8_block &g, char *stages, int64_t row, int64_t token, int (&d)[2][32])
{
    const int warp = (int)threadIdx.x / 32;
#pragma unroll
    for (int s = 0; s < TILE8_STAGES - 1; s++)
        copy_step(g, stages + s * 2 * OPERAND, row, token, s * TILE8_STEP);
    int stage = 0;
    for (int64_t at = 0; at < g.k; at += TILE8_STEP) {
        copies_wait<TILE8_STAGES - 2>();
        __syncthreads(); /* this step has come for all threads, and all have used the one before */
        const int next = stage == 0 ? TILE8_STAGES - 1 : stage - 1;
        copy_step(g, stages + next * 2 * OPERAND, row, token, at + (TILE8_STAGES - 1) * TILE8_STEP);
        multiply_step(stages + stage * 2 * OPERAND, warp / 2 * 32, warp % 2 * 64, d);
        stage = stage + 1 == TILE8_STAGES ? 0 : stage + 1;
    }
    copies_wait<0>();
    __syncthreads();
}

/* The outlier columns of 16 rows and 64 tokens of each warp are added, `count` taken columns first.  By all threads: what a
 * chunk holds serves all of them. */
DEVICE void add_outliers(const struct bnb_cuda_product8 &p, char *chunk, const struct place8 &tile,
                         const struct place8 &own, int *taken, int count, struct columns8 &columns, float (&f)[32])
{
    while (count > 0) {
        for (int piece = 0; piece < pieces8(p); piece++) {
            fill_tokens8(p, chunk, taken, count, piece, tile, (int)threadIdx.x, THREADS);
            fill_rows8<TILE8_SIDE>(p, chunk, taken, count, tile, (int)threadIdx.x, THREADS);
            __syncthreads();
            add_chunk8(f, chunk, TILE8_SIDE, (int)(own.row - tile.row), (int)(own.token - tile.token),
                       p.dtype == BNB_CUDA_F16);
            __syncthreads();
        }
        count = count < TILE8_COLUMNS ? 0 : take8(p, columns, taken);
    }
}

/* The results of 16 rows and 64 tokens of each warp. */
DEVICE void finish_half(const struct bnb_cuda_product8 &p, char *memory, const struct place8 &tile,
                        const struct place8 &own, const float *stats, const int (&d)[32])
{
    __shared__ int numbers[THREADS / 32][TILE8_COLUMNS];
    const int warp = (int)threadIdx.x / 32;
    if (p.g.sums) {
        store_sums8(p, own, d);
        return;
    }
    struct columns8 columns = {};
    const int count = lists8(p) ? take8(p, columns, numbers[warp]) : 0;
    const struct lane8 lane = lane8_of(p.g, own.row);
    char *buffers = memory + BNB_TILE8_CHUNK(TILE8_SIDE) + warp * 2 * TILE8_TURN;
    stats += own.token - tile.token;
    if (count == 0) {
        store8<32>(p, own, buffers, plain8<32>{d, own_stats8(stats), lane});
        return;
    }
    float f[32];
    begin8(d, f, stats);
    add_outliers(p, memory, tile, own, numbers[warp], count, columns, f);
    store8<32>(p, own, buffers, begun8<32>{f, lane});
}

/* The second half of the sums waits in shared memory, for want of registers; outliers are gathered for each.  Memory of the
 * stages serves again: a chunk, what is turned over, sums. */
DEVICE void finish_tile(const struct bnb_cuda_product8 &p, char *memory, int64_t row, int64_t token, int (&d)[2][32])
{
    __shared__ float stats[TILE8_SIDE];
    const int warp = (int)threadIdx.x / 32;
    const struct place8 tile = {row, token, 0, TILE8_SIDE};
    struct place8 own = {row + warp / 2 * 32, token + warp % 2 * 64, 0, 64};
    int *waiting = (int *)(memory + TILE8_WAITING) + threadIdx.x;
    if (!p.g.sums && threadIdx.x < TILE8_SIDE)
        stats[threadIdx.x] = token + threadIdx.x < p.g.m ? p.g.row_stats[token + threadIdx.x] : 0.0f;
#pragma unroll
    for (int i = 0; i < 32; i++)
        waiting[i * THREADS] = d[1][i];
    __syncthreads();
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
        finish_half(p, memory, tile, own, stats, d[0]);
#pragma unroll
        for (int i = 0; i < 32; i++)
            d[0][i] = waiting[i * THREADS];
        own.row += 16;
    }
}

DEVICE void mma8(const struct bnb_cuda_product8 &p)
{
    extern __shared__ __align__(16) char memory[];
    const int rows = (int)((p.g.n + TILE8_SIDE - 1) / TILE8_SIDE);
    const int columns = (int)((p.g.m + TILE8_SIDE - 1) / TILE8_SIDE);
    for (int tile = (int)blockIdx.x; tile < rows * columns; tile += (int)gridDim.x) {
        int row, token, d[2][32] = {};
        bnb_tile8_place(tile, rows, columns, p.group, &row, &token);
        sum_tile(p.g, memory, (int64_t)row * TILE8_SIDE, (int64_t)token * TILE8_SIDE, d);
        finish_tile(p, memory, (int64_t)row * TILE8_SIDE, (int64_t)token * TILE8_SIDE, d);
        __syncthreads(); /* the stages are filled again */
    }
}

#endif

extern "C" __global__ void __launch_bounds__(256, 2) bnb_k_gemm8_mma(const IN_PLACE struct bnb_cuda_product8 p)
{
#if __CUDA_ARCH__ >= 800
    mma8(p);
#endif
}
