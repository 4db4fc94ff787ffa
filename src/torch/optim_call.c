/* optim_call.c - the parameters of an optimizer call: see optim_call.h */
#include <stdlib.h>
#include <string.h>

#include "optim_call.h"

#define COUNT_WHY " (as many as p)"

static bool has(const struct bnb_tensor *t) { return t && t->present; }

static int row_of(const char *name)
{
    int i = 0;
    while (bnb_optim_name(i) && strcmp(bnb_optim_name(i), name) != 0)
        i++;
    return i;
}

int bnb_states_of(const char *name) { return bnb_optim_states(row_of(name)); }

void bnb_check_optimizer(struct bnb_call *c, const bnb_optim_config *config)
{
    if (!bnb_call_ok(c) || bnb_states_of(config->name) != 0)
        return;
    c->status = bnb_optim_step(&c->exec, config, NULL, 0);
    bnb_call_fail(c, BNB_EINVAL, "%s: optimizer_name is \"%s\", which the library does not know", c->op, config->name);
}

/* Does a state stay in the host's memory in a call on CUDA? */
static bool is_paged(const struct bnb_call *c, const struct bnb_tensor *state)
{
    return has(state) && state->n > 0 && state->device != c->first.device;
}

/* One state with its scales, if it is uint8; `rows` averages of p's size in one tensor. */
static void check_state(struct bnb_call *c, const struct bnb_tensor *state, const struct bnb_tensor *absmax, int64_t n,
                        int rows)
{
    const bool is8 = state->dtype == bnb_torch_dtypes[BNB_TORCH_uint8];
    bnb_check_count(c, state, rows * n, rows == 1 ? COUNT_WHY : " (two for each of p)");
    if (!is8)
        bnb_check_dtype(c, state, BNB_TORCH_float32);
    if (!is8)
        return;
    bnb_check_dtype(c, absmax, BNB_TORCH_float32);
    if (rows == 1)
        bnb_check_blocks(c, absmax, n, BNB_OPTIM_BLOCK);
    else
        bnb_check_count(c, absmax, rows * ((n + BNB_OPTIM_BLOCK - 1) / BNB_OPTIM_BLOCK), " (two for each 256 of p)");
}

static void check_parameter(struct bnb_call *c, const struct bnb_parameter *q, int row)
{
    if (!bnb_call_ok(c))
        return;
    bnb_check_float_tensor(c, q->p);
    if (q->g->dtype != q->p->dtype)
        bnb_call_fail(c, BNB_EDTYPE, "%s: %s has dtype %s, expected %s, the dtype of %s", c->op, bnb_label(q->g).text,
                      bnb_dtype_label(q->g->dtype).text, bnb_dtype_label(q->p->dtype).text, bnb_label(q->p).text);
    bnb_check_count(c, q->g, q->p->n, COUNT_WHY);
    check_state(c, q->state1, q->absmax1, q->p->n, bnb_optim_averages(row));
    if (bnb_optim_states(row) == 2) {
        if (q->state2->dtype != q->state1->dtype)
            bnb_call_fail(c, BNB_EDTYPE, "%s: %s has dtype %s, expected %s, the dtype of state1", c->op,
                          bnb_label(q->state2).text, bnb_dtype_label(q->state2->dtype).text,
                          bnb_dtype_label(q->state1->dtype).text);
        check_state(c, q->state2, q->absmax2, q->p->n, 1);
        if (is_paged(c, q->state1) != is_paged(c, q->state2))
            bnb_call_fail(c, BNB_EINVAL,
                          "%s: %s and %s are one on the device and one in host memory, expected both alike", c->op,
                          bnb_label(q->state1).text, bnb_label(q->state2).text);
    }
    const struct bnb_tensor *scalar[2] = {q->step_count, q->unorm};
    for (int k = 0; k < 2; k++) {
        if (!has(scalar[k]))
            continue;
        bnb_check_dtype(c, scalar[k], BNB_TORCH_float32);
        bnb_check_count(c, scalar[k], 1, "");
    }
}

/* ---------------------------------------------------------------- memory */

/* Do the elements fill one run of memory, each once?  Dense strides differ from each other, so the dimension that
 * continues the run is found by its stride alone. */
static bool is_dense(const struct bnb_tensor *t)
{
    int64_t run = 1, left = 0;
    for (int64_t i = 0; i < t->dim; i++)
        left += t->sizes[i] > 1;
    for (bool found = true; left && found;) {
        found = false;
        for (int64_t i = 0; i < t->dim && !found; i++) {
            if (t->sizes[i] > 1 && t->strides[i] == run) {
                run *= t->sizes[i];
                left--;
                found = true;
            }
        }
    }
    return left == 0;
}

/* Has t the shape of the state, behind its first `lead` dimensions? */
static bool fits_shape(const struct bnb_tensor *t, const struct bnb_tensor *state, int lead)
{
    return t->dim + lead == state->dim && memcmp(t->sizes, state->sizes + lead, (size_t)t->dim * sizeof *t->sizes) == 0;
}

