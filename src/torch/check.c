/*
 * check.c - what an operator asks of its arguments, and how a refusal reads
 *
 * "operator: argument is value, expected ...".  Only shapes, dtypes and lengths are looked at here; values are the
 * core's business.
 */
#include <stdio.h>

#include "call.h"

struct bnb_label bnb_label(const struct bnb_tensor *t)
{
    struct bnb_label label;
    if (t->index < 0)
        snprintf(label.text, sizeof label.text, "%s", t->name);
    else
        snprintf(label.text, sizeof label.text, "%s[%lld]", t->name, (long long)t->index);
    return label;
}

struct bnb_label bnb_dtype_label(int32_t dtype)
{
    static const char *const names[] = {
#define X(name) #name,
        BNB_TORCH_DTYPES(X)
#undef X
    };
    struct bnb_label label;
    snprintf(label.text, sizeof label.text, "number %d of torch", dtype);
    for (int i = 0; i < BNB_TORCH_DTYPE_COUNT; i++)
        if (bnb_torch_dtypes[i] == dtype)
            snprintf(label.text, sizeof label.text, "%s", names[i]);
    return label;
}

void bnb_check_dtype(struct bnb_call *c, const struct bnb_tensor *t, enum bnb_torch_dtype dtype)
{
    if (bnb_call_ok(c) && t->dtype != bnb_torch_dtypes[dtype])
        bnb_call_fail(c, BNB_EDTYPE, "%s: %s has dtype %s, expected %s", c->op, bnb_label(t).text,
                      bnb_dtype_label(t->dtype).text, bnb_dtype_label(bnb_torch_dtypes[dtype]).text);
}

void bnb_check_count(struct bnb_call *c, const struct bnb_tensor *t, int64_t n, const char *why)
{
    if (bnb_call_ok(c) && t->n != n)
        bnb_call_fail(c, BNB_EINVAL, "%s: %s has %lld elements, expected %lld%s", c->op, bnb_label(t).text,
                      (long long)t->n, (long long)n, why);
}

void bnb_check_blocks(struct bnb_call *c, const struct bnb_tensor *t, int64_t n, int64_t block)
{
    if (!bnb_call_ok(c))
        return;
    const int64_t blocks = n / block + (n % block != 0);
    if (t->n != blocks)
        bnb_call_fail(c, BNB_EINVAL, "%s: %s has %lld elements, expected %lld (%lld values in blocks of %lld)", c->op,
                      bnb_label(t).text, (long long)t->n, (long long)blocks, (long long)n, (long long)block);
}

bnb_dtype bnb_check_float(struct bnb_call *c, const char *name, int32_t dtype, bnb_status status)
{
    if (dtype == bnb_torch_dtypes[BNB_TORCH_float32])
        return BNB_F32;
    if (dtype == bnb_torch_dtypes[BNB_TORCH_float16])
        return BNB_F16;
    if (dtype == bnb_torch_dtypes[BNB_TORCH_bfloat16])
        return BNB_BF16;
    bnb_call_fail(c, status, "%s: %s is %s, expected float32, float16 or bfloat16", c->op, name,
                  bnb_dtype_label(dtype).text);
    return BNB_F32;
}

bnb_dtype bnb_check_float_tensor(struct bnb_call *c, const struct bnb_tensor *t)
{
    if (!bnb_call_ok(c) || t->dtype == bnb_torch_dtypes[BNB_TORCH_float32])
        return BNB_F32;
    if (t->dtype == bnb_torch_dtypes[BNB_TORCH_float16])
        return BNB_F16;
    if (t->dtype == bnb_torch_dtypes[BNB_TORCH_bfloat16])
        return BNB_BF16;
    bnb_call_fail(c, BNB_EDTYPE, "%s: %s has dtype %s, expected float32, float16 or bfloat16", c->op, bnb_label(t).text,
                  bnb_dtype_label(t->dtype).text);
    return BNB_F32;
}

void bnb_check_block(struct bnb_call *c, const char *name, int64_t block)
{
    if (block <= 0)
        bnb_call_fail(c, BNB_EINVAL, "%s: %s is %lld, expected a number above 0", c->op, name, (long long)block);
}

int64_t bnb_check_shape(struct bnb_call *c, const char *name, struct bnb_ints shape)
{
    int64_t n = 1;
    bool overflow = false, empty = false;
    for (size_t i = 0; bnb_call_ok(c) && i < shape.count; i++) {
        if (shape.values[i] < 0)
            bnb_call_fail(c, BNB_EINVAL, "%s: %s[%zu] is %lld, expected 0 or more", c->op, name, i,
                          (long long)shape.values[i]);
        empty |= shape.values[i] == 0;
        if (!overflow && !empty)
            overflow = __builtin_mul_overflow(n, shape.values[i], &n);
    }
    if (overflow && !empty)
        bnb_call_fail(c, BNB_EINVAL, "%s: the product of %s is too large, expected at most 2^63 - 1", c->op, name);
    return bnb_call_ok(c) && !empty ? n : 0;
}

void bnb_check_out(struct bnb_call *c, const struct bnb_tensor *out, struct bnb_ints shape, int32_t dtype)
{
    if (!bnb_call_ok(c))
        return;
    if (out->dtype != dtype)
        bnb_call_fail(c, BNB_EDTYPE, "%s: %s has dtype %s, expected %s", c->op, out->name,
                      bnb_dtype_label(out->dtype).text, bnb_dtype_label(dtype).text);
    if (out->dim != (int64_t)shape.count)
        bnb_call_fail(c, BNB_EINVAL, "%s: %s has %lld dimensions, expected %zu", c->op, out->name, (long long)out->dim,
                      shape.count);
    for (size_t i = 0; bnb_call_ok(c) && i < shape.count; i++)
        if (out->sizes[i] != shape.values[i])
            bnb_call_fail(c, BNB_EINVAL, "%s: %s has size %lld in dimension %zu, expected %lld", c->op, out->name,
                          (long long)out->sizes[i], i, (long long)shape.values[i]);
}
