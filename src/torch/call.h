/*
 * call.h - one call of a boxed operator: arguments in, checks, results out, and everything released at the end
 *
 * An operator reads as a straight line: begin, take each argument, check, compute, give the results, end.  The first
 * failure sticks: every later step does nothing, but arguments are still taken, because whoever takes one off the
 * stack must release it.  bnb_call_end() releases all of it and then, as the very last thing, raises.
 */
#ifndef BNB_TORCH_CALL_H
#define BNB_TORCH_CALL_H

#include "shim.h"

/* A tensor argument or a new tensor.  The call owns the handle; sizes and strides are borrowed from it. */
struct bnb_tensor {
    const char *name; /* of the argument, for messages           */
    int64_t index;    /* in a list argument, else -1             */
    torch_tensor handle;
    const int64_t *sizes, *strides;
    int64_t dim, n;
    int32_t dtype, device, device_index; /* as torch numbers them */
    bool contiguous;
    bool present; /* false: an optional that is None, or one that could not be read */
};

struct bnb_tensors {
    struct bnb_tensor *items;
    size_t count;
};

/* Tensors that are not described: torch is asked as far as needed. */
struct bnb_handles {
    torch_tensor *items;
    size_t count;
};

struct bnb_ints {
    const int64_t *values;
    size_t count;
};

/* What bnb_call_stage() is for. */
enum { BNB_STAGE_READ = 1, BNB_STAGE_WRITE = 2 };

#define BNB_CALL_INLINE 16

struct bnb_call {
    const char *op; /* opens every message                    */
    bnb_status status;
    torch_value *stack;
    uint64_t taken;
    uint64_t inputs; /* 0: the stack does not fit the schema, nothing can be taken */
    bnb_exec exec;   /* device and stream of the first tensor  */
    struct bnb_tensor first;
    torch_tensor results[5];
    torch_value *boxes[5]; /* what holds a result of type Tensor?   */
    size_t result_count;
    bool grad_mode;
    bool parallel_failed;
    bool host_too;   /* takers accept tensors of the host in a call on CUDA: paged states */
    char string[33]; /* the str argument, printable ASCII      */
    /* what bnb_call_end() releases */
    torch_tensor few[BNB_CALL_INLINE], *owned;
    size_t owned_count, owned_capacity;
    struct bnb_chunk *chunks;
    struct bnb_copy *copies;
    struct bnb_workspace *workspaces;
};

/* The text of a tensor for a message: "p", "p[3]".  Use: bnb_label(&t).text */
struct bnb_label { char text[48]; };
struct bnb_label bnb_label(const struct bnb_tensor *t);
struct bnb_label bnb_dtype_label(int32_t dtype);

/* The reason torch gave for its last failure; "" where the running torch cannot tell. */
const char *bnb_torch_reason(void);

void bnb_call_begin(struct bnb_call *c, const char *op, torch_value *stack, uint64_t inputs, uint64_t expected);

/* The call releases `handle` at its end. */
void bnb_call_own(struct bnb_call *c, torch_tensor handle);

/* Fill *t, whose handle the call owns, with what torch knows of it. */
void bnb_call_describe(struct bnb_call *c, struct bnb_tensor *t);

/* Takers, in the order of the schema.  The type of the argument must be the schema's. */
struct bnb_tensor bnb_take_tensor(struct bnb_call *c, const char *name);
struct bnb_tensor bnb_take_optional(struct bnb_call *c, const char *name); /* Tensor? */
struct bnb_tensors bnb_take_tensors(struct bnb_call *c, const char *name); /* Tensor[] */
struct bnb_handles bnb_take_handles(struct bnb_call *c, const char *name); /* Tensor[]; describes the first alone */
struct bnb_ints bnb_take_ints(struct bnb_call *c);
int64_t bnb_take_int(struct bnb_call *c);
double bnb_take_float(struct bnb_call *c);
bool bnb_take_bool(struct bnb_call *c);
int32_t bnb_take_dtype(struct bnb_call *c);   /* ScalarType, as torch numbers it */
int32_t bnb_take_optional_dtype(struct bnb_call *c, enum bnb_torch_dtype otherwise); /* ScalarType? */
const char *bnb_take_string(struct bnb_call *c); /* at most one per call; cut to 32 printable characters */

