/*
 * cuda.h - what the files of the CUDA device share: the members of bnb_cuda_device, one launcher per operation
 */
#ifndef BNB_CUDA_CUDA_H
#define BNB_CUDA_CUDA_H

#include "core/plan_gemm8.h"
#include "cuda/device.h"
#include "cuda/kernels/launch_args.h"

/* Can `bytes` bytes be moved at once from this address on? */
bool bnb_cuda_aligned(const void *address, size_t bytes);

/* launch_quant.c, launch_scales.c */
bnb_status bnb_cuda_quantize8(const bnb_exec *ex, const struct bnb_quant8_args *a, bnb_dtype dtype);
bnb_status bnb_cuda_dequantize8(const bnb_exec *ex, const struct bnb_dequant8_args *a, bnb_dtype dtype);
bnb_status bnb_cuda_quantize4(const bnb_exec *ex, const struct bnb_quant4_args *a, bnb_dtype dtype);
bnb_status bnb_cuda_dequantize4(const bnb_exec *ex, const struct bnb_dequant4_args *a, bnb_dtype dtype);
bnb_status bnb_cuda_quantize_scales(const bnb_exec *ex, const float *absmax, float *offset,
                                    const struct bnb_quant8_args *a);
bnb_status bnb_cuda_expand_scales(const bnb_exec *ex, const struct bnb_scale_args *a, int64_t n, float *out);

/* launch_quantile.c */
bnb_status bnb_cuda_select(const bnb_exec *ex, const void *x, bnb_dtype dtype, int64_t n, const int64_t *rank,
                           int count, float *out);

/* launch_gemm4.c, launch_gemm8.c, launch_rows.c, launch_linear8.c */
bnb_status bnb_cuda_gemm4(const bnb_exec *ex, const struct bnb_gemm4_block *g, bnb_dtype dtype);
bnb_status bnb_cuda_gemm8(const bnb_exec *ex, const struct bnb_gemm8_block *g, bnb_dtype dtype);
bnb_status bnb_cuda_linear8(const bnb_exec *ex, const struct bnb_linear8_block *l, bnb_dtype dtype);
bnb_status bnb_cuda_quantize_rows(const bnb_exec *ex, const struct bnb_rows_args *a, bnb_dtype dtype);
bnb_status bnb_cuda_quantize_both(const bnb_exec *ex, const struct bnb_rows_args a[2], bnb_dtype dtype);
bnb_status bnb_cuda_dequantize_rows(const bnb_exec *ex, const struct bnb_derows_args *a, bnb_dtype dtype);
bnb_status bnb_cuda_gather_columns(const bnb_exec *ex, const bnb_matrix *x, const int64_t *columns, int64_t count,
                                   void *out);

/* Can rows and codes be moved eight at a time? */
bool bnb_cuda_rows_aligned(const struct bnb_rows_args *a);

/* A product within a call: how it will be made. */
bnb_status bnb_cuda_plan8(const struct bnb_cuda_call *c, const struct bnb_gemm8_block *g, struct bnb_gemm8_plan *plan);

/* Made so.  Of q: g, dtype, threshold, and where g.outlier is not NULL mask and, if the plan wants them, list and values.
 * early: as in struct bnb_cuda_manner; the launch before must not have written the weight. */
bnb_status bnb_cuda_run8(const struct bnb_cuda_call *c, const struct bnb_gemm8_plan *plan,
                         const struct bnb_cuda_product8 *q, bool early);

/* A row of activations by a block that holds it; a without flags, or flags that are zero.  Codes in the columns of other
 * rows' outliers stay.  column_stats: NULL, or zero before, and cols is at most 16384. */
bnb_status bnb_cuda_hold_rows(const struct bnb_cuda_call *c, const struct bnb_rows_args *a, float *column_stats,
                              bnb_dtype dtype);

/* launch_optim.c, launch_norms.c */
bnb_status bnb_cuda_optim_step(const bnb_exec *ex, const bnb_optim_config *config, const bnb_optim_tensor *tensors,
                               size_t count);
bnb_status bnb_cuda_optim_norms(const bnb_exec *ex, const bnb_optim_config *config, const bnb_optim_tensor *tensors,
                                size_t count, double *norms);
bnb_status bnb_cuda_gradient_norms(const bnb_exec *ex, const bnb_gradient *gradients, size_t count, double *norms);
bnb_status bnb_cuda_clip_percentile(const bnb_exec *ex, const bnb_clip_tensor *tensors, size_t count, int percentile,
                                    const double *norms, float *report);

/*
 * upload.c - a table that the host fills and kernels read
 *
 * Host and device memory have the same layout, so `device` + offset is where host + offset arrives.
 */
struct bnb_cuda_table {
    char *host, *device;
    size_t bytes, tail;               /* the tail is workspace behind the table: it is not filled */
    struct bnb_cuda_staging *staging; /* what `host` is; NULL: ordinary memory */
    bool carried;                     /* in the arguments of launches */
};

/* bytes and tail as they will be; zeroed on the host.  Followed by bnb_cuda_table_close(), also after a failure. */
bnb_status bnb_cuda_table_open(const struct bnb_cuda_call *c, struct bnb_cuda_table *table, size_t bytes, size_t tail);
bnb_status bnb_cuda_table_send(const struct bnb_cuda_call *c, const struct bnb_cuda_table *table);
void bnb_cuda_table_close(const struct bnb_cuda_call *c, struct bnb_cuda_table *table);

#endif
