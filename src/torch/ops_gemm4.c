/*
 * ops_gemm4.c - the operators that multiply by a 4-bit weight
 *
 * One straight line serves them all: check the arguments against n and k, the shape of the weight, and call the core,
 * which reads the packed codes and the scales, plain or nested, where they are.
 */
#include "ops.h"
#include "quantized.h"

/* The scales of nested statistics come in blocks of this size where a schema has no argument for it. */
#define NESTED_BLOCK 256

/* The arguments of one product, taken from the stack. */
struct product4 {
    struct bnb_tensor x, weight, bias, out;
    struct bnb_tensor first; /* where the rows of each expert begin; not present: one weight */
    struct bnb_scale_tensors scales;
    int64_t n, k, block;
    bnb_type4 type;
    const float *values; /* [16], instead of the type */
    bool nested, exact;
    bool grad; /* x is the gradient of the output, the result that of the input */
};

/* How many experts there are, after checks of `first`: 1 without. */
static int64_t check_experts(struct bnb_call *c, struct product4 *p)
{
    if (!p->first.present)
        return 1;
    bnb_check_dtype(c, &p->first, BNB_TORCH_int64);
    if (bnb_call_ok(c) && p->first.n < 2)
        bnb_call_fail(c, BNB_EINVAL, "%s: first has %lld elements, expected 2 or more: one more than there are experts",
                      c->op, (long long)p->first.n);
    bnb_call_stage(c, &p->first, NULL, BNB_STAGE_READ);
    return bnb_call_ok(c) ? p->first.n - 1 : 1;
}

/* One for each row of the weight, of all experts. */
static void check_bias4(struct bnb_call *c, struct product4 *p, int64_t experts)
{
    if (!p->first.present) {
        bnb_check_bias(c, &p->bias, p->n);
    } else if (p->bias.present) {
        bnb_check_float_tensor(c, &p->bias);
        bnb_check_count(c, &p->bias, experts * p->n, " (one per row of the weight of each expert)");
        bnb_call_stage(c, &p->bias, NULL, BNB_STAGE_READ);
    }
    bnb_call_cast(c, &p->bias, p->x.dtype);
}

/* Check, allocate the result unless there is one, multiply. */
static void multiply(struct bnb_call *c, struct product4 *p)
{
    const int64_t experts = check_experts(c, p);
    const int64_t shape[3] = {experts, p->n, p->k};
    const int64_t inner = p->grad ? p->n : p->k, outer = p->grad ? p->k : p->n;
    const bnb_dtype dtype = bnb_check_float_tensor(c, &p->x);
    const int64_t count = bnb_check_shape(c, "the shape of the weight", (struct bnb_ints){shape, 3});
    bnb_check_block_4bit(c, p->block);
    const int64_t rows = bnb_check_rows(c, &p->x, inner);
    bnb_check_packed(c, &p->weight, count, true);
    bnb_check_scale_tensors(c, &p->scales, p->nested);
    bnb_check_blocks(c, &p->scales.absmax, count, p->block);
    check_bias4(c, p, experts);
    if (p->out.present) {
        if (bnb_call_ok(c))
            bnb_check_out(c, &p->out, bnb_rows_shape(c, &p->x, outer), p->x.dtype);
        bnb_call_stage(c, &p->out, NULL, BNB_STAGE_WRITE);
    } else if (bnb_call_ok(c)) {
        p->out = bnb_new_rows(c, "the result", &p->x, outer, p->x.dtype);
    }

    const void *x = bnb_read(c, &p->x);
    const uint8_t *codes = bnb_read(c, &p->weight);
    const void *bias = p->bias.present ? bnb_read(c, &p->bias) : NULL;
    const int64_t *first = p->first.present ? bnb_read(c, &p->first) : NULL;
    const bnb_scales scales = bnb_scale_pointers(c, &p->scales, p->nested);
    void *out = bnb_write(c, &p->out);
    if (!bnb_call_ok(c))
        return;
    const bnb_gemm4_args args = {.size = sizeof args,
                                 .x = x,
                                 .codes = codes,
                                 .scales = &scales,
                                 .bias = bias,
                                 .out = out,
                                 .m = rows,
                                 .n = p->n,
                                 .k = p->k,
                                 .block = p->block,
                                 .type = p->type,
                                 .dtype = dtype,
                                 .exact = p->exact,
                                 .values = p->values,
                                 .first = first,
                                 .experts = experts};
    c->status = p->grad ? bnb_gemm4_grad(&c->exec, &args) : bnb_gemm4(&c->exec, &args);
}

