/*
 * ops_optim_table.c - steps over parameters whose states were handed over and checked once: a table
 *
 * A table holds the states, scales, maps and counters of one _optimizer_step as torch's handles, which keep the tensors
 * alive, and what a step needs to know of them.  A step brings gradients, and parameters unless the table holds these
 * too.  Every address is read anew from its tensor; where one has moved, or a tensor is not what it was, nothing is
 * written and the caller is told to use _optimizer_step, which says what is wrong or copes with it.  The caller decides
 * about parameters: they may refer to whatever owns the table, by a hook or an attribute, and Python's garbage collector
 * cannot see through a handle.
 *
 * Where the parameters are held, a step need not bring the gradients either: bnb_torch_ready() finds those that the
 * parameters have.  That spares the caller a thousand small objects per step.
 *
 * The caller knows a table by a number that is never used twice, and forgets it with bnb_torch_forget().
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "ops.h"
#include "optim_call.h"

/* A tensor that the table holds, as it was. */
struct held {
    torch_tensor handle;
    const void *data;
    int64_t n;
    int32_t dtype;
};

struct table {
    int64_t id;
    char name[33]; /* of the optimizer */
    int32_t device, device_index;
    size_t count, held_count;
    bool counters;     /* steps are counted by tensors */
    bool finds;        /* gradients are found by way of the parameters */
    bool ready;        /* found, and all is current: the next run takes them */
    int32_t *dtypes;   /* [count] of the parameters, as torch numbers them */
    torch_tensor *params; /* [count] if they are held, else NULL */
    struct held *held; /* [held_count] */
    const float *qmap1, *qmap2;
    bnb_optim_tensor *tensors; /* [count] as the last step left them */
};

/* A number is a slot and, above it, a serial number. */
enum { SLOT_BITS = 20 };

static struct {
    pthread_mutex_t lock;
    struct table **slots;
    size_t count;
    int64_t serial;
} tables = {.lock = PTHREAD_MUTEX_INITIALIZER};

BNB_API void bnb_torch_forget(int64_t table);
BNB_API int bnb_torch_ready(int64_t table);

/* ---------------------------------------------------------------- tables and numbers */

static void free_table(struct table *t)
{
    if (!t)
        return;
    for (size_t i = 0; i < t->held_count; i++)
        bnb_shim.delete_tensor(t->held[i].handle);
    for (size_t i = 0; t->params && i < t->count; i++)
        if (t->params[i])
            bnb_shim.delete_tensor(t->params[i]);
    free(t->params);
    free(t->dtypes);
    free(t->held);
    free(t->tensors);
    free(t);
}

static struct table *new_table(const struct bnb_group *l, size_t held_count, bool with_params)
{
    struct table *t = calloc(1, sizeof *t);
    if (!t)
        return NULL;
    t->count = l->p.count;
    t->dtypes = calloc(t->count + 1, sizeof *t->dtypes);
    t->held = calloc(held_count + 1, sizeof *t->held);
    t->tensors = calloc(t->count + 1, sizeof *t->tensors);
    t->params = with_params ? calloc(t->count + 1, sizeof *t->params) : NULL;
    if (t->dtypes && t->held && t->tensors && (t->params || !with_params))
        return t;
    free_table(t);
    return NULL;
}

/* Give the table a number; false if there is none left, or no memory. */
static bool enter(struct table *t)
{
    size_t slot = 0;
    pthread_mutex_lock(&tables.lock);
    while (slot < tables.count && tables.slots[slot])
        slot++;
    if (slot == tables.count && slot < (size_t)1 << SLOT_BITS) {
        const size_t count = tables.count ? 2 * tables.count : 16;
        struct table **grown = realloc(tables.slots, count * sizeof *grown);
        if (grown) {
            memset(grown + tables.count, 0, (count - tables.count) * sizeof *grown);
            tables.slots = grown;
            tables.count = count;
        }
    }
    const bool found = slot < tables.count;
    if (found) {
        t->id = ++tables.serial << SLOT_BITS | (int64_t)slot;
        tables.slots[slot] = t;
    }
    pthread_mutex_unlock(&tables.lock);
    return found;
}

static struct table *look_up(int64_t id, bool take_out)
{
    struct table *t = NULL;
    pthread_mutex_lock(&tables.lock);
    const size_t slot = (size_t)id & (((size_t)1 << SLOT_BITS) - 1);
    if (slot < tables.count && tables.slots[slot] && tables.slots[slot]->id == id) {
        t = tables.slots[slot];
        if (take_out)
            tables.slots[slot] = NULL;
    }
    pthread_mutex_unlock(&tables.lock);
    return t;
}

