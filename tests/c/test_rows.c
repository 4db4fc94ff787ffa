/*
 * test_rows.c - LLM.int8()'s quantisers, by rows and by columns, against their definition, bit for bit
 *
 * r = 127 / stat and u = x r, each rounded to f32; the code is u rounded to nearest even.  An r that is not finite and an
 * outlier give code 0; a NaN makes the stat of its row NaN.  The definition below is written from the header and shares nothing with the kernels.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "support.h"

struct shape {
    bnb_dtype dtype;
    int64_t rows, cols;
    float threshold;
    bool by_column;
};

static void *take(size_t bytes)
{
    void *p = malloc(bytes ? bytes : 1);
    if (!p)
        abort();
    return p;
}

/* ---- the definition */

static bool is_outlier(const struct shape *s, float x) { return s->threshold > 0.0f && fabsf(x) >= s->threshold; }

static int8_t define_code(const struct shape *s, float x, float stat)
{
    const float r = 127.0f / stat, u = x * r;
    if (!isfinite(r) || isnan(u) || is_outlier(s, x))
        return 0;
    const double below = floor((double)u), rest = (double)u - below; /* no rounding of the C library */
    const bool up = rest > 0.5 || (rest >= 0.5 && fmod(below, 2.0) != 0.0);
    return (int8_t)(below + (up ? 1.0 : 0.0));
}

static void define_rows(const struct shape *s, const void *x, int8_t *codes, float *stats, uint8_t *outlier)
{
    for (int64_t i = 0; i < (s->by_column ? s->cols : s->rows); i++)
        stats[i] = 0.0f;
    for (int64_t j = 0; j < s->cols; j++)
        outlier[j] = 0;
    for (int64_t i = 0; i < s->rows * s->cols; i++) {
        const float value = value_at(x, s->dtype, i);
        float *stat = &stats[s->by_column ? i % s->cols : i / s->cols];
        if (is_outlier(s, value))
            outlier[i % s->cols] = 1;
        else if (isnan(value))
            *stat = NAN;
        else if (fabsf(value) > *stat) /* false once it is NaN */
            *stat = fabsf(value);
    }
    for (int64_t i = 0; i < s->rows * s->cols; i++) {
        const bool cleared = !s->by_column && s->rows > 1 && outlier[i % s->cols];
        const float stat = stats[s->by_column ? i % s->cols : i / s->cols];
        codes[i] = cleared ? (int8_t)0 : define_code(s, value_at(x, s->dtype, i), stat);
    }
}

/* ---- against it */

struct outputs { struct guarded codes, stats, outlier; };

static struct outputs outputs_make(const struct shape *s)
{
    const int64_t units = s->by_column ? s->cols : s->rows;
    return (struct outputs){guarded_make((size_t)(s->rows * s->cols), (size_t)(s->cols % 3)),
                            guarded_make((size_t)units * 4, 4), guarded_make((size_t)s->cols, 1)};
}

static bool outputs_intact(const struct outputs *o)
{
    return guarded_intact(&o->codes) && guarded_intact(&o->stats) && guarded_intact(&o->outlier);
}

static void outputs_free(struct outputs *o)
{
    guarded_free(&o->codes);
    guarded_free(&o->stats);
    guarded_free(&o->outlier);
}

static bnb_status quantize(const struct shape *s, const bnb_exec *ex, const void *x, const struct outputs *o)
{
    const double t = (double)s->threshold;
    if (s->by_column)
        return bnb_quantize_columns(ex, &(bnb_matrix){x, s->dtype, s->rows, s->cols}, t, o->codes.data, o->stats.data);
    return bnb_quantize_rows(ex, &(bnb_matrix){x, s->dtype, s->rows, s->cols}, t, o->codes.data, o->stats.data,
                             s->threshold > 0.0f ? o->outlier.data : NULL);
}

