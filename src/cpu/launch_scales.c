/*
 * launch_scales.c - nested statistics on the CPU: the mean, the centred scales, and back
 *
 * There is one scale for 32 values or more, so plain C on one thread is fast enough here.
 */
#include "core/scale.h"
#include "cpu/cpu.h"

/*
 * The sum of NUMERICS rule 9: 1024 values at a time go to 32 lanes in turn, the lanes are folded in half five times,
 * and the sums of one level are the values of the next.  Four levels hold any n below 2^40.
 */
enum { LANES = 32, RUN = 1024, LEVELS = 4 };

struct tree_sum {
    double lane[LEVELS][LANES];
    int filled[LEVELS];
};

static double fold(double lane[LANES])
{
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int j = 0; j < width; j++)
            lane[j] += lane[j + width];
    const double sum = lane[0];
    for (int j = 0; j < LANES; j++)
        lane[j] = 0.0;
    return sum;
}

static void tree_add(struct tree_sum *t, int level, double value)
{
    t->lane[level][t->filled[level] % LANES] += value;
    if (++t->filled[level] == RUN && level + 1 < LEVELS) {
        t->filled[level] = 0;
        tree_add(t, level + 1, fold(t->lane[level]));
    }
}

static double tree_total(struct tree_sum *t)
{
    for (int level = 0; level + 1 < LEVELS; level++) {
        bool above = false;
        for (int l = level + 1; l < LEVELS; l++)
            above = above || t->filled[l] > 0;
        if (!above)
            return fold(t->lane[level]);
        if (t->filled[level] > 0) {
            t->filled[level] = 0;
            tree_add(t, level + 1, fold(t->lane[level]));
        }
    }
    return fold(t->lane[LEVELS - 1]);
}

static float mean_of(const float *x, int64_t n)
{
    struct tree_sum t = {0};
    int64_t i = 0;
    for (; i + RUN <= n; i += RUN) { /* whole runs of level 0 at once */
        for (int k = 0; k < RUN; k += LANES)
            for (int j = 0; j < LANES; j++)
                t.lane[0][j] += (double)x[i + k + j];
        tree_add(&t, 1, fold(t.lane[0]));
    }
    for (; i < n; i++)
        tree_add(&t, 0, (double)x[i]);
    return n > 0 ? (float)(tree_total(&t) / (double)n) : 0.0f;
}

bnb_status bnb_cpu_quantize_scales(const bnb_exec *ex, const float *absmax, float *offset,
                                   const struct bnb_quant8_args *a)
{
    if (a->n == 0) {
        *offset = 0.0f;
        return BNB_OK;
    }
    const size_t bytes = (size_t)a->n * sizeof(float);
    float *centred = bnb_cpu_alloc(ex, bytes);
    if (!centred)
        return bnb_fail(BNB_ENOMEM, "quantize_scales: no %zu bytes of workspace", bytes);
    const float mean = mean_of(absmax, a->n);
    for (int64_t i = 0; i < a->n; i++)
        centred[i] = absmax[i] - mean;
    struct bnb_quant8_args args = *a;
    args.x = centred;
    const bnb_status status = bnb_cpu_quantize8(ex, &args, BNB_F32);
    *offset = mean;
    bnb_cpu_free(ex, centred, bytes);
    return status;
}

struct expand_task {
    const struct bnb_scale_args *scale;
    float *out;
};

static void run_expand(void *arg, int64_t begin, int64_t end)
{
    const struct expand_task *t = arg;
    for (int64_t b = begin; b < end; b++)
        t->out[b] = bnb_block_scale(t->scale, b);
}

bnb_status bnb_cpu_expand_scales(const bnb_exec *ex, const struct bnb_scale_args *a, int64_t n, float *out)
{
    struct expand_task t = {a, out};
    bnb_cpu_parallel(ex, n, BNB_GRAIN, run_expand, &t);
    return BNB_OK;
}
