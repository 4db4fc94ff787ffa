/*
 * ctypes.c - the functions of ctypes.h: from the address of the result to a device, then the public interface
 */
#include "clients/ctypes.h"

static bnb_status exec_of(const void *out, void *stream, bnb_exec *ex)
{
    *ex = (bnb_exec){.size = sizeof *ex, .stream = stream};
    return bnb_pointer_device(out, &ex->device, &ex->ordinal);
}

static int dequantize8(const float *code, const uint8_t *codes, const float *absmax, void *out, bnb_dtype dtype,
                       int blocksize, int n, void *stream)
{
    bnb_exec ex;
    const bnb_scales scales = {.absmax = absmax};
    const bnb_status status = exec_of(out, stream, &ex);
    return status ? (int)status : (int)bnb_dequantize8(&ex, codes, n, blocksize, code, &scales, out, dtype);
}

static int dequantize4(const uint8_t *codes, const float *absmax, void *out, bnb_dtype dtype, bnb_type4 type,
                       int blocksize, int n, void *stream)
{
    bnb_exec ex;
    const bnb_scales scales = {.absmax = absmax};
    const bnb_status status = exec_of(out, stream, &ex);
    return status ? (int)status : (int)bnb_dequantize4(&ex, codes, n, blocksize, type, &scales, out, dtype);
}

static int gemm4(const bnb_gemm4_args *sizes, const float *absmax, const float *code, void *stream)
{
    bnb_exec ex;
    const bnb_scales scales = {.absmax = absmax};
    bnb_gemm4_args args = *sizes;
    bnb_status status = exec_of(args.out, stream, &ex);
    if (!status && ex.device == BNB_CPU)
        status = bnb_find_4bit_map(code, &args.type);
    else
        args.values = code; /* memory of the device, which is not waited for */
    args.size = sizeof args;
    args.scales = &scales;
    return status ? (int)status : (int)bnb_gemm4(&ex, &args);
}

int cdequantize_blockwise_fp32(const float *code, const uint8_t *codes, const float *absmax, void *out, int blocksize,
                               int n, void *stream)
{
    return dequantize8(code, codes, absmax, out, BNB_F32, blocksize, n, stream);
}

int cdequantize_blockwise_fp16(const float *code, const uint8_t *codes, const float *absmax, void *out, int blocksize,
                               int n, void *stream)
{
    return dequantize8(code, codes, absmax, out, BNB_F16, blocksize, n, stream);
}

int cdequantize_blockwise_bf16(const float *code, const uint8_t *codes, const float *absmax, void *out, int blocksize,
                               int n, void *stream)
{
    return dequantize8(code, codes, absmax, out, BNB_BF16, blocksize, n, stream);
}

int cdequantize_blockwise_fp32_nf4(const float *code, const uint8_t *codes, const float *absmax, void *out,
                                   int blocksize, int n, void *stream)
{
    (void)code;
    return dequantize4(codes, absmax, out, BNB_F32, BNB_NF4, blocksize, n, stream);
}

int cdequantize_blockwise_fp16_nf4(const float *code, const uint8_t *codes, const float *absmax, void *out,
                                   int blocksize, int n, void *stream)
{
    (void)code;
    return dequantize4(codes, absmax, out, BNB_F16, BNB_NF4, blocksize, n, stream);
}

int cdequantize_blockwise_bf16_nf4(const float *code, const uint8_t *codes, const float *absmax, void *out,
                                   int blocksize, int n, void *stream)
{
    (void)code;
    return dequantize4(codes, absmax, out, BNB_BF16, BNB_NF4, blocksize, n, stream);
}

int cdequantize_blockwise_fp32_fp4(const float *code, const uint8_t *codes, const float *absmax, void *out,
                                   int blocksize, int n, void *stream)
{
    (void)code;
    return dequantize4(codes, absmax, out, BNB_F32, BNB_FP4, blocksize, n, stream);
}

int cdequantize_blockwise_fp16_fp4(const float *code, const uint8_t *codes, const float *absmax, void *out,
                                   int blocksize, int n, void *stream)
{
    (void)code;
    return dequantize4(codes, absmax, out, BNB_F16, BNB_FP4, blocksize, n, stream);
}

int cdequantize_blockwise_bf16_fp4(const float *code, const uint8_t *codes, const float *absmax, void *out,
                                   int blocksize, int n, void *stream)
{
    (void)code;
    return dequantize4(codes, absmax, out, BNB_BF16, BNB_FP4, blocksize, n, stream);
}

/* NOLINTBEGIN(readability-function-size): thirteen arguments, as the clients give them */
int cgemm_4bit_inference_naive_fp32(int m, int n, int k, const void *x, const uint8_t *codes, const float *absmax,
                                    const float *code, void *out, int lda, int ldb, int ldc, int blocksize,
                                    void *stream)
{
    const bnb_gemm4_args sizes = {.x = x,
                                  .codes = codes,
                                  .out = out,
                                  .type = BNB_NF4,
                                  .m = n,
                                  .n = m,
                                  .k = k,
                                  .block = blocksize,
                                  .dtype = BNB_F32};
    (void)lda, (void)ldb, (void)ldc;
    return gemm4(&sizes, absmax, code, stream);
}

int cgemm_4bit_inference_naive_fp16(int m, int n, int k, const void *x, const uint8_t *codes, const float *absmax,
                                    const float *code, void *out, int lda, int ldb, int ldc, int blocksize,
                                    void *stream)
{
    const bnb_gemm4_args sizes = {.x = x,
                                  .codes = codes,
                                  .out = out,
                                  .type = BNB_NF4,
                                  .m = n,
                                  .n = m,
                                  .k = k,
                                  .block = blocksize,
                                  .dtype = BNB_F16};
    (void)lda, (void)ldb, (void)ldc;
    return gemm4(&sizes, absmax, code, stream);
}

int cgemm_4bit_inference_naive_bf16(int m, int n, int k, const void *x, const uint8_t *codes, const float *absmax,
                                    const float *code, void *out, int lda, int ldb, int ldc, int blocksize,
                                    void *stream)
{
    const bnb_gemm4_args sizes = {.x = x,
                                  .codes = codes,
                                  .out = out,
                                  .type = BNB_NF4,
                                  .m = n,
                                  .n = m,
                                  .k = k,
                                  .block = blocksize,
                                  .dtype = BNB_BF16};
    (void)lda, (void)ldb, (void)ldc;
    return gemm4(&sizes, absmax, code, stream);
}
/* NOLINTEND(readability-function-size) */
