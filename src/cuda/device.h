/*
 * device.h - the cards, their kernels, and the frame of a call: context in, launches, context out
 *
 * A call names its card by ordinal; the card's primary context, the one that torch uses, is made current for the length
 * of the call if it is not already.  A kernel is loaded when first launched, once per card; later launches take no lock.
 */
#ifndef BNB_CUDA_DEVICE_H
#define BNB_CUDA_DEVICE_H

#include <stdatomic.h>
#include <stdint.h>

#include "cuda/driver.h"

/* Cards beyond this are refused. */
enum { BNB_CUDA_CARDS = 64 };

struct bnb_cuda_card {
    const struct bnb_driver *cu;
    int ordinal;
    cu_context context;
    int capability; /* 90 for compute capability 9.0 */
    int sms;
    int shared_bytes; /* the most that a kernel can have */
    bool early;       /* early launches, in graphs too   */
};

/* Of a kernel whose launches ask for different amounts, each no more than card->shared_bytes. */
enum { BNB_CUDA_ALL_SHARED = -1 };

/* One kernel of one image, in static storage. */
struct bnb_cuda_kernel {
    const char *image; /* the file of cuda/kernels/ without its ending           */
    const char *name;  /* as the device code exports it                          */
    int dtype;         /* the variant's bnb_dtype, or -1 where there is only one */
    int threads;       /* of a block */
    int least;         /* compute capability below which its body is empty */
    int shared;        /* bytes of dynamic shared memory of a block; BNB_CUDA_ALL_SHARED: told at a launch   */
    bool special;      /* code for some cards alone, on others it is empty; it has shared memory beside `shared` */
    struct {
        atomic_uintptr_t function; /* its cu_function; 0: not loaded yet */
        int resident;              /* blocks that the card holds at once; 0: the code is empty */
    } on[BNB_CUDA_CARDS];
};

/* The three variants of a kernel, by bnb_dtype: an initialiser of struct bnb_cuda_kernel [3]. */
#define BNB_CUDA_VARIANTS(file, prefix, count)                                          \
    {                                                                                   \
        {.image = file, .name = prefix "_f32", .dtype = BNB_F32, .threads = count},     \
            {.image = file, .name = prefix "_f16", .dtype = BNB_F16, .threads = count}, \
        {                                                                               \
            .image = file, .name = prefix "_bf16", .dtype = BNB_BF16, .threads = count  \
        }                                                                               \
    }

/* A call in progress. */
struct bnb_cuda_call {
    const struct bnb_cuda_card *card;
    const bnb_exec *ex;
    const char *function; /* the public name, for messages */
    cu_stream stream;
    bool pushed;
};

/* Every success is followed by bnb_cuda_end(), whatever happens between. */
bnb_status bnb_cuda_begin(struct bnb_cuda_call *c, const bnb_exec *ex, const char *function);
void bnb_cuda_end(const struct bnb_cuda_call *c);

/* `grid` blocks of threads; `arguments` points to the kernel's one argument, a struct.  grid >= 1. */
bnb_status bnb_cuda_launch(const struct bnb_cuda_call *c, struct bnb_cuda_kernel *kernel, int64_t grid,
                           const void *arguments);

/* The same for a kernel whose blocks walk over the work: one for each of `work` pieces, but no more than run at once. */
bnb_status bnb_cuda_launch_over(const struct bnb_cuda_call *c, struct bnb_cuda_kernel *kernel, int64_t work,
                                const void *arguments);

/* How a launch differs: blocks of a cluster, 0 or 1 for none; early: it may come to the card before the launch before it is
 * done, for which the kernel waits by itself; shared: bytes of dynamic shared memory, of a kernel of BNB_CUDA_ALL_SHARED, or
 * no more than 48 KB.  On drivers without such launches it is a plain one, cluster <= 1 then. */
struct bnb_cuda_manner {
    int cluster;
    bool early;
    int shared;
};
bnb_status bnb_cuda_launch_as(const struct bnb_cuda_call *c, struct bnb_cuda_kernel *kernel, int64_t grid,
                              struct bnb_cuda_manner manner, const void *arguments);

/* Blocks of a kernel that the card holds at once; 0 where a special kernel has no code for it. */
bnb_status bnb_cuda_resident(const struct bnb_cuda_call *c, struct bnb_cuda_kernel *kernel, int *blocks);

/* A call that is one such launch. */
bnb_status bnb_cuda_run(const bnb_exec *ex, const char *function, struct bnb_cuda_kernel *kernel, int64_t work,
                        const void *arguments);

/* Workspace of the caller's allocator.  BNB_ENOMEM; freed in stream order by the second. */
bnb_status bnb_cuda_alloc(const struct bnb_cuda_call *c, size_t bytes, void **memory);
void bnb_cuda_free(const struct bnb_cuda_call *c, void *memory, size_t bytes);

/* ---- what can be learned without a launch */

/* The number of cards, 0 after bnb_fail(). */
int bnb_cuda_count(void);

#endif
