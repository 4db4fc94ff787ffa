/*
 * test_quantile.c - exact order statistics against a full sort, for every dtype, length, count, offset and loop
 *
 * NUMERICS rule 10.  NaN sorts above every number, -0 and +0 are one value here.
 */
#include <math.h>
#include <string.h>

#include "check.h"
#include "support.h"

enum { LONGEST = 9000001 }; /* three chunks of the selection */

static int by_value(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    if (isnan(x) || isnan(y))
        return isnan(x) - isnan(y);
    return (x > y) - (x < y);
}

/* Point j of `count` from 0 to 255, in f32, from the nearer end. */
static int target_of(int count, int j)
{
    if (count == 256)
        return j;
    if (count == 1)
        return 0;
    const float step = 255.0f / (float)(count - 1);
    const float t = j < count / 2 ? step * (float)j : 255.0f - step * (float)(count - 1 - j);
    return (int)t;
}

static void check_quantiles(const void *x, bnb_dtype dtype, const float *sorted, int64_t n, double offset, int count,
                            const bnb_exec *ex)
{
    struct guarded out = guarded_make((size_t)count * 4, 4);
    CHECK(bnb_estimate_quantiles(ex, x, dtype, n, offset, count, out.data) == BNB_OK, "%s", bnb_detail());
    const double used = count < 256 && offset == 1.0 / 512 ? 1.0 / (2 * count) : offset;
    for (int j = 0; j < count; j++) {
        const double p = used + target_of(count, j) * (1.0 - 2.0 * used) / 255.0;
        const float want = sorted[(int64_t)rint(p * (double)(n - 1))], got = value_at(out.data, BNB_F32, j);
        CHECK(got == want || (isnan(got) && isnan(want)), "%s n %lld offset %g: quantile %d of %d is %g, expected %g",
              dtype_name[dtype], (long long)n, offset, j, count, (double)got, (double)want);
    }
    CHECK(guarded_intact(&out), "%s n %lld: guard bytes written", dtype_name[dtype], (long long)n);
    guarded_free(&out);
}

static void check_length(int64_t n, bnb_dtype dtype, enum fill kind)
{
    static const int count[] = {1, 2, 3, 15, 16, 127, 200, 255, 256};
    static const double offset[] = {1.0 / 512, 0.0, 0.02, 0.4999};
    const size_t size = bnb_dtype_size(dtype);
    struct guarded x = guarded_make((size_t)n * size, size);
    float *sorted = malloc((size_t)n * sizeof *sorted);
    if (!sorted)
        abort();
    fill_values(x.data, dtype, n, kind, (uint64_t)n);
    for (int64_t i = 0; i < n; i++)
        sorted[i] = value_at(x.data, dtype, i);
    qsort(sorted, (size_t)n, sizeof *sorted, by_value);
    const bnb_exec backwards = {.size = sizeof backwards, .parallel_for = loop_backwards};
    const bnb_exec threads = {.size = sizeof threads, .parallel_for = loop_threads};
    const bnb_exec *loop[] = {NULL, &backwards, &threads};
    for (size_t c = 0; c < sizeof count / sizeof count[0]; c++)
        for (size_t o = 0; o < sizeof offset / sizeof offset[0]; o++)
            if (n < 100000 || (o == 0 && c % 4 == 0))
                check_quantiles(x.data, dtype, sorted, n, offset[o], count[c], loop[(c + o) % 3]);
    free(sorted);
    guarded_free(&x);
}

int main(void)
{
    static const int64_t length[] = {1, 2, 3, 100, 255, 256, 257, 1000, 4095, 4097};
    for (size_t i = 0; i < sizeof length / sizeof length[0]; i++)
        for (int dtype = 0; dtype < BNB_FLOATS; dtype++)
            check_length(length[i], (bnb_dtype)dtype, (enum fill)(i % FILL_COUNT));
    for (int kind = 0; kind < FILL_COUNT; kind++)
        for (int dtype = 0; dtype < BNB_FLOATS; dtype++)
            check_length(777, (bnb_dtype)dtype, (enum fill)kind);
    for (int dtype = 0; dtype < BNB_FLOATS; dtype++)
        check_length(200003, (bnb_dtype)dtype, FILL_BELL);
    check_length(LONGEST, BNB_F32, FILL_HEAVY);
    return CHECK_RESULT();
}
