/*
 * gemm4_wide.tmpl.cuh - the kernels of gemm4_wide_kernel.cuh (template: included by gemm4_wide.cu once per dtype)
 *
 * The number in a name is that of the rows of activations in a tile.  In: T, NAME.
 */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "compute capability 9.0 is built as 90a: without it there would be no body here"
#endif
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WIDE_BODY(...) wide_product<T, wide_shape<__VA_ARGS__>>(p)
#else
#define WIDE_BODY(...) (void)p
#endif

extern "C" __global__ void __launch_bounds__(640, 1)
    NAME(bnb_k_gemm4_wide32)(const IN_PLACE struct bnb_cuda_gemm4_wide p)
{
    WIDE_BODY(32, WIDE_SUMS);
}

extern "C" __global__ void __launch_bounds__(640, 1)
    NAME(bnb_k_gemm4_wide64)(const IN_PLACE struct bnb_cuda_gemm4_wide p)
{
    WIDE_BODY(64, WIDE_SUMS);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    NAME(bnb_k_gemm4_wide128)(const IN_PLACE struct bnb_cuda_gemm4_wide p)
{
    WIDE_BODY(128, WIDE_WEIGHTS);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    NAME(bnb_k_gemm4_wide256)(const IN_PLACE struct bnb_cuda_gemm4_wide p)
{
    WIDE_BODY(256, WIDE_WEIGHTS);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    NAME(bnb_k_gemm4_meet128)(const IN_PLACE struct bnb_cuda_gemm4_wide p)
{
    WIDE_BODY(128, WIDE_WEIGHTS, true);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    NAME(bnb_k_gemm4_meet256)(const IN_PLACE struct bnb_cuda_gemm4_wide p)
{
    WIDE_BODY(256, WIDE_WEIGHTS, true);
}

/* out [m, k] = x [m, n] W */
extern "C" __global__ void __launch_bounds__(384, 1)
    NAME(bnb_k_gemm4_wide_grad128)(const IN_PLACE struct bnb_cuda_gemm4_wide p)
{
    WIDE_BODY(128, WIDE_GRAD);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    NAME(bnb_k_gemm4_wide_grad256)(const IN_PLACE struct bnb_cuda_gemm4_wide p)
{
    WIDE_BODY(256, WIDE_GRAD);
}

#undef WIDE_BODY
