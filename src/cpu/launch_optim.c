/*
 * launch_optim.c - one optimizer step over many tensors on the CPU
 *
 * The blocks of all tensors form one index range, so one parallel loop covers a whole step.  A task finds its first
 * tensor by walking the list, which is short beside the work of a task.
 */
#include "core/optim_plan.h"
#include "cpu/cpu.h"

static int64_t blocks_of(const bnb_optim_tensor *t) { return t->g ? bnb_blocks(t->n, BNB_OPTIM_BLOCK) : 0; }

void bnb_cpu_open_step(struct bnb_cpu_step *step, const bnb_optim_config *config, const bnb_optim_tensor *tensors,
                       size_t count)
{
    step->config = config;
    step->tensors = tensors;
    step->count = count;
    step->row = bnb_optim_find(config->name);
    step->recipe = bnb_optim_recipe_of(step->row, config);
    step->map[0] = config->qmap1 ? bnb_prepare_map(config->qmap1, step->midpoint[0]) : bnb_map_signed;
    step->map[1] = config->qmap2 ? bnb_prepare_map(config->qmap2, step->midpoint[1]) : bnb_map_unsigned;
}

struct bnb_optim_args bnb_cpu_optim_args(const struct bnb_cpu_step *step, size_t i, double *direction)
{
    const bnb_optim_tensor *t = &step->tensors[i];
    const bnb_optim_config *c = step->config;
    const int64_t update = t->step_count ? (int64_t)*t->step_count + 1 : t->step;
    const double *norms = c->max_unorm > 0.0 && c->norms ? c->norms + 2 * i : NULL;
    const double lr = c->lr_value ? (double)*c->lr_value : c->lr;
    const double scale = t->gnorm_scale ? (double)*t->gnorm_scale : 1.0;
    const struct bnb_optim_plan plan = bnb_optim_plan_of(&step->recipe, lr, update, scale, norms);
    struct bnb_optim_args a = {
        .p = t->p,
        .g = t->g,
        .state = {t->state1, t->state2, NULL},
        .absmax = {t->absmax1, t->absmax2, NULL},
        .n = t->n,
        .dtype = (int)t->dtype,
        .bits = t->bits,
        .stochastic = c->stochastic_rounding,
        .key = bnb_optim_key(t->seed, update),
        .map = {step->map[0], step->map[1]},
        .s = plan.scalars,
    };
    if (step->row->is_double) {
        a.state[2] = (char *)t->state1 + t->n * (t->bits / 8);
        a.absmax[2] = t->absmax1 ? t->absmax1 + bnb_blocks(t->n, BNB_OPTIM_BLOCK) : NULL;
    }
    *direction = plan.direction;
    return a;
}

static void run_step(void *arg, int64_t begin, int64_t end)
{
    const struct bnb_cpu_step *step = arg;
    const struct bnb_cpu_ops *ops = bnb_cpu_ops_in_use();
    int64_t base = 0; /* index of the first block of tensor i */
    for (size_t i = 0; i < step->count && base < end; i++) {
        const int64_t blocks = blocks_of(&step->tensors[i]);
        const int64_t first = begin > base ? begin - base : 0;
        const int64_t stop = end - base < blocks ? end - base : blocks;
        if (first < stop) {
            double direction;
            const struct bnb_optim_args a = bnb_cpu_optim_args(step, i, &direction);
            (a.bits == 8 ? ops->optim8 : ops->optim32)[step->row->rule](&a, first, stop);
        }
        base += blocks;
    }
}

bnb_status bnb_cpu_optim_step(const bnb_exec *ex, const bnb_optim_config *config, const bnb_optim_tensor *tensors,
                              size_t count)
{
    struct bnb_cpu_step step;
    bnb_cpu_open_step(&step, config, tensors, count);
    int64_t blocks = 0;
    for (size_t i = 0; i < count; i++)
        blocks += blocks_of(&tensors[i]);
    bnb_cpu_parallel(ex, blocks, BNB_GRAIN / BNB_OPTIM_BLOCK, run_step, &step);
    for (size_t i = 0; i < count; i++) {
        if (tensors[i].step_count && tensors[i].g)
            *tensors[i].step_count += 1.0f;
        if (tensors[i].unorm && tensors[i].g && config->max_unorm > 0.0)
            *tensors[i].unorm = (float)config->norms[2 * i];
    }
    return BNB_OK;
}
