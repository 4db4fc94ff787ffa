/*
 * ops.h - the operators of the library: one row each, registered by register.c for every device
 *
 * The schemas, which Python defines (python/bitsandbytes/_ops.py), fix the order of the arguments on the stack.
 */
#ifndef BNB_TORCH_OPS_H
#define BNB_TORCH_OPS_H

#include "shim.h"

/* X(name in the schema, C function) */
#define BNB_TORCH_OPS(X)                                                         \
    X("quantize_blockwise", bnb_op_quantize_blockwise)                           \
    X("dequantize_blockwise", bnb_op_dequantize_blockwise)                       \
    X("dequantize_blockwise.out", bnb_op_dequantize_blockwise_out)               \
    X("quantize_4bit", bnb_op_quantize_4bit)                                     \
    X("dequantize_4bit", bnb_op_dequantize_4bit)                                 \
    X("dequantize_4bit.out", bnb_op_dequantize_4bit_out)                         \
    X("_dequantize_4bit_nested", bnb_op_dequantize_4bit_nested)                  \
    X("_quantize_scales", bnb_op_quantize_scales)                                \
    X("_dequantize_scales", bnb_op_dequantize_scales)                            \
    X("_estimate_quantiles", bnb_op_estimate_quantiles)                          \
    X("gemm_4bit", bnb_op_gemm_4bit)                                             \
    X("gemv_4bit", bnb_op_gemv_4bit)                                             \
    X("gemv_4bit.out", bnb_op_gemv_4bit_out)                                     \
    X("_linear_4bit", bnb_op_linear_4bit)                                        \
    X("_linear_4bit_grad", bnb_op_linear_4bit_grad)                              \
    X("_experts_4bit", bnb_op_experts_4bit)                                      \
    X("_experts_4bit_grad", bnb_op_experts_4bit_grad)                            \
    X("int8_vectorwise_quant", bnb_op_int8_vectorwise_quant)                     \
    X("int8_vectorwise_dequant", bnb_op_int8_vectorwise_dequant)                 \
    X("int8_double_quant", bnb_op_int8_double_quant)                             \
    X("int8_linear_matmul", bnb_op_int8_linear_matmul)                           \
    X("int8_linear_matmul.out", bnb_op_int8_linear_matmul_out)                   \
    X("int8_mm_dequant", bnb_op_int8_mm_dequant)                                 \
    X("int8_scaled_mm", bnb_op_int8_scaled_mm)                                   \
    X("int8_mixed_scaled_mm", bnb_op_int8_mixed_scaled_mm)                       \
    X("_linear_int8", bnb_op_linear_int8)                                        \
    X("_linear_int8_grad", bnb_op_linear_int8_grad)                              \
    X("_int8_outlier_columns", bnb_op_int8_outlier_columns)                      \
    X("optimizer_update_32bit", bnb_op_optimizer_update_32bit)                   \
    X("optimizer_update_8bit_blockwise", bnb_op_optimizer_update_8bit_blockwise) \
    X("_optimizer_step", bnb_op_optimizer_step)                                  \
    X("_optimizer_norms", bnb_op_optimizer_norms)                                \
    X("_gradient_norms", bnb_op_gradient_norms)                                  \
    X("_percentile_clip", bnb_op_percentile_clip)                                \
    X("_optimizer_table", bnb_op_optimizer_table)                                \
    X("_optimizer_run", bnb_op_optimizer_run)

#define X(name, function) void function(torch_value *stack, uint64_t inputs, uint64_t outputs);
BNB_TORCH_OPS(X)
#undef X

#endif
