/*
 * ops_int8.c - the operators of LLM.int8(): quantise rows, multiply exactly, scale, add outliers and bias
 *
 * Leading dimensions are rows: every activation [..., k] is a matrix [rows, k] of its row-major flattening.
 */
#include "ops.h"
#include "quantized.h"

static int32_t torch_dtype(enum bnb_torch_dtype dtype) { return bnb_torch_dtypes[dtype]; }

static void check_threshold(struct bnb_call *c, double threshold)
{
    if (!(threshold >= 0.0))
        bnb_call_fail(c, BNB_EINVAL, "%s: threshold is %g, expected 0 or more", c->op, threshold);
}

/* f32 [n], made row-major. */
static void check_stats(struct bnb_call *c, struct bnb_tensor *stats, int64_t n)
{
    bnb_check_dtype(c, stats, BNB_TORCH_float32);
    bnb_check_count(c, stats, n, " (one per row)");
    bnb_call_stage(c, stats, NULL, BNB_STAGE_READ);
}

/* An int8 weight [n, k]; n is read from it, k is given. */
static int64_t check_weight(struct bnb_call *c, struct bnb_tensor *weight, int64_t k)
{
    bnb_check_dtype(c, weight, BNB_TORCH_int8);
    bnb_check_matrix(c, weight);
    bnb_check_rows(c, weight, k);
    return bnb_call_ok(c) ? weight->sizes[0] : 0;
}

/* The columns whose flag [k] is set, ascending: int64, in a tensor of the call.  How many there are is the shape of a
 * result: flags on a device are read, which waits for it.  The layers' products take the flags themselves. */
static struct bnb_tensor columns_of(struct bnb_call *c, const struct bnb_tensor *flags)
{
    struct bnb_tensor host = *flags;
    int64_t count = 0;
    bnb_call_to_host(c, &host);
    const uint8_t *flag = bnb_read(c, &host);
    for (int64_t i = 0; bnb_call_ok(c) && i < flags->n; i++)
        count += flag[i] != 0;
    struct bnb_tensor columns =
        bnb_new_host_tensor(c, "the outlier columns", bnb_one_size(&count), torch_dtype(BNB_TORCH_int64));
    int64_t *index = bnb_write(c, &columns);
    for (int64_t i = 0, j = 0; bnb_call_ok(c) && i < flags->n; i++)
        if (flag[i])
            index[j++] = i;
    bnb_call_from_host(c, &columns);
    return columns;
}

/* ---------------------------------------------------------------- quantising */

/* What quantising a matrix by rows gives. */
struct rows8 {
    struct bnb_tensor codes, stats, flags;
    int64_t rows, width;
};

static struct rows8 new_rows(struct bnb_call *c, struct bnb_tensor *x, double threshold)
{
    struct rows8 q = {.rows = 0};
    bnb_check_float_tensor(c, x);
    check_threshold(c, threshold);
    q.width = bnb_row_width(c, x);
    q.rows = bnb_check_rows(c, x, q.width);
    const int64_t flags = threshold > 0.0 ? q.width : 0;
    q.codes = bnb_new_tensor(c, "the codes", bnb_sizes_of(x), torch_dtype(BNB_TORCH_int8));
    q.stats = bnb_new_tensor(c, "the row statistics", bnb_one_size(&q.rows), torch_dtype(BNB_TORCH_float32));
    q.flags = bnb_new_tensor(c, "the outlier flags", bnb_one_size(&flags), torch_dtype(BNB_TORCH_uint8));
    return q;
}

/* int8_vectorwise_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor?) */
void bnb_op_int8_vectorwise_quant(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    (void)outputs;
    bnb_call_begin(&c, "int8_vectorwise_quant", stack, inputs, 2);
    struct bnb_tensor a = bnb_take_tensor(&c, "A"), columns = {.present = false};
    const double threshold = bnb_take_float(&c);
    const struct rows8 q = new_rows(&c, &a, threshold);
    const bnb_matrix x = {bnb_read(&c, &a), bnb_check_float_tensor(&c, &a), q.rows, q.width};
    int8_t *codes = bnb_write(&c, &q.codes);
    float *stats = bnb_write(&c, &q.stats);
    uint8_t *flags = bnb_write(&c, &q.flags);
    if (bnb_call_ok(&c))
        c.status = bnb_quantize_rows(&c.exec, &x, threshold, codes, stats, threshold > 0.0 ? flags : NULL);
    if (threshold > 0.0)
        columns = columns_of(&c, &q.flags);
    bnb_give(&c, &q.codes);
    bnb_give(&c, &q.stats);
    bnb_give_optional(&c, &columns);
    bnb_call_end(&c);
}

