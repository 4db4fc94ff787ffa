/*
 * ops_quant.c - the operators of quantisation: 8-bit, 4-bit, scales, quantiles
 *
 * Blocks run over the row-major order of the logical tensor, so an input with other strides is copied first.  The
 * schemas are in python/bitsandbytes/_ops.py; what the numbers mean is in bitsandbytes.h.
 */
#include "ops.h"
#include "quantized.h"

static int64_t blocks_of(const struct bnb_call *c, int64_t n, int64_t block)
{
    return bnb_call_ok(c) ? n / block + (n % block != 0) : 0;
}

/* ---------------------------------------------------------------- 8 bits */

/* quantize_blockwise(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor) */
void bnb_op_quantize_blockwise(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    (void)outputs;
    bnb_call_begin(&c, "quantize_blockwise", stack, inputs, 3);
    struct bnb_tensor a = bnb_take_tensor(&c, "A"), code = bnb_take_tensor(&c, "code");
    const int64_t block = bnb_take_int(&c);

    const bnb_dtype dtype = bnb_check_float(&c, "the dtype of A", a.dtype, BNB_EDTYPE);
    bnb_check_block(&c, "blocksize", block);
    bnb_check_map_tensor(&c, &code);
    bnb_call_stage(&c, &a, NULL, BNB_STAGE_READ);

    const int64_t blocks = blocks_of(&c, a.n, block);
    const struct bnb_tensor codes =
        bnb_new_tensor(&c, "the codes", bnb_sizes_of(&a), bnb_torch_dtypes[BNB_TORCH_uint8]);
    const struct bnb_tensor absmax =
        bnb_new_tensor(&c, "absmax", bnb_one_size(&blocks), bnb_torch_dtypes[BNB_TORCH_float32]);
    const void *x = bnb_read(&c, &a);
    const float *map = bnb_read(&c, &code);
    uint8_t *q = bnb_write(&c, &codes);
    float *scale = bnb_write(&c, &absmax);
    if (bnb_call_ok(&c))
        c.status = bnb_quantize8(&c.exec, x, dtype, a.n, block, map, q, scale);
    bnb_give(&c, &codes);
    bnb_give(&c, &absmax);
    bnb_call_end(&c);
}

static void dequantize_blockwise(torch_value *stack, uint64_t inputs, bool has_out)
{
    struct bnb_call c;
    bnb_call_begin(&c, has_out ? "dequantize_blockwise.out" : "dequantize_blockwise", stack, inputs, has_out ? 6 : 5);
    struct bnb_tensor a = bnb_take_tensor(&c, "A"), absmax = bnb_take_tensor(&c, "absmax");
    struct bnb_tensor code = bnb_take_tensor(&c, "code");
    const int64_t block = bnb_take_int(&c);
    const int32_t torch_dtype = bnb_take_dtype(&c);
    struct bnb_tensor out = {.present = false};
    if (has_out)
        out = bnb_take_tensor(&c, "out");

    const bnb_dtype dtype = bnb_check_float(&c, "dtype", torch_dtype, BNB_EDTYPE);
    bnb_check_dtype(&c, &a, BNB_TORCH_uint8);
    bnb_check_block(&c, "blocksize", block);
    bnb_check_dtype(&c, &absmax, BNB_TORCH_float32);
    bnb_check_blocks(&c, &absmax, a.n, block);
    bnb_check_map_tensor(&c, &code);
    if (has_out)
        bnb_check_out(&c, &out, bnb_sizes_of(&a), torch_dtype);
    bnb_call_stage(&c, &a, NULL, BNB_STAGE_READ);
    bnb_call_stage(&c, &absmax, NULL, BNB_STAGE_READ);

    if (has_out)
        bnb_call_stage(&c, &out, NULL, BNB_STAGE_WRITE);
    else
        out = bnb_new_tensor(&c, "the result", bnb_sizes_of(&a), torch_dtype);
    const uint8_t *q = bnb_read(&c, &a);
    const float *map = bnb_read(&c, &code);
    const bnb_scales scales = {.absmax = bnb_read(&c, &absmax)};
    void *x = bnb_write(&c, &out);
    if (bnb_call_ok(&c))
        c.status = bnb_dequantize8(&c.exec, q, a.n, block, map, &scales, x, dtype);
    if (!has_out)
        bnb_give(&c, &out);
    bnb_call_end(&c);
}

/* dequantize_blockwise(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor */
void bnb_op_dequantize_blockwise(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    (void)outputs;
    dequantize_blockwise(stack, inputs, false);
}

/* dequantize_blockwise.out(..., Tensor! out) -> () */
void bnb_op_dequantize_blockwise_out(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    (void)outputs;
    dequantize_blockwise(stack, inputs, true);
}

/* ---------------------------------------------------------------- 4 bits */

/* quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor) */
void bnb_op_quantize_4bit(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    (void)outputs;
    bnb_call_begin(&c, "quantize_4bit", stack, inputs, 4);
    struct bnb_tensor a = bnb_take_tensor(&c, "A");
    const int64_t block = bnb_take_int(&c);
    const bnb_type4 type = bnb_take_type_4bit(&c);
    const int32_t storage = bnb_take_dtype(&c);

    const bnb_dtype dtype = bnb_check_float(&c, "the dtype of A", a.dtype, BNB_EDTYPE);
    if (storage != bnb_torch_dtypes[BNB_TORCH_uint8] && storage != bnb_torch_dtypes[BNB_TORCH_float16] &&
        storage != bnb_torch_dtypes[BNB_TORCH_bfloat16] && storage != bnb_torch_dtypes[BNB_TORCH_float32])
        bnb_call_fail(&c, BNB_EDTYPE, "%s: quant_storage is %s, expected uint8, float16, bfloat16 or float32", c.op,
                      bnb_dtype_label(storage).text);
    bnb_check_block_4bit(&c, block);
    bnb_call_stage(&c, &a, NULL, BNB_STAGE_READ);

    const int64_t element_size = bnb_call_ok(&c) ? (int64_t)bnb_shim.element_size(storage) : 1;
    const int64_t blocks = blocks_of(&c, a.n, block), packed_sizes[2] = {bnb_packed_count(a.n, element_size), 1};
    const struct bnb_tensor packed =
        bnb_new_tensor(&c, "the packed codes", (struct bnb_ints){packed_sizes, 2}, storage);
    const struct bnb_tensor absmax =
        bnb_new_tensor(&c, "absmax", bnb_one_size(&blocks), bnb_torch_dtypes[BNB_TORCH_float32]);
    /* zero bytes behind the last code */
    if (bnb_call_ok(&c) && packed.n * element_size != a.n / 2 + a.n % 2 && bnb_shim.zero(packed.handle))
        bnb_call_fail(&c, BNB_EDEVICE, "%s: torch cannot fill the packed codes with zero", c.op);
    const void *x = bnb_read(&c, &a);
    uint8_t *q = bnb_write(&c, &packed);
    float *scale = bnb_write(&c, &absmax);
    if (bnb_call_ok(&c))
        c.status = bnb_quantize4(&c.exec, x, dtype, a.n, block, type, q, scale);
    bnb_give(&c, &packed);
    bnb_give(&c, &absmax);
    bnb_call_end(&c);
}

enum decode4 { DECODE_PLAIN, DECODE_OUT, DECODE_NESTED };

static void dequantize_4bit(torch_value *stack, uint64_t inputs, enum decode4 kind)
{
    static const char *const names[] = {"dequantize_4bit", "dequantize_4bit.out", "_dequantize_4bit_nested"};
    static const uint64_t counts[] = {6, 7, 10};
    struct bnb_call c;
    const bool nested = kind == DECODE_NESTED;
    bnb_call_begin(&c, names[kind], stack, inputs, counts[kind]);
    struct bnb_tensor a = bnb_take_tensor(&c, "A"), out = {.present = false};
    struct bnb_scale_tensors s = {.absmax = bnb_take_tensor(&c, "absmax")};
    if (nested) {
        s.code = bnb_take_tensor(&c, "absmax_code");
        s.absmax2 = bnb_take_tensor(&c, "absmax2");
        s.offset = bnb_take_tensor(&c, "offset");
        s.block2 = bnb_take_int(&c);
    }
    const int64_t block = bnb_take_int(&c);
    const bnb_type4 type = bnb_take_type_4bit(&c);
    const struct bnb_ints shape = bnb_take_ints(&c);
    const int32_t torch_dtype = bnb_take_dtype(&c);
    if (kind == DECODE_OUT)
        out = bnb_take_tensor(&c, "out");

    const bnb_dtype dtype = bnb_check_float(&c, "dtype", torch_dtype, BNB_EDTYPE);
    const int64_t n = bnb_check_shape(&c, "shape", shape);
    bnb_check_block_4bit(&c, block);
    bnb_check_packed(&c, &a, n, false);
    bnb_check_scale_tensors(&c, &s, nested);
    bnb_check_blocks(&c, &s.absmax, n, block);
    if (kind == DECODE_OUT) {
        bnb_check_out(&c, &out, shape, torch_dtype);
        bnb_call_stage(&c, &out, NULL, BNB_STAGE_WRITE);
    } else {
        out = bnb_new_tensor(&c, "the result", shape, torch_dtype);
    }
    const uint8_t *q = bnb_read(&c, &a);
    const bnb_scales scales = bnb_scale_pointers(&c, &s, nested);
    void *x = bnb_write(&c, &out);
    if (bnb_call_ok(&c))
        c.status = bnb_dequantize4(&c.exec, q, n, block, type, &scales, x, dtype);
    if (kind != DECODE_OUT)
        bnb_give(&c, &out);
    bnb_call_end(&c);
}

/* dequantize_4bit(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype) -> Tensor */
void bnb_op_dequantize_4bit(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    (void)outputs;
    dequantize_4bit(stack, inputs, DECODE_PLAIN);
}

/* dequantize_4bit.out(..., Tensor! out) -> () */
void bnb_op_dequantize_4bit_out(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    (void)outputs;
    dequantize_4bit(stack, inputs, DECODE_OUT);
}