static void compare(const struct shape *s, const void *x, const struct outputs *got, const struct outputs *want)
{
    const int64_t units = s->by_column ? s->cols : s->rows;
    const char *way = s->by_column ? "columns" : "rows";
    for (int64_t i = 0; i < units; i++)
        CHECK(bits_of(((float *)got->stats.data)[i]) == bits_of(((float *)want->stats.data)[i]),
              "%s %s %s, [%lld, %lld], threshold %g: stats[%lld] is %.9g, expected %.9g", bnb_cpu_isa(), way,
              dtype_name[s->dtype], (long long)s->rows, (long long)s->cols, (double)s->threshold, (long long)i,
              (double)((float *)got->stats.data)[i], (double)((float *)want->stats.data)[i]);
    for (int64_t i = 0; i < s->rows * s->cols; i++)
        CHECK(((int8_t *)got->codes.data)[i] == ((int8_t *)want->codes.data)[i],
              "%s %s %s, [%lld, %lld], threshold %g: code %lld of %.9g is %d, expected %d", bnb_cpu_isa(), way,
              dtype_name[s->dtype], (long long)s->rows, (long long)s->cols, (double)s->threshold, (long long)i,
              (double)value_at(x, s->dtype, i), ((int8_t *)got->codes.data)[i], ((int8_t *)want->codes.data)[i]);
    for (int64_t j = 0; j < s->cols && !s->by_column && s->threshold > 0.0f; j++)
        CHECK(((uint8_t *)got->outlier.data)[j] == ((uint8_t *)want->outlier.data)[j],
              "%s %s, [%lld, %lld], threshold %g: column %lld is flagged %d", bnb_cpu_isa(), dtype_name[s->dtype],
              (long long)s->rows, (long long)s->cols, (double)s->threshold, (long long)j,
              ((uint8_t *)got->outlier.data)[j]);
    CHECK(outputs_intact(got), "%s %s %s, [%lld, %lld]: guard bytes written", bnb_cpu_isa(), way, dtype_name[s->dtype],
          (long long)s->rows, (long long)s->cols);
    if (s->threshold <= 0.0f || s->by_column)
        CHECK(guarded_untouched(&got->outlier), "%s: flags written without a threshold", way);
}

static void check_values(const struct shape *s, const bnb_exec *ex, const void *x)
{
    struct outputs got = outputs_make(s), want = outputs_make(s);
    define_rows(s, x, want.codes.data, want.stats.data, want.outlier.data);
    CHECK(!quantize(s, ex, x, &got), "%s", bnb_detail());
    compare(s, x, &got, &want);
    outputs_free(&got);
    outputs_free(&want);
}

static void check_shape(const struct shape *s, enum fill kind, const bnb_exec *ex)
{
    void *x = take((size_t)(s->rows * s->cols) * bnb_dtype_size(s->dtype));
    fill_values(x, s->dtype, s->rows * s->cols, kind, (uint64_t)(s->rows * 91 + s->cols));
    check_values(s, ex, x);
    free(x);
}

static void shapes(bnb_dtype dtype, bool by_column)
{
    static const int64_t rows[] = {0, 1, 2, 3, 8, 33};
    static const float threshold[] = {0.0f, 1.25f, 0.5f, 1e-6f}; /* BELL is within 1.5: none, few, many, all */
    for (int64_t cols = 0; cols <= 140; cols++)
        for (int i = 0; i < 6; i++)
            check_shape(&(struct shape){dtype, rows[i], cols, threshold[(cols + i) % 4], by_column}, FILL_BELL, NULL);
    for (int kind = 0; kind < FILL_COUNT; kind++)
        for (int i = 0; i < 24; i++)
            check_shape(&(struct shape){dtype, rows[i / 4], 333, 6.0f * threshold[i % 4], by_column}, (enum fill)kind,
                        NULL);
    check_shape(&(struct shape){dtype, 1025, 7, 1.25f, by_column}, FILL_BELL, NULL);
    check_shape(&(struct shape){dtype, 5, 5001, 1.25f, by_column}, FILL_BELL, NULL);
}

