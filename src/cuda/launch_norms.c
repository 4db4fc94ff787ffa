/*
 * launch_norms.c - the norms that clipping needs on CUDA: of updates, parameters and gradients; percentile clipping
 *
 * One kernel sums runs of 64 blocks, a second one adds the runs of each tensor in order (NUMERICS rule 27).
 */
#include "cuda/optim_table.h"

enum { THREADS = 256, WARPS = THREADS / 32, NORM_THREADS = 128, RUN = 64 * BNB_OPTIM_BLOCK };

/* The sums of a run: of the updates, or the gradient, and of the parameters. */
enum { SUM_BYTES = 2 * sizeof(double) };

static bnb_status add_runs(const struct bnb_cuda_call *c, const double *partial, const int64_t *first, size_t count,
                           int width, double *norms)
{
    static struct bnb_cuda_kernel kernel = {
        .image = "optim_tables", .name = "bnb_k_total", .dtype = -1, .threads = THREADS};
    const struct bnb_cuda_total args = {
        .partial = partial, .first = first, .norms = norms, .count = (int)count, .width = width};
    return bnb_cuda_launch(c, &kernel, bnb_blocks((int64_t)count, WARPS), &args);
}

bnb_status bnb_cuda_optim_norms(const bnb_exec *ex, const bnb_optim_config *config, const bnb_optim_tensor *tensors,
                                size_t count, double *norms)
{
    static struct bnb_cuda_kernel kernels[BNB_RULE_COUNT] = {
        [BNB_RULE_ADAM] = {.image = "optim_adam", .name = "bnb_k_norms_adam", .dtype = -1, .threads = NORM_THREADS},
        [BNB_RULE_ADEMAMIX] = {.image = "optim_ademamix",
                               .name = "bnb_k_norms_ademamix",
                               .dtype = -1,
                               .threads = NORM_THREADS},
        [BNB_RULE_MOMENTUM] = {.image = "optim_momentum",
                               .name = "bnb_k_norms_momentum",
                               .dtype = -1,
                               .threads = NORM_THREADS},
        [BNB_RULE_LION] = {.image = "optim_lion", .name = "bnb_k_norms_lion", .dtype = -1, .threads = NORM_THREADS},
        [BNB_RULE_RMSPROP] = {
            .image = "optim_rmsprop", .name = "bnb_k_norms_rmsprop", .dtype = -1, .threads = NORM_THREADS}};
    struct bnb_cuda_call c;
    struct bnb_cuda_step s;
    if (count == 0)
        return BNB_OK;
    bnb_status status = bnb_cuda_begin(&c, ex, "optim_norms");
    if (status)
        return status;
    status = bnb_cuda_step_open(&c, &s, config, tensors, count, RUN, SUM_BYTES, false);
    s.args.partial = (void *)s.tail;
    if (!status)
        status = bnb_cuda_step_launch(&c, &s, &kernels[s.row->rule], NORM_THREADS / 32, false);
    if (!status)
        status = add_runs(&c, s.args.partial, s.first, count, 2, norms);
    bnb_cuda_step_close(&c, &s);
    bnb_cuda_end(&c);
    return status;
}

static bnb_status square_gradients(const struct bnb_cuda_call *c, const bnb_gradient *gradients, size_t count,
                                   struct bnb_cuda_table *table, double *norms)
{
    static struct bnb_cuda_kernel kernel = {
        .image = "optim_tables", .name = "bnb_k_squares", .dtype = -1, .threads = THREADS};
    const size_t entries = count * sizeof(struct bnb_cuda_gradient);
    int64_t runs = 0;
    for (size_t i = 0; i < count; i++)
        runs += bnb_blocks(gradients[i].n, RUN);
    bnb_status status =
        bnb_cuda_table_open(c, table, entries + (count + 1) * sizeof(int64_t), (size_t)runs * SUM_BYTES);
    if (status)
        return status;
    struct bnb_cuda_gradient *entry = (void *)table->host;
    int64_t *first = (void *)(table->host + entries);
    for (size_t i = 0; i < count; i++) {
        entry[i] = (struct bnb_cuda_gradient){gradients[i].g, gradients[i].n, first[i], (int)gradients[i].dtype};
        first[i + 1] = first[i] + bnb_blocks(gradients[i].n, RUN);
    }
    double *partial = (void *)(table->device + table->bytes);
    const struct bnb_cuda_squares args = {(const void *)table->device, partial, runs, (int)count};
    status = bnb_cuda_table_send(c, table);
    if (!status && runs > 0)
        status = bnb_cuda_launch_over(c, &kernel, bnb_blocks(runs, WARPS), &args);
    return status ? status : add_runs(c, partial, (const void *)(table->device + entries), count, 1, norms);
}

bnb_status bnb_cuda_gradient_norms(const bnb_exec *ex, const bnb_gradient *gradients, size_t count, double *norms)
{
    struct bnb_cuda_call c;
    struct bnb_cuda_table table = {0};
    if (count == 0)
        return BNB_OK;
    bnb_status status = bnb_cuda_begin(&c, ex, "gradient_norms");
    if (status)
        return status;
    status = square_gradients(&c, gradients, count, &table, norms);
    bnb_cuda_table_close(&c, &table);
    bnb_cuda_end(&c);
    return status;
}

bnb_status bnb_cuda_clip_percentile(const bnb_exec *ex, const bnb_clip_tensor *tensors, size_t count, int percentile,
                                    const double *norms, float *report)
{
    static struct bnb_cuda_kernel kernel = {.image = "optim_tables", .name = "bnb_k_clip", .dtype = -1, .threads = 128};
    struct bnb_cuda_call c;
    struct bnb_cuda_table table = {0};
    if (count == 0)
        return BNB_OK;
    bnb_status status = bnb_cuda_begin(&c, ex, "clip_percentile");
    if (status)
        return status;
    status = bnb_cuda_table_open(&c, &table, count * sizeof(struct bnb_cuda_history), 0);
    struct bnb_cuda_history *entry = (void *)table.host;
    for (size_t i = 0; !status && i < count; i++)
        entry[i] = (struct bnb_cuda_history){tensors[i].history, tensors[i].step_count, tensors[i].step};
    if (!status)
        status = bnb_cuda_table_send(&c, &table);
    const struct bnb_cuda_clip args = {(const void *)table.device, norms, report, (int)count, percentile};
    if (!status)
        status = bnb_cuda_launch(&c, &kernel, (int64_t)count, &args);
    bnb_cuda_table_close(&c, &table);
    bnb_cuda_end(&c);
    return status;
}
