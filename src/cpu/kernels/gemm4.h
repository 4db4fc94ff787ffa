/*
 * gemm4.h - products with a 4-bit weight, in the words of simd_*.h
 *
 * The weight is decoded from where it lies, a few rows or columns at a time, into a panel that stays in the first-level
 * cache and serves up to PANEL_M rows of activations.  A few rows of activations take another way: gemv4 decodes into
 * registers, multiplies unscaled, and applies the scale once per block.  Rows may begin anywhere in a block.
 */
#ifndef BNB_CPU_GEMM4_H
#define BNB_CPU_GEMM4_H

static ALWAYS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Elements at .. at + n - 1 of the weight, all of one block: decoded with its 16 products. */
static ALWAYS_INLINE void decode4_block(const uint8_t *codes, int64_t at, int64_t n, const float *product, float *out)
{
    enum { GROUP = 4 * VF_LANES };
    const lut16 value = lut16_load(product);
    int64_t i = 0;
    if (at % 2 != 0) {
        out[0] = product[codes[at / 2] & 15];
        i = 1;
    }
    for (; i + GROUP <= n; i += GROUP) {
        vi c[4];
        group_load_u4(codes + (at + i) / 2, c);
        for (int k = 0; k < 4; k++)
            vf_store_f32(out + i + k * VF_LANES, lut16_at(value, c[k]));
    }
    if (i < n) {
        uint8_t rest[GROUP / 2] = {0};
        float decoded[GROUP];
        vi c[4];
        memcpy(rest, codes + (at + i) / 2, (size_t)(n - i + 1) / 2);
        group_load_u4(rest, c);
        for (int k = 0; k < 4; k++)
            vf_store_f32(decoded + k * VF_LANES, lut16_at(value, c[k]));
        memcpy(out + i, decoded, (size_t)(n - i) * sizeof(float));
    }
}

static void decode4_range(const struct bnb_gemm4_block *g, int64_t at, int64_t n, float *out)
{
    const int shift = __builtin_ctzll((unsigned long long)g->block); /* a power of two */
    while (n > 0) {
        const int64_t b = at >> shift, here = smaller(n, ((b + 1) << shift) - at);
        const float scale = bnb_block_scale(&g->scale, b);
        float product[16];
        for (int k = 0; k < 16; k++)
            product[k] = g->code[k] * scale;
        decode4_block(g->codes, at, here, product, out);
        at += here;
        out += here;
        n -= here;
    }
}

/* One tile of columns of x W^T, for PANEL_M rows at a time. */
static void gemm4_dot(const struct bnb_gemm4_block *g, const struct bnb_dense_args *d, int64_t first, int64_t end)
{
    float w[TILE_N * PANEL_STRIDE];
    float sums[PANEL_M][TILE_N];
    for (int64_t t = first; t < end; t++) {
        const int64_t column = t * TILE_N, columns = smaller(TILE_N, g->n - column);
        memset(w, 0, sizeof w); /* rows beyond the weight, and the end of its rows, count as zero */
        for (int64_t row = 0; row < g->m; row += PANEL_M) {
            const int64_t rows = smaller(PANEL_M, g->m - row);
            memset(sums, 0, sizeof sums);
            for (int64_t l = 0; l < g->k; l += PANEL_K) {
                const int64_t k = smaller(PANEL_K, g->k - l), whole = (k + VF_LANES - 1) / VF_LANES * VF_LANES;
                for (int64_t j = 0; j < columns; j++) {
                    decode4_range(g, g->start + (column + j) * g->k + l, k, w + j * PANEL_STRIDE);
                    for (int64_t z = k; z < whole; z++)
                        w[j * PANEL_STRIDE + z] = 0.0f;
                }
                panel_dot(d->x + row * d->stride + l, d->stride, rows, w, whole, sums);
            }
            store_tile(g->out, d->dtype, g->n, &(struct tile){row, rows, column, columns}, &sums[0][0], TILE_N,
                       d->bias);
        }
    }
}

