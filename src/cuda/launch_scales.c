/*
 * launch_scales.c - nested statistics on CUDA: the mean, level by level, the centred scales, and back
 */
#include "cuda/cuda.h"

enum { THREADS = 256, RUN = 1024 };

/* The sum of x [n] in `sums`, which has room for two levels of the tree; the result is at *total. */
static bnb_status tree_sum(const struct bnb_cuda_call *c, const float *x, int64_t n, double *sums, double **total)
{
    static struct bnb_cuda_kernel kernel = {.image = "scales", .name = "bnb_k_sum", .dtype = -1, .threads = THREADS};
    struct bnb_cuda_sum s = {x, NULL, sums, n};
    bnb_status status = BNB_OK;
    do {
        const int64_t runs = bnb_blocks(s.n, RUN);
        *total = s.sums;
        status = bnb_cuda_launch_over(c, &kernel, bnb_blocks(runs, THREADS / 32), &s);
        s = (struct bnb_cuda_sum){NULL, s.sums, s.sums + runs, runs};
    } while (!status && s.n > 1);
    return status;
}

static bnb_status centre(const struct bnb_cuda_call *c, const float *absmax, int64_t n, float *offset, float *centred,
                         double *sums)
{
    static struct bnb_cuda_kernel kernel = {.image = "scales", .name = "bnb_k_centre", .dtype = -1, .threads = THREADS};
    double *total = NULL;
    const bnb_status status = tree_sum(c, absmax, n, sums, &total);
    if (status)
        return status;
    const struct bnb_cuda_centre args = {absmax, total, offset, centred, n};
    return bnb_cuda_launch_over(c, &kernel, bnb_blocks(n, THREADS), &args);
}

bnb_status bnb_cuda_quantize_scales(const bnb_exec *ex, const float *absmax, float *offset,
                                    const struct bnb_quant8_args *a)
{
    struct bnb_cuda_call c;
    bnb_status status = bnb_cuda_begin(&c, ex, "quantize_scales");
    if (status)
        return status;
    if (a->n == 0) {
        const cu_address to = (cu_address)(uintptr_t)offset;
        status = bnb_cuda_check(c.card->cu, c.card->cu->set_bytes(to, 0, sizeof *offset, c.stream), c.function,
                                "cuMemsetD8Async");
        bnb_cuda_end(&c);
        return status;
    }
    /* Every level of the tree is a 1024th of the one below; the doubles come first, so that they are aligned. */
    const size_t levels = ((size_t)bnb_blocks(a->n, RUN) + (size_t)bnb_blocks(a->n, RUN * RUN) + 8) * sizeof(double);
    const size_t bytes = levels + (size_t)a->n * sizeof(float);
    void *memory = NULL;
    status = bnb_cuda_alloc(&c, bytes, &memory);
    if (!status && memory) {
        float *centred = (float *)((char *)memory + levels);
        struct bnb_quant8_args args = *a;
        args.x = centred;
        status = centre(&c, absmax, a->n, offset, centred, memory);
        if (!status)
            status = bnb_cuda_quantize8(ex, &args, BNB_F32);
    }
    bnb_cuda_free(&c, memory, bytes);
    bnb_cuda_end(&c);
    return status;
}

bnb_status bnb_cuda_expand_scales(const bnb_exec *ex, const struct bnb_scale_args *a, int64_t n, float *out)
{
    static struct bnb_cuda_kernel kernel = {.image = "scales", .name = "bnb_k_expand", .dtype = -1, .threads = THREADS};
    const struct bnb_cuda_expand args = {*a, out, n};
    struct bnb_cuda_call c;
    bnb_status status = bnb_cuda_begin(&c, ex, "dequantize_scales");
    if (!status) {
        status = bnb_cuda_launch_over(&c, &kernel, bnb_blocks(n, THREADS), &args);
        bnb_cuda_end(&c);
    }
    return status;
}
