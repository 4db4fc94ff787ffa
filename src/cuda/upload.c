/*
 * upload.c - tables for kernels: see cuda.h
 *
 * A small table travels in the arguments of a launch, and so does every table while the stream is captured, because a
 * copy from host memory would be repeated from memory that is no longer there.  A larger one is copied in stream order,
 * in pieces: the driver takes up to 64 KiB of pageable memory into its own queue and returns, but waits for the stream
 * with more.  No host memory has to outlive the call.
 */
#include <stdlib.h>
#include <string.h>

#include "cuda/cuda.h"

enum { PIECE = 32 << 10 };

bnb_status bnb_cuda_table_open(const struct bnb_cuda_call *c, struct bnb_cuda_table *table, size_t bytes, size_t tail)
{
    void *device = NULL;
    bytes = (bytes + 63) / 64 * 64;
    *table = (struct bnb_cuda_table){.host = calloc(1, bytes + 1), .bytes = bytes, .tail = tail};
    if (!table->host)
        return bnb_fail(BNB_ENOMEM, "%s: out of memory for a table of %zu bytes", c->function, bytes);
    const bnb_status status = bnb_cuda_alloc(c, bytes + tail, &device);
    table->device = device;
    return status;
}

void bnb_cuda_table_close(const struct bnb_cuda_call *c, struct bnb_cuda_table *table)
{
    bnb_cuda_free(c, table->device, table->bytes + table->tail);
    free(table->host);
}

static bnb_status carry(const struct bnb_cuda_call *c, const struct bnb_cuda_table *table)
{
    static struct bnb_cuda_kernel kernel = {
        .image = "optim_tables", .name = "bnb_k_carry", .dtype = -1, .threads = 256};
    bnb_status status = BNB_OK;
    for (size_t at = 0; at < table->bytes && !status; at += BNB_CUDA_CARRIED) {
        const size_t bytes = table->bytes - at < BNB_CUDA_CARRIED ? table->bytes - at : BNB_CUDA_CARRIED;
        struct bnb_cuda_carry args = {.to = table->device + at, .words = (int)(bytes / 4)};
        memcpy(args.word, table->host + at, bytes);
        status = bnb_cuda_launch(c, &kernel, 1, &args);
    }
    return status;
}

bnb_status bnb_cuda_table_send(const struct bnb_cuda_call *c, const struct bnb_cuda_table *table)
{
    const struct bnb_driver *cu = c->card->cu;
    int capturing = 0;
    if (cu->stream_capturing(c->stream, &capturing) != 0 || capturing || table->bytes <= BNB_CUDA_CARRIED)
        return carry(c, table);
    bnb_status status = BNB_OK;
    for (size_t at = 0; at < table->bytes && !status; at += PIECE) {
        const size_t bytes = table->bytes - at < PIECE ? table->bytes - at : PIECE;
        const cu_address to = (cu_address)(uintptr_t)(table->device + at);
        status = bnb_cuda_check(cu, cu->copy_to_device(to, table->host + at, bytes, c->stream), c->function,
                                "cuMemcpyHtoDAsync");
    }
    return status;
}
