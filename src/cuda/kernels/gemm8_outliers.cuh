/*
 * gemm8_outliers.cuh - the outlier columns of a tile: which they are, their values in shared memory, their product
 *
 * They are taken sixteen at a time, a chunk, from a list or from the flags that the quantiser left on the card, by each
 * warp that gathers for itself: nobody needs to know beforehand how many there are.  A chunk is multiplied in 16 bits,
 * codes of the weight as they are: the products are exact and summed in f32, and the weight's scale comes last.  An f32
 * activation is three values of bf16, in three chunks.
 *
 * Where the activations' codes still stand in these columns, the sum has their share, code times the row's scale, and the
 * value of the activation is less by so much.  Of an outlier the code is 0; of others what is left is half a step of the
 * quantiser at most, so that its rounding to 16 bits is far below what any other column has.
 */
#ifndef BNB_CUDA_GEMM8_OUTLIERS_CUH
#define BNB_CUDA_GEMM8_OUTLIERS_CUH

#include "cuda/kernels/rows8.cuh"
#include "cuda/kernels/tile8.h"

/* This thread's number in its block, and in its warp, of which nothing is computed ahead: beside the sums there are no registers
 * in which it could wait, and what waits in memory comes back late. */
DEVICE int thread_here()
{
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

DEVICE int lane_here() { return thread_here() % 32; }

/* Are there any to look for? */
DEVICE bool lists8(const struct bnb_cuda_product8 &p) { return p.g.columns || p.g.outlier; }

/* Chunks of the same columns. */
DEVICE int pieces8(const struct bnb_cuda_product8 &p) { return p.dtype == BNB_CUDA_F32 ? 3 : 1; }

/* ---------------------------------------------------------------- which */

enum { PAGE8 = 4096 };

/* Of a list, the next.  Of flags, the first column that was not looked at, and bits of the ones of the page before it that
 * were not taken: bit j of word i of lane l is column 128 l + 32 i + j of the page. */
struct columns8 {
    int next;
    unsigned bits[PAGE8 / 1024];
};

/* Four flags as bits. */
DEVICE unsigned flags4(unsigned w) { return w * 0x01020408u >> 24 & 15u; }

DEVICE unsigned flags16(uint4 w) { return flags4(w.x) | flags4(w.y) << 4 | flags4(w.z) << 8 | flags4(w.w) << 12; }

/* The 32 flags from `first` on, as bits. */
DEVICE unsigned flags32(const uint8_t *flags, int64_t k, int first)
{
    unsigned bits = 0;
    if (((uint64_t)flags & 15u) == 0 && first + 32 <= k)
        return flags16(__ldg((const uint4 *)(flags + first))) | flags16(__ldg((const uint4 *)(flags + first) + 1))
                                                                    << 16;
    for (int i = 0; i < 32 && first + i < k; i++)
        bits |= flags[first + i] ? 1u << i : 0u;
    return bits;
}

/* The next page. */
DEVICE void turn_page8(const struct bnb_cuda_product8 &p, struct columns8 &c)
{
    const int lane = lane_here();
#pragma unroll
    for (int i = 0; i < PAGE8 / 1024; i++)
        c.bits[i] = flags32(p.g.outlier, p.g.k, c.next + PAGE8 / 32 * lane + 32 * i);
    c.next += PAGE8;
}

/* By a warp: up to 16 columns, in ascending order; how many.  Fewer than 16: there are no more. */
DEVICE int take8(const struct bnb_cuda_product8 &p, struct columns8 &c, int *taken)
{
    const int lane = lane_here();
    int count = 0;
    __syncwarp(); /* taken was read */
    if (p.g.columns) {
        const int64_t left = p.g.outliers - c.next;
        count = left < TILE8_COLUMNS ? (int)left : TILE8_COLUMNS;
        if (lane < count)
            taken[lane] = (int)p.g.columns[c.next + lane];
        c.next += count;
    }
    while (!p.g.columns && count < TILE8_COLUMNS) {
        const int own = __popc(c.bits[0]) + __popc(c.bits[1]) + __popc(c.bits[2]) + __popc(c.bits[3]);
        int below = own;
        if (!__any_sync(0xffffffffu, own > 0)) {
            if (c.next >= p.g.k)
                break;
            turn_page8(p, c);
            continue;
        }
#pragma unroll
        for (int o = 1; o < 32; o *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, below, o);
            below += lane >= o ? other : 0;
        }
        int at = count + below - own;
#pragma unroll
        for (int i = 0; i < PAGE8 / 1024; i++)
            for (; c.bits[i] && at < TILE8_COLUMNS; c.bits[i] &= c.bits[i] - 1)
                taken[at++] = c.next - PAGE8 + PAGE8 / 32 * lane + 32 * i + __ffs((int)c.bits[i]) - 1;
        count = min(count + __shfl_sync(0xffffffffu, below, 31), (int)TILE8_COLUMNS);
    }
    __syncwarp();
    return count;
}

