/*
 * gemm.h - the tiles of the matrix products, in the words of simd_*.h
 *
 * dot: both operands run along the inner dimension, as x W^T reads them; a tile of TILE_M x TILE_N sums sits in
 * registers.  axpy: one operand runs along the outer dimension, as x W reads it; a tile of AXPY_M rows by AXPY_V vectors
 * sits in registers.  Inner sizes are whole vectors: operands are padded with zeros.  The order of a sum depends on its
 * length and the instruction set, not on threads or on the other rows and columns.
 */
#ifndef BNB_CPU_GEMM_H
#define BNB_CPU_GEMM_H

/* The inner size of one panel: TILE_N rows of it fit into the first-level cache. */
enum { PANEL_K = 1024, PANEL_K8 = 4096 / sizeof(dot_b) };

/* Rows of a panel are not a power of two apart: they would all fall into the same few sets of the cache. */
enum { PANEL_STRIDE = PANEL_K + 16, PANEL_STRIDE8 = PANEL_K8 + 64 / sizeof(dot_b) };

/* Values of bnb_dtype. */
enum { TYPE_F32 = 0, TYPE_F16 = 1, TYPE_BF16 = 2 };

enum { GEMV_ROWS = 4 };

/* How many rows share the decoding of a panel. */
enum { PANEL_M = 256 };

/* sums[i][j] += x[i] . w[j], i < rows, j < TILE_N; w has row stride PANEL_STRIDE, k is a multiple of VF_LANES. */
static ALWAYS_INLINE void tile_dot(int rows, const float *const x[], const float *w, int64_t k,
                                   float (*restrict sums)[TILE_N])
{
    vf acc[TILE_M][TILE_N];
    UNROLL
    for (int i = 0; i < rows; i++)
        UNROLL
    for (int j = 0; j < TILE_N; j++)
        acc[i][j] = vf_set(0.0f);
    for (int64_t l = 0; l < k; l += VF_LANES) {
        vf a[TILE_M];
        UNROLL
        for (int i = 0; i < rows; i++)
            a[i] = vf_load_f32(x[i] + l);
        UNROLL
        for (int j = 0; j < TILE_N; j++) {
            const vf b = vf_load_f32(w + j * PANEL_STRIDE + l);
            UNROLL
            for (int i = 0; i < rows; i++)
                acc[i][j] = vf_fma(a[i], b, acc[i][j]);
        }
    }
    UNROLL
    for (int i = 0; i < rows; i++)
        UNROLL
    for (int j = 0; j < TILE_N; j++)
        sums[i][j] += vf_hsum(acc[i][j]);
}

/* A whole tile: kept apart so that the compiler finds registers for all of it. */
static __attribute__((noinline)) void whole_tile_dot(const float *const x[], const float *w, int64_t k,
                                                     float (*restrict sums)[TILE_N])
{
    tile_dot(TILE_M, x, w, k, sums);
}

/* All rows of a panel against its TILE_N columns.  x has row stride `stride`. */
static void panel_dot(const float *x, int64_t stride, int64_t rows, const float *w, int64_t k,
                      float (*restrict sums)[TILE_N])
{
    int64_t i = 0;
    for (; i + TILE_M <= rows; i += TILE_M) {
        const float *row[TILE_M];
        for (int r = 0; r < TILE_M; r++)
            row[r] = x + (i + r) * stride;
        whole_tile_dot(row, w, k, sums + i);
    }
    for (; i < rows; i++) {
        const float *row[TILE_M] = {x + i * stride};
        tile_dot(1, row, w, k, sums + i);
    }
}

/* sums[i][j] += a[i] . b[j] in int32, wrapping, as dot_step() packs the operands; k is a multiple of DOT_LANES. */
static ALWAYS_INLINE void tile_dot8(int rows, const dot_a *const a[], const dot_b *const b[TILE_N], int64_t k,
                                    int32_t (*restrict sums)[TILE_N])
{
    vi acc[TILE_M8][TILE_N];
    UNROLL
    for (int i = 0; i < rows; i++)
        UNROLL
    for (int j = 0; j < TILE_N; j++)
        acc[i][j] = vi_set(0);
    for (int64_t l = 0; l < k; l += DOT_LANES) {
        vi x[TILE_M8];
        UNROLL
        for (int i = 0; i < rows; i++)
            x[i] = dot_load(a[i] + l);
        UNROLL
        for (int j = 0; j < TILE_N; j++) {
            const vi w = dot_load(b[j] + l);
            UNROLL
            for (int i = 0; i < rows; i++)
                acc[i][j] = dot_step(acc[i][j], x[i], w);
        }
    }
    UNROLL
    for (int i = 0; i < rows; i++)
        UNROLL
    for (int j = 0; j < TILE_N; j++)
        sums[i][j] = (int32_t)((uint32_t)sums[i][j] + (uint32_t)vi_hsum(acc[i][j]));
}