/* Ties: with a largest value of 127 the factor is 1, so halves lie between two codes. */
static void ties(void)
{
    float x[509], turned[509];
    for (int i = 0; i < 509; i++)
        x[i] = (float)(i - 254) * 0.5f;
    memcpy(turned, x, sizeof x);
    check_values(&(struct shape){BNB_F32, 1, 509, 0.0f, false}, NULL, x);
    check_values(&(struct shape){BNB_F32, 509, 1, 0.0f, true}, NULL, turned);
}

/* ---- values typed by hand */

static void by_hand(void)
{
    static const struct {
        float x[2][3];
        double threshold;
        int8_t codes[2][3];
        float stats[2];
        uint8_t outlier[3];
    } row[] = {
        {{{1.0f, -2.0f, 0.5f}, {0.0f, -0.0f, 0.0f}}, 0.0, {{64, -127, 32}, {0, 0, 0}}, {2.0f, 0.0f}, {0, 0, 0}},
        /* 6 and -7 are outliers; their columns are 0 in both rows; 5 still sets the second row's scale */
        {{{6.0f, 1.0f, 2.0f}, {5.0f, 1.0f, 2.5f}}, 6.0, {{0, 64, 127}, {0, 25, 64}}, {2.0f, 5.0f}, {1, 0, 0}},
        {{{6.0f, -7.0f, 8.0f}, {1.0f, 1.0f, 1.0f}}, 6.0, {{0, 0, 0}, {0, 0, 0}}, {0.0f, 1.0f}, {1, 1, 1}},
        {{{5.99f, 1.0f, 2.0f}, {-INFINITY, 1.0f, 2.0f}}, 6.0, {{0, 21, 42}, {0, 64, 127}}, {5.99f, 2.0f}, {1, 0, 0}},
        /* NaN is no outlier, and nothing of its row is left */
        {{{NAN, 1.0f, 2.0f}, {2.0f, 7.0f, NAN}}, 6.0, {{0, 0, 0}, {0, 0, 0}}, {NAN, NAN}, {0, 1, 0}},
        {{{NAN, NAN, NAN}, {1.0f, 1.0f, -1.0f}}, 0.0, {{0, 0, 0}, {127, 127, -127}}, {NAN, 1.0f}, {0, 0, 0}},
        /* an infinite element is the largest of its row: nothing of the row is left, and its results are not finite */
        {{{INFINITY, 1.0f, 2.0f}, {1.0f, 1.0f, 1.0f}}, 0.0, {{0, 0, 0}, {127, 127, 127}}, {INFINITY, 1.0f}, {0, 0, 0}},
        /* 127 / 2^-126 is no f32 number */
        {{{0x1p-126f, 0.0f, 0.0f}, {0x1p-119f, 0.0f, 0.0f}}, 0.0, {{0}, {127, 0, 0}}, {0x1p-126f, 0x1p-119f}, {0}},
    };
    for (size_t i = 0; i < sizeof row / sizeof row[0]; i++) {
        int8_t codes[6];
        float stats[2];
        uint8_t outlier[3] = {0};
        CHECK(!bnb_quantize_rows(NULL, &(bnb_matrix){row[i].x, BNB_F32, 2, 3}, row[i].threshold, codes, stats, outlier),
              "%s", bnb_detail());
        CHECK(!memcmp(codes, row[i].codes, 6), "case %zu: codes %d %d %d, %d %d %d", i, codes[0], codes[1], codes[2],
              codes[3], codes[4], codes[5]);
        CHECK(!memcmp(stats, row[i].stats, sizeof stats), "case %zu: stats %g, %g", i, (double)stats[0],
              (double)stats[1]);
        CHECK(!memcmp(outlier, row[i].outlier, 3), "case %zu: flags %d %d %d", i, outlier[0], outlier[1], outlier[2]);
    }
    static const float one_row[3] = {6.0f, 1.0f, 2.0f};
    int8_t codes[3];
    float stat;
    uint8_t outlier[3];
    CHECK(!bnb_quantize_rows(NULL, &(bnb_matrix){one_row, BNB_F32, 1, 3}, 6.0, codes, &stat, outlier), "%s",
          bnb_detail());
    CHECK(codes[0] == 0 && codes[1] == 64 && codes[2] == 127 && outlier[0] == 1, "one row: %d %d %d", codes[0],
          codes[1], codes[2]);
    memset(outlier, 9, 3);
    CHECK(!bnb_quantize_rows(NULL, &(bnb_matrix){NULL, BNB_F32, 0, 3}, 6.0, NULL, NULL, outlier), "%s", bnb_detail());
    CHECK(!outlier[0] && !outlier[1] && !outlier[2], "no row has an outlier");
}