/* ---------------------------------------------------------------- what the layers call */

/* All of the nested scales, or none. */
static void check_nesting(struct bnb_call *c, struct product4 *p)
{
    const struct bnb_tensor *const parts[] = {&p->scales.code, &p->scales.absmax2, &p->scales.offset};
    static const char *const names[] = {"absmax_code", "absmax2", "offset"};
    int present = 0;
    for (int i = 0; i < 3; i++)
        present += parts[i]->present;
    for (int i = 0; present > 0 && i < 3; i++)
        if (!parts[i]->present)
            bnb_call_fail(c, BNB_EINVAL, "%s: %s is None, expected a tensor: other parts of nested scales are given",
                          c->op, names[i]);
    p->nested = present > 0;
    /* An offset of another float dtype stands for its f32 value. */
    if (p->nested && bnb_call_ok(c)) {
        if (p->scales.offset.dtype != bnb_torch_dtypes[BNB_TORCH_float64])
            bnb_check_float_tensor(c, &p->scales.offset);
        bnb_call_cast(c, &p->scales.offset, bnb_torch_dtypes[BNB_TORCH_float32]);
    }
}

/* The arguments that both have, up to n and k. */
static void take_product(struct bnb_call *c, struct product4 *p)
{
    p->x = bnb_take_tensor(c, p->grad ? "grad" : "x");
    p->weight = bnb_take_tensor(c, "weight");
    p->scales.absmax = bnb_take_tensor(c, "absmax");
    p->scales.code = bnb_take_optional(c, "absmax_code");
    p->scales.absmax2 = bnb_take_optional(c, "absmax2");
    p->scales.offset = bnb_take_optional(c, "offset");
    p->scales.block2 = bnb_take_int(c);
    p->block = bnb_take_int(c);
    p->type = bnb_take_type_4bit(c);
    p->n = bnb_take_int(c);
    p->k = bnb_take_int(c);
}

/* _linear_4bit(Tensor x, Tensor weight, Tensor absmax, Tensor? absmax_code, Tensor? absmax2, Tensor? offset,
 *              int blocksize2, int blocksize, str quant_type, int n, int k, Tensor? bias, bool exact) -> Tensor */
void bnb_op_linear_4bit(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    struct product4 p = {.type = BNB_NF4};
    (void)outputs;
    bnb_call_begin(&c, "_linear_4bit", stack, inputs, 13);
    take_product(&c, &p);
    p.bias = bnb_take_optional(&c, "bias");
    p.exact = bnb_take_bool(&c);
    check_nesting(&c, &p);
    multiply(&c, &p);
    bnb_give(&c, &p.out);
    bnb_call_end(&c);
}

/* _linear_4bit_grad(Tensor grad, Tensor weight, Tensor absmax, Tensor? absmax_code, Tensor? absmax2, Tensor? offset,
 *                   int blocksize2, int blocksize, str quant_type, int n, int k) -> Tensor */
void bnb_op_linear_4bit_grad(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    struct product4 p = {.type = BNB_NF4, .grad = true};
    (void)outputs;
    bnb_call_begin(&c, "_linear_4bit_grad", stack, inputs, 11);
    take_product(&c, &p);
    check_nesting(&c, &p);
    multiply(&c, &p);
    bnb_give(&c, &p.out);
    bnb_call_end(&c);
}

/* _experts_4bit(Tensor x, Tensor weight, Tensor absmax, Tensor? absmax_code, Tensor? absmax2, Tensor? offset,
 *               int blocksize2, int blocksize, str quant_type, int n, int k, Tensor first, Tensor? bias) -> Tensor */
void bnb_op_experts_4bit(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    struct product4 p = {.type = BNB_NF4};
    (void)outputs;
    bnb_call_begin(&c, "_experts_4bit", stack, inputs, 13);
    take_product(&c, &p);
    p.first = bnb_take_tensor(&c, "first");
    p.bias = bnb_take_optional(&c, "bias");
    check_nesting(&c, &p);
    multiply(&c, &p);
    bnb_give(&c, &p.out);
    bnb_call_end(&c);
}

/* _experts_4bit_grad(Tensor grad, Tensor weight, Tensor absmax, Tensor? absmax_code, Tensor? absmax2, Tensor? offset,
 *                    int blocksize2, int blocksize, str quant_type, int n, int k, Tensor first) -> Tensor */