/* int8_double_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor?) */
void bnb_op_int8_double_quant(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    (void)outputs;
    bnb_call_begin(&c, "int8_double_quant", stack, inputs, 2);
    struct bnb_tensor a = bnb_take_tensor(&c, "A"), columns = {.present = false};
    const double threshold = bnb_take_float(&c);
    const struct rows8 q = new_rows(&c, &a, threshold);
    const struct bnb_tensor codes = bnb_new_tensor(&c, "the codes", bnb_sizes_of(&a), torch_dtype(BNB_TORCH_int8));
    const struct bnb_tensor stats =
        bnb_new_tensor(&c, "the column statistics", bnb_one_size(&q.width), torch_dtype(BNB_TORCH_float32));
    const bnb_matrix x = {bnb_read(&c, &a), bnb_check_float_tensor(&c, &a), q.rows, q.width};
    int8_t *both[2] = {bnb_write(&c, &q.codes), bnb_write(&c, &codes)};
    float *scales[2] = {bnb_write(&c, &q.stats), bnb_write(&c, &stats)};
    uint8_t *flags = bnb_write(&c, &q.flags);
    if (bnb_call_ok(&c))
        c.status = bnb_quantize_both(&c.exec, &x, threshold, both, scales, threshold > 0.0 ? flags : NULL);
    if (threshold > 0.0)
        columns = columns_of(&c, &q.flags);
    bnb_give(&c, &q.codes);
    bnb_give(&c, &codes);
    bnb_give(&c, &q.stats);
    bnb_give(&c, &stats);
    bnb_give_optional(&c, &columns);
    bnb_call_end(&c);
}

/* int8_vectorwise_dequant(Tensor A, Tensor stats) -> Tensor */
void bnb_op_int8_vectorwise_dequant(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    (void)outputs;
    bnb_call_begin(&c, "int8_vectorwise_dequant", stack, inputs, 2);
    struct bnb_tensor a = bnb_take_tensor(&c, "A"), stats = bnb_take_tensor(&c, "stats");
    bnb_check_dtype(&c, &a, BNB_TORCH_int8);
    const int64_t width = bnb_row_width(&c, &a), rows = bnb_check_rows(&c, &a, width);
    check_stats(&c, &stats, rows);
    const struct bnb_tensor out = bnb_new_tensor(&c, "the result", bnb_sizes_of(&a), torch_dtype(BNB_TORCH_float32));
    const int8_t *codes = bnb_read(&c, &a);
    const float *scale = bnb_read(&c, &stats);
    float *x = bnb_write(&c, &out);
    if (bnb_call_ok(&c))
        c.status = bnb_dequantize_rows(&c.exec, codes, scale, rows, width, x, BNB_F32);
    bnb_give(&c, &out);
    bnb_call_end(&c);
}

/* _int8_outlier_columns(Tensor flags) -> Tensor */
void bnb_op_int8_outlier_columns(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    (void)outputs;
    bnb_call_begin(&c, "_int8_outlier_columns", stack, inputs, 1);
    struct bnb_tensor flags = bnb_take_tensor(&c, "flags");
    bnb_check_dtype(&c, &flags, BNB_TORCH_uint8);
    bnb_call_stage(&c, &flags, NULL, BNB_STAGE_READ);
    const struct bnb_tensor columns = columns_of(&c, &flags);
    bnb_give(&c, &columns);
    bnb_call_end(&c);
}

/* ---------------------------------------------------------------- integer products */

static void int8_linear_matmul(torch_value *stack, uint64_t inputs, bool has_out)
{
    struct bnb_call c;
    bnb_call_begin(&c, has_out ? "int8_linear_matmul.out" : "int8_linear_matmul", stack, inputs, has_out ? 3 : 2);
    struct bnb_tensor a = bnb_take_tensor(&c, "A"), b = bnb_take_tensor(&c, "B"), out = {.present = false};
    if (has_out)
        out = bnb_take_tensor(&c, "out");
    bnb_check_dtype(&c, &a, BNB_TORCH_int8);
    const int64_t k = bnb_row_width(&c, &a), m = bnb_check_rows(&c, &a, k);
    const int64_t n = check_weight(&c, &b, k);
    if (bnb_call_ok(&c) && !has_out)
        out = bnb_new_rows(&c, "the result", &a, n, torch_dtype(BNB_TORCH_int32));
    else if (bnb_call_ok(&c))
        bnb_check_out(&c, &out, bnb_rows_shape(&c, &a, n), torch_dtype(BNB_TORCH_int32));
    bnb_call_stage(&c, &out, NULL, BNB_STAGE_WRITE);
    const int8_t *x = bnb_read(&c, &a), *w = bnb_read(&c, &b);
    int32_t *y = bnb_write(&c, &out);
    if (bnb_call_ok(&c))
        c.status = bnb_matmul8(&c.exec, x, w, m, n, k, y);
    if (!has_out)
        bnb_give(&c, &out);
    bnb_call_end(&c);
}

