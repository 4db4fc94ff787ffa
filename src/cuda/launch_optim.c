/*
 * launch_optim.c - one optimizer step over many tensors on CUDA: a table of them, then one launch
 *
 * The host computes the scalars of an update where it knows all that they follow from.  Where learning rate, step counts,
 * norms or gradient scales are on the device, a second, small kernel computes them there, and nothing is waited for.
 */
#include "cuda/optim_table.h"

enum { THREADS = 256 };

/* Where the parts of the table lie. */
struct layout { size_t tensors, plans, origins, first, bytes; };

static int64_t elements_of(const bnb_optim_tensor *t) { return t->g ? t->n : 0; }

/* Must the device make the scalars? */
static bool is_remote(const bnb_optim_config *config, const bnb_optim_tensor *tensors, size_t count)
{
    bool remote = config->lr_value || (config->norms && config->max_unorm > 0.0);
    for (size_t i = 0; i < count && !remote; i++)
        remote = tensors[i].step_count || tensors[i].gnorm_scale;
    return remote;
}

/* The host needs as many plans as fill_plans() will make, one as a rule, and no origins. */
static struct layout layout_of(const bnb_optim_tensor *tensors, size_t count, bool remote)
{
    struct layout l = {0};
    size_t plans = remote ? count : 1;
    int64_t step = 0;
    for (size_t i = 0; i < count && !remote; i++) {
        if (elements_of(&tensors[i]) > 0 && tensors[i].step != step) {
            step = tensors[i].step;
            plans++;
        }
    }
    l.plans = count * sizeof(struct bnb_cuda_tensor);
    l.origins = l.plans + plans * sizeof(struct bnb_optim_plan);
    l.first = l.origins + (remote ? count : 0) * sizeof(struct bnb_cuda_origin);
    l.bytes = l.first + (count + 1) * sizeof(int64_t);
    return l;
}

/* Can every array be moved 8 elements at a time, in accesses of 8 or 16 bytes? */
static bool is_vector(const bnb_optim_tensor *t, bool is_double)
{
    const size_t state = t->bits == 8 ? 8 : 16, lead = is_double ? (size_t)t->n * (size_t)(t->bits / 8) : 0;
    return bnb_cuda_aligned(t->p, 16) && bnb_cuda_aligned(t->g, 16) && bnb_cuda_aligned(t->state1, state) &&
           (!t->state2 || bnb_cuda_aligned(t->state2, state)) && lead % state == 0;
}

static struct bnb_cuda_tensor entry_of(const bnb_optim_tensor *t, const struct bnb_optim_row *row)
{
    return (struct bnb_cuda_tensor){.p = t->p,
                                    .g = t->g,
                                    .state1 = t->state1,
                                    .state2 = t->state2,
                                    .absmax1 = t->absmax1,
                                    .absmax2 = t->absmax2,
                                    .n = elements_of(t),
                                    .dtype = (int)t->dtype,
                                    .bits = t->bits,
                                    .vector = is_vector(t, row->is_double)};
}

/* The scalars of every tensor, each kind of them once; returns how many there are. */
static int fill_plans(const struct bnb_optim_recipe *recipe, double lr, const bnb_optim_tensor *tensors, size_t count,
                      struct bnb_cuda_tensor *entries, struct bnb_optim_plan *plans)
{
    int64_t step = 0;
    int used = 0;
    for (size_t i = 0; i < count; i++) {
        if (elements_of(&tensors[i]) > 0 && tensors[i].step != step) {
            step = tensors[i].step;
            plans[used++] = bnb_optim_plan_of(recipe, lr, step, 1.0, NULL);
        }
        entries[i].plan = used > 0 ? used - 1 : 0;
        entries[i].key = recipe->stochastic ? bnb_optim_key(tensors[i].seed, tensors[i].step) : 0;
    }
    return used;
}

static void fill_origins(const bnb_optim_tensor *tensors, size_t count, struct bnb_cuda_tensor *entries,
                         struct bnb_cuda_origin *origins)
{
    for (size_t i = 0; i < count; i++) {
        const bnb_optim_tensor *t = &tensors[i];
        entries[i].plan = (int)i;
        origins[i] = (struct bnb_cuda_origin){.step = t->step, .seed = t->seed};
        if (!t->g)
            continue;
        origins[i].step_count = t->step_count;
        origins[i].gnorm_scale = t->gnorm_scale;
        origins[i].unorm = t->unorm;
    }
}

