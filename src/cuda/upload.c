/*
 * upload.c - tables for kernels: see cuda.h
 *
 * A small table travels in the arguments of a launch, and so does every table while the stream is captured, because a
 * copy from host memory would be repeated from memory that is no longer there.  A larger one is filled in page-locked
 * memory, which the library keeps, and copied in stream order; such memory is used again when the copy has been made.
 * Where all of it is in use, ordinary memory serves, in pieces: the driver takes up to 64 KiB of that into its own queue
 * and returns, but waits for the stream with more.  No host memory of the caller has to outlive the call.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/cuda.h"

enum { PIECE = 32 << 10, BUFFERS = 4, LEAST_BUFFER = 256 << 10 };

struct bnb_cuda_staging {
    char *memory; /* NULL: none yet */
    size_t bytes;
    cu_event copied; /* the last copy from it */
    bool taken;      /* by a call that has not ended */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct bnb_cuda_staging staging[BNB_CUDA_CARDS][BUFFERS];

static bool is_free(const struct bnb_driver *cu, const struct bnb_cuda_staging *s)
{
    return s->memory && !s->taken && cu->event_query(s->copied) == 0;
}

static bool make_buffer(const struct bnb_driver *cu, struct bnb_cuda_staging *s, size_t bytes)
{
    void *memory = NULL;
    size_t size = LEAST_BUFFER;
    while (size < bytes)
        size *= 2;
    if (!s->copied && cu->event_create(&s->copied, CU_EVENT_NO_TIMING) != 0) {
        s->copied = NULL;
        return false;
    }
    if (cu->host_alloc(&memory, size, CU_HOST_PORTABLE) != 0)
        return false;
    s->memory = memory;
    s->bytes = size;
    return true;
}

/* A free buffer of that size at least, or NULL.  Asking and allocating are no work of a stream: allowed while another
 * thread captures one. */
static struct bnb_cuda_staging *take_buffer(const struct bnb_cuda_call *c, size_t bytes)
{
    const struct bnb_driver *cu = c->card->cu;
    struct bnb_cuda_staging *all = staging[c->card->ordinal], *found = NULL;
    int mode = CU_CAPTURE_RELAXED;
    pthread_mutex_lock(&lock);
    cu->capture_mode(&mode);
    for (int i = 0; i < BUFFERS && !found; i++)
        if (all[i].bytes >= bytes && is_free(cu, &all[i]))
            found = &all[i];
    for (int i = 0; i < BUFFERS && !found; i++)
        if (!all[i].memory && make_buffer(cu, &all[i], bytes))
            found = &all[i];
    if (found)
        found->taken = true;
    cu->capture_mode(&mode);
    pthread_mutex_unlock(&lock);
    return found;
}

static void give_buffer(struct bnb_cuda_staging *s)
{
    pthread_mutex_lock(&lock);
    s->taken = false;
    pthread_mutex_unlock(&lock);
}

/* Does a table of that size travel in the arguments of launches? */
static bool is_carried(const struct bnb_cuda_call *c, size_t bytes)
{
    int capturing = 0;
    return bytes <= BNB_CUDA_CARRIED || c->card->cu->stream_capturing(c->stream, &capturing) != 0 || capturing;
}

bnb_status bnb_cuda_table_open(const struct bnb_cuda_call *c, struct bnb_cuda_table *table, size_t bytes, size_t tail)
{
    void *device = NULL;
    bytes = (bytes + 63) / 64 * 64;
    *table = (struct bnb_cuda_table){.bytes = bytes, .tail = tail, .carried = is_carried(c, bytes)};
    table->staging = table->carried ? NULL : take_buffer(c, bytes);
    if (table->staging)
        table->host = memset(table->staging->memory, 0, bytes);
    else
        table->host = calloc(1, bytes + 1);
    if (!table->host)
        return bnb_fail(BNB_ENOMEM, "%s: out of memory for a table of %zu bytes", c->function, bytes);
    const bnb_status status = bnb_cuda_alloc(c, bytes + tail, &device);
    table->device = device;
    return status;
}

void bnb_cuda_table_close(const struct bnb_cuda_call *c, struct bnb_cuda_table *table)
{
    bnb_cuda_free(c, table->device, table->bytes + table->tail);
    if (table->staging)
        give_buffer(table->staging);
    else
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
    const size_t most = table->staging ? table->bytes : PIECE;
    if (table->carried)
        return carry(c, table);
    bnb_status status = BNB_OK;
    for (size_t at = 0; at < table->bytes && !status; at += most) {
        const size_t bytes = table->bytes - at < most ? table->bytes - at : most;
        const cu_address to = (cu_address)(uintptr_t)(table->device + at);
        status = bnb_cuda_check(cu, cu->copy_to_device(to, table->host + at, bytes, c->stream), c->function,
                                "cuMemcpyHtoDAsync");
    }
    if (!status && table->staging)
        status = bnb_cuda_check(cu, cu->event_record(table->staging->copied, c->stream), c->function, "cuEventRecord");
    return status;
}
