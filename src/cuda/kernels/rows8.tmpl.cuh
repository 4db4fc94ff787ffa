/*
 * rows8.tmpl.cuh - LLM.int8()'s quantisers (template: included by rows8.cu once per dtype)
 *
 * A row belongs to a warp: the largest magnitude first, then the codes.  Long ones: rows8_linear.tmpl.cuh.
 * Of columns, a thread reads eight of some rows; their largest magnitudes meet in an atomic maximum, whose result does not
 * depend on the order.
 * In: T, NAME.  Source: Dettmers et al. 2022, "LLM.int8()", section 3.
 */

/* The largest magnitude that this thread sees of a row; flags the columns of outliers. */
DEVICE unsigned NAME(row_bits)(const struct bnb_cuda_rows8 &q, const T *x, int lane)
{
    unsigned largest = 0;
    for (int64_t at = lane * 8; at < q.a.cols; at += 32 * 8) {
        const int count = count8(q.a.cols, at);
        float v[8];
        raw8_values(raw8_load(x + at, count, q.vector), v);
#pragma unroll
        for (int i = 0; i < 8; i++)
            largest = max(largest, stat_bits(v[i], q.a.threshold));
        if (!q.a.outlier)
            continue;
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < count && is_outlier(fabsf(v[i]), q.a.threshold))
                q.a.outlier[at + i] = 1; /* other rows may write the same */
    }
    return largest;
}

extern "C" __global__ void __launch_bounds__(256) NAME(bnb_k_rows8)(const struct bnb_cuda_rows8 q)
{
    const int lane = (int)threadIdx.x % 32;
    const int64_t step = (int64_t)gridDim.x * 8;
    for (int64_t row = (int64_t)blockIdx.x * 8 + (int)threadIdx.x / 32; row < q.a.rows; row += step) {
        const T *x = (const T *)q.a.x + row * q.a.cols;
        int8_t *codes = q.a.codes + row * q.a.cols;
        const float stat = __uint_as_float(warp_max(NAME(row_bits)(q, x, lane)));
        const float r = 127.0f / stat;
        if (lane == 0)
            q.a.stats[row] = stat;
        for (int64_t at = lane * 8; at < q.a.cols; at += 32 * 8) {
            const int count = count8(q.a.cols, at);
            float v[8];
            int c[8];
            raw8_values(raw8_load(x + at, count, q.vector), v);
#pragma unroll
            for (int i = 0; i < 8; i++)
                c[i] = code8_of(v[i], r, q.a.threshold);
            store_codes8(codes + at, count, q.vector, c);
        }
    }
}

/* The statistics, which are zero before. */
extern "C" __global__ void __launch_bounds__(256) NAME(bnb_k_column_stats8)(const struct bnb_cuda_rows8 q)
{
    const int64_t groups = (q.a.cols + 7) / 8, work = groups * ((q.a.rows + COLUMN_ROWS - 1) / COLUMN_ROWS);
    for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < work; i += (int64_t)gridDim.x * 256) {
        const int64_t column = i % groups * 8, first = i / groups * COLUMN_ROWS;
        const int64_t end = first + COLUMN_ROWS < q.a.rows ? first + COLUMN_ROWS : q.a.rows;
        const int count = count8(q.a.cols, column);
        unsigned largest[8] = {};
#pragma unroll 4
        for (int64_t r = first; r < end; r++) {
            float v[8];
            raw8_values(raw8_load((const T *)q.a.x + r * q.a.cols + column, count, q.vector), v);
#pragma unroll
            for (int e = 0; e < 8; e++)
                largest[e] = max(largest[e], stat_bits(v[e], q.a.threshold));
        }
#pragma unroll
        for (int e = 0; e < 8; e++)
            if (e < count && largest[e] > 0)
                atomicMax((unsigned *)q.a.stats + column + e, largest[e]);
    }
}

extern "C" __global__ void __launch_bounds__(256) NAME(bnb_k_column_codes8)(const struct bnb_cuda_rows8 q)
{
    const int64_t groups = (q.a.cols + 7) / 8, work = groups * ((q.a.rows + COLUMN_ROWS - 1) / COLUMN_ROWS);
    for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < work; i += (int64_t)gridDim.x * 256) {
        const int64_t column = i % groups * 8, first = i / groups * COLUMN_ROWS;
        const int64_t end = first + COLUMN_ROWS < q.a.rows ? first + COLUMN_ROWS : q.a.rows;
        const int count = count8(q.a.cols, column);
        float r[8];
#pragma unroll
        for (int e = 0; e < 8; e++)
            r[e] = e < count ? 127.0f / q.a.stats[column + e] : 0.0f;
#pragma unroll 4
        for (int64_t row = first; row < end; row++) {
            const int64_t at = row * q.a.cols + column;
            float v[8];
            int c[8];
            raw8_values(raw8_load((const T *)q.a.x + at, count, q.vector), v);
#pragma unroll
            for (int e = 0; e < 8; e++)
                c[e] = code8_of(v[e], r[e], q.a.threshold);
            store_codes8(q.a.codes + at, count, q.vector, c);
        }
    }
}

/* Eight elements of a thread, which may reach into the next row. */
extern "C" __global__ void __launch_bounds__(256) NAME(bnb_k_derows8)(const struct bnb_cuda_derows8 q)
{
    const int64_t n = q.a.rows * q.a.cols, step = (int64_t)gridDim.x * 2048;
    for (int64_t at = (int64_t)blockIdx.x * 2048 + threadIdx.x * 8; at < n; at += step) {
        const int count = count8(n, at);
        int64_t row = at / q.a.cols, column = at - row * q.a.cols;
        float v[8];
        int c[8];
        load_codes8(q.a.codes + at, count, q.vector, c);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (i < count)
                v[i] = (float)c[i] * q.a.stats[row] * (1.0f / 127.0f);
            if (++column == q.a.cols)
                column = 0, row++;
        }
        store8_some((T *)q.a.out + at, count, q.vector, v);
    }
}