/* Bring all tensors of a parameter into the order of state1: its strides if it is dense, row-major otherwise.  Where
 * state1 has rows (`lead` is 1), the order is that within each. */
static void stage_parameter(struct bnb_call *c, const struct bnb_parameter *q, int lead)
{
    if (!bnb_call_ok(c) || q->p->n == 0)
        return;
    const struct bnb_tensor *state = q->state1;
    const bool by_strides = !state->contiguous && is_dense(state) && fits_shape(q->p, state, lead) &&
                            (lead == 0 || state->strides[0] == q->p->n) && fits_shape(q->g, state, lead) &&
                            (!has(q->state2) || fits_shape(q->state2, state, lead));
    const int64_t *order = by_strides ? state->strides + lead : NULL;
    if (is_paged(c, state) && !by_strides && !(state->contiguous && (!has(q->state2) || q->state2->contiguous)))
        bnb_call_fail(c, BNB_EINVAL, "%s: %s is paged and lies in memory in an order of its own, expected that of %s",
                      c->op, bnb_label(state).text, bnb_label(q->p).text);
    const unsigned both = BNB_STAGE_READ | BNB_STAGE_WRITE;
    bnb_call_stage(c, q->p, order, both);
    bnb_call_stage(c, q->g, order, BNB_STAGE_READ);
    bnb_call_stage(c, q->state1, by_strides ? state->strides : NULL, both);
    if (has(q->state2))
        bnb_call_stage(c, q->state2, order, both);
    if (has(q->absmax1))
        bnb_call_stage(c, q->absmax1, NULL, both);
    if (has(q->absmax2))
        bnb_call_stage(c, q->absmax2, NULL, both);
}

/* The bytes from the first to the last element of a tensor. */
struct extent {
    uintptr_t begin, end;
    const struct bnb_tensor *tensor;
};

static int by_address(const void *a, const void *b)
{
    const uintptr_t x = ((const struct extent *)a)->begin, y = ((const struct extent *)b)->begin;
    return (x > y) - (x < y);
}

static struct extent extent_of(struct bnb_call *c, const struct bnb_tensor *t)
{
    int64_t last = 0;
    for (int64_t i = 0; i < t->dim; i++)
        last += (t->sizes[i] - 1) * t->strides[i];
    const void *data = NULL;
    if (bnb_shim.const_data(t->handle, &data))
        bnb_call_fail(c, BNB_EINVAL, "%s: %s has no data: %s", c->op, bnb_label(t).text, bnb_torch_reason());
    const uintptr_t begin = (uintptr_t)data;
    return (struct extent){begin, begin + (size_t)(last + 1) * bnb_shim.element_size(t->dtype), t};
}

/* Mark every byte of a tensor in a map of the bytes from `base` on; false if one was marked before. */
static bool mark(uint8_t *map, uintptr_t base, const struct extent *e)
{
    const struct bnb_tensor *t = e->tensor;
    const size_t size = bnb_shim.element_size(t->dtype);
    for (int64_t i = 0; i < t->n; i++) {
        int64_t offset = 0, left = i;
        for (int64_t d = t->dim - 1; d >= 0; left /= t->sizes[d], d--)
            offset += left % t->sizes[d] * t->strides[d];
        const size_t first = e->begin - base + (size_t)offset * size;
        for (size_t k = first; k < first + size; k++) {
            if (map[k / 8] >> (k % 8) & 1)
                return false;
            map[k / 8] |= (uint8_t)(1u << (k % 8));
        }
    }
    return true;
}

/* Extents [first, end) overlap one after the other.  Views may still have no element in common. */
static void check_elements(struct bnb_call *c, const struct extent *first, const struct extent *end)
{
    uintptr_t stop = first->end;
    for (const struct extent *e = first; e < end; e++)
        stop = e->end > stop ? e->end : stop;
    uint8_t *map = bnb_call_alloc(c, (stop - first->begin) / 8 + 1, 1);
    for (const struct extent *e = first; map && e < end && bnb_call_ok(c); e++)
        if (!mark(map, first->begin, e))
            bnb_call_fail(c, BNB_EINVAL, "%s: %s shares memory with another parameter, expected parameters apart",
                          c->op, bnb_label(e->tensor).text);
}

