/*
 * driver.c - a stand-in for CUDA's driver: one card whose memory is the host's, and streams that run late, in any order
 *
 * What is enqueued waits until somebody synchronises.  Then the work of all streams is done in a random order that their
 * own order and events allow: a dependency that nobody stated shows as a wrong result.  Instead of the kernels of an
 * optimizer run others with the same arguments, in whose results every array, scalar and index takes part.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/random.h"
#include "cuda/driver.h"
#include "cuda/kernels/launch_args.h"

enum { STREAMS = 64, PINNED = 64, FAILED = 719 };

enum kind { COPY, FILL, LAUNCH, RECORD, WAIT };

struct cu_function_object { char name[40]; };
struct cu_stream_object { int id; };
struct cu_event_object { size_t record; }; /* the work that the last record was, counted from 1 on; 0: none */

struct work {
    enum kind kind;
    int stream;
    bool done;
    size_t after; /* WAIT: what an event said */
    char *to;
    const char *from;
    char *owned; /* a copy of what was not page-locked */
    size_t bytes;
    unsigned char value;
    const char *name;
    char arguments[4096];
};

static struct work *queue;
static size_t count, room, before; /* before: work that was in the queue once, all done */
static uint64_t state = 1;
static bool stepped; /* a step kernel has run */
static struct cu_stream_object streams[STREAMS];
static int stream_count = 1; /* 0: the default one */
static struct pinned { char *begin, *end; } pinned[PINNED];

/* What the test sets and reads. */
int stub_copies_first; /* copies run as early as they may */
int stub_ahead;        /* copies from page-locked memory before the first step kernel */
int stub_calls_left;   /* a copy or launch fails when this falls to 0 */
int stub_captures;     /* every stream says that it is captured */
void stub_seed(uint64_t seed);
size_t stub_left(void);

void stub_seed(uint64_t seed)
{
    state = seed;
    stub_ahead = 0;
    stepped = false;
}

static bool fails(void) { return stub_calls_left > 0 && --stub_calls_left == 0; }

/* ---------------------------------------------------------------- kernels */

static uint32_t read_raw(const void *array, int64_t i, int size)
{
    uint32_t value = 0;
    memcpy(&value, (const char *)array + i * size, (size_t)size);
    return value;
}

static void write_raw(void *array, int64_t i, int size, uint32_t value)
{
    memcpy((char *)array + i * size, &value, (size_t)size);
}

static uint32_t mix(uint32_t value, uint32_t with) { return (value ^ with) * 0x9e3779b1u + 0x7f4a7c15u; }

static void step(const struct bnb_cuda_optim *o)
{
    int64_t chunk = 0;
    for (int e = 0; e < o->count; e++) {
        const struct bnb_cuda_tensor *t = &o->tensors[e];
        const int size = t->dtype == BNB_F32 ? 4 : 2, width = t->bits / 8;
        uint32_t step_size;
        if (t->first != chunk)
            abort();
        chunk += (t->n + BNB_CUDA_CHUNK - 1) / BNB_CUDA_CHUNK;
        memcpy(&step_size, &o->plans[t->plan].scalars.step_size, 4);
        for (int64_t i = 0; i < t->n; i++) {
            const int64_t block = i / BNB_OPTIM_BLOCK;
            const uint32_t random = o->stochastic ? (uint32_t)(t->key + (uint64_t)block) : 0;
            uint32_t p = mix(read_raw(t->p, i, size), step_size + random);
            for (int k = 0; k < BNB_MAX_STATES && t->state[k]; k++) {
                const uint32_t scale = t->absmax[k] ? (uint32_t)t->absmax[k][block] : 0;
                const uint32_t s = mix(read_raw(t->state[k], i, width), read_raw(t->g, i, size) + scale);
                write_raw(t->state[k], i, width, s >> 3);
                p = mix(p, s);
            }
            write_raw(t->p, i, size, p >> 5);
            for (int k = 0; k < BNB_MAX_STATES && t->absmax[k] && i % BNB_OPTIM_BLOCK == 0; k++)
                t->absmax[k][block] += (float)(k + 1);
        }
    }
    if (chunk != o->chunks)
        abort();
}