/* int8_linear_matmul(Tensor A, Tensor B) -> Tensor */
void bnb_op_int8_linear_matmul(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    (void)outputs;
    int8_linear_matmul(stack, inputs, false);
}

/* int8_linear_matmul.out(Tensor A, Tensor B, Tensor! out) -> () */
void bnb_op_int8_linear_matmul_out(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    (void)outputs;
    int8_linear_matmul(stack, inputs, true);
}

/* ---------------------------------------------------------------- scaled products */

/* The tensors of bnb_gemm8(); the absent ones are not part of the product.  flags: of the outlier columns, instead of
 * their list. */
struct product8 {
    struct bnb_tensor a, weight, product, row_stats, col_stats, bias, x, columns, flags, out;
    int64_t m, n, k;
};

static const void *read_if(struct bnb_call *c, const struct bnb_tensor *t)
{
    return t->present ? bnb_read(c, t) : NULL;
}

/* Scales, bias and outliers on checked operands; the result has the shape and dtype of p->out. */
static void multiply(struct bnb_call *c, struct product8 *p, bnb_dtype dtype)
{
    check_stats(c, &p->row_stats, p->m);
    check_stats(c, &p->col_stats, p->n);
    bnb_check_bias(c, &p->bias, p->n);
    const bnb_dtype bias_dtype = p->bias.present ? bnb_check_float_tensor(c, &p->bias) : BNB_F32;
    bnb_gemm8_args args = {
        .size = sizeof args, .m = p->m, .n = p->n, .k = p->k, .dtype = dtype, .bias_dtype = bias_dtype};
    args.a = read_if(c, &p->a);
    args.b = read_if(c, &p->weight);
    args.product = read_if(c, &p->product);
    args.row_stats = bnb_read(c, &p->row_stats);
    args.col_stats = bnb_read(c, &p->col_stats);
    args.bias = read_if(c, &p->bias);
    args.out = bnb_write(c, &p->out);
    if (p->columns.present && p->columns.n > 0) {
        args.x = bnb_read(c, &p->x);
        args.columns = bnb_read(c, &p->columns);
        args.outliers = p->columns.n;
    }
    if (p->flags.present && p->flags.n > 0) {
        args.x = bnb_read(c, &p->x);
        args.outlier = bnb_read(c, &p->flags);
    }
    if (bnb_call_ok(c))
        c->status = bnb_gemm8(&c->exec, &args);
}

/* A [..., k] and B [n, k], int8; gives m, n and k. */
static void check_operands(struct bnb_call *c, struct product8 *p)
{
    bnb_check_dtype(c, &p->a, BNB_TORCH_int8);
    p->k = bnb_row_width(c, &p->a);
    p->m = bnb_check_rows(c, &p->a, p->k);
    p->n = check_weight(c, &p->weight, p->k);
}

/* int8_scaled_mm(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, ScalarType? dtype=None)
 *     -> Tensor */
void bnb_op_int8_scaled_mm(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    struct product8 p = {.m = 0};
    (void)outputs;
    bnb_call_begin(&c, "int8_scaled_mm", stack, inputs, 6);
    p.a = bnb_take_tensor(&c, "A");
    p.weight = bnb_take_tensor(&c, "B");
    p.row_stats = bnb_take_tensor(&c, "row_stats");
    p.col_stats = bnb_take_tensor(&c, "col_stats");
    p.bias = bnb_take_optional(&c, "bias");
    const int32_t result = bnb_take_optional_dtype(&c, BNB_TORCH_float16);

    const bnb_dtype dtype = bnb_check_float(&c, "dtype", result, BNB_EDTYPE);
    check_operands(&c, &p);
    if (bnb_call_ok(&c))
        p.out = bnb_new_rows(&c, "the result", &p.a, p.n, result);
    multiply(&c, &p, dtype);
    bnb_give(&c, &p.out);
    bnb_call_end(&c);
}