/* Release a table; no step may be under way with it.  A number that is not (or no longer) in use: nothing happens. */
void bnb_torch_forget(int64_t table) { free_table(look_up(table, true)); }

/* ---------------------------------------------------------------- making one */

/* What torch keeps about a tensor: a handle points to a pointer to it, as a c10::intrusive_ptr is nothing else. */
static const void *impl_of(torch_tensor tensor) { return *(const void *const *)(const void *)tensor; }

/* The gradient of a parameter, borrowed; it may be undefined. */
static torch_tensor gradient_of(torch_tensor param) { return bnb_shim.gradient(impl_of(param)); }

/* Does torch's own function find the gradients that the caller has given? */
static bool finds_gradients(const struct table *t, const struct bnb_tensors *g)
{
    if (!t->params || !bnb_shim.gradient)
        return false;
    for (size_t i = 0; i < t->count; i++) {
        torch_tensor found = gradient_of(t->params[i]);
        if (!found || impl_of(found) != impl_of(g->items[i].handle))
            return false;
    }
    return true;
}

static bool are_contiguous(const struct bnb_tensors *list)
{
    for (size_t i = 0; i < list->count; i++)
        if (!list->items[i].contiguous)
            return false;
    return true;
}

/* Move the tensors of the lists behind p and g from the call into a new table: they are the last that the call owns.  The
 * first are those of p. */
static struct table *adopt(struct bnb_call *c, const struct bnb_group *l, const bnb_optim_tensor *tensors,
                           bool with_params)
{
    const struct bnb_tensors *lists[] = {&l->state1, &l->state2, &l->absmax1, &l->absmax2,
                                         &l->qmaps,  &l->steps,  &l->unorm};
    const size_t first = 2 * l->p.count, held_count = c->owned_count - first;
    struct table *t = new_table(l, held_count, with_params);
    if (!t) {
        bnb_call_fail(c, BNB_ENOMEM, "%s: out of memory for a table of %zu parameters", c->op, l->p.count);
        return NULL;
    }
    memcpy(t->name, c->string, sizeof t->name);
    memcpy(t->tensors, tensors, t->count * sizeof *tensors);
    t->device = c->first.device;
    t->device_index = c->first.device_index;
    t->counters = l->steps.count > 0;
    t->qmap1 = l->config.qmap1;
    t->qmap2 = l->config.qmap2;
    for (size_t i = 0; i < t->count; i++)
        t->dtypes[i] = l->p.items[i].dtype;
    for (size_t k = 0; k < sizeof lists / sizeof lists[0]; k++) {
        for (size_t i = 0; i < lists[k]->count; i++) {
            const struct bnb_tensor *s = &lists[k]->items[i];
            void *data = NULL;
            bnb_shim.mutable_data(s->handle, &data);
            t->held[t->held_count++] = (struct held){.handle = s->handle, .data = data, .n = s->n, .dtype = s->dtype};
        }
    }
    c->owned_count = first;
    if (with_params) {
        memcpy(t->params, c->owned, t->count * sizeof *t->params);
        memmove(c->owned, c->owned + t->count, t->count * sizeof *c->owned);
        c->owned_count = t->count;
    }
    t->finds = finds_gradients(t, &l->g);
    return t;
}

/* _optimizer_table(bool with_params, the arguments of _optimizer_step) -> int: the number of a table for these tensors;
 * 0 if they do not suit one, because a tensor is not contiguous.  Nothing is computed, and the options are not kept. */
void bnb_op_optimizer_table(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    struct table *t = NULL;
    (void)outputs;
    bnb_call_begin(&c, "_optimizer_table", stack, inputs, 32);
    const bool with_params = bnb_take_bool(&c);
    struct bnb_group l = bnb_take_group(&c);
    bnb_check_optimizer(&c, &l.config);
    if (l.gnorm_scale.present || l.norms.present || l.lr_tensor.present)
        bnb_call_fail(&c, BNB_EINVAL, "%s: gnorm_scale, norms or lr_tensor is a tensor, expected None", c.op);
    const struct bnb_tensors *lists[] = {&l.p,       &l.g,     &l.state1, &l.state2, &l.absmax1,
                                         &l.absmax2, &l.qmaps, &l.steps,  &l.unorm};
    bool suits = bnb_call_ok(&c);
    for (size_t k = 0; k < sizeof lists / sizeof lists[0]; k++)
        suits = suits && are_contiguous(lists[k]);
    if (suits) {
        struct bnb_parameter *q = bnb_deal_group(&c, &l);
        bnb_finish_config(&c, &l);
        const bnb_optim_tensor *tensors = bnb_open_parameters(&c, &l.config, q, q ? l.p.count : 0);
        if (tensors)
            t = adopt(&c, &l, tensors, with_params);
    }
    if (t && !enter(t)) {
        free_table(t);
        t = NULL;
    }
    const int64_t id = t ? t->id : 0;
    bnb_call_end(&c);
    stack[0] = (torch_value)id;
}

