/*
 * optim_table.h - the tensors of an optimizer step as kernels read them: launch_optim.c and launch_norms.c launch over them
 *
 * A tensor whose states are on the device is one piece.  One with paged states is cut into pieces that fit into a slot of
 * device memory; consecutive pieces make a span, which has a launch of its own (pages.h).  Without paged states there is
 * one span, hence one launch.
 */
#ifndef BNB_CUDA_OPTIM_TABLE_H
#define BNB_CUDA_OPTIM_TABLE_H

#include "cuda/cuda.h"

/* Elements [begin, begin + n) of a tensor; `at` is where its states begin in the slot if they are paged. */
struct bnb_cuda_piece {
    size_t tensor, at;
    int64_t begin, n;
};

/* Pieces piece, piece + 1, ..., and their chunks. */
struct bnb_cuda_span {
    int piece, pieces;
    int64_t chunk, chunks;
};

struct bnb_cuda_step {
    struct bnb_cuda_table table;
    struct bnb_cuda_optim args; /* for the kernels, of all spans together; chunks are of `unit` elements */
    const struct bnb_optim_row *row;
    const bnb_optim_tensor *tensors;
    const int64_t *first; /* [count + 1] on the device: the first chunk of each tensor */
    char *tail;           /* the workspace that was asked for */
    struct bnb_cuda_piece *pieces;
    struct bnb_cuda_span *spans;
    int piece_count, span_count;
    char *slots; /* on the device, [BNB_CUDA_SLOTS][slot_bytes] */
    size_t slot_bytes;
};

/* Fill and send the table, and have the scalars made; advance: this is the step, not a measurement before it.  `unit`
 * elements make a chunk, each of which gets `tail` bytes of workspace.  Ends with bnb_cuda_step_close(), also after a
 * failure. */
bnb_status bnb_cuda_step_open(const struct bnb_cuda_call *c, struct bnb_cuda_step *s, const bnb_optim_config *config,
                              const bnb_optim_tensor *tensors, size_t count, int unit, size_t tail, bool advance);
void bnb_cuda_step_close(const struct bnb_cuda_call *c, struct bnb_cuda_step *s);

/* A kernel over all chunks, `each` of them to a block of threads at a time; store: it changes the states. */
bnb_status bnb_cuda_step_launch(const struct bnb_cuda_call *c, struct bnb_cuda_step *s, struct bnb_cuda_kernel *kernel,
                                int each, bool store);

#endif
