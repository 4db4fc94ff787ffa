/*
 * gemm4.cu - products with a 4-bit weight, forward and gradient, for f32, f16 and bf16: NUMERICS rules 30 and 31
 *
 * The weight is decoded on the way to the product.  Its rows may begin anywhere: at an odd element, in mid-block.
 */
#include "cuda/kernels/gemm4_walk.cuh"
#include "cuda/kernels/gemm_tile.cuh"

/* The 16 values of the type into shared memory. */
DEVICE void load_values4(const struct bnb_cuda_gemm4 &p, float *values)
{
    if (threadIdx.x < 16)
        values[threadIdx.x] = p.type > 0 ? bnb_values4[p.type - 1][threadIdx.x] : p.g.code[threadIdx.x];
    __syncthreads();
}

/* Code i of eight as they lie in memory: element 0 in the high nibble of the lowest byte. */
DEVICE unsigned code4_of(unsigned word, int i) { return word >> (8 * (i / 2) + (i % 2 ? 0 : 4)) & 15u; }

DEVICE float weight4_at(const struct bnb_cuda_gemm4 &p, const float *values, int64_t at)
{
    const unsigned code = p.g.codes[at / 2] >> (at % 2 ? 0 : 4) & 15;
    return values[code] * bnb_block_scale(&p.g.scale, at >> p.shift);
}

/* Elements at .. at + count - 1 of the weight, the rest of the eight zero. */
DEVICE void weight4_values(const struct bnb_cuda_gemm4 &p, const float *values, int64_t at, int count, float v[8])
{
    if (p.whole && count == 8) { /* all of one block */
        const unsigned word = __ldg((const unsigned *)(p.g.codes + at / 2));
        const float scale = bnb_block_scale(&p.g.scale, at >> p.shift);
#pragma unroll
        for (int i = 0; i < 8; i++)
            v[i] = values[code4_of(word, i)] * scale;
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        v[i] = i < count ? weight4_at(p, values, at + i) : 0.0f;
}

#if BNB_HAS_DTYPE(BNB_CUDA_F32)
#define T float
#define NAME(f) f##_f32
#include "cuda/kernels/gemm4.tmpl.cuh"
#undef T
#undef NAME
#endif
#if BNB_HAS_DTYPE(BNB_CUDA_F16)
#define T f16
#define NAME(f) f##_f16
#include "cuda/kernels/gemm4.tmpl.cuh"
#undef T
#undef NAME
#endif
#if BNB_HAS_DTYPE(BNB_CUDA_BF16)
#define T bf16
#define NAME(f) f##_bf16
#include "cuda/kernels/gemm4.tmpl.cuh"
#undef T
#undef NAME
#endif
