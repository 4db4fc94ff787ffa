/*
 * gemm4_wide.cu - products of 16-bit activations with a 4-bit weight, forward and gradient, on compute capability 9.0
 */
#include "cuda/kernels/gemm4_wide_kernel.cuh"

#if BNB_HAS_DTYPE(BNB_CUDA_F16)
#define T f16
#define NAME(f) f##_f16
#include "cuda/kernels/gemm4_wide.tmpl.cuh"
#undef T
#undef NAME
#endif
#if BNB_HAS_DTYPE(BNB_CUDA_BF16)
#define T bf16
#define NAME(f) f##_bf16
#include "cuda/kernels/gemm4_wide.tmpl.cuh"
#undef T
#undef NAME
#endif