/* A whole tile: kept apart so that the compiler finds registers for all of it. */
static __attribute__((noinline)) void whole_tile_dot8(const dot_a *const a[], const dot_b *const b[TILE_N], int64_t k,
                                                      int32_t (*restrict sums)[TILE_N])
{
    tile_dot8(TILE_M8, a, b, k, sums);
}

static void panel_dot8(const dot_a *a, int64_t stride, int64_t rows, const dot_b *const b[TILE_N], int64_t k,
                       int32_t (*restrict sums)[TILE_N])
{
    int64_t i = 0;
    for (; i + TILE_M8 <= rows; i += TILE_M8) {
        const dot_a *row[TILE_M8];
        for (int r = 0; r < TILE_M8; r++)
            row[r] = a + (i + r) * stride;
        whole_tile_dot8(row, b, k, sums + i);
    }
    for (; i < rows; i++) {
        const dot_a *row[TILE_M8] = {a + i * stride};
        tile_dot8(1, row, b, k, sums + i);
    }
}

/* The columns of one axpy tile, and how many inner steps share their decoding. */
enum { AXPY_N = AXPY_V * VF_LANES, AXPY_K = 128 };

/* sums[i][:] += x[i][l] w[l][:], l < k; x has row stride `stride`, w and sums AXPY_N. */
static ALWAYS_INLINE void tile_axpy(int rows, const float *x, int64_t stride, const float *w, int64_t k, float *sums)
{
    vf acc[AXPY_M][AXPY_V];
    UNROLL
    for (int i = 0; i < rows; i++)
        UNROLL
    for (int j = 0; j < AXPY_V; j++)
        acc[i][j] = vf_load_f32(sums + i * AXPY_N + j * VF_LANES);
    for (int64_t l = 0; l < k; l++) {
        vf b[AXPY_V];
        UNROLL
        for (int j = 0; j < AXPY_V; j++)
            b[j] = vf_load_f32(w + l * AXPY_N + j * VF_LANES);
        UNROLL
        for (int i = 0; i < rows; i++) {
            const vf a = vf_set(x[i * stride + l]);
            UNROLL
            for (int j = 0; j < AXPY_V; j++)
                acc[i][j] = vf_fma(a, b[j], acc[i][j]);
        }
    }
    UNROLL
    for (int i = 0; i < rows; i++)
        UNROLL
    for (int j = 0; j < AXPY_V; j++)
        vf_store_f32(sums + i * AXPY_N + j * VF_LANES, acc[i][j]);
}

static void panel_axpy(const float *x, int64_t stride, int64_t rows, const float *w, int64_t k, float *sums)
{
    int64_t i = 0;
    for (; i + AXPY_M <= rows; i += AXPY_M)
        tile_axpy(AXPY_M, x + i * stride, stride, w, k, sums + i * AXPY_N);
    for (; i < rows; i++)
        tile_axpy(1, x + i * stride, stride, w, k, sums + i * AXPY_N);
}

/* Part of the result: `rows` from `row` on, `columns` from `column` on. */
struct tile { int64_t row, rows, column, columns; };

/* out[row + i][column + j] = sums[i][j] + bias[column + j], rounded once.  Rows of out are `width` apart, of sums
 * `stride`. */
static void store_tile(void *out, int dtype, int64_t width, const struct tile *t, const float *sums, int64_t stride,
                       const float *bias)
{
    for (int64_t i = 0; i < t->rows; i++) {
        const float *sum = sums + i * stride, *add = bias ? bias + t->column : NULL;
        const int64_t at = (t->row + i) * width + t->column;
        if (dtype == TYPE_F32)
            for (int64_t j = 0; j < t->columns; j++)
                ((float *)out)[at + j] = sum[j] + (add ? add[j] : 0.0f);
        else if (dtype == TYPE_F16)
            for (int64_t j = 0; j < t->columns; j++)
                ((bnb_f16 *)out)[at + j] = bnb_to_f16(sum[j] + (add ? add[j] : 0.0f));
        else
            for (int64_t j = 0; j < t->columns; j++)
                ((bnb_bf16 *)out)[at + j] = bnb_to_bf16(sum[j] + (add ? add[j] : 0.0f));
    }
}

#endif
