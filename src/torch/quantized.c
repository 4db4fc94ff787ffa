/*
 * quantized.c - what the operators on quantised tensors ask of maps, packed codes, scales and rows
 */
#include <string.h>

#include "quantized.h"

#define MAP_WHY " (an 8-bit map)"

void bnb_check_map_tensor(struct bnb_call *c, struct bnb_tensor *code)
{
    bnb_check_dtype(c, code, BNB_TORCH_float32);
    bnb_check_count(c, code, 256, MAP_WHY);
    bnb_call_stage(c, code, NULL, BNB_STAGE_READ);
}

void bnb_check_bias(struct bnb_call *c, struct bnb_tensor *bias, int64_t n)
{
    if (!bias->present)
        return;
    bnb_check_float_tensor(c, bias);
    if (bnb_call_ok(c) && bias->dim != 1)
        bnb_call_fail(c, BNB_EINVAL, "%s: %s has %lld dimensions, expected 1", c->op, bnb_label(bias).text,
                      (long long)bias->dim);
    bnb_check_count(c, bias, n, " (one per row of the weight)");
    bnb_call_stage(c, bias, NULL, BNB_STAGE_READ);
}

/* ---------------------------------------------------------------- 4 bits */

bnb_type4 bnb_take_type_4bit(struct bnb_call *c)
{
    const char *name = bnb_take_string(c);
    if (strcmp(name, "nf4") == 0)
        return BNB_NF4;
    if (strcmp(name, "fp4") != 0)
        bnb_call_fail(c, BNB_EINVAL, "%s: quant_type is \"%s\", expected \"nf4\" or \"fp4\"", c->op, name);
    return BNB_FP4;
}

void bnb_check_block_4bit(struct bnb_call *c, int64_t block)
{
    if (block < 32 || block > 4096 || (block & (block - 1)))
        bnb_call_fail(c, BNB_EINVAL, "%s: blocksize is %lld, expected a power of two from 32 to 4096", c->op,
                      (long long)block);
}

int64_t bnb_packed_count(int64_t n, int64_t element_size)
{
    const int64_t bytes = n / 2 + n % 2;
    return bytes / element_size + (bytes % element_size != 0);
}

void bnb_check_packed(struct bnb_call *c, struct bnb_tensor *a, int64_t n, bool longer)
{
    if (!bnb_call_ok(c))
        return;
    const int64_t element_size = (int64_t)bnb_shim.element_size(a->dtype);
    const int64_t expected = bnb_packed_count(n, element_size);
    if (longer ? a->n < expected : a->n != expected)
        bnb_call_fail(c, BNB_EINVAL, "%s: %s has %lld bytes, expected %s%lld (%lld values of 4 bits%s)", c->op,
                      bnb_label(a).text, (long long)(a->n * element_size), longer ? "at least " : "",
                      (long long)(expected * element_size), (long long)n,
                      element_size > 1 ? ", padded to whole elements" : "");
    bnb_call_stage(c, a, NULL, BNB_STAGE_READ);
}

void bnb_check_scale_tensors(struct bnb_call *c, struct bnb_scale_tensors *s, bool nested)
{
    bnb_check_dtype(c, &s->absmax, nested ? BNB_TORCH_uint8 : BNB_TORCH_float32);
    if (nested) {
        bnb_check_block(c, "blocksize of the nested scales", s->block2);
        bnb_check_map_tensor(c, &s->code);
        bnb_check_dtype(c, &s->absmax2, BNB_TORCH_float32);
        bnb_check_blocks(c, &s->absmax2, s->absmax.n, s->block2);
        bnb_check_dtype(c, &s->offset, BNB_TORCH_float32);
        bnb_check_count(c, &s->offset, 1, "");
        bnb_call_stage(c, &s->absmax2, NULL, BNB_STAGE_READ);
    }
    bnb_call_stage(c, &s->absmax, NULL, BNB_STAGE_READ);
}

bnb_scales bnb_scale_pointers(struct bnb_call *c, const struct bnb_scale_tensors *s, bool nested)
{
    bnb_scales scales = {.absmax = bnb_read(c, &s->absmax)};
    if (nested) {
        scales.code = bnb_read(c, &s->code);
        scales.absmax2 = bnb_read(c, &s->absmax2);
        scales.offset = bnb_read(c, &s->offset);
        scales.block2 = s->block2;
    }
    return scales;
}

/* ---------------------------------------------------------------- rows */

int64_t bnb_row_width(struct bnb_call *c, const struct bnb_tensor *x)
{
    if (bnb_call_ok(c) && x->dim < 1)
        bnb_call_fail(c, BNB_EINVAL, "%s: %s has 0 dimensions, expected 1 or more", c->op, bnb_label(x).text);
    return bnb_call_ok(c) ? x->sizes[x->dim - 1] : 0;
}

int64_t bnb_check_rows(struct bnb_call *c, struct bnb_tensor *x, int64_t width)
{
    const int64_t found = bnb_row_width(c, x);
    int64_t rows = 1;
    if (bnb_call_ok(c) && found != width)
        bnb_call_fail(c, BNB_EINVAL, "%s: %s has size %lld in its last dimension, expected %lld", c->op,
                      bnb_label(x).text, (long long)found, (long long)width);
    bnb_call_stage(c, x, NULL, BNB_STAGE_READ);
    for (int64_t i = 0; bnb_call_ok(c) && i + 1 < x->dim; i++)
        if (__builtin_mul_overflow(rows, x->sizes[i], &rows))
            bnb_call_fail(c, BNB_EINVAL, "%s: %s has too many rows, expected at most 2^63 - 1", c->op,
                          bnb_label(x).text);
    return bnb_call_ok(c) ? rows : 0;
}

struct bnb_ints bnb_rows_shape(struct bnb_call *c, const struct bnb_tensor *x, int64_t width)
{
    int64_t *sizes = bnb_call_alloc(c, (size_t)x->dim + 1, sizeof *sizes);
    if (!sizes)
        return (struct bnb_ints){NULL, 0};
    memcpy(sizes, x->sizes, (size_t)x->dim * sizeof *sizes);
    sizes[x->dim - 1] = width;
    return (struct bnb_ints){sizes, (size_t)x->dim};
}

struct bnb_tensor bnb_new_rows(struct bnb_call *c, const char *name, const struct bnb_tensor *x, int64_t width,
                               int32_t dtype)
{
    return bnb_new_tensor(c, name, bnb_rows_shape(c, x, width), dtype);
}

void bnb_check_matrix(struct bnb_call *c, const struct bnb_tensor *t)
{
    if (bnb_call_ok(c) && t->dim != 2)
        bnb_call_fail(c, BNB_EINVAL, "%s: %s has %lld dimensions, expected 2", c->op, bnb_label(t).text,
                      (long long)t->dim);
}
