/*
 * gemm8_tile.cuh - from the sums of a tile to its results: scales, outlier columns, bias, one rounding, and the way out
 *
 * In the layout of tile8.h: f[4 j + i] is value i of this lane in block j of eight tokens.  NUMERICS rule 34: without
 * outliers every operation is rounded by itself.  Outlier columns are multiplied in 16 bits, codes as they are: their
 * products are exact and summed in f32, and the weight's scale comes last.  An f32 activation is three values of bf16.
 */
#ifndef BNB_CUDA_GEMM8_TILE_CUH
#define BNB_CUDA_GEMM8_TILE_CUH

#include "cuda/kernels/device.cuh"
#include "cuda/kernels/tile8.h"

DEVICE int64_t listed8(const struct bnb_cuda_product8 &p) { return p.count ? *p.count : p.g.outliers; }

/* ---------------------------------------------------------------- outlier columns in shared memory */

/* Values of an activation in the chunks' dtype, that of x or bf16. */
DEVICE int pieces8(const struct bnb_cuda_product8 &p) { return p.dtype == BNB_CUDA_F32 ? 3 : 1; }

DEVICE int64_t chunks8(const struct bnb_cuda_product8 &p, int64_t count)
{
    return (count + TILE8_COLUMNS - 1) / TILE8_COLUMNS * pieces8(p);
}

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

DEVICE unsigned value8(const struct bnb_cuda_product8 &p, int64_t at, int piece)
{
    if (p.dtype == BNB_CUDA_F32)
        return piece8(__ldg((const float *)p.g.x + at), piece);
    return __ldg((const unsigned short *)p.g.x + at);
}

/* Chunk `chunk` of a tile, by `threads` threads. */
template <int TOKENS>
DEVICE void fill_chunk8(const struct bnb_cuda_product8 &p, char *to, int64_t chunk, int64_t count, int64_t row,
                        int64_t token, int thread, int threads)
{
    const int piece = (int)(chunk % pieces8(p));
    const int64_t first = chunk / pieces8(p) * TILE8_COLUMNS;
    int column[TILE8_COLUMNS];
#pragma unroll
    for (int i = 0; i < TILE8_COLUMNS; i++)
        column[i] = first + i < count ? (int)p.g.columns[first + i] : -1;
    for (int r = thread; r < TOKENS + TILE8_ROWS; r += threads) {
        const bool is_token = r < TOKENS;
        const int64_t line = is_token ? token + r : row + r - TOKENS;
        const bool there = line < (is_token ? p.g.m : p.g.n);
        unsigned w[8] = {};
#pragma unroll
        for (int i = 0; i < TILE8_COLUMNS; i++) {
            if (!there || column[i] < 0)
                continue;
            const int64_t at = line * p.g.k + column[i];
            if (is_token)
                w[i / 2] |= value8(p, at, piece) << 16 * (i % 2);
            else
                w[i / 4] |= (unsigned)(uint8_t)__ldg(p.g.b + at) << 8 * (i % 4);
        }
        if (is_token)
            ((uint4 *)(to + bnb_tile8_values(r, 0)))[1] = make_uint4(w[4], w[5], w[6], w[7]);
        *(uint4 *)(to + (is_token ? bnb_tile8_values(r, 0) : bnb_tile8_codes(TOKENS, r - TOKENS, 0))) =
            make_uint4(w[0], w[1], w[2], w[3]);
    }
}

/* ---------------------------------------------------------------- outlier columns: the product */

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
    const int g = (int)threadIdx.x % 32 / 4, t = (int)threadIdx.x % 4;
    const unsigned upper = *(const unsigned *)(chunk + bnb_tile8_codes(tokens, row + g, t));
    const unsigned lower = *(const unsigned *)(chunk + bnb_tile8_codes(tokens, row + g + 8, t));
    const unsigned a[4] = {codes_pair8(upper, 0, half), codes_pair8(lower, 0, half), codes_pair8(upper, 2, half),
                           codes_pair8(lower, 2, half)};
#pragma unroll
    for (int j = 0; j < R / 4; j++)
        multiply16(f + 4 * j, a, *(const uint2 *)(chunk + bnb_tile8_values(token + 8 * j + g, t)), half);
}

/* ---------------------------------------------------------------- scales and bias */

/* Of this lane's two rows. */
struct lane8 { float scale[2], bias[2]; };

DEVICE float bias8_at(const struct bnb_gemm8_block &g, int64_t j)
{
    if (g.bias_dtype == BNB_CUDA_F16)
        return value_of((const f16 *)g.bias + j);
    return g.bias_dtype == BNB_CUDA_BF16 ? value_of((const bf16 *)g.bias + j) : value_of((const float *)g.bias + j);
}

DEVICE struct lane8 lane8_of(const struct bnb_gemm8_block &g, int64_t row)
{
    struct lane8 l = {};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int64_t n = row + (int)threadIdx.x % 32 / 4 + 8 * i;
        if (n < g.n && !g.sums) {
            l.scale[i] = g.col_stats[n];
            l.bias[i] = g.bias ? bias8_at(g, n) : 0.0f;
        }
    }
    return l;
}