static bnb_status make_plans(const struct bnb_cuda_call *c, const struct bnb_cuda_step *s,
                             const bnb_optim_config *config, const struct layout *l, bool advance)
{
    static struct bnb_cuda_kernel kernel = {
        .image = "optim_tables", .name = "bnb_k_plan", .dtype = -1, .threads = THREADS};
    char *device = s->table.device;
    const struct bnb_cuda_planner args = {.recipe = bnb_optim_recipe_of(s->row, config),
                                          .origins = (const void *)(device + l->origins),
                                          .tensors = (void *)(device + l->tensors),
                                          .plans = (void *)(device + l->plans),
                                          .lr_value = config->lr_value,
                                          .norms = advance ? config->norms : NULL,
                                          .lr = config->lr,
                                          .count = s->args.count,
                                          .advance = advance};
    return bnb_cuda_launch(c, &kernel, (s->args.count + THREADS - 1) / THREADS, &args);
}

bnb_status bnb_cuda_step_open(const struct bnb_cuda_call *c, struct bnb_cuda_step *s, const bnb_optim_config *config,
                              const bnb_optim_tensor *tensors, size_t count, int unit, size_t tail, bool advance)
{
    const bool remote = is_remote(config, tensors, count);
    const struct layout l = layout_of(tensors, count, remote);
    int64_t chunks = 0;
    for (size_t i = 0; i < count; i++)
        chunks += bnb_blocks(elements_of(&tensors[i]), unit);
    *s = (struct bnb_cuda_step){.row = bnb_optim_find(config->name)};
    bnb_status status = bnb_cuda_table_open(c, &s->table, l.bytes, (size_t)chunks * tail);
    if (status)
        return status;
    struct bnb_cuda_tensor *entries = (void *)(s->table.host + l.tensors);
    int64_t *first = (void *)(s->table.host + l.first);
    for (size_t i = 0; i < count; i++) {
        entries[i] = entry_of(&tensors[i], s->row);
        entries[i].first = first[i];
        first[i + 1] = first[i] + bnb_blocks(entries[i].n, unit);
    }
    s->args = (struct bnb_cuda_optim){.tensors = (const void *)(s->table.device + l.tensors),
                                      .plans = (const void *)(s->table.device + l.plans),
                                      .map1 = config->qmap1,
                                      .map2 = s->row->states == 2 ? config->qmap2 : NULL,
                                      .chunks = chunks,
                                      .count = (int)count,
                                      .stochastic = config->stochastic_rounding};
    s->first = (const void *)(s->table.device + l.first);
    s->tail = s->table.device + s->table.bytes;
    const struct bnb_optim_recipe recipe = bnb_optim_recipe_of(s->row, config);
    if (remote)
        fill_origins(tensors, count, entries, (void *)(s->table.host + l.origins));
    else
        fill_plans(&recipe, config->lr, tensors, count, entries, (void *)(s->table.host + l.plans));
    status = bnb_cuda_table_send(c, &s->table);
    return status || !remote ? status : make_plans(c, s, config, &l, advance);
}

bnb_status bnb_cuda_optim_step(const bnb_exec *ex, const bnb_optim_config *config, const bnb_optim_tensor *tensors,
                               size_t count)
{
    static struct bnb_cuda_kernel kernels[BNB_RULE_COUNT] = {
        [BNB_RULE_ADAM] = {.image = "optim_adam", .name = "bnb_k_optim_adam", .dtype = -1, .threads = THREADS},
        [BNB_RULE_ADEMAMIX] = {.image = "optim_ademamix",
                               .name = "bnb_k_optim_ademamix",
                               .dtype = -1,
                               .threads = THREADS},
        [BNB_RULE_MOMENTUM] = {.image = "optim_momentum",
                               .name = "bnb_k_optim_momentum",
                               .dtype = -1,
                               .threads = THREADS},
        [BNB_RULE_LION] = {.image = "optim_lion", .name = "bnb_k_optim_lion", .dtype = -1, .threads = THREADS},
        [BNB_RULE_RMSPROP] = {
            .image = "optim_rmsprop", .name = "bnb_k_optim_rmsprop", .dtype = -1, .threads = THREADS}};
    struct bnb_cuda_call c;
    struct bnb_cuda_step s;
    if (count == 0)
        return BNB_OK;
    bnb_status status = bnb_cuda_begin(&c, ex, "optim_step");
    if (status)
        return status;
    status = bnb_cuda_step_open(&c, &s, config, tensors, count, BNB_CUDA_CHUNK, 0, true);
    if (!status && s.args.chunks > 0)
        status = bnb_cuda_launch_over(&c, &kernels[s.row->rule], s.args.chunks, &s.args);
    bnb_cuda_table_close(&c, &s.table);
    bnb_cuda_end(&c);
    return status;
}
