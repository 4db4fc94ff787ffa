/*
 * optim_table.h - the tensors of a step as kernels read them: launch_optim.c fills it, launch_norms.c too
 */
#ifndef BNB_CUDA_OPTIM_TABLE_H
#define BNB_CUDA_OPTIM_TABLE_H

#include "cuda/cuda.h"

struct bnb_cuda_step {
    struct bnb_cuda_table table;
    struct bnb_cuda_optim args; /* for the kernels; chunks are of `unit` elements */
    const struct bnb_optim_row *row;
    const int64_t *first; /* [count + 1] on the device: the first chunk of each tensor */
    char *tail;           /* the workspace that was asked for */
};

/* Fill and send the table, and have the scalars made; advance: this is the step, not a measurement before it.  `unit`
 * elements make a chunk, each of which gets `tail` bytes of workspace.  bnb_cuda_table_close(&s->table) ends it. */
bnb_status bnb_cuda_step_open(const struct bnb_cuda_call *c, struct bnb_cuda_step *s, const bnb_optim_config *config,
                              const bnb_optim_tensor *tensors, size_t count, int unit, size_t tail, bool advance);

#endif
