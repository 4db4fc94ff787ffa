/*
 * gemm4.tmpl.cuh - products with a 4-bit weight (template: included by gemm4.cu once per dtype)
 *
 * Up to eight rows of activations: a warp for each row of the weight, whose lanes take 32 codes at a time and apply the
 * scale to the sum of these.  More rows, and the gradient: tiles, for which the weight is decoded into shared memory.
 * In: T, NAME.
 */

/* M rows of activations, of which those beyond m repeat the last. */
template <int M>
DEVICE void NAME(gemv4_row)(const struct bnb_cuda_gemm4 &p, const float *values, int64_t row, float sums[M])
{
    const int64_t k = p.g.k, start = row * k;
    const int lane = (int)threadIdx.x % 32;
    const T *x[M];
#pragma unroll
    for (int i = 0; i < M; i++) {
        x[i] = (const T *)p.g.x + (i < p.g.m ? i : p.g.m - 1) * k;
        sums[i] = 0.0f;
    }
    for (int64_t l = lane * 32; p.vector && l < k; l += 32 * 32) {
        const uint4 codes = __ldcs((const uint4 *)(p.g.codes + (start + l) / 2));
        const float scale = bnb_block_scale(&p.g.scale, (start + l) >> p.shift);
        const unsigned word[4] = {codes.x, codes.y, codes.z, codes.w};
        float part[M] = {};
#pragma unroll
        for (int w = 0; w < 4; w++)
#pragma unroll
            for (int i = 0; i < M; i++) {
                float v[8];
                values8_of(x[i] + l + 8 * w, 8, 1, v);
#pragma unroll
                for (int e = 0; e < 8; e++)
                    part[i] = __fmaf_rn(values[code4_of(word[w], e)], v[e], part[i]);
            }
#pragma unroll
        for (int i = 0; i < M; i++)
            sums[i] = __fmaf_rn(part[i], scale, sums[i]);
    }
    for (int64_t l = lane; !p.vector && l < k; l += 32) {
        const float w = weight4_at(p, values, start + l);
#pragma unroll
        for (int i = 0; i < M; i++)
            sums[i] = __fmaf_rn(w, value_of(x[i] + l), sums[i]);
    }
}

template <int M> DEVICE void NAME(gemv4_rows)(const struct bnb_cuda_gemm4 &p, const float *values)
{
    const int64_t n = p.g.n, step = (int64_t)gridDim.x * (TILE_THREADS / 32);
    for (int64_t row = (int64_t)blockIdx.x * (TILE_THREADS / 32) + threadIdx.x / 32; row < n; row += step) {
        float sums[M];
        NAME(gemv4_row)<M>(p, values, row, sums);
        const float bias = p.g.bias ? value_of((const T *)p.g.bias + row) : 0.0f;
#pragma unroll
        for (int i = 0; i < M; i++) {
            const float sum = warp_sum(sums[i]);
            if (threadIdx.x % 32 == 0 && i < p.g.m)
                set_value((T *)p.g.out + i * n + row, sum + bias);
        }
    }
}

/* out = x W^T + bias for one to eight rows of x. */
extern "C" __global__ void __launch_bounds__(256) NAME(bnb_k_gemv4)(const struct bnb_cuda_gemm4 p)
{
    __shared__ float values[16];
    load_values4(p, values);
    if (p.g.m == 1)
        NAME(gemv4_rows)<1>(p, values);
    else if (p.g.m == 2)
        NAME(gemv4_rows)<2>(p, values);
    else if (p.g.m <= 4)
        NAME(gemv4_rows)<4>(p, values);
    else
        NAME(gemv4_rows)<8>(p, values);
}

/* One tile of out [m, outer]: GRAD says along which side of the weight the sum runs. */
template <bool GRAD>
DEVICE void NAME(gemm4_tile)(const struct bnb_cuda_gemm4 &p, const struct walk_tile<int64_t> &t, const float *values,
                             float *rows, float *columns)
{
    const struct bnb_gemm4_block &g = p.g;
    const int64_t inner = GRAD ? g.n : g.k, outer = GRAD ? g.k : g.n, column = t.column * TILE;
    const int64_t start = t.expert * g.n * g.k;
    float sums[4][4] = {};
    for (int64_t l = 0; l < inner; l += DEPTH) {
        float v[8];
        tile_row_values((const T *)g.x, t.end, inner, t.token, l, p.vector, v);
        tile_put_row(rows, v);
        if (GRAD) {
            const int64_t i = l + bring_line(), j = column + bring_column();
            weight4_values(p, values, start + i * g.k + j, i < inner ? count8(outer, j) : 0, v);
            tile_put_line(columns, v);
        } else {
            const int64_t i = column + bring_row(), j = l + bring_depth();
            weight4_values(p, values, start + i * g.k + j, i < outer ? count8(inner, j) : 0, v);
            tile_put_row(columns, v);
        }
        __syncthreads();
        tile_multiply(rows, columns, sums);
        __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int64_t at = column + tile_column() + j;
        const float bias = g.bias && at < outer ? value_of((const T *)g.bias + t.expert * outer + at) : 0.0f;
#pragma unroll
        for (int i = 0; i < 4; i++)
            sums[i][j] += bias;
    }
    tile_store((T *)g.out, t.end, outer, t.token, column, p.store, sums);
}

template <bool GRAD> DEVICE void NAME(gemm4_tiles)(const struct bnb_cuda_gemm4 &p)
{
    __shared__ float values[16];
    alignas(16) __shared__ float rows[OPERAND], columns[OPERAND];
    const int64_t across = ((GRAD ? p.g.k : p.g.n) + TILE - 1) / TILE;
    const struct walk_work work = {p.g.first, p.g.m, p.g.first ? (int)p.g.experts : 1, 1};
    struct walk<int64_t> w = {(int64_t)blockIdx.x, 0, 0};
    struct walk_tile<int64_t> t;
    load_values4(p, values);
    while (walk_next(work, TILE, across, (int)gridDim.x, &w, &t))
        NAME(gemm4_tile)<GRAD>(p, t, values, rows, columns);
}

extern "C" __global__ void __launch_bounds__(256) NAME(bnb_k_gemm4)(const struct bnb_cuda_gemm4 p)
{
    NAME(gemm4_tiles)<false>(p);
}

/* out [m, k] = x [m, n] W */
extern "C" __global__ void __launch_bounds__(256) NAME(bnb_k_gemm4_grad)(const struct bnb_cuda_gemm4 p)
{
    NAME(gemm4_tiles)<true>(p);
}
