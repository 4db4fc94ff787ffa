/*
 * gemm4_tile.tmpl.cuh - the kernels of gemm4_tile.cuh (template: included by gemm4_tile.cu once per dtype)
 *
 * Older cards get empty bodies, which nobody launches.  In: T, NAME.
 */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define TILE_BODY(GRAD) (void)p
#else
#define TILE_BODY(GRAD) tile_product<T, GRAD>(p)
#endif

extern "C" __global__ void __launch_bounds__(256, 2) NAME(bnb_k_gemm4_tile)(const IN_PLACE struct bnb_cuda_gemm4_fast p)
{
    TILE_BODY(false);
}

/* out [m, k] = x [m, n] W */
extern "C" __global__ void __launch_bounds__(256, 2)
    NAME(bnb_k_gemm4_tile_grad)(const IN_PLACE struct bnb_cuda_gemm4_fast p)
{
    TILE_BODY(true);
}

#undef TILE_BODY