/* ---------------------------------------------------------------- values */

/* Where a warp's, or a block's, values go: rows from `row` on, tokens from `token` on, of these the ones from `first` to
 * `end`. */
struct place8 {
    int64_t row, token;
    int first, end;
};

/* Piece 0, 1 or 2 of an f32 value: eight bits of it each, all of them together. */
DEVICE unsigned piece8(float x, int piece)
{
    float top = x;
#pragma unroll
    for (int i = 0; i < 3; i++) {
        top = __uint_as_float(__float_as_uint(x) & 0xffff0000u);
        if (i == piece)
            break;
        x = fabsf(x) <= FLOAT_MAX ? __fsub_rn(x, top) : 0.0f;
    }
    return x != x ? 0x7fc0u : __float_as_uint(top) >> 16;
}

DEVICE unsigned piece_pair8(const struct bnb_cuda_product8 &p, float a, float b, int piece)
{
    return p.dtype == BNB_CUDA_F32   ? piece8(a, piece) | piece8(b, piece) << 16
           : p.dtype == BNB_CUDA_F16 ? quick_pair((const f16 *)nullptr, a, b)
                                     : quick_pair((const bf16 *)nullptr, a, b);
}

/* Columns are loaded eight at a time, all of them on their way before the first is used: beyond `count`, 1 or more, the first
 * again, as zeros. */
enum { LOADED8 = 8 };

DEVICE int column8(const int *taken, int count, int i) { return taken[i < count ? i : 0]; }

/* Of one token: what is on its way. */
struct coming8 {
    unsigned bits[LOADED8];
    float stat;
};

DEVICE void load_token8(const struct bnb_cuda_product8 &p, const int *taken, int count, int64_t token,
                        struct coming8 &c)
{
    const int64_t at = token * p.g.k;
    if (count <= 0 || token >= p.g.m)
        return;
    c.stat = p.threshold > 0.0f ? __ldg(p.g.row_stats + token) : 1.0f;
    if (p.dtype == BNB_CUDA_F32) {
#pragma unroll
        for (int i = 0; i < LOADED8; i++)
            c.bits[i] = __ldg((const unsigned *)p.g.x + at + column8(taken, count, i));
    } else {
#pragma unroll
        for (int i = 0; i < LOADED8; i++)
            c.bits[i] = __ldg((const unsigned short *)p.g.x + at + column8(taken, count, i));
    }
}

/* It has come: `count` of eight columns, zeros beyond. */
DEVICE void put_token8(const struct bnb_cuda_product8 &p, char *to, int count, int piece, int64_t token,
                       const struct coming8 &c)
{
    float v[LOADED8] = {};
    unsigned w[LOADED8 / 2];
    if (count > 0 && token < p.g.m) { /* two warps have all of a tile: what is not needed shows */
        const float r = 127.0f / c.stat;
#pragma unroll
        for (int i = 0; i < LOADED8; i++) {
            v[i] = p.dtype == BNB_CUDA_F32   ? __uint_as_float(c.bits[i])
                   : p.dtype == BNB_CUDA_F16 ? f16_value(c.bits[i])
                                             : __uint_as_float(c.bits[i] << 16);
            v[i] = p.threshold > 0.0f ? rest8_of(v[i], c.stat, r, p.threshold) : v[i];
            v[i] = i < count ? v[i] : 0.0f;
        }
    }
#pragma unroll
    for (int i = 0; i < LOADED8 / 2; i++)
        w[i] = piece_pair8(p, v[2 * i], v[2 * i + 1], piece);
    *(uint4 *)to = make_uint4(w[0], w[1], w[2], w[3]);
}

