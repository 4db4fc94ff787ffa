/*
 * ops_optim.c - the operators of the optimizers: one parameter (the public names), or a whole group in one call
 *
 * An update works element by element, in the order in which state1 lies in memory, because the blocks of 8-bit state
 * follow that order.  A parameter, gradient or state with other strides is updated through a temporary, so that no
 * stride ever changes; where all agree, the storage is updated directly.
 */
#include <string.h>

#include "call.h"
#include "ops.h"

#define COUNT_WHY " (as many as p)"

/* The tensors of one parameter; absmax1, absmax2, state2 may be absent. */
struct parameter {
    struct bnb_tensor p, g, state1, state2, absmax1, absmax2;
    int64_t step;
};

/* How many states an algorithm has; 0 for a name that is not in the core's table. */
static int states_of(const char *name)
{
    int i = 0;
    while (bnb_optim_name(i) && strcmp(bnb_optim_name(i), name) != 0)
        i++;
    return bnb_optim_states(i);
}

/* The core alone knows its table: its refusal of the name is the text. */
static void check_name(struct bnb_call *c, const bnb_optim_config *config)
{
    if (!bnb_call_ok(c) || states_of(config->name) != 0)
        return;
    c->status = bnb_optim_step(&c->exec, config, NULL, 0);
    bnb_call_fail(c, BNB_EINVAL, "%s: optimizer_name is \"%s\", which the library does not know", c->op, config->name);
}

static void check_parameter(struct bnb_call *c, const struct parameter *q, int states)
{
    if (!bnb_call_ok(c))
        return;
    bnb_check_float(c, bnb_label(&q->p).text, q->p.dtype, BNB_EDTYPE);
    if (q->g.dtype != q->p.dtype)
        bnb_call_fail(c, BNB_EDTYPE, "%s: %s has dtype %s, expected %s, the dtype of %s", c->op, bnb_label(&q->g).text,
                      bnb_dtype_label(q->g.dtype).text, bnb_dtype_label(q->p.dtype).text, bnb_label(&q->p).text);
    bnb_check_count(c, &q->g, q->p.n, COUNT_WHY);
    bnb_check_count(c, &q->state1, q->p.n, COUNT_WHY);
    const bool is8 = q->state1.dtype == bnb_torch_dtypes[BNB_TORCH_uint8];
    if (!is8)
        bnb_check_dtype(c, &q->state1, BNB_TORCH_float32);
    if (is8)
        bnb_check_dtype(c, &q->absmax1, BNB_TORCH_float32);
    if (is8)
        bnb_check_blocks(c, &q->absmax1, q->p.n, BNB_OPTIM_BLOCK);
    if (states < 2)
        return;
    bnb_check_dtype(c, &q->state2, is8 ? BNB_TORCH_uint8 : BNB_TORCH_float32);
    bnb_check_count(c, &q->state2, q->p.n, COUNT_WHY);
    if (is8)
        bnb_check_dtype(c, &q->absmax2, BNB_TORCH_float32);
    if (is8)
        bnb_check_blocks(c, &q->absmax2, q->p.n, BNB_OPTIM_BLOCK);
}

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

static bool same_shape(const struct bnb_tensor *a, const struct bnb_tensor *b)
{
    return a->dim == b->dim && memcmp(a->sizes, b->sizes, (size_t)a->dim * sizeof *a->sizes) == 0;
}