static void measure(const struct bnb_cuda_optim *o)
{
    enum { RUN = 64 * BNB_OPTIM_BLOCK };
    for (int e = 0; e < o->count; e++) {
        const struct bnb_cuda_tensor *t = &o->tensors[e];
        for (int64_t i = 0; i < t->n; i++) {
            double *sum = o->partial + 2 * (t->first + i / RUN);
            if (i % RUN == 0)
                sum[0] = sum[1] = 0.0;
            for (int k = 0; k < BNB_MAX_STATES && t->state[k]; k++)
                sum[0] += read_raw(t->state[k], i, t->bits / 8) % 1000;
            sum[1] += read_raw(t->p, i, t->dtype == BNB_F32 ? 4 : 2) % 1000;
        }
    }
}

static void total(const struct bnb_cuda_total *q)
{
    for (int i = 0; i < q->count; i++) {
        for (int j = 0; j < q->width; j++) {
            double sum = 0.0;
            for (int64_t run = q->first[i]; run < q->first[i + 1]; run++)
                sum += q->partial[2 * run + j];
            q->norms[q->width * i + j] = sum;
        }
    }
}

static void plan(const struct bnb_cuda_planner *q)
{
    for (int i = 0; i < q->count; i++) {
        const struct bnb_cuda_origin *origin = &q->origins[i];
        const int64_t t = origin->step_count ? (int64_t)*origin->step_count + 1 : origin->step;
        const double lr = q->lr_value ? (double)*q->lr_value : q->lr;
        const double scale = origin->gnorm_scale ? (double)*origin->gnorm_scale : 1.0;
        const double *norms = q->norms && q->recipe.max_unorm > 0.0 ? q->norms + 2 * i : NULL;
        q->plans[i] = bnb_optim_plan_of(&q->recipe, lr, t, scale, norms);
        for (int j = 0; j < origin->pieces; j++)
            q->tensors[origin->piece + j].key += bnb_mix64(bnb_mix64(origin->seed) + (uint64_t)t);
        if (q->advance && origin->step_count)
            *origin->step_count += 1.0f;
        if (q->advance && origin->unorm && norms)
            *origin->unorm = (float)norms[0];
    }
}

static void launch(const struct work *w)
{
    const void *arguments = w->arguments;
    const struct bnb_cuda_carry *carry = arguments;
    if (!strcmp(w->name, "bnb_k_carry"))
        memcpy(carry->to, carry->word, 4 * (size_t)carry->words);
    else if (!strcmp(w->name, "bnb_k_plan"))
        plan(arguments);
    else if (!strcmp(w->name, "bnb_k_total"))
        total(arguments);
    else if (!strncmp(w->name, "bnb_k_norms_", 12))
        measure(arguments);
    else if (!strncmp(w->name, "bnb_k_optim_", 12))
        step(arguments);
    else
        abort();
}

static size_t bytes_of_arguments(const char *name)
{
    return !strcmp(name, "bnb_k_carry")   ? sizeof(struct bnb_cuda_carry)
           : !strcmp(name, "bnb_k_plan")  ? sizeof(struct bnb_cuda_planner)
           : !strcmp(name, "bnb_k_total") ? sizeof(struct bnb_cuda_total)
                                          : sizeof(struct bnb_cuda_optim);
}

/* ---------------------------------------------------------------- the order of work */

static void perform(struct work *w)
{
    if (w->kind == COPY)
        memcpy(w->to, w->from, w->bytes);
    else if (w->kind == FILL)
        memset(w->to, w->value, w->bytes);
    else if (w->kind == LAUNCH)
        launch(w);
    if (w->kind == LAUNCH && !strncmp(w->name, "bnb_k_optim_", 12))
        stepped = true;
    if (w->kind == COPY && w->stream > 1 && !w->owned && !stepped)
        stub_ahead++;
    free(w->owned);
    w->owned = NULL;
    w->done = true;
}

static bool has_passed(size_t record) { return record <= before || queue[record - before - 1].done; }

/* The first work of each stream that waits for nothing; one of them, or NULL. */
static struct work *choose(void)
{
    struct work *ready[STREAMS];
    bool seen[STREAMS] = {false};
    size_t found = 0;
    for (size_t i = 0; i < count; i++) {
        struct work *w = &queue[i];
        if (w->done || seen[w->stream])
            continue;
        seen[w->stream] = true;
        if (w->kind == WAIT && !has_passed(w->after))
            continue;
        if (stub_copies_first && w->kind != LAUNCH)
            return w;
        ready[found++] = w;
    }
    state = bnb_mix64(state + 1);
    return found ? ready[state % found] : NULL;
}

static bool busy(int stream)
{
    for (size_t i = 0; i < count; i++)
        if (!queue[i].done && (stream < 0 || queue[i].stream == stream))
            return true;
    return false;
}