/* ---- back */

/* (code stat) (1 / 127), each product rounded to f32, then one rounding to the dtype. */
static void dequantize(bnb_dtype dtype, int64_t rows, int64_t cols, const bnb_exec *ex)
{
    const size_t size = bnb_dtype_size(dtype);
    uint64_t state = (uint64_t)(rows + cols);
    int8_t *codes = take((size_t)(rows * cols));
    float *stats = take((size_t)rows * 4);
    struct guarded out = guarded_make((size_t)(rows * cols) * size, (size_t)(cols % 3) * size);
    struct guarded want = guarded_make((size_t)(rows * cols) * size, 0);
    for (int64_t i = 0; i < rows; i++)
        stats[i] = i % 7 == 3 ? 0.0f : (float)pow(10.0, 8.0 * random_unit(&state) - 4.0);
    for (int64_t i = 0; i < rows * cols; i++) {
        codes[i] = (int8_t)(random_bits(&state) & 255);
        const float scaled = (float)codes[i] * stats[i / cols];
        store_at(want.data, dtype, i, scaled * 7.874015718698502e-3f);
    }
    CHECK(!bnb_dequantize_rows(ex, codes, stats, rows, cols, out.data, dtype), "%s", bnb_detail());
    CHECK(!memcmp(out.data, want.data, out.bytes) && guarded_intact(&out), "%s %s: [%lld, %lld] differs", bnb_cpu_isa(),
          dtype_name[dtype], (long long)rows, (long long)cols);
    guarded_free(&out);
    guarded_free(&want);
    free(codes);
    free(stats);
}

static void with(const bnb_exec *ex)
{
    for (int i = 0; i < 12; i++) {
        const bnb_dtype dtype = (bnb_dtype)(i % 3);
        check_shape(&(struct shape){dtype, 333, 517, i / 6 ? 1.25f : 0.0f, i / 3 % 2}, FILL_BELL, ex);
        check_shape(&(struct shape){dtype, 7, 70001, i / 6 ? 1.49f : 0.0f, i / 3 % 2}, FILL_BELL, ex);
        check_shape(&(struct shape){dtype, 70001, 3, i / 6 ? 1.49f : 0.0f, i / 3 % 2}, FILL_MIXED, ex);
        dequantize(dtype, 333, 517, ex);
    }
}

int main(void)
{
    if (skip_foreign_isa())
        return TEST_SKIPPED;
    by_hand();
    ties();
    for (int dtype = 0; dtype < BNB_FLOATS; dtype++) {
        shapes((bnb_dtype)dtype, false);
        shapes((bnb_dtype)dtype, true);
        for (int64_t cols = 0; cols <= 70; cols++)
            dequantize((bnb_dtype)dtype, cols % 5, cols, NULL);
    }
    const bnb_exec backwards = {.size = sizeof backwards, .parallel_for = loop_backwards};
    const bnb_exec threads = {.size = sizeof threads, .parallel_for = loop_threads};
    with(NULL);
    with(&backwards);
    with(&threads);
    return CHECK_RESULT();
}