/* Bring all tensors of a parameter into the order of state1: its strides if it is dense, row-major otherwise. */
static void stage_parameter(struct bnb_call *c, struct parameter *q, int states)
{
    if (!bnb_call_ok(c) || q->p.n == 0)
        return;
    const bool by_strides = !q->state1.contiguous && is_dense(&q->state1) && same_shape(&q->p, &q->state1) &&
                            same_shape(&q->g, &q->state1) && (states < 2 || same_shape(&q->state2, &q->state1));
    const int64_t *order = by_strides ? q->state1.strides : NULL;
    bnb_call_stage(c, &q->p, order, BNB_STAGE_READ | BNB_STAGE_WRITE);
    bnb_call_stage(c, &q->g, order, BNB_STAGE_READ);
    bnb_call_stage(c, &q->state1, order, BNB_STAGE_READ | BNB_STAGE_WRITE);
    bnb_call_stage(c, &q->state2, order, BNB_STAGE_READ | BNB_STAGE_WRITE);
    bnb_call_stage(c, &q->absmax1, NULL, BNB_STAGE_READ | BNB_STAGE_WRITE);
    bnb_call_stage(c, &q->absmax2, NULL, BNB_STAGE_READ | BNB_STAGE_WRITE);
}

static bnb_optim_tensor core_tensor(struct bnb_call *c, const struct parameter *q)
{
    const bool is8 = q->state1.dtype == bnb_torch_dtypes[BNB_TORCH_uint8];
    bnb_optim_tensor t = {.n = q->p.n, .step = q->step, .bits = is8 ? 8 : 32};
    t.dtype = bnb_check_float(c, q->p.name, q->p.dtype, BNB_EDTYPE);
    t.p = bnb_write(c, &q->p);
    t.g = bnb_read(c, &q->g);
    t.state1 = bnb_write(c, &q->state1);
    t.state2 = q->state2.present ? bnb_write(c, &q->state2) : NULL;
    t.absmax1 = q->absmax1.present ? bnb_write(c, &q->absmax1) : NULL;
    t.absmax2 = q->absmax2.present ? bnb_write(c, &q->absmax2) : NULL;
    return t;
}

/* A map of 8-bit state, or NULL where there is none. */
static const float *map_of(struct bnb_call *c, struct bnb_tensor *map)
{
    if (!bnb_call_ok(c) || !map->present)
        return NULL;
    bnb_check_dtype(c, map, BNB_TORCH_float32);
    bnb_check_count(c, map, 256, " (an 8-bit map)");
    bnb_call_stage(c, map, NULL, BNB_STAGE_READ);
    return bnb_read(c, map);
}

/* Check all parameters, then stage them, then update them in one call of the core. */
static void update(struct bnb_call *c, const bnb_optim_config *config, struct parameter *q, size_t count)
{
    check_name(c, config);
    const int states = states_of(config->name);
    for (size_t i = 0; i < count; i++)
        check_parameter(c, &q[i], states);
    for (size_t i = 0; i < count; i++)
        stage_parameter(c, &q[i], states);
    bnb_optim_tensor *tensors = bnb_call_alloc(c, count, sizeof *tensors);
    for (size_t i = 0; i < count && tensors; i++)
        tensors[i] = core_tensor(c, &q[i]);
    if (bnb_call_ok(c))
        c->status = bnb_optim_step(&c->exec, config, tensors, count);
}

/* A state or statistic that the algorithm needs, but the caller left out; or one that it has no use for. */
static void check_given(struct bnb_call *c, const struct bnb_tensor *t, bool needed, const char *name)
{
    if (bnb_call_ok(c) && t->present != needed)
        bnb_call_fail(c, BNB_EINVAL, "%s: %s is %s, expected %s for optimizer \"%s\"", c->op, t->name,
                      t->present ? "a tensor" : "None", needed ? "a tensor" : "None", name);
}

/* optimizer_update_32bit(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2,
 *     Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, float beta1, float beta2, float beta3, float alpha,
 *     float eps, float weight_decay, int step, float lr, float gnorm_scale, bool skip_zeros=False) -> () */
