/*
 * gemm8.tmpl.cuh - products with an int8 weight (template: included by gemm8.cu once per dtype)
 *
 * Up to eight rows of activations: a warp for each row of the weight, 16 codes of each lane at a time.  More rows: tiles.
 * The outlier columns are a second, f32 product over the list of columns.  Gradient: the codes as floats, the scales of
 * the weight's rows multiplied into x.
 * In: T, NAME.
 */

/* The sums over the outlier columns of one row of the weight with M rows of x; the lanes take columns in turn. */
template <int M>
DEVICE void NAME(gemv8_outliers)(const struct bnb_cuda_gemm8 &p, int64_t row, int64_t count, float sums[M])
{
    const struct bnb_gemm8_block &g = p.g;
    const float scale = g.col_stats[row] / 127.0f;
#pragma unroll
    for (int i = 0; i < M; i++)
        sums[i] = 0.0f;
    for (int64_t o = threadIdx.x % 32; o < count; o += 32) {
        const int64_t column = g.columns[o];
        const float w = (float)g.b[row * g.k + column] * scale;
#pragma unroll
        for (int i = 0; i < M; i++)
            if (i < g.m)
                sums[i] = __fmaf_rn(outlier8_of(p, i, value_of((const T *)g.x + i * g.k + column)), w, sums[i]);
    }
#pragma unroll
    for (int i = 0; i < M; i++)
        sums[i] = warp_sum(sums[i]);
}

/* One row of the weight with M rows of activations, of which those beyond m repeat the last. */
template <int M> DEVICE void NAME(gemv8_row)(const struct bnb_cuda_gemm8 &p, int64_t row, int64_t count)
{
    const struct bnb_gemm8_block &g = p.g;
    const int lane = (int)threadIdx.x % 32;
    int sums[M] = {};
    float outliers[M] = {};
    for (int64_t l = lane * 16; l < g.k; l += 32 * 16) {
        const uint4 b = codes16_of(g.b + row * g.k, g.k, l, p.codes);
#pragma unroll
        for (int i = 0; i < M; i++)
            sums[i] = dot16(codes16_of(g.a + (i < g.m ? i : g.m - 1) * g.k, g.k, l, p.codes), b, sums[i]);
    }
    if (count > 0)
        NAME(gemv8_outliers)<M>(p, row, count, outliers);
    const float scale = g.sums ? 0.0f : g.col_stats[row] / 16129.0f;
#pragma unroll
    for (int i = 0; i < M; i++) {
        const int sum = warp_sum(sums[i]);
        if (lane > 0 || i >= g.m)
            continue;
        if (g.sums)
            g.sums[i * g.n + row] = sum;
        else
            set_value((T *)g.out + i * g.n + row, biased8(g, row, scaled8(g, i, sum, scale, count > 0, outliers[i])));
    }
}

template <int M> DEVICE void NAME(gemv8_rows)(const struct bnb_cuda_gemm8 &p)
{
    const int64_t step = (int64_t)gridDim.x * (TILE_THREADS / 32), count = outliers8_of(p);
    for (int64_t row = (int64_t)blockIdx.x * (TILE_THREADS / 32) + threadIdx.x / 32; row < p.g.n; row += step)
        NAME(gemv8_row)<M>(p, row, count);
}

/* The forward product of one to eight rows of activations. */
extern "C" __global__ void __launch_bounds__(256) NAME(bnb_k_gemv8)(const struct bnb_cuda_gemm8 p)
{
    if (p.g.m == 1)
        NAME(gemv8_rows)<1>(p);
    else if (p.g.m == 2)
        NAME(gemv8_rows)<2>(p);
    else if (p.g.m <= 4)
        NAME(gemv8_rows)<4>(p);
    else
        NAME(gemv8_rows)<8>(p);
}

/* sums = x W^T over the outlier columns, for one tile. */
DEVICE void NAME(tile_outliers8)(const struct bnb_cuda_gemm8 &p, int64_t row, int64_t column, int64_t count,
                                 float *rows, float *columns, float sums[4][4])
{
    const struct bnb_gemm8_block &g = p.g;
    const int64_t i = row + bring_row(), n = column + bring_row();
    const float scale = n < g.n ? g.col_stats[n] / 127.0f : 0.0f;
    for (int64_t l = 0; l < count; l += DEPTH) {
        float x[8], w[8];
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const int64_t o = l + bring_depth() + e, c = o < count ? g.columns[o] : 0;
            x[e] = o < count && i < g.m ? outlier8_of(p, i, value_of((const T *)g.x + i * g.k + c)) : 0.0f;
            w[e] = o < count && n < g.n ? (float)g.b[n * g.k + c] * scale : 0.0f;
        }
        tile_put_row(rows, x);
        tile_put_row(columns, w);
        __syncthreads();
        tile_multiply(rows, columns, sums);
        __syncthreads();
    }
}

