/*
 * rows8_linear.tmpl.cuh - the activations of an int8 layer (template: included by rows8_linear.cu once per dtype)
 *
 * In: T, NAME.  Source: Dettmers et al. 2022, "LLM.int8()", section 3.
 */

/* One row, by a block.  Of a row longer than HELD * 2048 elements, the rest is read twice.  Memory is written that others may
 * have read when the launch before is done; the row is on its way by then, and before the next launch comes, whose own
 * loads would keep it waiting.  COLUMNS: top is kept, the largest of the columns that a thread holds. */
template <int HELD, bool COLUMNS>
DEVICE void NAME(held8_row)(const struct bnb_cuda_held8 &q, int64_t row, const struct marks8 &marks,
                            unsigned (&top)[HELD][8], unsigned partial[THREADS / 32])
{
    const T *x = (const T *)q.a.x + row * q.a.cols;
    int8_t *codes = q.a.codes + row * q.a.cols;
    const int64_t held = (int64_t)HELD * THREADS * 8, first = threadIdx.x * 8;
    struct raw8<T> raw[HELD];
    unsigned largest = 0;
    float v[8];
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if (first + i * THREADS * 8 < q.a.cols)
            raw[i] = raw8_load(x + first + i * THREADS * 8, count8(q.a.cols, first + i * THREADS * 8), q.vector);
    wait_for_launch_before();
    let_next_launch_come();
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        if (first + i * THREADS * 8 >= q.a.cols)
            continue;
        raw8_values(raw[i], v);
        largest = max(largest, look8(v, first + i * THREADS * 8, marks));
#pragma unroll
        for (int e = 0; COLUMNS && e < 8; e++)
            top[i][e] = max(top[i][e], stat_bits(v[e], marks.threshold));
    }
    for (int64_t at = first + held; at < q.a.cols; at += THREADS * 8) {
        raw8_values(raw8_load(x + at, count8(q.a.cols, at), q.vector), v);
        largest = max(largest, look8(v, at, marks));
    }

    largest = warp_max(largest);
    __syncthreads(); /* partial was read for the row before */
    if (threadIdx.x % 32 == 0)
        partial[threadIdx.x / 32] = largest;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < THREADS / 32; w++)
        largest = max(largest, partial[w]);
    const float stat = __uint_as_float(largest > INFINITE ? NAN_BITS : largest), inverse = 127.0f / stat;
    const float r = inverse <= FLOAT_MAX ? inverse : 0.0f;
    if (threadIdx.x == 0)
        q.a.stats[row] = stat;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int64_t at = first + i * THREADS * 8;
        if (at >= q.a.cols)
            continue;
        raw8_values(raw[i], v);
        store_eight(codes + at, count8(q.a.cols, at), q.vector, codes8_of(v, r, marks.limit));
    }
    for (int64_t at = first + held; at < q.a.cols; at += THREADS * 8) {
        raw8_values(raw8_load(x + at, count8(q.a.cols, at), q.vector), v);
        store_eight(codes + at, count8(q.a.cols, at), q.vector, codes8_of(v, r, marks.limit));
    }
}

/* The flags of 32 columns, by a block that looks at all rows of them, as bytes and as a word of the mask. */
DEVICE void NAME(find_columns8)(const struct bnb_cuda_held8 &q, int word)
{
    __shared__ unsigned found;
    const int64_t at = (int64_t)word * WORD + threadIdx.x % ACROSS * 8;
    const int count = count8(q.a.cols, at);
    unsigned bits = 0;
    if (threadIdx.x == 0)
        found = 0;
    for (int64_t first = threadIdx.x / ACROSS; count > 0 && first < q.a.rows; first += THREADS / ACROSS * AHEAD) {
        struct raw8<T> raw[AHEAD] = {};
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int64_t row = first + i * (THREADS / ACROSS);
            if (row < q.a.rows)
                raw[i] = raw8_load((const T *)q.a.x + row * q.a.cols + at, count, q.vector);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            float v[8];
            raw8_values(raw[i], v);
#pragma unroll
            for (int e = 0; e < 8; e++)
                bits |= is_outlier(fabsf(v[e]), q.a.threshold) ? 1u << e : 0u;
        }
    }
    bits <<= threadIdx.x % ACROSS * 8;
#pragma unroll
    for (int o = 16; o > 0; o /= 2)
        bits |= __shfl_xor_sync(0xffffffffu, bits, o);
    __syncthreads();
    if (threadIdx.x % 32 == 0 && bits)
        atomicOr(&found, bits);
    __syncthreads();
    give_flags8(q, word, found);
}

template <int HELD, bool COLUMNS> DEVICE void NAME(held8_rows)(const struct bnb_cuda_held8 &q)
{
    __shared__ unsigned partial[THREADS / 32];
    const bool notes = q.mask && !q.row_blocks;
    const struct marks8 marks = marks8_of(q.a, notes ? own_marks : nullptr, !q.row_blocks);
    const int64_t blocks = q.row_blocks ? q.row_blocks : gridDim.x;
    unsigned top[HELD][8] = {};
    if (notes)
        clear_marks8(q, own_marks);
    else /* or the launch before cleared flags, and has waited for what made x */
        wait_for_launch_before();
    if (blockIdx.x >= blocks) {
        let_next_launch_come();
        NAME(find_columns8)(q, (int)(blockIdx.x - blocks));
        return;
    }
    for (int64_t row = blockIdx.x; row < q.a.rows; row += blocks)
        NAME(held8_row)<HELD, COLUMNS>(q, row, marks, top, partial);
    if (notes)
        add_marks8(q, own_marks);
#pragma unroll
    for (int i = 0; COLUMNS && i < HELD * 8; i++) {
        const int64_t column = threadIdx.x * 8 + i / 8 * THREADS * 8 + i % 8;
        if (column < q.a.cols && top[i / 8][i % 8] > 0)
            atomicMax((unsigned *)q.column_stats + column, top[i / 8][i % 8]);
    }
}

extern "C" __global__ void __launch_bounds__(256) NAME(bnb_k_linear8_rows)(const struct bnb_cuda_held8 q)
{
    NAME(held8_rows)<SHORT_PARTS, false>(q);
}

extern "C" __global__ void __launch_bounds__(256) NAME(bnb_k_linear8_long)(const struct bnb_cuda_held8 q)
{
    NAME(held8_rows)<PARTS, false>(q);
}

/* Statistics of rows of up to 16384 elements and of columns, and codes by row. */
extern "C" __global__ void __launch_bounds__(256) NAME(bnb_k_both8)(const struct bnb_cuda_held8 q)
{
    NAME(held8_rows)<PARTS, true>(q);
}