static cu_result run_until_idle(int stream)
{
    while (busy(stream)) {
        struct work *w = choose();
        if (!w)
            abort(); /* streams that wait for each other */
        perform(w);
    }
    if (!busy(-1)) {
        before += count;
        count = 0;
    }
    return 0;
}

/* Work that nobody waited for. */
size_t stub_left(void)
{
    size_t left = 0;
    for (size_t i = 0; i < count; i++)
        left += !queue[i].done;
    return left;
}

static struct work *enqueue(enum kind kind, cu_stream stream)
{
    if (count == room) {
        room = room ? 2 * room : 256;
        queue = realloc(queue, room * sizeof *queue);
        if (!queue)
            abort();
    }
    queue[count] = (struct work){.kind = kind, .stream = stream ? stream->id : 0};
    return &queue[count++];
}

static bool is_pinned(const char *p)
{
    for (int i = 0; i < PINNED; i++)
        if (p >= pinned[i].begin && p < pinned[i].end)
            return true;
    return false;
}

/* ---------------------------------------------------------------- the driver */

#define DRIVER(symbol, parameters) \
    cu_result symbol parameters;   \
    cu_result symbol parameters

DRIVER(cuInit, (unsigned flags)) { return flags ? FAILED : 0; }
DRIVER(cuDriverGetVersion, (int *version)) { return *version = 13000, 0; }
DRIVER(cuDeviceGetCount, (int *devices)) { return *devices = 1, 0; }
DRIVER(cuDeviceGet, (cu_device * device, int ordinal)) { return *device = ordinal, 0; }
DRIVER(cuDeviceGetName, (char *name, int size, cu_device device))
{
    snprintf(name, (size_t)size, "stub %d", device);
    return 0;
}
DRIVER(cuDeviceGetAttribute, (int *value, int attribute, cu_device device))
{
    *value = attribute == CU_DEVICE_CC_MAJOR ? 9 : attribute == CU_DEVICE_CC_MINOR ? device : 4;
    return 0;
}
DRIVER(cuDevicePrimaryCtxRetain, (cu_context * context, cu_device device))
{
    static int one;
    *context = (cu_context)(void *)(&one + device);
    return 0;
}
DRIVER(cuCtxGetCurrent, (cu_context * context)) { return *context = NULL, 0; }
DRIVER(cuCtxPushCurrent_v2, (cu_context context)) { return context ? 0 : FAILED; }
DRIVER(cuCtxPopCurrent_v2, (cu_context * context)) { return *context = NULL, 0; }
DRIVER(cuCtxSynchronize, (void)) { return run_until_idle(-1); }
DRIVER(cuModuleLoadData, (cu_module * module, const void *image))
{
    *module = (cu_module)(uintptr_t)image;
    return image ? 0 : FAILED;
}
DRIVER(cuModuleUnload, (cu_module module)) { return module ? 0 : FAILED; }
DRIVER(cuModuleGetFunction, (cu_function * function, cu_module module, const char *name))
{
    static struct cu_function_object functions[64];
    int i = 0;
    while (functions[i].name[0] && strcmp(functions[i].name, name) != 0)
        i++;
    snprintf(functions[i].name, sizeof functions[i].name, "%s", name);
    *function = &functions[i];
    return module ? 0 : FAILED;
}
DRIVER(cuFuncGetAttribute, (int *value, int attribute, cu_function function))
{
    return *value = attribute, function ? 0 : FAILED;
}
DRIVER(cuFuncSetAttribute, (cu_function function, int attribute, int value))
{
    return function && attribute && value ? 0 : FAILED;
}
DRIVER(cuOccupancyMaxActiveBlocksPerMultiprocessor, (int *blocks, cu_function function, int threads, size_t shared))
{
    *blocks = function && threads > 0 && shared == 0 ? 2 : 1;
    return 0;
}
DRIVER(cuLaunchKernel, (cu_function function, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y,
                        unsigned block_z, unsigned shared, cu_stream stream, void **parameters, void **extra))
{
    if (fails() || x == 0 || y != 1 || z != 1 || block_x == 0 || block_y != 1 || block_z != 1 || shared || extra)
        return FAILED;
    struct work *w = enqueue(LAUNCH, stream);
    w->name = function->name;
    memcpy(w->arguments, parameters[0], bytes_of_arguments(w->name));
    return 0;
}