/* Record a failure, unless there is one: bnb_call_fail(c, BNB_EINVAL, "%s: ...", c->op, ...). */
#define bnb_call_fail(c, ...) ((c)->status ? (void)0 : (void)((c)->status = bnb_fail(__VA_ARGS__)))

/* Checks.  Each names the argument, its value and what was expected. */
void bnb_check_dtype(struct bnb_call *c, const struct bnb_tensor *t, enum bnb_torch_dtype dtype);
void bnb_check_count(struct bnb_call *c, const struct bnb_tensor *t, int64_t n, const char *why);
/* ceil(n / block) elements: the statistics of n values */
void bnb_check_blocks(struct bnb_call *c, const struct bnb_tensor *t, int64_t n, int64_t block);
/* f32, f16 or bf16; `status` is the failure for all others.  Fails softly: BNB_F32 with c->status set. */
bnb_dtype bnb_check_float(struct bnb_call *c, const char *name, int32_t dtype, bnb_status status);
/* The same for a tensor, whose label is made only for a failure: BNB_EDTYPE. */
bnb_dtype bnb_check_float_tensor(struct bnb_call *c, const struct bnb_tensor *t);
void bnb_check_block(struct bnb_call *c, const char *name, int64_t block);
/* The product of sizes; 0 on failure (a negative size, overflow). */
int64_t bnb_check_shape(struct bnb_call *c, const char *name, struct bnb_ints shape);
/* `out` must have this shape and dtype. */
void bnb_check_out(struct bnb_call *c, const struct bnb_tensor *out, struct bnb_ints shape, int32_t dtype);

/* Memory that lives until the end of the call; NULL with c->status set when there is none. */
void *bnb_call_alloc(struct bnb_call *c, size_t count, size_t size);

/* A new contiguous tensor on the device of the call, or one with the given strides. */
struct bnb_tensor bnb_new_tensor(struct bnb_call *c, const char *name, struct bnb_ints shape, int32_t dtype);
struct bnb_tensor bnb_new_strided(struct bnb_call *c, const char *name, struct bnb_ints shape, const int64_t *strides,
                                  int32_t dtype);

/* Make *t a tensor with these strides (NULL: row-major), if it is not one: a temporary, filled from the argument when
 * read, and copied back into the argument at the end of a successful call when written. */
void bnb_call_stage(struct bnb_call *c, struct bnb_tensor *t, const int64_t *strides, unsigned use);

/* Make *t a row-major tensor of this dtype, if it has another: a temporary that torch converts. */
void bnb_call_cast(struct bnb_call *c, struct bnb_tensor *t, int32_t dtype);

/* For operators whose results depend on values: *t as it is on the CPU, which waits for the work of a device; and a CPU
 * tensor where the call runs.  Contiguous tensors; nothing is done where they are there already. */
struct bnb_tensor bnb_new_host_tensor(struct bnb_call *c, const char *name, struct bnb_ints shape, int32_t dtype);
void bnb_call_to_host(struct bnb_call *c, struct bnb_tensor *t);
void bnb_call_from_host(struct bnb_call *c, struct bnb_tensor *t);

/* The elements of a contiguous or staged tensor; NULL on failure. */
const void *bnb_read(struct bnb_call *c, const struct bnb_tensor *t);
void *bnb_write(struct bnb_call *c, const struct bnb_tensor *t);

/* Give a tensor of the call away as its next result. */
void bnb_give(struct bnb_call *c, const struct bnb_tensor *t);

/* The same for a result of type Tensor?; a tensor that is not present gives None. */
void bnb_give_optional(struct bnb_call *c, const struct bnb_tensor *t);

/* Free the box of an optional. */
void bnb_delete_box(torch_value *box);

/* True until something failed. */
static inline bool bnb_call_ok(const struct bnb_call *c) { return c->status == BNB_OK; }

/* Copy back, release everything, put the results on the stack; or raise.  The last statement of every operator. */
void bnb_call_end(struct bnb_call *c);

static inline struct bnb_ints bnb_sizes_of(const struct bnb_tensor *t)
{
    return (struct bnb_ints){t->sizes, (size_t)t->dim};
}

#endif
