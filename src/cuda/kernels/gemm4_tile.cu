/*
 * gemm4_tile.cu - products of 16-bit activations with a 4-bit weight by tiles, forward and gradient, from 8.0 on
 */
#include "cuda/kernels/gemm4_tile.cuh"

#if BNB_HAS_DTYPE(BNB_CUDA_F16)
#define T f16
#define NAME(f) f##_f16
#include "cuda/kernels/gemm4_tile.tmpl.cuh"
#undef T
#undef NAME
#endif
#if BNB_HAS_DTYPE(BNB_CUDA_BF16)
#define T bf16
#define NAME(f) f##_bf16
#include "cuda/kernels/gemm4_tile.tmpl.cuh"
#undef T
#undef NAME
#endif
