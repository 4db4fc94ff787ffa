/*
 * call.c - memory and tensors that live for one call, the execution context it hands to the core, and its end
 *
 * Whatever the call owns is entered at once into a list of the call, so that bnb_call_end() alone releases: after a
 * success, after a refusal, after a failure in the middle of a list.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "call.h"

struct bnb_chunk {
    struct bnb_chunk *next;
    max_align_t data[];
};

/* Copy `from` into `to` when the call has succeeded. */
struct bnb_copy {
    struct bnb_copy *next;
    torch_tensor to, from;
    struct bnb_label label;
};

/* Memory that the core has asked for. */
struct bnb_workspace {
    struct bnb_workspace *next;
    torch_tensor handle;
    void *ptr;
};

/* ---------------------------------------------------------------- ownership */

void bnb_call_own(struct bnb_call *c, torch_tensor handle)
{
    if (c->owned_count == c->owned_capacity) {
        const size_t capacity = 4 * c->owned_capacity;
        torch_tensor *grown = malloc(capacity * sizeof *grown);
        if (!grown) {
            bnb_shim.delete_tensor(handle);
            bnb_call_fail(c, BNB_ENOMEM, "%s: out of memory for %zu arguments", c->op, capacity);
            return;
        }
        memcpy(grown, c->owned, c->owned_count * sizeof *grown);
        if (c->owned != c->few)
            free(c->owned);
        c->owned = grown;
        c->owned_capacity = capacity;
    }
    c->owned[c->owned_count++] = handle;
}

const char *bnb_torch_reason(void)
{
    const char *reason = bnb_shim.reason ? bnb_shim.reason() : NULL;
    return reason ? reason : "";
}

void *bnb_call_alloc(struct bnb_call *c, size_t count, size_t size)
{
    struct bnb_chunk *chunk = NULL;
    if (!bnb_call_ok(c))
        return NULL;
    if (count <= (SIZE_MAX / 2) / size)
        chunk = calloc(1, sizeof *chunk + count * size);
    if (!chunk) {
        bnb_call_fail(c, BNB_ENOMEM, "%s: out of memory for %zu arguments", c->op, count);
        return NULL;
    }
    chunk->next = c->chunks;
    c->chunks = chunk;
    return chunk->data;
}

/* ---------------------------------------------------------------- the execution context */

static void *workspace_alloc(void *context, size_t bytes)
{
    struct bnb_call *c = context;
    const int64_t size = bytes ? (int64_t)bytes : 1, one = 1;
    struct bnb_workspace *w = malloc(sizeof *w);
    if (!w)
        return NULL;
    if (bnb_shim.empty(1, &size, &one, bnb_torch_dtypes[BNB_TORCH_uint8], c->first.device, c->first.device_index,
                       &w->handle)) {
        free(w);
        return NULL;
    }
    if (bnb_shim.mutable_data(w->handle, &w->ptr)) {
        bnb_shim.delete_tensor(w->handle);
        free(w);
        return NULL;
    }
    w->next = c->workspaces;
    c->workspaces = w;
    return w->ptr;
}

static void workspace_free(void *context, void *ptr, size_t bytes)
{
    struct bnb_call *c = context;
    (void)bytes;
    for (struct bnb_workspace **link = &c->workspaces; *link; link = &(*link)->next) {
        struct bnb_workspace *w = *link;
        if (w->ptr == ptr) {
            *link = w->next;
            bnb_shim.delete_tensor(w->handle);
            free(w);
            return;
        }
    }
}

struct range {
    bnb_range_fn body;
    void *arg;
};

static void run_range(int64_t begin, int64_t end, void *arg)
{
    const struct range *range = arg;
    range->body(range->arg, begin, end);
}

/* On torch's own threads, so that torch.set_num_threads() holds.  torch's grain is a least size too. */
static void parallel_for(void *context, int64_t n, int64_t grain, bnb_range_fn body, void *arg)
{
    struct bnb_call *c = context;
    struct range range = {body, arg};
    if (bnb_shim.parallel_for(0, n, grain, run_range, &range))
        c->parallel_failed = true;
}