/* ---------------------------------------------------------------- a step */

/* The address of a contiguous tensor of that dtype and size; NULL if it is another.  What is written must be asked for
 * its address as such: torch then ends a lazy copy that shares the memory. */
static const void *address_of(torch_tensor tensor, int32_t dtype, int64_t n, bool written)
{
    int32_t has_dtype = 0;
    int64_t has_n = 0;
    bool contiguous = false;
    const void *data = NULL;
    void *target = NULL;
    if (!tensor || (written ? bnb_shim.mutable_data(tensor, &target) : bnb_shim.const_data(tensor, &data)) ||
        bnb_shim.numel(tensor, &has_n) || bnb_shim.dtype(tensor, &has_dtype) ||
        bnb_shim.is_contiguous(tensor, &contiguous))
        return NULL;
    return has_n == n && has_dtype == dtype && contiguous ? (written ? target : data) : NULL;
}

/* Does the tensor lie on the device of the table?  Equal addresses say so as well. */
static bool is_near(const struct table *t, torch_tensor tensor)
{
    int32_t device = 0, device_index = 0;
    return !bnb_shim.device(tensor, &device) && !bnb_shim.device_index(tensor, &device_index) && device == t->device &&
           device_index == t->device_index;
}

/* What torch keeps about a tensor points to its storage, near its beginning.  The tensors of a step do not fit into the
 * first caches, and nobody else has touched most of them lately.  Prefetching asks nothing of an address: where torch keeps
 * things elsewhere, this is of no use and does no harm. */
enum { NEAR = 4, AHEAD = 8, FAR_AHEAD = 16 }; /* tensors by which prefetching is ahead */

static void prefetch_tensor(torch_tensor tensor)
{
    const char *about = tensor ? impl_of(tensor) : NULL;
    for (int line = 0; about && line < 4; line++)
        __builtin_prefetch(about + 64 * (ptrdiff_t)line);
}

static void prefetch_storage(torch_tensor tensor)
{
    const char *const *about = tensor ? impl_of(tensor) : NULL;
    if (!about)
        return;
    __builtin_prefetch(about[2]); /* behind two words; there are three in older releases */
    __builtin_prefetch(about[3]); /* or what autograd knows */
}

/* Are the states what they were? */
static bool holds_states(const struct table *t)
{
    for (size_t i = 0; i < t->held_count; i++) {
        const struct held *h = &t->held[i];
        if (i + FAR_AHEAD < t->held_count)
            prefetch_tensor(h[FAR_AHEAD].handle);
        if (i + AHEAD < t->held_count)
            prefetch_storage(h[AHEAD].handle);
        if (address_of(h->handle, h->dtype, h->n, true) != h->data)
            return false;
    }
    return true;
}

/* Are parameter i and its gradient what the table takes them for?  Enters the address of the gradient. */
static bool enter_gradient(struct table *t, size_t i, torch_tensor param, torch_tensor gradient)
{
    bnb_optim_tensor *e = &t->tensors[i];
    const void *to = address_of(param, t->dtypes[i], e->n, true);
    const void *from = address_of(gradient, t->dtypes[i], e->n, false);
    if (e->n > 0 && (to != e->p || !from || !is_near(t, gradient)))
        return false;
    if (e->n > 0)
        e->g = from;
    return true;
}

/* Are all tensors what the table takes them for? */
static bool is_current(struct table *t, const struct bnb_handles *p, const struct bnb_handles *g)
{
    const torch_tensor *params = t->params ? t->params : p->items;
    if (p->count != (t->params ? 0 : t->count) || g->count != t->count || !holds_states(t))
        return false;
    for (size_t i = 0; i < t->count; i++) {
        if (i + FAR_AHEAD < t->count) {
            prefetch_tensor(params[i + FAR_AHEAD]);
            prefetch_tensor(g->items[i + FAR_AHEAD]);
            prefetch_storage(params[i + AHEAD]);
            prefetch_storage(g->items[i + AHEAD]);
        }
        if (!enter_gradient(t, i, params[i], g->items[i]))
            return false;
    }
    return true;
}

