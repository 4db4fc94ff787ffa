/*
 * api_quantile.c - bnb_estimate_quantiles(): probabilities to ranks, then exact selection on the device
 */
#include <math.h>

#include "core/check.h"

/* The offset that stands for "half a step" whatever the count. */
#define DEFAULT_OFFSET (1.0 / 512.0)

/* The rank of quantile j of `count`: NUMERICS rule 10. */
static int64_t rank_of(int64_t n, double offset, int count, int j)
{
    const int t = count == 256 ? j : (int)bnb_linspace(0.0f, 255.0f, count, j);
    const double p = offset + t * (1.0 - 2.0 * offset) / 255.0;
    return (int64_t)rint(p * (double)(n - 1));
}

bnb_status bnb_estimate_quantiles(const bnb_exec *ex, const void *x, bnb_dtype dtype, int64_t n, double offset,
                                  int count, float *out)
{
    const char *f = "estimate_quantiles";
    const struct bnb_device_ops *device = bnb_device_of(ex, f);
    if (!device)
        return bnb_last_status();
    if (dtype != BNB_F32 && dtype != BNB_F16 && dtype != BNB_BF16)
        return bnb_fail(BNB_ENOTSUP, "%s: dtype is %d, expected f32, f16 or bf16", f, (int)dtype);
    if (n < 1)
        return bnb_fail(BNB_EINVAL, "%s: n is %lld, expected 1 or more", f, (long long)n);
    if (count > 256)
        return bnb_fail(BNB_ENOTSUP, "%s: num_quantiles is %d, expected 1..256", f, count);
    if (count < 1)
        return bnb_fail(BNB_EINVAL, "%s: num_quantiles is %d, expected 1..256", f, count);
    if (!(offset >= 0.0 && offset <= 0.5))
        return bnb_fail(BNB_EINVAL, "%s: offset is %g, expected a probability in [0, 0.5]", f, offset);
    if (!x || !out)
        return bnb_fail(BNB_EINVAL, "%s: %s is NULL, expected a buffer", f, x ? "out" : "x");
    if (count < 256 && offset == DEFAULT_OFFSET)
        offset = 1.0 / (2.0 * count);
    int64_t rank[256];
    for (int j = 0; j < count; j++)
        rank[j] = rank_of(n, offset, count, j);
    BNB_CHECK(bnb_core_check_member(f, device->select != NULL));
    return device->select(ex, x, dtype, n, rank, count, out);
}
