/*
 * gemm4_few.cu - products of 1 to 64 rows of 16-bit activations with a 4-bit weight, from compute capability 8.0 on
 */
#include "cuda/kernels/gemm4_few.cuh"

#if BNB_HAS_DTYPE(BNB_CUDA_F16)
#define T f16
#define NAME(f) f##_f16
#include "cuda/kernels/gemm4_few.tmpl.cuh"
#undef T
#undef NAME
#endif
#if BNB_HAS_DTYPE(BNB_CUDA_BF16)
#define T bf16
#define NAME(f) f##_bf16
#include "cuda/kernels/gemm4_few.tmpl.cuh"
#undef T
#undef NAME
#endif