/* int8_mm_dequant(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None) -> Tensor */
void bnb_op_int8_mm_dequant(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    struct product8 p = {.m = 0};
    (void)outputs;
    bnb_call_begin(&c, "int8_mm_dequant", stack, inputs, 5);
    p.product = bnb_take_tensor(&c, "A");
    p.row_stats = bnb_take_tensor(&c, "row_stats");
    p.col_stats = bnb_take_tensor(&c, "col_stats");
    const int32_t result = bnb_take_optional_dtype(&c, BNB_TORCH_float16);
    p.bias = bnb_take_optional(&c, "bias");

    const bnb_dtype dtype = bnb_check_float(&c, "dtype", result, BNB_EDTYPE);
    bnb_check_dtype(&c, &p.product, BNB_TORCH_int32);
    p.n = bnb_row_width(&c, &p.product);
    p.m = bnb_check_rows(&c, &p.product, p.n);
    if (bnb_call_ok(&c))
        p.out = bnb_new_tensor(&c, "the result", bnb_sizes_of(&p.product), result);
    multiply(&c, &p, dtype);
    bnb_give(&c, &p.out);
    bnb_call_end(&c);
}

/* Ascending column numbers below k: looked at on the host, because the kernels trust them. */
static void check_columns(struct bnb_call *c, struct bnb_tensor *columns, int64_t k)
{
    if (!columns->present)
        return;
    bnb_check_dtype(c, columns, BNB_TORCH_int64);
    bnb_call_stage(c, columns, NULL, BNB_STAGE_READ);
    struct bnb_tensor host = *columns;
    bnb_call_to_host(c, &host);
    const int64_t *index = bnb_read(c, &host);
    for (int64_t i = 0; bnb_call_ok(c) && i < columns->n; i++)
        if (index[i] < 0 || index[i] >= k || (i > 0 && index[i] <= index[i - 1]))
            bnb_call_fail(c, BNB_EINVAL, "%s: %s[%lld] is %lld, expected ascending columns below %lld", c->op,
                          bnb_label(columns).text, (long long)i, (long long)index[i], (long long)k);
}

/* x[:, columns] as a new tensor [rows, columns]. */
static struct bnb_tensor gather(struct bnb_call *c, const struct product8 *p, bnb_dtype dtype)
{
    const int64_t width = p->columns.present ? p->columns.n : 0, sizes[2] = {p->m, width};
    const struct bnb_tensor sub = bnb_new_tensor(c, "the outliers", (struct bnb_ints){sizes, 2}, p->x.dtype);
    const void *x = bnb_read(c, &p->x);
    void *out = bnb_write(c, &sub);
    const int64_t *index = read_if(c, &p->columns);
    if (bnb_call_ok(c))
        c->status = bnb_gather_columns(&c->exec, &(bnb_matrix){x, dtype, p->m, p->k}, index, width, out);
    return sub;
}

/* int8_mixed_scaled_mm(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None,
 *                      Tensor? bias=None) -> (Tensor, Tensor?) */
void bnb_op_int8_mixed_scaled_mm(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    struct product8 p = {.m = 0};
    (void)outputs;
    bnb_call_begin(&c, "int8_mixed_scaled_mm", stack, inputs, 7);
    p.x = bnb_take_tensor(&c, "A");
    p.a = bnb_take_tensor(&c, "CA");
    p.weight = bnb_take_tensor(&c, "CB");
    p.row_stats = bnb_take_tensor(&c, "SCA");
    p.col_stats = bnb_take_tensor(&c, "SCB");
    p.columns = bnb_take_optional(&c, "outlier_cols");
    p.bias = bnb_take_optional(&c, "bias");

    const bnb_dtype dtype = bnb_check_float_tensor(&c, &p.x);
    check_operands(&c, &p);
    const int64_t rows = bnb_check_rows(&c, &p.x, p.k);
    if (bnb_call_ok(&c) && rows != p.m)
        bnb_call_fail(&c, BNB_EINVAL, "%s: A has %lld rows, expected %lld, the rows of CA", c.op, (long long)rows,
                      (long long)p.m);
    check_columns(&c, &p.columns, p.k);
    if (bnb_call_ok(&c))
        p.out = bnb_new_rows(&c, "the result", &p.a, p.n, p.x.dtype);
    multiply(&c, &p, dtype);
    const struct bnb_tensor sub = gather(&c, &p, dtype);
    bnb_give(&c, &p.out);
    bnb_give_optional(&c, &sub);
    bnb_call_end(&c);
}