static cu_result copy(char *to, const char *from, size_t bytes, cu_stream stream)
{
    if (fails())
        return FAILED;
    struct work *w = enqueue(COPY, stream);
    w->to = to;
    w->from = from;
    w->bytes = bytes;
    return 0;
}
DRIVER(cuMemcpyHtoDAsync_v2, (cu_address to, const void *from, size_t bytes, cu_stream stream))
{
    char *owned = NULL;
    if (!is_pinned(from)) {
        owned = malloc(bytes + 1);
        if (!owned)
            abort();
        memcpy(owned, from, bytes);
    }
    const cu_result result = copy((char *)(uintptr_t)to, owned ? owned : from, bytes, stream);
    if (result)
        free(owned);
    else
        queue[count - 1].owned = owned;
    return result;
}
DRIVER(cuMemcpyDtoHAsync_v2, (void *to, cu_address from, size_t bytes, cu_stream stream))
{
    return copy(to, (const char *)(uintptr_t)from, bytes, stream);
}
DRIVER(cuMemcpyDtoDAsync_v2, (cu_address to, cu_address from, size_t bytes, cu_stream stream))
{
    return copy((char *)(uintptr_t)to, (const char *)(uintptr_t)from, bytes, stream);
}
DRIVER(cuMemsetD8Async, (cu_address to, unsigned char value, size_t bytes, cu_stream stream))
{
    struct work *w = enqueue(FILL, stream);
    w->to = (char *)(uintptr_t)to;
    w->value = value;
    w->bytes = bytes;
    return 0;
}
DRIVER(cuMemHostAlloc, (void **memory, size_t bytes, unsigned flags))
{
    for (int i = 0; i < PINNED && flags; i++) {
        if (pinned[i].begin)
            continue;
        pinned[i].begin = malloc(bytes);
        pinned[i].end = pinned[i].begin + bytes;
        *memory = pinned[i].begin;
        return pinned[i].begin ? 0 : CU_ERROR_OUT_OF_MEMORY;
    }
    return CU_ERROR_OUT_OF_MEMORY;
}
DRIVER(cuMemFreeHost, (void *memory))
{
    for (int i = 0; i < PINNED; i++) {
        if (pinned[i].begin != memory)
            continue;
        free(memory);
        pinned[i] = (struct pinned){NULL, NULL};
        return 0;
    }
    return FAILED;
}
DRIVER(cuPointerGetAttribute, (void *value, int attribute, cu_address pointer))
{
    const bool known = attribute == CU_POINTER_MEMORY_TYPE && is_pinned((const char *)(uintptr_t)pointer);
    if (known)
        *(unsigned *)value = CU_MEMORY_HOST;
    return known ? 0 : FAILED;
}
DRIVER(cuStreamIsCapturing, (cu_stream stream, int *status)) { return *status = stub_captures && stream, 0; }
DRIVER(cuThreadExchangeStreamCaptureMode, (int *mode)) { return *mode = 0, 0; }
DRIVER(cuEventCreate, (cu_event * event, unsigned flags))
{
    *event = calloc(1, sizeof **event);
    return *event && flags == CU_EVENT_NO_TIMING ? 0 : FAILED;
}
DRIVER(cuEventDestroy_v2, (cu_event event)) { return free(event), 0; }
DRIVER(cuEventRecord, (cu_event event, cu_stream stream))
{
    enqueue(RECORD, stream);
    event->record = before + count;
    return 0;
}
DRIVER(cuStreamWaitEvent, (cu_stream stream, cu_event event, unsigned flags))
{
    struct work *w = enqueue(WAIT, stream);
    w->after = event->record;
    return flags ? FAILED : 0;
}
DRIVER(cuEventQuery, (cu_event event)) { return has_passed(event->record) ? 0 : FAILED; }
DRIVER(cuStreamCreate, (cu_stream * stream, unsigned flags))
{
    if (stream_count == STREAMS || flags != CU_STREAM_NON_BLOCKING)
        return FAILED;
    streams[stream_count].id = stream_count;
    *stream = &streams[stream_count++];
    return 0;
}
DRIVER(cuStreamSynchronize, (cu_stream stream)) { return run_until_idle(stream ? stream->id : 0); }
DRIVER(cuGetErrorName, (cu_result error, const char **name))
{
    *name = error ? "CUDA_ERROR_STUB" : "CUDA_SUCCESS";
    return 0;
}
DRIVER(cuGetErrorString, (cu_result error, const char **text)) { return *text = error ? "as asked" : "", 0; }
