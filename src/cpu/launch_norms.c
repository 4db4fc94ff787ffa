/*
 * launch_norms.c - the norms that clipping needs on the CPU: of updates, parameters and gradients
 *
 * A tensor is cut into runs of 64 blocks.  Each run is summed by one task; then the sums of the runs are added in order,
 * so the result does not depend on threads (NUMERICS rule 27).
 */
#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "cpu/cpu.h"

enum { RUN_BLOCKS = 64, RUN = RUN_BLOCKS * BNB_OPTIM_BLOCK, HISTORY = 100 };

/* What is measured: the updates of a step, or, where that is NULL, gradients; and room for two sums for each run. */
struct norms_task {
    const struct bnb_cpu_step *step;
    const bnb_gradient *gradients;
    size_t count;
    double *partial;
};

static int64_t elements_of(const struct norms_task *task, size_t i)
{
    if (!task->step)
        return task->gradients[i].n;
    return task->step->tensors[i].g ? task->step->tensors[i].n : 0;
}

static void measure_run(const struct norms_task *task, size_t i, int64_t run, double sums[2])
{
    const struct bnb_cpu_ops *ops = bnb_cpu_ops_in_use();
    if (!task->step) {
        const bnb_gradient *g = &task->gradients[i];
        const int64_t n = g->n - run * RUN < RUN ? g->n - run * RUN : RUN;
        sums[0] =
            ops->square_blocks((int)g->dtype, (const char *)g->g + run * RUN * (int64_t)bnb_dtype_size(g->dtype), n);
        return;
    }
    double direction;
    const struct bnb_optim_args a = bnb_cpu_optim_args(task->step, i, &direction);
    const int64_t blocks = bnb_blocks(a.n, BNB_OPTIM_BLOCK), first = run * RUN_BLOCKS;
    ops->optim_norms[task->step->row->rule](&a, first, first + RUN_BLOCKS < blocks ? first + RUN_BLOCKS : blocks, sums);
    sums[0] *= direction * direction;
}

static void run_norms(void *arg, int64_t begin, int64_t end)
{
    const struct norms_task *task = arg;
    int64_t base = 0; /* index of the first run of tensor i */
    for (size_t i = 0; i < task->count && base < end; i++) {
        const int64_t runs = bnb_blocks(elements_of(task, i), RUN);
        for (int64_t run = begin > base ? begin - base : 0; run < runs && base + run < end; run++) {
            double *sums = task->partial + 2 * (base + run);
            sums[0] = sums[1] = 0.0;
            measure_run(task, i, run, sums);
        }
        base += runs;
    }
}

/* norms [count][width] */
static bnb_status measure(const bnb_exec *ex, struct norms_task *task, int width, double *norms)
{
    int64_t runs = 0;
    for (size_t i = 0; i < task->count; i++)
        runs += bnb_blocks(elements_of(task, i), RUN);
    const size_t bytes = (size_t)runs * 2 * sizeof(double);
    task->partial = runs > 0 ? bnb_cpu_alloc(ex, bytes) : NULL;
    if (runs > 0 && !task->partial)
        return bnb_fail(BNB_ENOMEM, "norms: no %zu bytes of workspace", bytes);
    bnb_cpu_parallel(ex, runs, BNB_GRAIN / RUN, run_norms, task);
    const double *partial = task->partial;
    for (size_t i = 0; i < task->count; i++) {
        double sums[2] = {0.0, 0.0};
        for (int64_t run = bnb_blocks(elements_of(task, i), RUN); run > 0; run--, partial += 2) {
            sums[0] += partial[0];
            sums[1] += partial[1];
        }
        for (int k = 0; k < width; k++)
            norms[(size_t)width * i + (size_t)k] = sums[k];
    }
    if (runs > 0)
        bnb_cpu_free(ex, task->partial, bytes);
    return BNB_OK;
}

bnb_status bnb_cpu_optim_norms(const bnb_exec *ex, const bnb_optim_config *config, const bnb_optim_tensor *tensors,
                               size_t count, double *norms)
{
    struct bnb_cpu_step step;
    bnb_cpu_open_step(&step, config, tensors, count);
    struct norms_task task = {.step = &step, .count = count};
    return measure(ex, &task, 2, norms);
}

bnb_status bnb_cpu_gradient_norms(const bnb_exec *ex, const bnb_gradient *gradients, size_t count, double *norms)
{
    struct norms_task task = {.gradients = gradients, .count = count};
    return measure(ex, &task, 1, norms);
}

static int ascending(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

bnb_status bnb_cpu_clip_percentile(const bnb_exec *ex, const bnb_clip_tensor *tensors, size_t count, int percentile,
                                   const double *norms, float *report)
{
    (void)ex;
    for (size_t i = 0; i < count; i++) {
        const bnb_clip_tensor *t = &tensors[i];
        const int64_t step = t->step_count ? (int64_t)*t->step_count + 1 : t->step;
        const float square = (float)norms[i];
        float sorted[HISTORY];
        bool fresh = true;
        for (int slot = 0; slot < HISTORY; slot++)
            fresh = fresh && t->history[slot] == 0.0f;
        for (int slot = 0; slot < HISTORY; slot++)
            if (step == 1 || fresh || slot == step % HISTORY)
                t->history[slot] = square;
        for (int slot = 0; slot < HISTORY; slot++)
            sorted[slot] = isnan(t->history[slot]) ? INFINITY : t->history[slot];
        qsort(sorted, HISTORY, sizeof sorted[0], ascending);
        const float norm = sqrtf(square), limit = sqrtf(sorted[percentile]);
        report[3 * i] = norm;
        report[3 * i + 1] = limit;
        report[3 * i + 2] = norm > limit && norm <= FLT_MAX ? limit / norm : 1.0f;
    }
    return BNB_OK;
}
