/*
 * api_gemm.c - the public products with 4-bit weights: check everything, call the device
 */
#include <math.h>
#include <stdio.h>

#include "core/check.h"
#include "core/internal.h"
#include "core/plan_gemm4.h"

static bnb_status check_gemm4(const char *f, const bnb_gemm4_args *g, struct bnb_gemm4_block *b, bool grad)
{
    if (!g)
        return bnb_fail(BNB_EINVAL, "%s: args is NULL, expected a bnb_gemm4_args", f);
    if (g->size < sizeof *g)
        return bnb_fail(BNB_EINVAL, "%s: args->size is %zu, expected at least sizeof(bnb_gemm4_args) = %zu", f, g->size,
                        sizeof *g);
    BNB_CHECK(bnb_core_check_float(f, g->dtype));
    BNB_CHECK(bnb_core_check_product(f, g->m, g->n, g->k));
    BNB_CHECK(bnb_core_check_block4(f, g->block));
    if (!g->values)
        BNB_CHECK(bnb_core_check_type4(f, g->type));
    if (g->first && (g->experts < 1 || g->experts > INT32_MAX ||
                     (g->n > 0 && g->k > 0 && g->experts > INT64_MAX / 8 / g->n / g->k)))
        return bnb_fail(BNB_EINVAL, "%s: experts is %lld, expected 1 or more, and a weight that fits into memory", f,
                        (long long)g->experts);
    if (grad && g->bias)
        return bnb_fail(BNB_EINVAL, "%s: bias is given, expected NULL: it has no part in the gradient of the input", f);
    *b = (struct bnb_gemm4_block){.x = g->x,
                                  .codes = g->codes,
                                  .bias = g->bias,
                                  .out = g->out,
                                  .m = g->m,
                                  .n = g->n,
                                  .k = g->k,
                                  .block = g->block,
                                  .code = g->values ? NULL : bnb_map4(g->type),
                                  .grad = grad,
                                  .exact = g->exact || g->dtype == BNB_F32,
                                  .first = g->first,
                                  .experts = g->experts};
    const int64_t inner = grad ? g->n : g->k, outer = grad ? g->k : g->n;
    if (g->m == 0 || outer == 0)
        return BNB_OK;
    BNB_CHECK(bnb_core_check_ptr(f, "out", g->out));
    if (inner == 0)
        return BNB_OK;
    BNB_CHECK(bnb_core_check_ptr(f, "x", g->x));
    BNB_CHECK(bnb_core_check_ptr(f, "codes", g->codes));
    return bnb_core_check_scales(f, g->scales, &b->scale);
}

/* The values of the codes, where a caller gives them: on the CPU as the type that they are of. */
static bnb_status set_values(const char *f, const bnb_exec *ex, const float *values, struct bnb_gemm4_block *b)
{
    bnb_type4 type = BNB_NF4;
    if (ex && ex->device != BNB_CPU) {
        b->code = values;
        return BNB_OK;
    }
    if (bnb_find_4bit_map(values, &type))
        return bnb_fail(BNB_ENOTSUP, "%s: values are not those of a 4-bit type, expected those of NF4 or FP4", f);
    b->code = bnb_map4(type);
    return BNB_OK;
}

static bnb_status run_gemm4(const bnb_exec *ex, const bnb_gemm4_args *g, bool grad)
{
    const char *f = grad ? "gemm4_grad" : "gemm4";
    struct bnb_gemm4_block b;
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    BNB_CHECK(check_gemm4(f, g, &b, grad));
    if (g->values)
        BNB_CHECK(set_values(f, ex, g->values, &b));
    if (g->m == 0 || (grad ? g->k : g->n) == 0)
        return BNB_OK;
    BNB_CHECK(bnb_core_check_member(f, device->gemm4 != NULL));
    return device->gemm4(ex, &b, g->dtype);
}

bnb_status bnb_gemm4(const bnb_exec *ex, const bnb_gemm4_args *args) { return run_gemm4(ex, args, false); }

bnb_status bnb_gemm4_grad(const bnb_exec *ex, const bnb_gemm4_args *args) { return run_gemm4(ex, args, true); }

static _Thread_local struct bnb_gemm4_plan last_plan;
static _Thread_local bool planned;

void bnb_gemm4_note(const struct bnb_gemm4_plan *plan)
{
    last_plan = *plan;
    planned = true;
}

const char *bnb_gemm4_plan(void)
{
    static _Thread_local char text[128];
    const struct bnb_gemm4_plan *p = &last_plan;
    if (planned)
        snprintf(text, sizeof text, "%s splits %d bands %d slices %d steps %d depth %d",
                 bnb_gemm4_kernel_name[p->kernel], p->splits, p->bands, p->slices, p->steps, p->depth);
    return text;
}