/* The same with the gradients that the parameters have; a parameter without one is not current. */
static bool finds_current(struct table *t)
{
    if (!holds_states(t))
        return false;
    for (size_t i = 0; i < t->count; i++) {
        if (i + FAR_AHEAD < t->count) {
            prefetch_tensor(t->params[i + FAR_AHEAD]);
            prefetch_storage(t->params[i + AHEAD]);
            prefetch_tensor(gradient_of(t->params[i + NEAR]));
            prefetch_storage(gradient_of(t->params[i + 1]));
        }
        torch_tensor gradient = gradient_of(t->params[i]);
        bool defined = false;
        if (!gradient || bnb_shim.is_defined(gradient, &defined) || !defined ||
            !enter_gradient(t, i, t->params[i], gradient))
            return false;
    }
    return true;
}

/* May _optimizer_run be called with the first gradient alone, once, because every parameter has one and all tensors are
 * what the table takes them for?  1: yes;  0: not now;  -1: never with this table, or there is no such table. */
int bnb_torch_ready(int64_t table)
{
    struct table *t = look_up(table, false);
    if (!t || !t->finds)
        return -1;
    t->ready = finds_current(t);
    return t->ready;
}

static void check_count(struct bnb_call *c, const char *name, size_t count, size_t expected)
{
    if (count != expected)
        bnb_call_fail(c, BNB_EINVAL, "%s: %s has %zu entries, expected %zu", c->op, name, count, expected);
}

/* Enter what each parameter has of its own in this step. */
static void enter_options(struct bnb_call *c, struct table *t, struct bnb_group *l)
{
    const size_t steps = l->step.count, seeds = l->seed.count;
    if (t->counters || steps != 1)
        check_count(c, "step", steps, t->counters ? 0 : t->count);
    if (seeds || l->config.stochastic_rounding)
        check_count(c, "seed", seeds, t->count);
    const float *scale = bnb_read_floats(c, &l->gnorm_scale, (int64_t)t->count, " (one per parameter)");
    for (size_t i = 0; bnb_call_ok(c) && i < t->count; i++) {
        bnb_optim_tensor *e = &t->tensors[i];
        e->step = steps ? l->step.values[steps == 1 ? 0 : i] : 0;
        e->seed = seeds ? (uint64_t)l->seed.values[i] : 0;
        e->gnorm_scale = scale ? scale + i : NULL;
    }
}

/* Is the step possible?  One with the first gradient alone must have been announced. */
static bool may_run(struct table *t, const struct bnb_handles *p, const struct bnb_handles *g)
{
    const bool ready = t->ready;
    t->ready = false;
    return g->count == 1 && p->count == 0 && t->count > 1 ? ready : is_current(t, p, g);
}

/* _optimizer_run(int table, Tensor(a!)[] p, Tensor[] g, Tensor? gnorm_scale, Tensor? norms, Tensor? lr_tensor,
 *     int[] step, int[] seed, float lr, ..., int page_bytes) -> bool: was the step made?  If not, nothing
 *     was written, and the table is of no more use.  p: empty if the table holds the parameters.  g: after
 *     bnb_torch_ready() the first suffices, by which the dispatcher knows the device.  step: one per parameter, or one for
 *     all. */
void bnb_op_optimizer_run(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    (void)outputs;
    bnb_call_begin(&c, "_optimizer_run", stack, inputs, 24);
    const int64_t id = bnb_take_int(&c);
    const struct bnb_handles p = bnb_take_handles(&c, "p"), g = bnb_take_handles(&c, "g");
    struct bnb_group l = {.config = {.name = ""}};
    bnb_take_options(&c, &l);
    struct table *t = look_up(id, false);
    if (!t)
        bnb_call_fail(&c, BNB_EINVAL, "%s: table is %lld, expected the number of one that _optimizer_table() has made",
                      c.op, (long long)id);
    const bool current = t && bnb_call_ok(&c) && may_run(t, &p, &g);
    if (current) {
        enter_options(&c, t, &l);
        bnb_finish_config(&c, &l);
        l.config.name = t->name;
        l.config.qmap1 = t->qmap1;
        l.config.qmap2 = t->qmap2;
        bnb_step_tensors(&c, &l.config, t->tensors, t->count);
    }
    bnb_call_end(&c);
    stack[0] = current;
}
