/*
 * rows8.cu - LLM.int8()'s quantisers by row and by column, and the inverse, for f32, f16 and bf16: NUMERICS rule 33
 */
#include "cuda/kernels/rows8.cuh"

/* Rows of a column that a thread reads. */
enum { COLUMN_ROWS = 16 };

/* Eight codes as they lie in memory. */
DEVICE void store_codes8(int8_t *p, int count, int vector, const int c[8])
{
    if (vector && count == 8) {
        unsigned w[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < 8; i++)
            w[i / 4] |= (unsigned)(c[i] & 255) << 8 * (i % 4);
        *(uint2 *)p = make_uint2(w[0], w[1]);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < count)
            p[i] = (int8_t)c[i];
}

DEVICE void load_codes8(const int8_t *p, int count, int vector, int c[8])
{
    const uint2 w = vector && count == 8 ? __ldcs((const uint2 *)p) : make_uint2(0, 0);
#pragma unroll
    for (int i = 0; i < 8; i++)
        c[i] = vector && count == 8 ? (int8_t)((i < 4 ? w.x : w.y) >> 8 * (i % 4)) : i < count ? p[i] : 0;
}

/* When all rows are known: the codes of the columns whose flag is set become 0.  A thread looks at four columns of 64
 * rows. */
extern "C" __global__ void __launch_bounds__(256) bnb_k_clear8(const struct bnb_rows_args a)
{
    const int64_t groups = (a.cols + 3) / 4, work = groups * ((a.rows + 63) / 64);
    for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < work; i += (int64_t)gridDim.x * 256) {
        const int64_t column = i % groups * 4, first = i / groups * 64;
        const int64_t end = first + 64 < a.rows ? first + 64 : a.rows;
        for (int64_t c = column; c < column + 4 && c < a.cols; c++)
            for (int64_t r = first; a.outlier[c] && r < end; r++)
                a.codes[r * a.cols + c] = 0;
    }
}

#if BNB_HAS_DTYPE(BNB_CUDA_F32)
#define T float
#define NAME(f) f##_f32
#include "cuda/kernels/rows8.tmpl.cuh"
#undef T
#undef NAME
#endif
#if BNB_HAS_DTYPE(BNB_CUDA_F16)
#define T f16
#define NAME(f) f##_f16
#include "cuda/kernels/rows8.tmpl.cuh"
#undef T
#undef NAME
#endif
#if BNB_HAS_DTYPE(BNB_CUDA_BF16)
#define T bf16
#define NAME(f) f##_bf16
#include "cuda/kernels/rows8.tmpl.cuh"
#undef T
#undef NAME
#endif