void bnb_op_optimizer_update_32bit(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    (void)outputs;
    bnb_call_begin(&c, "optimizer_update_32bit", stack, inputs, 18);
    bnb_optim_config config = {.size = sizeof config, .name = bnb_take_string(&c)};
    struct parameter q = {.g = bnb_take_tensor(&c, "g")};
    q.p = bnb_take_tensor(&c, "p");
    q.state1 = bnb_take_tensor(&c, "state1");
    q.state2 = bnb_take_optional(&c, "state2");
    bnb_take_optional(&c, "unorm_vec");
    const double max_unorm = bnb_take_float(&c);
    bnb_take_float(&c); /* param_norm: of use to trust clipping alone */
    config.beta1 = bnb_take_float(&c);
    config.beta2 = bnb_take_float(&c);
    config.beta3 = bnb_take_float(&c);
    config.alpha = bnb_take_float(&c);
    config.eps = bnb_take_float(&c);
    config.weight_decay = bnb_take_float(&c);
    q.step = bnb_take_int(&c);
    config.lr = bnb_take_float(&c);
    config.gnorm_scale = bnb_take_float(&c);
    config.skip_zeros = bnb_take_bool(&c);

    check_name(&c, &config);
    bnb_check_dtype(&c, &q.state1, BNB_TORCH_float32);
    check_given(&c, &q.state2, states_of(config.name) == 2, config.name);
    if (!(max_unorm <= 0))
        bnb_call_fail(&c, BNB_ENOTSUP,
                      "%s: max_unorm is %g, expected 0: clipping by the norm of the parameter is not "
                      "available",
                      c.op, max_unorm);
    update(&c, &config, &q, 1);
    bnb_call_end(&c);
}

/* optimizer_update_8bit_blockwise(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1,
 *     Tensor(a3!)? state2, float beta1, float beta2, float beta3, float alpha, float eps, int step, float lr,
 *     Tensor(a4!) qmap1, Tensor(a5!)? qmap2, Tensor(a6!) absmax1, Tensor(a7!)? absmax2, float weight_decay,
 *     float gnorm_scale, bool skip_zeros=False) -> () */
void bnb_op_optimizer_update_8bit_blockwise(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    (void)outputs;
    bnb_call_begin(&c, "optimizer_update_8bit_blockwise", stack, inputs, 19);
    bnb_optim_config config = {.size = sizeof config, .name = bnb_take_string(&c)};
    struct parameter q = {.g = bnb_take_tensor(&c, "g")};
    q.p = bnb_take_tensor(&c, "p");
    q.state1 = bnb_take_tensor(&c, "state1");
    q.state2 = bnb_take_optional(&c, "state2");
    config.beta1 = bnb_take_float(&c);
    config.beta2 = bnb_take_float(&c);
    config.beta3 = bnb_take_float(&c);
    config.alpha = bnb_take_float(&c);
    config.eps = bnb_take_float(&c);
    q.step = bnb_take_int(&c);
    config.lr = bnb_take_float(&c);
    struct bnb_tensor qmap1 = bnb_take_tensor(&c, "qmap1"), qmap2 = bnb_take_optional(&c, "qmap2");
    q.absmax1 = bnb_take_tensor(&c, "absmax1");
    q.absmax2 = bnb_take_optional(&c, "absmax2");
    config.weight_decay = bnb_take_float(&c);
    config.gnorm_scale = bnb_take_float(&c);
    config.skip_zeros = bnb_take_bool(&c);

    check_name(&c, &config);
    const bool two = states_of(config.name) == 2;
    bnb_check_dtype(&c, &q.state1, BNB_TORCH_uint8);
    check_given(&c, &q.state2, two, config.name);
    check_given(&c, &qmap2, two, config.name);
    check_given(&c, &q.absmax2, two, config.name);
    config.qmap1 = map_of(&c, &qmap1);
    config.qmap2 = map_of(&c, &qmap2);
    update(&c, &config, &q, 1);
    bnb_call_end(&c);
}

/* ---------------------------------------------------------------- a group */

/* The list arguments of _optimizer_step. */
struct group {
    struct bnb_tensors p, g, state1, state2, absmax1, absmax2, qmaps;
    struct bnb_ints step;
};

static void check_length(struct bnb_call *c, const char *name, size_t count, size_t expected, const char *why)
{
    if (count != expected)
        bnb_call_fail(c, BNB_EINVAL, "%s: %s has %zu entries, expected %zu (%s)", c->op, name, count, expected, why);
}

