/*
 * table.c - what the CUDA device can do
 */
#include "cuda/cuda.h"

const struct bnb_device_ops bnb_cuda_device = {.quantize8 = bnb_cuda_quantize8,
                                               .dequantize8 = bnb_cuda_dequantize8,
                                               .quantize4 = bnb_cuda_quantize4,
                                               .dequantize4 = bnb_cuda_dequantize4,
                                               .quantize_scales = bnb_cuda_quantize_scales,
                                               .expand_scales = bnb_cuda_expand_scales,
                                               .gemm4 = bnb_cuda_gemm4,
                                               .gemm8 = bnb_cuda_gemm8,
                                               .linear8 = bnb_cuda_linear8,
                                               .quantize_both = bnb_cuda_quantize_both,
                                               .quantize_rows = bnb_cuda_quantize_rows,
                                               .dequantize_rows = bnb_cuda_dequantize_rows,
                                               .gather_columns = bnb_cuda_gather_columns,
                                               .select = bnb_cuda_select,
                                               .optim_step = bnb_cuda_optim_step,
                                               .optim_norms = bnb_cuda_optim_norms,
                                               .gradient_norms = bnb_cuda_gradient_norms,
                                               .clip_percentile = bnb_cuda_clip_percentile};
