/*
 * gemm8.h - products with an int8 weight, in the words of simd_*.h
 *
 * Forward: exact int32 dot products of packed operands; then scales, bias and the outlier columns, which are multiplied
 * in f32 with the dequantised weight.  Gradient: the codes as floats; the launcher has put the scales into x.
 */
#ifndef BNB_CPU_GEMM8_H
#define BNB_CPU_GEMM8_H

static void pack8(const int8_t *a, int64_t n, int64_t padded, void *out)
{
    dot_a *p = out;
    int64_t i = 0;
    for (; i < n; i++)
        p[i] = (dot_a)(a[i] + DOT_SHIFT);
    for (; i < padded; i++)
        p[i] = 0; /* meets a zero of the weight */
}

/* One row of the weight into a panel, zero beyond n. */
static void pack8_weight(const int8_t *b, int64_t n, int64_t padded, dot_b *out)
{
    int64_t i = 0;
    for (; i < n; i++)
        out[i] = b[i];
    for (; i < padded; i++)
        out[i] = 0;
}

/* What DOT_SHIFT added to the sums with each row of the weight, taken back. */
static void take_back_shift(const dot_b *const b[TILE_N], int64_t k, int64_t rows, int32_t (*sums)[TILE_N])
{
    dot_a ones[PANEL_K8];
    const dot_a *row[TILE_M8] = {ones};
    int32_t total[1][TILE_N] = {{0}};
    for (int64_t l = 0; l < k; l++)
        ones[l] = 1;
    tile_dot8(1, row, b, k, total);
    for (int64_t i = 0; i < rows; i++)
        for (int j = 0; j < TILE_N; j++)
            sums[i][j] = (int32_t)((uint32_t)sums[i][j] - (uint32_t)DOT_SHIFT * (uint32_t)total[0][j]);
}

/* sums = a b^T for one tile of columns and up to PANEL_M rows.  With few rows of a, whole
 * rows of bytes are read where they are. */
static void tile_sums8(const struct bnb_gemm8_block *g, const dot_a *a, int64_t stride, int64_t rows, int64_t column,
                       int64_t columns, int32_t (*sums)[TILE_N])
{
    dot_b panel[TILE_N * PANEL_STRIDE8];
    const dot_b *w[TILE_N];
    memset(sums, 0, (size_t)rows * sizeof sums[0]);
    for (int64_t l = 0; l < g->k; l += PANEL_K8) {
        const int64_t k = smaller(PANEL_K8, g->k - l), whole = (k + DOT_LANES - 1) / DOT_LANES * DOT_LANES;
        for (int64_t j = 0; j < TILE_N; j++) {
            const int8_t *b = g->b + (column + j) * g->k + l;
            const bool in_place = sizeof(dot_b) == 1 && k == whole && j < columns && rows <= TILE_M;
            w[j] = in_place ? (const dot_b *)(const void *)b : panel + j * PANEL_STRIDE8;
            if (!in_place)
                pack8_weight(b, j < columns ? k : 0, whole, panel + j * PANEL_STRIDE8);
        }
        panel_dot8(a + l, stride, rows, w, whole, sums);
        if (DOT_SHIFT)
            take_back_shift(w, whole, rows, sums);
    }
}

/* values += x[:, outlier columns] W[:, outlier columns]^T; d->x holds those columns of the activations. */
static void add_outliers(const struct bnb_gemm8_block *g, const struct bnb_dense_args *d, int64_t row, int64_t rows,
                         int64_t column, int64_t columns, float (*values)[TILE_N])
{
    float w[TILE_N * PANEL_STRIDE];
    memset(w, 0, sizeof w);
    for (int64_t l = 0; l < g->outliers; l += PANEL_K) {
        const int64_t k = smaller(PANEL_K, g->outliers - l), whole = (k + VF_LANES - 1) / VF_LANES * VF_LANES;
        for (int64_t j = 0; j < columns; j++) {
            const int8_t *b = g->b + (column + j) * g->k;
            const float scale = g->col_stats[column + j] / 127.0f;
            for (int64_t i = 0; i < whole; i++)
                w[j * PANEL_STRIDE + i] = i < k ? (float)b[g->columns[l + i]] * scale : 0.0f;
        }
        panel_dot(d->x + row * d->stride + l, d->stride, rows, w, whole, values);
    }
}

static void finish8(const struct bnb_gemm8_block *g, const struct bnb_dense_args *d, int64_t row, int64_t rows,
                    int64_t column, int64_t columns, int32_t (*sums)[TILE_N])
{
    float values[PANEL_M][TILE_N], scale[TILE_N];
    for (int64_t j = 0; j < TILE_N; j++)
        scale[j] = j < columns ? g->col_stats[column + j] / 16129.0f : 0.0f;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < TILE_N; j++)
            values[i][j] = (float)sums[i][j] * (g->row_stats[row + i] * scale[j]);
    if (g->outliers > 0)
        add_outliers(g, d, row, rows, column, columns, values);
    store_tile(g->out, d->dtype, g->n, &(struct tile){row, rows, column, columns}, &values[0][0], TILE_N, d->bias);
}

/* One tile of columns of the forward product; `packed` is a, or unused where the product is given. */
static void gemm8_dot(const struct bnb_gemm8_block *g, const struct bnb_dense_args *d, const void *packed,
                      int64_t stride, int64_t first, int64_t end)
{
    int32_t sums[PANEL_M][TILE_N];
    for (int64_t t = first; t < end; t++) {
        const int64_t column = t * TILE_N, columns = smaller(TILE_N, g->n - column);
        for (int64_t row = 0; row < g->m; row += PANEL_M) {
            const int64_t rows = smaller(PANEL_M, g->m - row);
            if (g->product) {
                for (int64_t i = 0; i < rows; i++)
                    for (int64_t j = 0; j < TILE_N; j++)
                        sums[i][j] = j < columns ? g->product[(row + i) * g->n + column + j] : 0;
            } else {
                tile_sums8(g, (const dot_a *)packed + row * stride, stride, rows, column, columns, sums);
            }
            for (int64_t i = 0; g->sums && i < rows; i++)
                memcpy(g->sums + (row + i) * g->n + column, sums[i], (size_t)columns * sizeof(int32_t));
            if (!g->sums)
                finish8(g, d, row, rows, column, columns, sums);
        }
    }
}

/* One tile of columns of x W. */
static void gemm8_axpy(const struct bnb_gemm8_block *g, const struct bnb_dense_args *d, int64_t first, int64_t end)
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
                for (int64_t i = 0; i < k; i++) {
                    const int8_t *b = g->b + (l + i) * g->k + column;
                    for (int64_t j = 0; j < columns; j++)
                        w[i * AXPY_N + j] = (float)b[j];
                }
                panel_axpy(d->x + row * d->stride + l, d->stride, rows, w, k, sums);
            }
            store_tile(g->out, d->dtype, g->k, &(struct tile){row, rows, column, columns}, sums, AXPY_N, NULL);
        }
    }
}

#endif
