/*
 * launch_optim.c - one optimizer step over many tensors on CUDA: a table of them, then one launch
 */
#include "cuda/optim_table.h"

enum { THREADS = 256 };

bnb_status bnb_cuda_optim_step(const bnb_exec *ex, const bnb_optim_config *config, const bnb_optim_tensor *tensors,
                               size_t count)
{
    static struct bnb_cuda_kernel kernels[BNB_RULE_COUNT] = {
        [BNB_RULE_ADAM] = {.image = "optim_adam", .name = "bnb_k_optim_adam", .dtype = -1, .threads = THREADS},
        [BNB_RULE_ADEMAMIX] = {.image = "optim_ademamix",
                               .name = "bnb_k_optim_ademamix",
                               .dtype = -1,
                               .threads = THREADS},
        [BNB_RULE_MOMENTUM] = {.image = "optim_momentum",
                               .name = "bnb_k_optim_momentum",
                               .dtype = -1,
                               .threads = THREADS},
        [BNB_RULE_LION] = {.image = "optim_lion", .name = "bnb_k_optim_lion", .dtype = -1, .threads = THREADS},
        [BNB_RULE_RMSPROP] = {
            .image = "optim_rmsprop", .name = "bnb_k_optim_rmsprop", .dtype = -1, .threads = THREADS}};
    struct bnb_cuda_call c;
    struct bnb_cuda_step s;
    if (count == 0)
        return BNB_OK;
    bnb_status status = bnb_cuda_begin(&c, ex, "optim_step");
    if (status)
        return status;
    status = bnb_cuda_step_open(&c, &s, config, tensors, count, BNB_CUDA_CHUNK, 0, true);
    if (!status)
        status = bnb_cuda_step_launch(&c, &s, &kernels[s.row->rule], 1, true);
    bnb_cuda_step_close(&c, &s);
    bnb_cuda_end(&c);
    return status;
}