/* Blocks of all parameters are updated side by side: no two may share an element. */
static void check_overlap(struct bnb_call *c, const struct bnb_parameter *q, size_t count)
{
    if (!bnb_call_ok(c) || count < 2)
        return;
    struct extent *extents = bnb_call_alloc(c, count, sizeof *extents);
    size_t used = 0;
    bool sorted = true;
    for (size_t i = 0; extents && i < count; i++) {
        if (q[i].p->n == 0)
            continue;
        extents[used++] = extent_of(c, q[i].p);
        sorted = sorted && (used < 2 || extents[used - 2].end <= extents[used - 1].begin);
    }
    if (!extents || !bnb_call_ok(c) || sorted)
        return;
    qsort(extents, used, sizeof *extents, by_address);
    for (size_t i = 0, next; i < used && bnb_call_ok(c); i = next) {
        uintptr_t reach = extents[i].end;
        for (next = i + 1; next < used && extents[next].begin < reach; next++)
            reach = extents[next].end > reach ? extents[next].end : reach;
        if (next > i + 1)
            check_elements(c, extents + i, extents + next);
    }
}

static bnb_optim_tensor core_tensor(struct bnb_call *c, const struct bnb_parameter *q)
{
    const bool is8 = q->state1->dtype == bnb_torch_dtypes[BNB_TORCH_uint8];
    bnb_optim_tensor t = {
        .n = q->p->n, .step = q->step, .bits = is8 ? 8 : 32, .seed = q->seed, .gnorm_scale = q->gnorm_scale};
    t.dtype = bnb_check_float_tensor(c, q->p);
    t.paged = is_paged(c, q->state1);
    t.p = bnb_write(c, q->p);
    t.g = bnb_read(c, q->g);
    t.state1 = bnb_write(c, q->state1);
    t.state2 = has(q->state2) ? bnb_write(c, q->state2) : NULL;
    t.absmax1 = has(q->absmax1) ? bnb_write(c, q->absmax1) : NULL;
    t.absmax2 = has(q->absmax2) ? bnb_write(c, q->absmax2) : NULL;
    t.step_count = has(q->step_count) ? bnb_write(c, q->step_count) : NULL;
    t.unorm = has(q->unorm) ? bnb_write(c, q->unorm) : NULL;
    return t;
}

const float *bnb_read_floats(struct bnb_call *c, struct bnb_tensor *t, int64_t count, const char *why)
{
    if (!bnb_call_ok(c) || !t->present)
        return NULL;
    bnb_check_dtype(c, t, BNB_TORCH_float32);
    bnb_check_count(c, t, count, why);
    bnb_call_stage(c, t, NULL, BNB_STAGE_READ);
    return bnb_read(c, t);
}

void bnb_check_given(struct bnb_call *c, const struct bnb_tensor *t, bool needed, const char *name)
{
    if (bnb_call_ok(c) && t->present != needed)
        bnb_call_fail(c, BNB_EINVAL, "%s: %s is %s, expected %s for optimizer \"%s\"", c->op, t->name,
                      t->present ? "a tensor" : "None", needed ? "a tensor" : "None", name);
}

/* ---------------------------------------------------------------- the step */

bnb_optim_tensor *bnb_open_parameters(struct bnb_call *c, const bnb_optim_config *config, struct bnb_parameter *q,
                                      size_t count)
{
    bnb_check_optimizer(c, config);
    const int row = row_of(config->name);
    for (size_t i = 0; i < count; i++)
        check_parameter(c, &q[i], row);
    check_overlap(c, q, count);
    for (size_t i = 0; i < count; i++)
        stage_parameter(c, &q[i], bnb_optim_averages(row) - 1);
    bnb_optim_tensor *tensors = bnb_call_alloc(c, count, sizeof *tensors);
    for (size_t i = 0; i < count && tensors; i++)
        tensors[i] = core_tensor(c, &q[i]);
    return bnb_call_ok(c) ? tensors : NULL;
}

struct bnb_tensor bnb_measure_parameters(struct bnb_call *c, const bnb_optim_config *config,
                                         const bnb_optim_tensor *tensors, size_t count)
{
    const int64_t shape[2] = {(int64_t)count, 2};
    const struct bnb_ints sizes = {shape, 2};
    struct bnb_tensor norms = bnb_new_tensor(c, "norms", sizes, bnb_torch_dtypes[BNB_TORCH_float64]);
    double *values = bnb_call_ok(c) && count > 0 ? bnb_write(c, &norms) : NULL;
    if (bnb_call_ok(c))
        c->status = bnb_optim_norms(&c->exec, config, tensors, count, values);
    return norms;
}

void bnb_step_tensors(struct bnb_call *c, bnb_optim_config *config, const bnb_optim_tensor *tensors, size_t count)
{
    if (bnb_call_ok(c) && config->max_unorm > 0.0 && !config->norms && count > 0) {
        const struct bnb_tensor norms = bnb_measure_parameters(c, config, tensors, count);
        config->norms = bnb_read(c, &norms);
    }
    if (bnb_call_ok(c))
        c->status = bnb_optim_step(&c->exec, config, tensors, count);
}

void bnb_step_parameters(struct bnb_call *c, bnb_optim_config *config, struct bnb_parameter *q, size_t count)
{
    const bnb_optim_tensor *tensors = bnb_open_parameters(c, config, q, count);
    bnb_step_tensors(c, config, tensors, count);
}