/* The sums under their scales; with outliers without that of the row, which comes when these have been added. */
template <int R>
DEVICE void scale8(const int (&d)[R], float (&f)[R], const float *stats, const struct lane8 &l, bool outliers)
{
    const float scale[2] = {l.scale[0] / 16129.0f, l.scale[1] / 16129.0f};
#pragma unroll
    for (int j = 0; j < R / 4; j++) {
        const float2 row = *(const float2 *)(stats + 8 * j + (int)threadIdx.x % 4 * 2);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float s = i % 2 ? row.y : row.x;
            f[4 * j + i] = __fmul_rn((float)d[4 * j + i], __fmul_rn(s, outliers ? 1.0f / 127.0f : scale[i / 2]));
        }
    }
}

template <int R> DEVICE void finish8(float (&f)[R], const struct lane8 &l, bool outliers, bool bias)
{
    if (outliers) {
        const float scale[2] = {l.scale[0] / 127.0f, l.scale[1] / 127.0f};
#pragma unroll
        for (int i = 0; i < R; i++)
            f[i] = __fmul_rn(f[i], scale[i % 4 / 2]);
    }
    if (bias) {
#pragma unroll
        for (int i = 0; i < R; i++)
            f[i] = __fadd_rn(f[i], l.bias[i % 4 / 2]);
    }
}

/* ---------------------------------------------------------------- the way out */

/* Where a warp's values go: rows from `row` on, tokens from `token` on, of these the ones from `first` to `end`. */
struct place8 {
    int64_t row, token;
    int first, end;
};

DEVICE bool is_placed8(const struct bnb_cuda_product8 &p, const struct place8 &at, int token)
{
    return token >= at.first && token < at.end && at.token + token < p.g.m;
}

/* Values of 32 bits, as bits: eight lanes have neighbouring rows of one token. */
template <int R>
DEVICE void store32(const struct bnb_cuda_product8 &p, const struct place8 &at, unsigned *out, const int (&d)[R])
{
    const int g = (int)threadIdx.x % 32 / 4, t = (int)threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < R; i++) {
        const int token = i / 4 * 8 + 2 * t + i % 2;
        const int64_t n = at.row + g + 8 * (i % 4 / 2);
        if (n < p.g.n && is_placed8(p, at, token))
            out[(at.token + token) * p.g.n + n] = (unsigned)d[i];
    }
}

/* Four 8 x 8 matrices, each lane with two values of a row in each, to shared memory by columns. */
DEVICE void store_turned(char *to, const unsigned w[4])
{
#if __CUDA_ARCH__ >= 900
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     (unsigned)__cvta_generic_to_shared(to + bnb_tile8_written((int)threadIdx.x % 32))),
                 "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
                 : "memory");
#elif __CUDA_ARCH__ >= 750
    const int g = (int)threadIdx.x % 32 / 4, t = (int)threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        unsigned turned;
        asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(w[i]));
        *(unsigned *)(to + bnb_tile8_turned(i / 2 * 8 + g, i % 2) + 4 * t) = turned;
    }
#endif
}

/* The first `count` of eight values of 16 bits, one by one. */
DEVICE void store_some(unsigned short *to, int64_t count, uint4 v)
{
    uint64_t low = (uint64_t)v.y << 32 | v.x, high = (uint64_t)v.w << 32 | v.z;
#pragma unroll 1
    for (int i = 0; i < 8 && i < count; i++) {
        to[i] = (unsigned short)low;
        low = low >> 16 | high << 48;
        high >>= 16;
    }
}

/* Values of 16 bits, through this warp's two buffers of TILE8_TURN bytes: each lane gets eight rows of one token. */
template <bool HALF, int R>
DEVICE void store16(const struct bnb_cuda_product8 &p, const struct place8 &at, char *buffers, const float (&f)[R])
{
    const int lane = (int)threadIdx.x % 32, own = lane / 2;
    const int64_t n = at.row + lane % 2 * 8, rows = p.g.n - n, left = p.g.m - at.token;
    const int end = rows <= 0 ? 0 : left < at.end ? (int)left : at.end;
    unsigned short *to = (unsigned short *)p.g.out + (at.token + own) * p.g.n + n;
#pragma unroll
    for (int q = 0; q < (R + 7) / 8; q++, to += 16 * p.g.n) {
        char *buffer = buffers + q % 2 * TILE8_TURN;
        unsigned w[4] = {};
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (8 * q + 2 * i < R)
                w[i] = HALF ? quick_pair((const f16 *)nullptr, f[8 * q + 2 * i], f[8 * q + 2 * i + 1])
                            : quick_pair((const bf16 *)nullptr, f[8 * q + 2 * i], f[8 * q + 2 * i + 1]);
        store_turned(buffer, w);
        __syncwarp();
        const uint4 v = *(const uint4 *)(buffer + bnb_tile8_read(lane));
        if (16 * q + own < at.first || 16 * q + own >= end)
            continue;
        if (p.store && rows >= 8)
            *(uint4 *)to = v;
        else
            store_some(to, rows, v);
    }
    __syncwarp();
}

template <int R>
DEVICE void store8(const struct bnb_cuda_product8 &p, const struct place8 &at, char *buffers, const float (&f)[R])
{
    if (p.dtype == BNB_CUDA_F16) {
        store16<true>(p, at, buffers, f);
    } else if (p.dtype == BNB_CUDA_BF16) {
        store16<false>(p, at, buffers, f);
    } else {
        int bits[R];
#pragma unroll
        for (int i = 0; i < R; i++)
            bits[i] = __float_as_int(f[i]);
        store32(p, at, (unsigned *)p.g.out, bits);
    }
}

#endif
