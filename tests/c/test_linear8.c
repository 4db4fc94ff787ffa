/*
 * test_linear8.c - calls that do two things give what the two calls give: a layer, and quantising by rows and by columns
 */
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "support.h"

enum { M = 5, N = 9, K = 70 };

static float x[M * K], stats[M], scales[N], bias[N];
static int8_t weight[N * K], codes[M * K];
static uint8_t flags[K], expected_flags[K];
static uint16_t out[M * N], expected[M * N];

static bnb_gemm8_args args_of(bnb_dtype dtype, const void *values, void *result)
{
    return (bnb_gemm8_args){.size = sizeof(bnb_gemm8_args),
                            .b = weight,
                            .col_stats = scales,
                            .bias = bias,
                            .bias_dtype = BNB_F32,
                            .x = values,
                            .out = result,
                            .m = M,
                            .n = N,
                            .k = K,
                            .dtype = dtype};
}

static void layer(bnb_dtype dtype, double threshold)
{
    uint16_t values[M * K];
    for (int i = 0; i < M * K; i++)
        store_at(values, dtype, i, x[i]);
    bnb_gemm8_args one = args_of(dtype, values, out), two = args_of(dtype, values, expected);
    const bnb_matrix matrix = {values, dtype, M, K};
    CHECK(!bnb_quantize_rows(NULL, &matrix, threshold, codes, stats, expected_flags), "%s", bnb_detail());
    two.a = codes;
    two.row_stats = stats;
    two.outlier = threshold > 0.0 ? expected_flags : NULL;
    CHECK(!bnb_gemm8(NULL, &two), "%s", bnb_detail());
    memset(out, 0xff, sizeof out);
    memset(flags, 0xff, sizeof flags);
    CHECK(!bnb_linear8(NULL, &one, threshold, flags), "%s", bnb_detail());
    CHECK(!memcmp(out, expected, sizeof out), "dtype %d, threshold %g", (int)dtype, threshold);
    CHECK(threshold == 0.0 || !memcmp(flags, expected_flags, K), "flags under %g", threshold);
}

static void both(double threshold)
{
    int8_t rows[M * K], columns[M * K], by_column[M * K];
    float row_stats[M], column_stats[K], by_column_stats[K];
    const bnb_matrix matrix = {x, BNB_F32, M, K};
    CHECK(!bnb_quantize_rows(NULL, &matrix, threshold, codes, stats, expected_flags), "%s", bnb_detail());
    CHECK(!bnb_quantize_columns(NULL, &matrix, threshold, by_column, by_column_stats), "%s", bnb_detail());
    CHECK(!bnb_quantize_both(NULL, &matrix, threshold, (int8_t *[]){rows, columns},
                             (float *[]){row_stats, column_stats}, flags),
          "%s", bnb_detail());
    CHECK(!memcmp(rows, codes, sizeof rows) && !memcmp(row_stats, stats, sizeof stats), "rows under %g", threshold);
    CHECK(!memcmp(columns, by_column, sizeof columns) && !memcmp(column_stats, by_column_stats, sizeof column_stats),
          "columns under %g", threshold);
    CHECK(threshold == 0.0 || !memcmp(flags, expected_flags, K), "flags under %g", threshold);
}

int main(void)
{
    for (int i = 0; i < M * K; i++)
        x[i] = (float)(i * 37 % 101 - 50) / 13.0f * (i % K == 11 ? 4.0f : 1.0f);
    for (int i = 0; i < N * K; i++)
        weight[i] = (int8_t)(i * 71 % 255 - 127);
    for (int i = 0; i < N; i++)
        scales[i] = 0.5f + (float)i, bias[i] = (float)(i - 4);
    for (int t = 0; t < 3; t++) {
        const double threshold = t == 0 ? 0.0 : t == 1 ? 6.0 : 1e-3;
        layer(BNB_F16, threshold);
        layer(BNB_BF16, threshold);
        both(threshold);
    }
    return CHECK_RESULT();
}