/* _dequantize_4bit_nested(Tensor A, Tensor absmax, Tensor absmax_code, Tensor absmax2, Tensor offset, int blocksize2,
 *                         int blocksize, str quant_type, int[] shape, ScalarType dtype) -> Tensor */
void bnb_op_dequantize_4bit_nested(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    (void)outputs;
    dequantize_4bit(stack, inputs, DECODE_NESTED);
}

/* ---------------------------------------------------------------- scales and quantiles */

/* _quantize_scales(Tensor absmax, Tensor code, int blocksize) -> (Tensor codes, Tensor absmax2, Tensor offset) */
void bnb_op_quantize_scales(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    (void)outputs;
    bnb_call_begin(&c, "_quantize_scales", stack, inputs, 3);
    struct bnb_tensor absmax = bnb_take_tensor(&c, "absmax"), code = bnb_take_tensor(&c, "code");
    const int64_t block = bnb_take_int(&c);

    bnb_check_dtype(&c, &absmax, BNB_TORCH_float32);
    bnb_check_block(&c, "blocksize", block);
    bnb_check_map_tensor(&c, &code);
    bnb_call_stage(&c, &absmax, NULL, BNB_STAGE_READ);

    const int32_t f32 = bnb_torch_dtypes[BNB_TORCH_float32];
    const int64_t blocks = blocks_of(&c, absmax.n, block);
    const struct bnb_tensor codes =
        bnb_new_tensor(&c, "the codes", bnb_sizes_of(&absmax), bnb_torch_dtypes[BNB_TORCH_uint8]);
    const struct bnb_tensor absmax2 = bnb_new_tensor(&c, "absmax2", bnb_one_size(&blocks), f32);
    const struct bnb_tensor offset = bnb_new_tensor(&c, "offset", (struct bnb_ints){NULL, 0}, f32);
    const float *x = bnb_read(&c, &absmax), *map = bnb_read(&c, &code);
    uint8_t *q = bnb_write(&c, &codes);
    float *scale = bnb_write(&c, &absmax2), *mean = bnb_write(&c, &offset);
    if (bnb_call_ok(&c))
        c.status = bnb_quantize_scales(&c.exec, x, absmax.n, block, map, q, scale, mean);
    bnb_give(&c, &codes);
    bnb_give(&c, &absmax2);
    bnb_give(&c, &offset);
    bnb_call_end(&c);
}

/* _dequantize_scales(Tensor absmax, Tensor code, Tensor absmax2, Tensor offset, int blocksize) -> Tensor */
void bnb_op_dequantize_scales(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    (void)outputs;
    bnb_call_begin(&c, "_dequantize_scales", stack, inputs, 5);
    struct bnb_scale_tensors s = {.absmax = bnb_take_tensor(&c, "absmax")};
    s.code = bnb_take_tensor(&c, "code");
    s.absmax2 = bnb_take_tensor(&c, "absmax2");
    s.offset = bnb_take_tensor(&c, "offset");
    s.block2 = bnb_take_int(&c);

    bnb_check_scale_tensors(&c, &s, true);
    const struct bnb_tensor out =
        bnb_new_tensor(&c, "the result", bnb_sizes_of(&s.absmax), bnb_torch_dtypes[BNB_TORCH_float32]);
    const bnb_scales scales = bnb_scale_pointers(&c, &s, true);
    float *x = bnb_write(&c, &out);
    if (bnb_call_ok(&c))
        c.status = bnb_dequantize_scales(&c.exec, &scales, s.absmax.n, x);
    bnb_give(&c, &out);
    bnb_call_end(&c);
}

/* _estimate_quantiles(Tensor A, float offset, int num_quantiles) -> Tensor */
void bnb_op_estimate_quantiles(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    (void)outputs;
    bnb_call_begin(&c, "_estimate_quantiles", stack, inputs, 3);
    struct bnb_tensor a = bnb_take_tensor(&c, "A");
    const double offset = bnb_take_float(&c);
    const int64_t count = bnb_take_int(&c);

    const bnb_dtype dtype = bnb_check_float(&c, "the dtype of A", a.dtype, BNB_ENOTSUP);
    if (a.n < 1)
        bnb_call_fail(&c, BNB_EINVAL, "%s: A has 0 elements, expected 1 or more", c.op);
    if (count < 1 || count > 256)
        bnb_call_fail(&c, count < 1 ? BNB_EINVAL : BNB_ENOTSUP, "%s: num_quantiles is %lld, expected 1 to 256", c.op,
                      (long long)count);
    bnb_call_stage(&c, &a, NULL, BNB_STAGE_READ);
    const struct bnb_tensor out =
        bnb_new_tensor(&c, "the quantiles", bnb_one_size(&count), bnb_torch_dtypes[BNB_TORCH_float32]);
    const void *x = bnb_read(&c, &a);
    float *q = bnb_write(&c, &out);
    if (bnb_call_ok(&c))
        c.status = bnb_estimate_quantiles(&c.exec, x, dtype, a.n, offset, (int)count, q);
    bnb_give(&c, &out);
    bnb_call_end(&c);
}