void bnb_op_experts_4bit_grad(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    struct product4 p = {.type = BNB_NF4, .grad = true};
    (void)outputs;
    bnb_call_begin(&c, "_experts_4bit_grad", stack, inputs, 12);
    take_product(&c, &p);
    p.first = bnb_take_tensor(&c, "first");
    check_nesting(&c, &p);
    multiply(&c, &p);
    bnb_give(&c, &p.out);
    bnb_call_end(&c);
}

/* ---------------------------------------------------------------- the public names */

static void set_shape(struct bnb_call *c, struct product4 *p, struct bnb_ints shape)
{
    if (bnb_call_ok(c) && shape.count != 2)
        bnb_call_fail(c, BNB_EINVAL, "%s: shapeB has %zu entries, expected 2", c->op, shape.count);
    if (bnb_call_ok(c)) {
        p->n = shape.values[0];
        p->k = shape.values[1];
    }
}

/* gemm_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None,
 *           Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor */
void bnb_op_gemm_4bit(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    struct product4 p = {.type = BNB_NF4, .scales = {.block2 = NESTED_BLOCK}};
    (void)outputs;
    bnb_call_begin(&c, "gemm_4bit", stack, inputs, 10);
    p.x = bnb_take_tensor(&c, "A");
    p.weight = bnb_take_tensor(&c, "B");
    const struct bnb_ints shape = bnb_take_ints(&c);
    const struct bnb_tensor absmax = bnb_take_tensor(&c, "absmax");
    p.block = bnb_take_int(&c);
    p.type = bnb_take_type_4bit(&c);
    p.bias = bnb_take_optional(&c, "bias");
    p.scales.absmax = bnb_take_optional(&c, "absmax_8bit");
    p.scales.code = bnb_take_optional(&c, "absmax_code");
    p.scales.offset = bnb_take_optional(&c, "absmax_offset");

    set_shape(&c, &p, shape);
    if (p.scales.absmax.present) {
        p.scales.absmax2 = absmax;
        check_nesting(&c, &p);
    } else {
        p.scales.absmax = absmax;
    }
    if (bnb_call_ok(&c) && p.bias.present && p.bias.dtype != p.x.dtype)
        bnb_call_fail(&c, BNB_EDTYPE, "%s: bias has dtype %s, expected %s, the dtype of A", c.op,
                      bnb_dtype_label(p.bias.dtype).text, bnb_dtype_label(p.x.dtype).text);
    multiply(&c, &p);
    bnb_give(&c, &p.out);
    bnb_call_end(&c);
}

/* The type whose 16 values these are: the schema of gemv_4bit names it no other way.  A device reads them itself. */
static void take_values(struct bnb_call *c, struct product4 *p, struct bnb_tensor *code)
{
    bnb_check_dtype(c, code, BNB_TORCH_float32);
    bnb_check_count(c, code, 16, " (the values of a 4-bit type)");
    bnb_call_stage(c, code, NULL, BNB_STAGE_READ);
    const float *values = bnb_read(c, code);
    if (c->exec.device != BNB_CPU)
        p->values = values;
    else if (bnb_call_ok(c) && bnb_find_4bit_map(values, &p->type))
        bnb_call_fail(c, BNB_ENOTSUP, "%s: code holds the values of another type, expected those of NF4 or FP4", c->op);
}

static void gemv_4bit(torch_value *stack, uint64_t inputs, bool has_out)
{
    struct bnb_call c;
    struct product4 p = {.type = BNB_NF4};
    bnb_call_begin(&c, has_out ? "gemv_4bit.out" : "gemv_4bit", stack, inputs, has_out ? 7 : 6);
    p.x = bnb_take_tensor(&c, "A");
    p.weight = bnb_take_tensor(&c, "B");
    const struct bnb_ints shape = bnb_take_ints(&c);
    p.scales.absmax = bnb_take_tensor(&c, "absmax");
    struct bnb_tensor code = bnb_take_tensor(&c, "code");
    p.block = bnb_take_int(&c);
    if (has_out)
        p.out = bnb_take_tensor(&c, "out");

    set_shape(&c, &p, shape);
    take_values(&c, &p, &code);
    multiply(&c, &p);
    if (!has_out)
        bnb_give(&c, &p.out);
    bnb_call_end(&c);
}

/* gemv_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) -> Tensor */
void bnb_op_gemv_4bit(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    (void)outputs;
    gemv_4bit(stack, inputs, false);
}

/* gemv_4bit.out(..., Tensor! out) -> () */
void bnb_op_gemv_4bit_out(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    (void)outputs;
    gemv_4bit(stack, inputs, true);
}
