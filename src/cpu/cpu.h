/*
 * cpu.h - what the files of the CPU device share
 */
#ifndef BNB_CPU_CPU_H
#define BNB_CPU_CPU_H

#include "core/internal.h"
#include "cpu/kernels/kernels.h"

/* All tables of this build, best first; the scalar one is last and needs nothing. */
extern const struct bnb_cpu_ops *const bnb_cpu_all[];
extern const int bnb_cpu_all_count;

/* The features of this machine, as BNB_CPU_* bits. */
unsigned bnb_cpu_features(void);

/* The best table whose needs are met.  Pure: a test passes any feature mask. */
const struct bnb_cpu_ops *bnb_cpu_pick(unsigned features);

/* The table in use on this machine. */
const struct bnb_cpu_ops *bnb_cpu_ops_in_use(void);

/* body over 0 .. n - 1, by ex's callback or on this thread. */
void bnb_cpu_parallel(const bnb_exec *ex, int64_t n, int64_t grain, bnb_range_fn body, void *arg);

/* Workspace by ex's callbacks, or malloc. */
void *bnb_cpu_alloc(const bnb_exec *ex, size_t bytes);
void bnb_cpu_free(const bnb_exec *ex, void *ptr, size_t bytes);

/* launch_quant.c, launch_scales.c, launch_quantile.c, launch_optim.c, launch_norms.c: the members of bnb_cpu_device */
bnb_status bnb_cpu_quantize8(const bnb_exec *ex, const struct bnb_quant8_args *a, bnb_dtype dtype);
bnb_status bnb_cpu_dequantize8(const bnb_exec *ex, const struct bnb_dequant8_args *a, bnb_dtype dtype);
bnb_status bnb_cpu_quantize4(const bnb_exec *ex, const struct bnb_quant4_args *a, bnb_dtype dtype);
bnb_status bnb_cpu_dequantize4(const bnb_exec *ex, const struct bnb_dequant4_args *a, bnb_dtype dtype);
bnb_status bnb_cpu_quantize_scales(const bnb_exec *ex, const float *absmax, float *offset,
                                   const struct bnb_quant8_args *a);
bnb_status bnb_cpu_expand_scales(const bnb_exec *ex, const struct bnb_scale_args *a, int64_t n, float *out);
bnb_status bnb_cpu_select(const bnb_exec *ex, const void *x, bnb_dtype dtype, int64_t n, const int64_t *rank, int count,
                          float *out);
bnb_status bnb_cpu_gemm4(const bnb_exec *ex, const struct bnb_gemm4_block *g, bnb_dtype dtype);
bnb_status bnb_cpu_gemm8(const bnb_exec *ex, const struct bnb_gemm8_block *g, bnb_dtype dtype);
bnb_status bnb_cpu_quantize_rows(const bnb_exec *ex, const struct bnb_rows_args *a, bnb_dtype dtype);
bnb_status bnb_cpu_dequantize_rows(const bnb_exec *ex, const struct bnb_derows_args *a, bnb_dtype dtype);
bnb_status bnb_cpu_gather_columns(const bnb_exec *ex, const bnb_matrix *x, const int64_t *columns, int64_t count,
                                  void *out);
bnb_status bnb_cpu_optim_step(const bnb_exec *ex, const bnb_optim_config *config, const bnb_optim_tensor *tensors,
                              size_t count);
bnb_status bnb_cpu_optim_norms(const bnb_exec *ex, const bnb_optim_config *config, const bnb_optim_tensor *tensors,
                               size_t count, double *norms);
bnb_status bnb_cpu_gradient_norms(const bnb_exec *ex, const bnb_gradient *gradients, size_t count, double *norms);
bnb_status bnb_cpu_clip_percentile(const bnb_exec *ex, const bnb_clip_tensor *tensors, size_t count, int percentile,
                                   const double *norms, float *report);

/* launch_optim.c: what the blocks of a step share, and the arguments of one of its tensors */
struct bnb_cpu_step {
    const bnb_optim_config *config;
    const bnb_optim_tensor *tensors;
    size_t count;
    const struct bnb_optim_row *row;
    struct bnb_optim_recipe recipe;
    struct bnb_map8 map[2];
    float midpoint[2][256];
};
void bnb_cpu_open_step(struct bnb_cpu_step *step, const bnb_optim_config *config, const bnb_optim_tensor *tensors,
                       size_t count);
struct bnb_optim_args bnb_cpu_optim_args(const struct bnb_cpu_step *step, size_t i, double *direction);

#endif