/* ---------------------------------------------------------------- what the layers call */

/* _linear_int8(Tensor x, Tensor CB, Tensor SCB, Tensor? bias, float threshold) -> (Tensor, Tensor) */
void bnb_op_linear_int8(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    struct product8 p = {.m = 0};
    (void)outputs;
    bnb_call_begin(&c, "_linear_int8", stack, inputs, 5);
    p.x = bnb_take_tensor(&c, "x");
    p.weight = bnb_take_tensor(&c, "CB");
    p.col_stats = bnb_take_tensor(&c, "SCB");
    p.bias = bnb_take_optional(&c, "bias");
    const double threshold = bnb_take_float(&c);

    const bnb_dtype dtype = bnb_check_float_tensor(&c, &p.x);
    bnb_check_matrix(&c, &p.weight);
    p.k = bnb_call_ok(&c) ? p.weight.sizes[1] : 0;
    p.n = check_weight(&c, &p.weight, p.k);
    p.m = bnb_check_rows(&c, &p.x, p.k);
    check_threshold(&c, threshold);
    check_stats(&c, &p.col_stats, p.n);
    bnb_check_bias(&c, &p.bias, p.n);
    const bnb_dtype bias_dtype = p.bias.present ? bnb_check_float_tensor(&c, &p.bias) : BNB_F32;
    const int64_t width = threshold > 0.0 ? p.k : 0;
    if (bnb_call_ok(&c)) {
        p.out = bnb_new_rows(&c, "the result", &p.x, p.n, p.x.dtype);
        p.flags = bnb_new_tensor(&c, "the outlier flags", bnb_one_size(&width), torch_dtype(BNB_TORCH_uint8));
    }
    const bnb_gemm8_args args = {.size = sizeof args,
                                 .b = bnb_read(&c, &p.weight),
                                 .col_stats = bnb_read(&c, &p.col_stats),
                                 .bias = read_if(&c, &p.bias),
                                 .x = bnb_read(&c, &p.x),
                                 .out = bnb_write(&c, &p.out),
                                 .m = p.m,
                                 .n = p.n,
                                 .k = p.k,
                                 .dtype = dtype,
                                 .bias_dtype = bias_dtype};
    uint8_t *outlier = bnb_write(&c, &p.flags);
    if (bnb_call_ok(&c))
        c.status = bnb_linear8(&c.exec, &args, threshold, outlier);
    bnb_give(&c, &p.out);
    bnb_give(&c, &p.flags);
    bnb_call_end(&c);
}

/* _linear_int8_grad(Tensor grad, Tensor CB, Tensor SCB) -> Tensor */
void bnb_op_linear_int8_grad(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    struct product8 p = {.m = 0};
    (void)outputs;
    bnb_call_begin(&c, "_linear_int8_grad", stack, inputs, 3);
    p.x = bnb_take_tensor(&c, "grad");
    p.weight = bnb_take_tensor(&c, "CB");
    p.col_stats = bnb_take_tensor(&c, "SCB");

    const bnb_dtype dtype = bnb_check_float_tensor(&c, &p.x);
    bnb_check_matrix(&c, &p.weight);
    p.k = bnb_call_ok(&c) ? p.weight.sizes[1] : 0;
    p.n = check_weight(&c, &p.weight, p.k);
    p.m = bnb_check_rows(&c, &p.x, p.n);
    check_stats(&c, &p.col_stats, p.n);
    if (bnb_call_ok(&c))
        p.out = bnb_new_rows(&c, "the result", &p.x, p.k, p.x.dtype);
    const void *x = bnb_read(&c, &p.x);
    const int8_t *weight = bnb_read(&c, &p.weight);
    const float *scale = bnb_read(&c, &p.col_stats);
    void *out = bnb_write(&c, &p.out);
    const bnb_gemm8_args args = {.size = sizeof args,
                                 .x = x,
                                 .b = weight,
                                 .col_stats = scale,
                                 .out = out,
                                 .m = p.m,
                                 .n = p.n,
                                 .k = p.k,
                                 .dtype = dtype};
    if (bnb_call_ok(&c))
        c.status = bnb_gemm8_grad(&c.exec, &args);
    bnb_give(&c, &p.out);
    bnb_call_end(&c);
}
