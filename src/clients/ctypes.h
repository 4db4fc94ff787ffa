/*
 * ctypes.h - functions under the names that clients bind by hand, through ctypes, from bitsandbytes.functional.lib
 *
 * Unsloth and axolotl call these C functions of the library past its Python layer: names and the order of arguments are
 * a contract with them.  Buffers are all on the CPU or, where this library has the kernel, all on one CUDA device, as
 * the address of `out` tells; `stream` is then the CUstream that orders the call.
 * The result is a bnb_status.  Who binds a function as void loses nothing: bnb_detail() has the reason of a failure,
 * and the Python package raises it.
 */
#ifndef BNB_CLIENTS_CTYPES_H
#define BNB_CLIENTS_CTYPES_H

#include "bitsandbytes.h"

/* bnb_dequantize8(): code [256], codes [n], absmax [ceil(n / blocksize)] -> out [n] of the dtype in the name */
BNB_API int cdequantize_blockwise_fp32(const float *code, const uint8_t *codes, const float *absmax, void *out,
                                       int blocksize, int n, void *stream);
BNB_API int cdequantize_blockwise_fp16(const float *code, const uint8_t *codes, const float *absmax, void *out,
                                       int blocksize, int n, void *stream);
BNB_API int cdequantize_blockwise_bf16(const float *code, const uint8_t *codes, const float *absmax, void *out,
                                       int blocksize, int n, void *stream);

/* bnb_dequantize4() of the type in the name: codes [(n + 1) / 2]; `code` is not read and may be NULL */
BNB_API int cdequantize_blockwise_fp32_nf4(const float *code, const uint8_t *codes, const float *absmax, void *out,
                                           int blocksize, int n, void *stream);
BNB_API int cdequantize_blockwise_fp16_nf4(const float *code, const uint8_t *codes, const float *absmax, void *out,
                                           int blocksize, int n, void *stream);
BNB_API int cdequantize_blockwise_bf16_nf4(const float *code, const uint8_t *codes, const float *absmax, void *out,
                                           int blocksize, int n, void *stream);
BNB_API int cdequantize_blockwise_fp32_fp4(const float *code, const uint8_t *codes, const float *absmax, void *out,
                                           int blocksize, int n, void *stream);
BNB_API int cdequantize_blockwise_fp16_fp4(const float *code, const uint8_t *codes, const float *absmax, void *out,
                                           int blocksize, int n, void *stream);
BNB_API int cdequantize_blockwise_bf16_fp4(const float *code, const uint8_t *codes, const float *absmax, void *out,
                                           int blocksize, int n, void *stream);

/*
 * bnb_gemm4(): out [n, m] = x [n, k] W^T with a 4-bit weight W [m, k], all of the dtype in the name
 *   code           [16] the values of NF4 or FP4, in host memory if the buffers are
 *   lda, ldb, ldc  m, (k + 1) / 2 and m for the clients; not read, as every buffer is contiguous
 */
BNB_API int cgemm_4bit_inference_naive_fp32(int m, int n, int k, const void *x, const uint8_t *codes,
                                            const float *absmax, const float *code, void *out, int lda, int ldb,
                                            int ldc, int blocksize, void *stream);
BNB_API int cgemm_4bit_inference_naive_fp16(int m, int n, int k, const void *x, const uint8_t *codes,
                                            const float *absmax, const float *code, void *out, int lda, int ldb,
                                            int ldc, int blocksize, void *stream);
BNB_API int cgemm_4bit_inference_naive_bf16(int m, int n, int k, const void *x, const uint8_t *codes,
                                            const float *absmax, const float *code, void *out, int lda, int ldb,
                                            int ldc, int blocksize, void *stream);

#endif