DEVICE void NAME(gemm8_tile)(const struct bnb_cuda_gemm8 &p, int64_t row, int64_t column, int64_t count, float *rows,
                             float *columns)
{
    const struct bnb_gemm8_block &g = p.g;
    int sums[4][4] = {};
    float values[4][4] = {};
    tile_sums8(p, row, column, (unsigned *)rows, (unsigned *)columns, sums);
    if (g.sums) {
        store_sums8(g, row, column, sums);
        return;
    }
    NAME(tile_outliers8)(p, row, column, count, rows, columns, values);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int64_t c = column + tile_column() + j;
        const float scale = c < g.n ? g.col_stats[c] / 16129.0f : 0.0f;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int64_t r = row + tile_row() + i;
            if (r < g.m && c < g.n)
                values[i][j] = biased8(g, c, scaled8(g, r, sums[i][j], scale, count > 0, values[i][j]));
        }
    }
    tile_store((T *)g.out, g.m, g.n, row, column, p.store, values);
}

/* The forward product of any number of rows. */
extern "C" __global__ void __launch_bounds__(256) NAME(bnb_k_gemm8)(const struct bnb_cuda_gemm8 p)
{
    alignas(16) __shared__ float rows[OPERAND], columns[OPERAND];
    const int64_t across = (p.g.n + TILE - 1) / TILE, tiles = (p.g.m + TILE - 1) / TILE * across;
    const int64_t count = outliers8_of(p);
    for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x)
        NAME(gemm8_tile)(p, t / across * TILE, t % across * TILE, count, rows, columns);
}

/* Known sums under their scales: eight of a row for each thread. */
extern "C" __global__ void __launch_bounds__(256) NAME(bnb_k_scale8)(const struct bnb_cuda_gemm8 p)
{
    const struct bnb_gemm8_block &g = p.g;
    const int64_t groups = (g.n + 7) / 8, work = g.m * groups;
    for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < work; i += (int64_t)gridDim.x * 256) {
        const int64_t r = i / groups, c = (i - r * groups) * 8;
        const int count = count8(g.n, c);
        int sums[8] = {};
        float v[8];
        sums8_of(g.product + r * g.n + c, count, p.vector, sums);
#pragma unroll
        for (int e = 0; e < 8; e++)
            v[e] = e < count ? biased8(g, c + e, scaled8(g, r, sums[e], g.col_stats[c + e] / 16129.0f, false, 0.0f))
                             : 0.0f;
        store8_some((T *)g.out + r * g.n + c, count, p.vector, v);
    }
}

/* One tile of out [m, k] = x [m, n] W. */
DEVICE void NAME(gemm8_grad_tile)(const struct bnb_cuda_gemm8 &p, int64_t row, int64_t column, float *rows,
                                  float *columns)
{
    const struct bnb_gemm8_block &g = p.g;
    float sums[4][4] = {};
    for (int64_t l = 0; l < g.n; l += DEPTH) {
        float v[8];
        tile_row_values((const T *)g.x, g.m, g.n, row, l, p.vector, v);
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const int64_t at = l + bring_depth() + e;
            v[e] *= at < g.n ? g.col_stats[at] / 127.0f : 0.0f;
        }
        tile_put_row(rows, v);
        const int64_t i = l + bring_line(), j = column + bring_column();
        codes8_values(g.b + i * g.k + j, i < g.n ? count8(g.k, j) : 0, p.codes, v);
        tile_put_line(columns, v);
        __syncthreads();
        tile_multiply(rows, columns, sums);
        __syncthreads();
    }
    tile_store((T *)g.out, g.m, g.k, row, column, p.store, sums);
}

extern "C" __global__ void __launch_bounds__(256) NAME(bnb_k_gemm8_grad)(const struct bnb_cuda_gemm8 p)
{
    alignas(16) __shared__ float rows[OPERAND], columns[OPERAND];
    const int64_t across = (p.g.k + TILE - 1) / TILE, tiles = (p.g.m + TILE - 1) / TILE * across;
    for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x)
        NAME(gemm8_grad_tile)(p, t / across * TILE, t % across * TILE, rows, columns);
}