void bnb_call_describe(struct bnb_call *c, struct bnb_tensor *t)
{
    int64_t *sizes = NULL, *strides = NULL;
    if (bnb_shim.dtype(t->handle, &t->dtype) || bnb_shim.device(t->handle, &t->device) ||
        bnb_shim.device_index(t->handle, &t->device_index) || bnb_shim.dim(t->handle, &t->dim) ||
        bnb_shim.numel(t->handle, &t->n) || bnb_shim.sizes(t->handle, &sizes) ||
        bnb_shim.strides(t->handle, &strides) || bnb_shim.is_contiguous(t->handle, &t->contiguous)) {
        bnb_call_fail(c, BNB_EDEVICE, "%s: torch cannot describe %s: it is not an ordinary strided tensor. %s", c->op,
                      bnb_label(t).text, bnb_torch_reason());
        return;
    }
    t->sizes = sizes;
    t->strides = strides;
    t->present = true;
}

void bnb_call_begin(struct bnb_call *c, const char *op, torch_value *stack, uint64_t inputs, uint64_t expected)
{
    memset(c, 0, sizeof *c);
    c->op = op;
    c->stack = stack;
    c->inputs = inputs == expected ? inputs : 0;
    c->owned = c->few;
    c->owned_capacity = BNB_CALL_INLINE;
    c->exec = (bnb_exec){.size = sizeof(bnb_exec),
                         .context = c,
                         .alloc = workspace_alloc,
                         .free = workspace_free,
                         .parallel_for = parallel_for};
    if (!c->inputs)
        bnb_call_fail(c, BNB_EDEVICE,
                      "%s: torch hands over %llu arguments, this library takes %llu: the Python "
                      "package and the library differ in version",
                      op, (unsigned long long)inputs, (unsigned long long)expected);
}

/* ---------------------------------------------------------------- new tensors */

/* Row-major strides of a shape; NULL on failure. */
static const int64_t *row_major(struct bnb_call *c, const char *name, struct bnb_ints shape)
{
    int64_t *strides = bnb_call_alloc(c, shape.count + 1, sizeof *strides);
    int64_t stride = 1;
    for (size_t i = shape.count; strides && i-- > 0;) {
        strides[i] = stride;
        if (__builtin_mul_overflow(stride, shape.values[i] > 1 ? shape.values[i] : 1, &stride)) {
            bnb_call_fail(c, BNB_EINVAL, "%s: the shape of %s is too large, expected at most 2^63 - 1 elements", c->op,
                          name);
            return NULL;
        }
    }
    return strides;
}

struct bnb_tensor bnb_new_strided(struct bnb_call *c, const char *name, struct bnb_ints shape, const int64_t *strides,
                                  int32_t dtype)
{
    struct bnb_tensor t = {.name = name, .index = -1};
    static const int64_t none[1];
    if (!bnb_call_ok(c))
        return t;
    if (bnb_shim.empty((int64_t)shape.count, shape.count ? shape.values : none, shape.count ? strides : none, dtype,
                       c->first.device, c->first.device_index, &t.handle)) {
        bnb_call_fail(c, BNB_ENOMEM, "%s: %s out of memory for %s. %s", c->op,
                      c->exec.device == BNB_CUDA ? "CUDA" : "CPU", name, bnb_torch_reason());
        return t;
    }
    bnb_call_own(c, t.handle);
    if (bnb_call_ok(c))
        bnb_call_describe(c, &t);
    return t;
}

struct bnb_tensor bnb_new_tensor(struct bnb_call *c, const char *name, struct bnb_ints shape, int32_t dtype)
{
    return bnb_new_strided(c, name, shape, row_major(c, name, shape), dtype);
}

/* Copy without a trace in autograd. */
static bool copy(torch_tensor to, torch_tensor from)
{
    const bool grad = bnb_shim.grad_mode();
    bnb_shim.set_grad_mode(false);
    const torch_error error = bnb_shim.copy(to, from, 0);
    bnb_shim.set_grad_mode(grad);
    return error == 0;
}