/* One tile of columns of x W. */
static void gemm4_axpy(const struct bnb_gemm4_block *g, const struct bnb_dense_args *d, int64_t first, int64_t end)
{
    enum { ROWS = 48 };
    float w[AXPY_K * AXPY_N];
    float sums[ROWS * AXPY_N];
    for (int64_t t = first; t < end; t++) {
        const int64_t column = t * AXPY_N, columns = smaller(AXPY_N, g->k - column);
        memset(w, 0, sizeof w);
        for (int64_t row = 0; row < g->m; row += ROWS) {
            const int64_t rows = smaller(ROWS, g->m - row);
            memset(sums, 0, sizeof sums);
            for (int64_t l = 0; l < g->n; l += AXPY_K) {
                const int64_t k = smaller(AXPY_K, g->n - l);
                for (int64_t i = 0; i < k; i++)
                    decode4_range(g, g->start + (l + i) * g->k + column, columns, w + i * AXPY_N);
                panel_axpy(d->x + row * d->stride + l, d->stride, rows, w, k, sums);
            }
            store_tile(g->out, d->dtype, g->k, &(struct tile){row, rows, column, columns}, sums, AXPY_N, NULL);
        }
    }
}

/* A run of x in the order in which gemv4 decodes weights: of 2 VF_LANES elements, the even ones, then the odd ones. */
static void pack_pairs(const float *x, int64_t k, float *out)
{
    for (int64_t i = 0; i < k; i += 2 * VF_LANES)
        for (int j = 0; j < VF_LANES; j++) {
            out[i + j] = x[i + 2 * j];
            out[i + VF_LANES + j] = x[i + 2 * j + 1];
        }
}

/* The dot products of one row of the weight with up to GEMV_ROWS rows of packed x; k and block are whole runs.  A byte
 * is an index as it is: the look-up reads its low four bits alone. */
static ALWAYS_INLINE void gemv4_row(const struct bnb_gemm4_block *g, const struct bnb_dense_args *d, int rows,
                                    int64_t column, lut16 value, float (*sums)[TILE_N])
{
    const int shift = __builtin_ctzll((unsigned long long)g->block);
    const float *x = d->x;
    vf sum[GEMV_ROWS];
    UNROLL
    for (int i = 0; i < rows; i++)
        sum[i] = vf_set(0.0f);
    int64_t at = g->start + column * g->k;
    for (const int64_t stop = at + g->k; at < stop;) {
        const int64_t b = at >> shift, end = smaller(stop, (b + 1) << shift);
        vf even[GEMV_ROWS], odd[GEMV_ROWS];
        UNROLL
        for (int i = 0; i < rows; i++)
            even[i] = odd[i] = vf_set(0.0f);
        for (; at < end; at += 2 * VF_LANES, x += 2 * VF_LANES) {
            const vi bytes = vi_load_u8(g->codes + at / 2);
            const vf w_even = lut16_at(value, vi_div16(bytes)), w_odd = lut16_at(value, bytes);
            UNROLL
            for (int i = 0; i < rows; i++) {
                even[i] = vf_fma(w_even, vf_load_f32(x + i * d->stride), even[i]);
                odd[i] = vf_fma(w_odd, vf_load_f32(x + i * d->stride + VF_LANES), odd[i]);
            }
        }
        const vf scale = vf_set(bnb_block_scale(&g->scale, b));
        UNROLL
        for (int i = 0; i < rows; i++)
            sum[i] = vf_fma(vf_add(even[i], odd[i]), scale, sum[i]);
    }
    UNROLL
    for (int i = 0; i < rows; i++)
        sums[i][column % TILE_N] = vf_hsum(sum[i]);
}

static ALWAYS_INLINE void gemv4_tiles(const struct bnb_gemm4_block *g, const struct bnb_dense_args *d, int rows,
                                      int64_t first, int64_t end)
{
    const lut16 value = lut16_load(g->code);
    for (int64_t t = first; t < end; t++) {
        const int64_t column = t * TILE_N, columns = smaller(TILE_N, g->n - column);
        float sums[GEMV_ROWS][TILE_N];
        for (int64_t j = 0; j < columns; j++)
            gemv4_row(g, d, rows, column + j, value, sums);
        store_tile(g->out, d->dtype, g->n, &(struct tile){0, rows, column, columns}, &sums[0][0], TILE_N, d->bias);
    }
}

static void gemv4(const struct bnb_gemm4_block *g, const struct bnb_dense_args *d, int64_t first, int64_t end)
{
    switch (g->m) {
    case 1:
        gemv4_tiles(g, d, 1, first, end);
        break;
    case 2:
        gemv4_tiles(g, d, 2, first, end);
        break;
    case 3:
        gemv4_tiles(g, d, 3, first, end);
        break;
    default:
        gemv4_tiles(g, d, GEMV_ROWS, first, end);
    }
}

#endif
