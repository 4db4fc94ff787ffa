/*
 * optim_rmsprop.cu - steps and norms of the rows of the optimizer table that follow the rule rmsprop
 */
#include "cuda/kernels/optim_norms.cuh"

extern "C" __global__ void __launch_bounds__(256, 5) bnb_k_optim_rmsprop(const struct bnb_cuda_optim o)
{
    optim_step<BNB_RULE_RMSPROP>(o);
}

extern "C" __global__ void __launch_bounds__(128, 6) bnb_k_norms_rmsprop(const struct bnb_cuda_optim o)
{
    optim_norms<BNB_RULE_RMSPROP>(o);
}