/* The same elements in the same places?  The stride of a dimension of size 1 says nothing. */
static bool same_strides(const struct bnb_tensor *t, const int64_t *strides)
{
    for (int64_t i = 0; i < t->dim; i++)
        if (t->sizes[i] != 1 && t->strides[i] != strides[i])
            return false;
    return true;
}

void bnb_call_stage(struct bnb_call *c, struct bnb_tensor *t, const int64_t *strides, unsigned use)
{
    if (!bnb_call_ok(c) || !t->present || t->n == 0 || (strides ? same_strides(t, strides) : t->contiguous))
        return;
    for (int64_t i = 0; (use & BNB_STAGE_WRITE) && i < t->dim; i++)
        if (t->strides[i] == 0 && t->sizes[i] > 1)
            bnb_call_fail(c, BNB_EINVAL,
                          "%s: %s is written but has stride 0 in dimension %lld, expected elements "
                          "that do not overlap",
                          c->op, bnb_label(t).text, (long long)i);

    const struct bnb_ints shape = bnb_sizes_of(t);
    struct bnb_tensor temporary =
        strides ? bnb_new_strided(c, t->name, shape, strides, t->dtype) : bnb_new_tensor(c, t->name, shape, t->dtype);
    temporary.index = t->index;
    if (bnb_call_ok(c) && (use & BNB_STAGE_READ) && !copy(temporary.handle, t->handle))
        bnb_call_fail(c, BNB_EDEVICE, "%s: torch cannot copy %s. %s", c->op, bnb_label(t).text, bnb_torch_reason());
    if (use & BNB_STAGE_WRITE) {
        struct bnb_copy *back = bnb_call_alloc(c, 1, sizeof *back);
        if (back) {
            *back = (struct bnb_copy){c->copies, t->handle, temporary.handle, bnb_label(t)};
            c->copies = back;
        }
    }
    *t = temporary;
}

void bnb_call_cast(struct bnb_call *c, struct bnb_tensor *t, int32_t dtype)
{
    if (!bnb_call_ok(c) || !t->present || t->dtype == dtype)
        return;
    struct bnb_tensor cast = bnb_new_tensor(c, t->name, bnb_sizes_of(t), dtype);
    cast.index = t->index;
    if (bnb_call_ok(c) && !copy(cast.handle, t->handle))
        bnb_call_fail(c, BNB_EDEVICE, "%s: torch cannot convert %s. %s", c->op, bnb_label(t).text, bnb_torch_reason());
    *t = cast;
}

struct bnb_tensor bnb_new_host_tensor(struct bnb_call *c, const char *name, struct bnb_ints shape, int32_t dtype)
{
    const struct bnb_tensor first = c->first;
    c->first.device = bnb_shim.device_cpu();
    c->first.device_index = 0;
    const struct bnb_tensor t = bnb_new_tensor(c, name, shape, dtype);
    c->first = first;
    return t;
}

/* *t replaced by `moved`, which has its shape and dtype. */
static void move_into(struct bnb_call *c, struct bnb_tensor *t, struct bnb_tensor moved)
{
    moved.index = t->index;
    if (bnb_call_ok(c) && t->n > 0 && !copy(moved.handle, t->handle))
        bnb_call_fail(c, BNB_EDEVICE, "%s: torch cannot copy %s between devices. %s", c->op, bnb_label(t).text,
                      bnb_torch_reason());
    *t = moved;
}

void bnb_call_to_host(struct bnb_call *c, struct bnb_tensor *t)
{
    if (bnb_call_ok(c) && t->device != bnb_shim.device_cpu())
        move_into(c, t, bnb_new_host_tensor(c, t->name, bnb_sizes_of(t), t->dtype));
}

void bnb_call_from_host(struct bnb_call *c, struct bnb_tensor *t)
{
    if (bnb_call_ok(c) && t->device != c->first.device)
        move_into(c, t, bnb_new_tensor(c, t->name, bnb_sizes_of(t), t->dtype));
}

/* ---------------------------------------------------------------- data and results */

