/*
 * optim_ademamix.cu - steps and norms of the rows of the optimizer table that follow the rule ademamix
 */
#include "cuda/kernels/optim_norms.cuh"

extern "C" __global__ void __launch_bounds__(256, 3) bnb_k_optim_ademamix(const struct bnb_cuda_optim o)
{
    optim_step<BNB_RULE_ADEMAMIX>(o);
}

extern "C" __global__ void __launch_bounds__(128, 4) bnb_k_norms_ademamix(const struct bnb_cuda_optim o)
{
    optim_norms<BNB_RULE_ADEMAMIX>(o);
}
