/*
 * launch_optim.c - one optimizer step over many tensors on the CPU
 *
 * The blocks of all tensors form one index range, so one parallel loop covers a whole step.  A task finds its first
 * tensor by walking the list, which is short beside the work of a task.
 */
#include "cpu/cpu.h"

struct step_task {
    const bnb_optim_config *config;
    const bnb_optim_tensor *tensors;
    size_t count;
    const struct bnb_optim_row *row;
    struct bnb_map8 map1, map2;
};

static int64_t blocks_of(const bnb_optim_tensor *t) { return t->g ? bnb_blocks(t->n, BNB_OPTIM_BLOCK) : 0; }

static void run_tensor(const struct step_task *task, const bnb_optim_tensor *t, int64_t first, int64_t end)
{
    const struct bnb_cpu_ops *ops = bnb_cpu_ops_in_use();
    const struct bnb_optim_args a = {
        .p = t->p,
        .g = t->g,
        .state1 = t->state1,
        .state2 = t->state2,
        .absmax1 = t->absmax1,
        .absmax2 = t->absmax2,
        .n = t->n,
        .map1 = task->map1,
        .map2 = task->map2,
        .s = bnb_optim_scalars_of(task->config, t->step),
    };
    if (t->bits == 8)
        ops->optim8[task->row->rule][t->dtype](&a, first, end);
    else
        ops->optim32[task->row->rule][t->dtype](&a, first, end);
}

static void run_step(void *arg, int64_t begin, int64_t end)
{
    const struct step_task *task = arg;
    int64_t base = 0; /* index of the first block of tensor i */
    for (size_t i = 0; i < task->count && base < end; i++) {
        const int64_t blocks = blocks_of(&task->tensors[i]);
        const int64_t first = begin > base ? begin - base : 0;
        const int64_t stop = end - base < blocks ? end - base : blocks;
        if (first < stop)
            run_tensor(task, &task->tensors[i], first, stop);
        base += blocks;
    }
}

bnb_status bnb_cpu_optim_step(const bnb_exec *ex, const bnb_optim_config *config, const bnb_optim_tensor *tensors,
                              size_t count)
{
    float midpoint1[256], midpoint2[256];
    struct step_task task = {config, tensors, count, bnb_optim_find(config->name), bnb_map_signed, bnb_map_unsigned};
    if (config->qmap1)
        task.map1 = bnb_prepare_map(config->qmap1, midpoint1);
    if (config->qmap2)
        task.map2 = bnb_prepare_map(config->qmap2, midpoint2);
    int64_t blocks = 0;
    for (size_t i = 0; i < count; i++)
        blocks += blocks_of(&tensors[i]);
    bnb_cpu_parallel(ex, blocks, BNB_GRAIN / BNB_OPTIM_BLOCK, run_step, &task);
    return BNB_OK;
}
