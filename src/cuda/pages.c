/*
 * pages.c - spans of host memory on their way through the device: see pages.h
 */
#include "cuda/pages.h"

#include <pthread.h>

/* Events by what they say: of the call, of each slot, of the copies as a whole. */
enum {
    BEGUN = 0,
    FETCHED = 1,
    WORKED = FETCHED + BNB_CUDA_SLOTS,
    FREE = WORKED + BNB_CUDA_SLOTS,
    ALL_FETCHED = FREE + BNB_CUDA_SLOTS,
    ALL_STORED = ALL_FETCHED + 1,
    EVENTS = ALL_STORED + 1
};

/* The two copy streams of a card.  Those of a capture are part of it until it ends, so that it has others. */
struct copiers {
    bool open;
    cu_stream up, down;
    cu_event event[EVENTS];
};

/* Held while a call enqueues: an event means the last record of it. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct copiers copiers[BNB_CUDA_CARDS][2];

struct passage {
    const struct bnb_cuda_call *c;
    const struct copiers *by;
    const struct bnb_cuda_pages *pages;
    void *job;
};

static bnb_status record(const struct passage *p, int event, cu_stream stream)
{
    const struct bnb_driver *cu = p->c->card->cu;
    return bnb_cuda_check(cu, cu->event_record(p->by->event[event], stream), p->c->function, "cuEventRecord");
}

static bnb_status wait_for(const struct passage *p, int event, cu_stream stream)
{
    const struct bnb_driver *cu = p->c->card->cu;
    return bnb_cuda_check(cu, cu->event_wait(stream, p->by->event[event], 0), p->c->function, "cuStreamWaitEvent");
}

/* What `to` is given from now on comes after what `from` has been given so far. */
static bnb_status order(const struct passage *p, int event, cu_stream from, cu_stream to)
{
    const bnb_status status = record(p, event, from);
    return status ? status : wait_for(p, event, to);
}

static bnb_status open_copiers(const struct bnb_cuda_call *c, struct copiers *by)
{
    const struct bnb_driver *cu = c->card->cu;
    bnb_status status = BNB_OK;
    for (int i = 0; i < EVENTS && !status; i++)
        if (!by->event[i])
            status =
                bnb_cuda_check(cu, cu->event_create(&by->event[i], CU_EVENT_NO_TIMING), c->function, "cuEventCreate");
    if (!status && !by->up)
        status = bnb_cuda_check(cu, cu->stream_create(&by->up, CU_STREAM_NON_BLOCKING), c->function, "cuStreamCreate");
    if (!status && !by->down)
        status =
            bnb_cuda_check(cu, cu->stream_create(&by->down, CU_STREAM_NON_BLOCKING), c->function, "cuStreamCreate");
    by->open = !status;
    return status;
}

/* Those for the stream of the call; they stay. */
static bnb_status find_copiers(const struct bnb_cuda_call *c, const struct copiers **found)
{
    const struct bnb_driver *cu = c->card->cu;
    int capturing = 0, mode = CU_CAPTURE_RELAXED; /* making streams is no work of the stream that is captured */
    bnb_status status =
        bnb_cuda_check(cu, cu->stream_capturing(c->stream, &capturing), c->function, "cuStreamIsCapturing");
    struct copiers *by = &copiers[c->card->ordinal][capturing != 0];
    *found = by;
    if (status || by->open)
        return status;
    cu->capture_mode(&mode);
    status = open_copiers(c, by);
    cu->capture_mode(&mode);
    return status;
}

static bnb_status pass_span(const struct passage *p, int span)
{
    cu_stream stream = p->c->stream, up = p->by->up, down = p->by->down;
    const int slot = span % BNB_CUDA_SLOTS;
    bnb_status status = wait_for(p, span < BNB_CUDA_SLOTS ? BEGUN : FREE + slot, up);
    if (!status)
        status = p->pages->fetch(p->job, span, up);
    if (!status)
        status = order(p, FETCHED + slot, up, stream);
    if (!status)
        status = p->pages->work(p->job, span);
    if (status || !p->pages->store)
        return status ? status : record(p, FREE + slot, stream);
    status = order(p, WORKED + slot, stream, down);
    if (!status)
        status = p->pages->store(p->job, span, down);
    return status ? status : record(p, FREE + slot, down);
}

bnb_status bnb_cuda_pass_pages(const struct bnb_cuda_call *c, const struct bnb_cuda_pages *pages, int spans, void *job)
{
    struct passage p = {.c = c, .pages = pages, .job = job};
    pthread_mutex_lock(&lock);
    bnb_status status = find_copiers(c, &p.by);
    if (!status)
        status = record(&p, BEGUN, c->stream);
    for (int span = 0; span < spans && !status; span++)
        status = pass_span(&p, span);
    bnb_status joined = p.by->open ? order(&p, ALL_FETCHED, p.by->up, c->stream) : BNB_OK;
    if (p.by->open && pages->store && !joined)
        joined = order(&p, ALL_STORED, p.by->down, c->stream);
    pthread_mutex_unlock(&lock);
    return status ? status : joined;
}

/* ---------------------------------------------------------------- memory */

int64_t bnb_pages_least(void) { return 100000; }

static bnb_status begin(struct bnb_cuda_call *c, bnb_exec *ex, int ordinal, const char *function)
{
    *ex = (bnb_exec){.size = sizeof *ex, .device = BNB_CUDA, .ordinal = ordinal};
    return bnb_cuda_begin(c, ex, function);
}

bnb_status bnb_pages_alloc(int ordinal, size_t bytes, void **pages)
{
    const char *f = "pages_alloc";
    bnb_exec ex;
    struct bnb_cuda_call c;
    if (!pages)
        return bnb_fail(BNB_EINVAL, "%s: pages is NULL, expected a place for the address", f);
    *pages = NULL;
    if (bytes == 0)
        return bnb_fail(BNB_EINVAL, "%s: bytes is 0, expected more", f);
    bnb_status status = begin(&c, &ex, ordinal, f);
    if (status)
        return status;
    const cu_result result = c.card->cu->host_alloc(pages, bytes, CU_HOST_PORTABLE | CU_HOST_MAPPED);
    if (result)
        *pages = NULL;
    if (result == CU_ERROR_OUT_OF_MEMORY)
        status = bnb_fail(BNB_ENOMEM, "%s: the host has no %zu bytes of page-locked memory to give", f, bytes);
    else
        status = bnb_cuda_check(c.card->cu, result, f, "cuMemHostAlloc");
    bnb_cuda_end(&c);
    return status;
}

bnb_status bnb_pages_free(int ordinal, void *pages)
{
    const char *f = "pages_free";
    bnb_exec ex;
    struct bnb_cuda_call c;
    if (!pages)
        return BNB_OK;
    bnb_status status = begin(&c, &ex, ordinal, f);
    if (status)
        return status;
    c.card->cu->context_synchronize(); /* what it reports belongs to those who launched */
    status = bnb_cuda_check(c.card->cu, c.card->cu->host_free(pages), f, "cuMemFreeHost");
    bnb_cuda_end(&c);
    return status;
}