/* Check the lengths of the lists and deal their entries out to the parameters; NULL on failure. */
static struct parameter *deal(struct bnb_call *c, const struct group *l, int states)
{
    const size_t count = l->p.count;
    size_t count8 = 0, next8 = 0;
    for (size_t i = 0; i < l->state1.count; i++)
        count8 += l->state1.items[i].dtype == bnb_torch_dtypes[BNB_TORCH_uint8];
    check_length(c, "g", l->g.count, count, "one per parameter");
    check_length(c, "state1", l->state1.count, count, "one per parameter");
    check_length(c, "step", l->step.count, count, "one per parameter");
    check_length(c, "state2", l->state2.count, states == 2 ? count : 0, "one per parameter and second state");
    check_length(c, "absmax1", l->absmax1.count, count8, "one per uint8 state1");
    check_length(c, "absmax2", l->absmax2.count, states == 2 ? count8 : 0, "one per uint8 state2");
    check_length(c, "qmaps", l->qmaps.count, count8 ? (size_t)states : 0, "one per state if any is uint8");

    struct parameter *q = bnb_call_alloc(c, count, sizeof *q);
    for (size_t i = 0; q && i < count; i++) {
        q[i] = (struct parameter){
            .p = l->p.items[i], .g = l->g.items[i], .state1 = l->state1.items[i], .step = l->step.values[i]};
        const bool is8 = q[i].state1.dtype == bnb_torch_dtypes[BNB_TORCH_uint8];
        if (states == 2)
            q[i].state2 = l->state2.items[i];
        if (is8)
            q[i].absmax1 = l->absmax1.items[next8];
        if (is8 && states == 2)
            q[i].absmax2 = l->absmax2.items[next8];
        next8 += is8;
    }
    return q;
}

/* _optimizer_step(str name, Tensor(a!)[] p, Tensor[] g, Tensor(b!)[] state1, Tensor(c!)[] state2, Tensor(d!)[] absmax1,
 *     Tensor(e!)[] absmax2, Tensor[] qmaps, int[] step, float lr, float beta1, float beta2, float beta3, float alpha,
 *     float eps, float weight_decay, float gnorm_scale, bool skip_zeros) -> () */
void bnb_op_optimizer_step(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    (void)outputs;
    bnb_call_begin(&c, "_optimizer_step", stack, inputs, 18);
    bnb_optim_config config = {.size = sizeof config, .name = bnb_take_string(&c)};
    struct group l = {.p = bnb_take_tensors(&c, "p")};
    l.g = bnb_take_tensors(&c, "g");
    l.state1 = bnb_take_tensors(&c, "state1");
    l.state2 = bnb_take_tensors(&c, "state2");
    l.absmax1 = bnb_take_tensors(&c, "absmax1");
    l.absmax2 = bnb_take_tensors(&c, "absmax2");
    l.qmaps = bnb_take_tensors(&c, "qmaps");
    l.step = bnb_take_ints(&c);
    config.lr = bnb_take_float(&c);
    config.beta1 = bnb_take_float(&c);
    config.beta2 = bnb_take_float(&c);
    config.beta3 = bnb_take_float(&c);
    config.alpha = bnb_take_float(&c);
    config.eps = bnb_take_float(&c);
    config.weight_decay = bnb_take_float(&c);
    config.gnorm_scale = bnb_take_float(&c);
    config.skip_zeros = bnb_take_bool(&c);

    check_name(&c, &config);
    struct parameter *q = deal(&c, &l, states_of(config.name));
    if (bnb_call_ok(&c) && l.qmaps.count > 0)
        config.qmap1 = map_of(&c, &l.qmaps.items[0]);
    if (bnb_call_ok(&c) && l.qmaps.count > 1)
        config.qmap2 = map_of(&c, &l.qmaps.items[1]);
    update(&c, &config, q, q ? l.p.count : 0);
    bnb_call_end(&c);
}
