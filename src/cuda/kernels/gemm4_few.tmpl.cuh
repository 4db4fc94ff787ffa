/*
 * gemm4_few.tmpl.cuh - the kernels of gemm4_few.cuh (template: included by gemm4_few.cu once per dtype)
 *
 * The number in a name is the most rows of activations.  Older cards get empty bodies, which nobody launches.
 * In: T, NAME.
 */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define FEW_BODY(shape) (void)p
#else
#define FEW_BODY(shape) few_product<T, few_shape<shape>>(p)
#endif

extern "C" __global__ void __launch_bounds__(640, 1) NAME(bnb_k_gemm4_few8)(const IN_PLACE struct bnb_cuda_gemm4_wide p)
{
    FEW_BODY(BNB_GEMM4_FEW8);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    NAME(bnb_k_gemm4_few16)(const IN_PLACE struct bnb_cuda_gemm4_wide p)
{
    FEW_BODY(BNB_GEMM4_FEW16);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    NAME(bnb_k_gemm4_few32)(const IN_PLACE struct bnb_cuda_gemm4_wide p)
{
    FEW_BODY(BNB_GEMM4_FEW32);
}

extern "C" __global__ void __launch_bounds__(256, 1)
    NAME(bnb_k_gemm4_few64)(const IN_PLACE struct bnb_cuda_gemm4_wide p)
{
    FEW_BODY(BNB_GEMM4_FEW64);
}

/* The sums of the splits, in their order. */
extern "C" __global__ void __launch_bounds__(256) NAME(bnb_k_gemm4_sum)(const struct bnb_cuda_gemm4_sum s)
{
    const int64_t total = s.m * s.n, step = (int64_t)gridDim.x * 256;
    let_next_launch_come();
    wait_for_launch_before();
    for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < total; i += step) {
        float sum = 0.0f;
        for (int j = 0; j < s.splits; j++)
            sum += s.partial[j * total + i];
        set_value((T *)s.out + i, s.bias ? sum + value_of((const T *)s.bias + i % s.n) : sum);
    }
}

#undef FEW_BODY
