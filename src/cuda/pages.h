/*
 * pages.h - data that stays in page-locked memory of the host and passes through the device span by span
 *
 * Two spans are on the device at a time: while kernels work on one, the other is written back and the next one fetched,
 * each by a stream of its own.  The caller's stream comes before all of it and after all of it, and nothing waits on the
 * host, so that a captured graph holds all three.
 */
#ifndef BNB_CUDA_PAGES_H
#define BNB_CUDA_PAGES_H

#include "cuda/device.h"

/* Spans on the device at a time: span i lies in slot i % BNB_CUDA_SLOTS. */
enum { BNB_CUDA_SLOTS = 2 };

/* What a span needs; each enqueues and returns. */
struct bnb_cuda_pages {
    bnb_status (*fetch)(void *job, int span, cu_stream stream);
    bnb_status (*work)(void *job, int span); /* on the stream of the call */
    bnb_status (*store)(void *job, int span, cu_stream stream); /* NULL: what was fetched has only been read */
};

/* All spans, 0 to spans - 1.  After a failure as well, the stream of the call comes after whatever was begun. */
bnb_status bnb_cuda_pass_pages(const struct bnb_cuda_call *c, const struct bnb_cuda_pages *pages, int spans, void *job);

#endif