/* Of one row of the weight. */
DEVICE void fill_row8(const struct bnb_cuda_product8 &p, char *to, const int *taken, int count, int64_t row)
{
    const int8_t *from = p.g.b + row * p.g.k;
    unsigned c[LOADED8], w[2] = {0, 0};
    if (count > 0 && row < p.g.n) {
#pragma unroll
        for (int i = 0; i < LOADED8; i++)
            c[i] = (unsigned char)__ldg(from + column8(taken, count, i));
#pragma unroll
        for (int i = 0; i < LOADED8; i++)
            w[i / 4] |= i < count ? c[i] << 8 * (i % 4) : 0u;
    }
    *(uint2 *)to = make_uint2(w[0], w[1]);
}

/* A chunk of the columns `taken`, by `threads` threads, eight columns of a line each time.  Values of the tile's tokens from
 * `first` to `end`. */
DEVICE void fill_tokens8(const struct bnb_cuda_product8 &p, char *to, const int *taken, int count, int piece,
                         const struct place8 &at, int thread, int threads)
{
    const int tokens = at.end - at.first;
#pragma unroll 1
    for (int i = thread; i < 2 * tokens; i += threads) {
        const int h = i < tokens ? 0 : LOADED8, token = at.first + (i < tokens ? i : i - tokens);
        struct coming8 c = {};
        load_token8(p, taken + h, count - h, at.token + token, c);
        put_token8(p, to + bnb_tile8_values(token, h / 4), count - h, piece, at.token + token, c);
    }
}

/* Codes of its rows. */
template <int TOKENS>
DEVICE void fill_rows8(const struct bnb_cuda_product8 &p, char *to, const int *taken, int count,
                       const struct place8 &at, int thread, int threads)
{
#pragma unroll 1
    for (int i = threads - 1 - thread; i < 2 * TILE8_ROWS; i += threads) {
        const int h = i / TILE8_ROWS * LOADED8, row = i % TILE8_ROWS;
        fill_row8(p, to + bnb_tile8_codes(TOKENS, row, h / 4), taken + h, count - h, at.row + row);
    }
}

/* ---------------------------------------------------------------- product */

/* Two of four codes as 16-bit floats, which hold them exactly. */
DEVICE unsigned codes_pair8(unsigned codes, int at, bool half)
{
    const float a = (float)(int8_t)(codes >> 8 * at), b = (float)(int8_t)(codes >> 8 * (at + 1));
    return half ? quick_pair((const f16 *)nullptr, a, b) : quick_pair((const bf16 *)nullptr, a, b);
}

DEVICE void multiply16(float *f, const unsigned a[4], uint2 b, bool half)
{
#if __CUDA_ARCH__ >= 800
    if (half)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
            " {%0, %1, %2, %3};"
            : "+f"(f[0]), "+f"(f[1]), "+f"(f[2]), "+f"(f[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
            " {%0, %1, %2, %3};"
            : "+f"(f[0]), "+f"(f[1]), "+f"(f[2]), "+f"(f[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
#endif
}

/* Adds a chunk: row is the first of this warp's 16 in the tile, token that of f[0].  The order of the 16 columns in the sum
 * is the same on both sides and otherwise free: t's are 4 t .. 4 t + 3. */
template <int R> DEVICE void add_chunk8(float (&f)[R], const char *chunk, int tokens, int row, int token, bool half)
{
    const int lane = lane_here(), g = lane / 4, t = lane % 4;
    const unsigned upper = *(const unsigned *)(chunk + bnb_tile8_codes(tokens, row + g, t));
    const unsigned lower = *(const unsigned *)(chunk + bnb_tile8_codes(tokens, row + g + 8, t));
    const unsigned a[4] = {codes_pair8(upper, 0, half), codes_pair8(lower, 0, half), codes_pair8(upper, 2, half),
                           codes_pair8(lower, 2, half)};
#pragma unroll
    for (int j = 0; j < R / 4; j++)
        multiply16(f + 4 * j, a, *(const uint2 *)(chunk + bnb_tile8_values(token + 8 * j + g, t)), half);
}

#endif