/* torch gives NULL for a tensor without elements, the core wants a pointer for every buffer. */
static int64_t nothing[1];

const void *bnb_read(struct bnb_call *c, const struct bnb_tensor *t)
{
    const void *data = NULL;
    if (bnb_call_ok(c) && bnb_shim.const_data(t->handle, &data))
        bnb_call_fail(c, BNB_EDEVICE, "%s: torch cannot give the data of %s. %s", c->op, bnb_label(t).text,
                      bnb_torch_reason());
    return bnb_call_ok(c) && t->n == 0 ? nothing : data;
}

void *bnb_write(struct bnb_call *c, const struct bnb_tensor *t)
{
    void *data = NULL;
    if (bnb_call_ok(c) && bnb_shim.mutable_data(t->handle, &data))
        bnb_call_fail(c, BNB_EDEVICE, "%s: torch cannot give the data of %s. %s", c->op, bnb_label(t).text,
                      bnb_torch_reason());
    return bnb_call_ok(c) && t->n == 0 ? nothing : data;
}

void bnb_give(struct bnb_call *c, const struct bnb_tensor *t)
{
    for (size_t i = 0; bnb_call_ok(c) && i < c->owned_count; i++) {
        if (c->owned[i] == t->handle) {
            c->owned[i] = c->owned[--c->owned_count];
            c->results[c->result_count++] = t->handle;
            return;
        }
    }
}

static torch_value *new_box(void)
{
    torch_value *box = NULL;
    if (bnb_shim.new_box)
        return bnb_shim.new_box(&box) ? NULL : box;
    return bnb_shim.operator_new(sizeof *box);
}

void bnb_delete_box(torch_value *box)
{
    if (bnb_shim.delete_box)
        bnb_shim.delete_box(box);
    else
        bnb_shim.operator_delete(box);
}

void bnb_give_optional(struct bnb_call *c, const struct bnb_tensor *t)
{
    if (!bnb_call_ok(c))
        return;
    if (!t->present) {
        c->results[c->result_count++] = NULL; /* the stack's 0 is None */
        return;
    }
    torch_value *box = new_box();
    if (!box) {
        bnb_call_fail(c, BNB_ENOMEM, "%s: out of memory for a result", c->op);
        return;
    }
    c->boxes[c->result_count] = box;
    bnb_give(c, t);
}

static void put_result(struct bnb_call *c, size_t i, bool ok)
{
    torch_value value = (torch_value)(uintptr_t)c->results[i];
    if (!ok) {
        if (c->results[i])
            bnb_shim.delete_tensor(c->results[i]);
        if (c->boxes[i])
            bnb_delete_box(c->boxes[i]);
        return;
    }
    if (c->boxes[i]) {
        *c->boxes[i] = value;
        value = (torch_value)(uintptr_t)c->boxes[i];
    }
    c->stack[i] = value;
}

static void release(struct bnb_call *c)
{
    for (size_t i = 0; i < c->owned_count; i++)
        bnb_shim.delete_tensor(c->owned[i]);
    if (c->owned != c->few)
        free(c->owned);
    while (c->workspaces)
        workspace_free(c, c->workspaces->ptr, 0);
    while (c->chunks) {
        struct bnb_chunk *chunk = c->chunks;
        c->chunks = chunk->next;
        free(chunk);
    }
}

void bnb_call_end(struct bnb_call *c)
{
    if (c->parallel_failed)
        bnb_call_fail(c, BNB_EDEVICE, "%s: torch_parallel_for failed. %s", c->op, bnb_torch_reason());
    for (const struct bnb_copy *back = c->copies; back && bnb_call_ok(c); back = back->next)
        if (!copy(back->to, back->from))
            bnb_call_fail(c, BNB_EDEVICE, "%s: torch cannot copy the result into %s. %s", c->op, back->label.text,
                          bnb_torch_reason());
    const bool ok = bnb_call_ok(c);
    for (size_t i = 0; i < c->result_count; i++)
        put_result(c, i, ok);
    release(c);
    if (!ok)
        bnb_shim.check(false, c->op, __FILE__, __LINE__, bnb_detail());
}
