/*
 * internal.h - what the layers of the library share: failing, the device tables, the ready-made maps
 *
 * A device is a folder that fills one struct bnb_device_ops; the API checks its arguments, then calls through the
 * table of the call's device.
 */
#ifndef BNB_CORE_INTERNAL_H
#define BNB_CORE_INTERNAL_H

#include "bitsandbytes.h"
#include "core/args.h"

/* Values handled by one parallel task, at least: below this, splitting costs more than it saves. */
#define BNB_GRAIN 32768

/* Set this thread's status and detail, and return the status.  The detail is "function: argument is value, ...". */
bnb_status bnb_fail(bnb_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* ceil(n / block), without overflow for any n >= 0. */
static inline int64_t bnb_blocks(int64_t n, int64_t block) { return n / block + (n % block != 0); }

/* Everything a device can do.  Arguments are checked; n > 0 unless a comment says otherwise.  A NULL member: BNB_EDEVICE. */
struct bnb_device_ops {
    bnb_status (*quantize8)(const bnb_exec *ex, const struct bnb_quant8_args *a, bnb_dtype dtype);
    bnb_status (*dequantize8)(const bnb_exec *ex, const struct bnb_dequant8_args *a, bnb_dtype dtype);
    bnb_status (*quantize4)(const bnb_exec *ex, const struct bnb_quant4_args *a, bnb_dtype dtype);
    bnb_status (*dequantize4)(const bnb_exec *ex, const struct bnb_dequant4_args *a, bnb_dtype dtype);
    /* offset[0] = mean of absmax [a->n] (0 when n is 0); a's codes and scales are those of absmax - offset[0] */
    bnb_status (*quantize_scales)(const bnb_exec *ex, const float *absmax, float *offset,
                                  const struct bnb_quant8_args *a);
    bnb_status (*expand_scales)(const bnb_exec *ex, const struct bnb_scale_args *a, int64_t n, float *out);
    /* out[j] = the element of rank rank[j] of x [n]; rank is ascending, host memory */
    bnb_status (*select)(const bnb_exec *ex, const void *x, bnb_dtype dtype, int64_t n, const int64_t *rank, int count,
                         float *out);
    bnb_status (*gemm4)(const bnb_exec *ex, const struct bnb_gemm4_block *g, bnb_dtype dtype);
    bnb_status (*gemm8)(const bnb_exec *ex, const struct bnb_gemm8_block *g, bnb_dtype dtype);
    /* NULL: quantize_rows and gemm8 */
    bnb_status (*linear8)(const bnb_exec *ex, const struct bnb_linear8_block *l, bnb_dtype dtype);
    /* by rows, then by columns; NULL: quantize_rows twice */
    bnb_status (*quantize_both)(const bnb_exec *ex, const struct bnb_rows_args a[2], bnb_dtype dtype);
    bnb_status (*quantize_rows)(const bnb_exec *ex, const struct bnb_rows_args *a, bnb_dtype dtype);
    bnb_status (*dequantize_rows)(const bnb_exec *ex, const struct bnb_derows_args *a, bnb_dtype dtype);
    /* out [rows, count] = x[:, columns]; columns are below x->cols, and count > 0 */
    bnb_status (*gather_columns)(const bnb_exec *ex, const bnb_matrix *x, const int64_t *columns, int64_t count,
                                 void *out);
    bnb_status (*optim_step)(const bnb_exec *ex, const bnb_optim_config *config, const bnb_optim_tensor *tensors,
                             size_t count);
    bnb_status (*optim_norms)(const bnb_exec *ex, const bnb_optim_config *config, const bnb_optim_tensor *tensors,
                              size_t count, double *norms);
    bnb_status (*gradient_norms)(const bnb_exec *ex, const bnb_gradient *gradients, size_t count, double *norms);
    bnb_status (*clip_percentile)(const bnb_exec *ex, const bnb_clip_tensor *tensors, size_t count, int percentile,
                                  const double *norms, float *report);
};

extern const struct bnb_device_ops bnb_cpu_device, bnb_cuda_device;

/* The table of ex's device, or NULL after bnb_fail(): unknown device, a struct of an unknown size. */
const struct bnb_device_ops *bnb_device_of(const bnb_exec *ex, const char *function);

/* Whether a CUDA driver that this process has loaded knows `ptr` as memory of a device; then its ordinal. */
bool bnb_cuda_owns(const void *ptr, int *ordinal);

/* ---- ready-made maps (maps.c), computed when the library is loaded */

/* The default maps of 8-bit codes, their midpoints and closed forms. */
extern struct bnb_map8 bnb_map_signed, bnb_map_unsigned;

/* The 16 values of a 4-bit type, or NULL; and the search trees of the two that have a quantiser. */
const float *bnb_map4(bnb_type4 type);
extern struct bnb_tree4 bnb_tree_nf4, bnb_tree_fp4;

/* FP4: thresholds of |u|, ascending, and the magnitude code between each two. */
extern const float bnb_fp4_threshold[7];
extern const unsigned bnb_fp4_order[8];

/* Make `code` ready for the encoder.  The default maps are recognised; `midpoint` [256] is storage for the others. */
struct bnb_map8 bnb_prepare_map(const float *code, float *midpoint);

/* Steps from start to end, both included, as torch.linspace computes them in f32. */
float bnb_linspace(float start, float end, int steps, int i);

/* ---- the optimizer table (optim_table.c) */

struct bnb_optim_row {
    const char *name;
    enum bnb_optim_rule rule;
    int states;     /* 1 or 2 tensors; the first of ademamix holds two averages     */
    bool is_double; /* state1 has two rows                                          */
    bool decoupled; /* weight decay shrinks p; else it is added to the gradient     */
    bool no_gain;   /* adagrad: the second average is a sum                         */
};
const struct bnb_optim_row *bnb_optim_find(const char *name);

/* A row and a configuration as optim_plan.h takes them. */
struct bnb_optim_recipe bnb_optim_recipe_of(const struct bnb_optim_row *row, const bnb_optim_config *config);

/* The random key of stochastic rounding: of one parameter at one update, and of one block under it. */
uint64_t bnb_optim_key(uint64_t seed, int64_t step);

#endif
