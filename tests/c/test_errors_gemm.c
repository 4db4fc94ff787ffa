/*
 * test_errors_gemm.c - bad arguments of the products and of LLM.int8(): status, a detail with argument and value, nothing
 * written
 *
 * A row sets one argument of an otherwise good call, as in test_errors.c.
 */
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "check.h"
#include "support.h"

enum function { GEMM4, GRAD4, MATMUL8, GEMM8, GRAD8, LAYER8, ROWS, COLUMNS, BOTH, BACK, GATHER, FUNCTIONS };

struct call { /* every argument of every function */
    bnb_exec ex;
    bnb_gemm4_args four;
    bnb_gemm8_args eight;
    bnb_scales scales;
    bool no_args, no_scales;
    const void *x;
    bnb_dtype dtype;
    int64_t rows, cols;
    double threshold;
    int8_t *codes;
    float *stats;
    uint8_t *outlier;
    int32_t *sums;
    void *out;
};

enum kind { POINTER, BOOLEAN, INT, INT64, SIZE, DOUBLE, GIVEN };
struct row {
    enum function function;
    enum kind kind;
    size_t place;
    double value; /* 0 for a pointer: NULL */
    bnb_status status;
    const char *name, *shown; /* both must be in the detail, behind the function's name */
};
#define AT(kind, member) kind, offsetof(struct call, member)

static const char *const function_name[FUNCTIONS] = {
    "gemm4",         "gemm4_grad",       "matmul8",       "gemm8",           "gemm8_grad",    "linear8",
    "quantize_rows", "quantize_columns", "quantize_both", "dequantize_rows", "gather_columns"};

/* BNB_EDEVICE stands for what a call for absent_card() gives. */
static const struct row rows[] = {
    {GEMM4, AT(SIZE, ex.size), 8, BNB_EINVAL, "size", "8"},
    {GEMM4, AT(INT, ex.device), 7, BNB_EINVAL, "device", "7"},
    {GEMM4, AT(INT, ex.device), 1, BNB_EDEVICE, "CUDA", ""},
    {GEMM4, AT(BOOLEAN, no_args), 0, BNB_EINVAL, "args", "NULL"},
    {GEMM4, AT(SIZE, four.size), 16, BNB_EINVAL, "size", "16"},
    {GEMM4, AT(POINTER, four.x), 0, BNB_EINVAL, "x is", "NULL"},
    {GEMM4, AT(POINTER, four.codes), 0, BNB_EINVAL, "codes", "NULL"},
    {GEMM4, AT(POINTER, four.out), 0, BNB_EINVAL, "out", "NULL"},
    {GEMM4, AT(BOOLEAN, no_scales), 0, BNB_EINVAL, "scales", "NULL"},
    {GEMM4, AT(POINTER, scales.absmax), 0, BNB_EINVAL, "absmax", "NULL"},
    {GEMM4, AT(POINTER, scales.code), 0, BNB_EINVAL, "code", "NULL"},
    {GEMM4, AT(POINTER, scales.absmax2), 0, BNB_EINVAL, "absmax2", "NULL"},
    {GEMM4, AT(POINTER, scales.offset), 0, BNB_EINVAL, "offset", "NULL"},
    {GEMM4, AT(INT64, scales.block2), 0, BNB_EINVAL, "block2", "0"},
    {GEMM4, AT(INT64, scales.block2), -4, BNB_EINVAL, "block2", "-4"},
    {GEMM4, AT(INT64, four.m), -1, BNB_EINVAL, "m is", "-1"},
    {GEMM4, AT(INT64, four.n), -2, BNB_EINVAL, "n is", "-2"},
    {GEMM4, AT(INT64, four.k), -3, BNB_EINVAL, "k is", "-3"},
    {GEMM4, AT(INT64, four.m), 0x1p61, BNB_EINVAL, "m, n, k", "2305843009213693952"},
    {GEMM4, AT(INT64, four.k), 0x1p62, BNB_EINVAL, "m, n, k", "4611686018427387904"},
    {GEMM4, AT(INT64, four.block), 0, BNB_EINVAL, "block", "0"},
    {GEMM4, AT(INT64, four.block), 48, BNB_EINVAL, "block", "48"},
    {GEMM4, AT(INT64, four.block), 8192, BNB_EINVAL, "block", "8192"},
    {GEMM4, AT(INT, four.type), 3, BNB_EINVAL, "type", "3"},
    {GEMM4, AT(INT, four.type), 0, BNB_EINVAL, "type", "0"},
    {GEMM4, AT(INT, four.dtype), 3, BNB_EDTYPE, "dtype", "3"},
    {GEMM4, AT(INT, four.dtype), -1, BNB_EDTYPE, "dtype", "-1"},
    {GEMM4, AT(GIVEN, four.values), 0, BNB_ENOTSUP, "values", "NF4"},
    {GRAD4, AT(BOOLEAN, no_args), 0, BNB_EINVAL, "args", "NULL"},
    {GRAD4, AT(SIZE, four.size), 0, BNB_EINVAL, "size", "0"},
    {GRAD4, AT(GIVEN, four.bias), 0, BNB_EINVAL, "bias", "given"},
    {GRAD4, AT(POINTER, four.x), 0, BNB_EINVAL, "x is", "NULL"},
    {GRAD4, AT(POINTER, four.out), 0, BNB_EINVAL, "out", "NULL"},
    {GRAD4, AT(INT64, four.n), -1, BNB_EINVAL, "n is", "-1"},
    {GRAD4, AT(INT64, four.block), 63, BNB_EINVAL, "block", "63"},
    {GRAD4, AT(INT, four.dtype), 4, BNB_EDTYPE, "dtype", "4"},
    {MATMUL8, AT(INT, ex.device), 1, BNB_EDEVICE, "CUDA", ""},
    {MATMUL8, AT(INT64, eight.m), -1, BNB_EINVAL, "m is", "-1"},
    {MATMUL8, AT(INT64, eight.n), -1, BNB_EINVAL, "n is", "-1"},
    {MATMUL8, AT(INT64, eight.k), -1, BNB_EINVAL, "k is", "-1"},
    {MATMUL8, AT(INT64, eight.k), 131072, BNB_ENOTSUP, "k is", "131072"},
    {MATMUL8, AT(POINTER, eight.a), 0, BNB_EINVAL, "a is", "NULL"},
    {MATMUL8, AT(POINTER, eight.b), 0, BNB_EINVAL, "b is", "NULL"},
    {MATMUL8, AT(POINTER, sums), 0, BNB_EINVAL, "out", "NULL"},
    {GEMM8, AT(BOOLEAN, no_args), 0, BNB_EINVAL, "args", "NULL"},
    {GEMM8, AT(SIZE, eight.size), 24, BNB_EINVAL, "size", "24"},
    {GEMM8, AT(POINTER, eight.a), 0, BNB_EINVAL, "a is", "NULL"},
    {GEMM8, AT(POINTER, eight.b), 0, BNB_EINVAL, "b is", "NULL"},
    {GEMM8, AT(POINTER, eight.row_stats), 0, BNB_EINVAL, "row_stats", "NULL"},
    {GEMM8, AT(POINTER, eight.col_stats), 0, BNB_EINVAL, "col_stats", "NULL"},
    {GEMM8, AT(POINTER, eight.x), 0, BNB_EINVAL, "x is", "NULL"},
    {GEMM8, AT(POINTER, eight.columns), 0, BNB_EINVAL, "columns", "NULL"},
    {GEMM8, AT(POINTER, eight.out), 0, BNB_EINVAL, "out", "NULL"},
    {GEMM8, AT(INT64, eight.outliers), -1, BNB_EINVAL, "outliers", "-1"},
    {GEMM8, AT(INT64, eight.outliers), 71, BNB_EINVAL, "outliers", "71"},
    {GEMM8, AT(INT64, eight.m), -7, BNB_EINVAL, "m is", "-7"},
    {GEMM8, AT(INT64, eight.k), 1 << 20, BNB_ENOTSUP, "k is", "1048576"},
    {GEMM8, AT(INT, eight.dtype), 3, BNB_EDTYPE, "dtype", "3"},
    {GEMM8, AT(INT, eight.bias_dtype), 4, BNB_EDTYPE, "bias_dtype", "4"},
    {GEMM8, AT(GIVEN, eight.outlier), 0, BNB_EINVAL, "outliers", "2"},
    {GRAD8, AT(BOOLEAN, no_args), 0, BNB_EINVAL, "args", "NULL"},
    {GRAD8, AT(SIZE, eight.size), 1, BNB_EINVAL, "size", "1"},
    {GRAD8, AT(POINTER, eight.x), 0, BNB_EINVAL, "x is", "NULL"},
    {GRAD8, AT(POINTER, eight.b), 0, BNB_EINVAL, "b is", "NULL"},
    {GRAD8, AT(POINTER, eight.col_stats), 0, BNB_EINVAL, "col_stats", "NULL"},
    {GRAD8, AT(POINTER, eight.out), 0, BNB_EINVAL, "out", "NULL"},
    {GRAD8, AT(INT64, eight.n), -1, BNB_EINVAL, "n is", "-1"},
    {GRAD8, AT(INT, eight.dtype), 9, BNB_EDTYPE, "dtype", "9"},
    {LAYER8, AT(INT, ex.device), 1, BNB_EDEVICE, "CUDA", ""},
    {LAYER8, AT(BOOLEAN, no_args), 0, BNB_EINVAL, "args", "NULL"},
    {LAYER8, AT(SIZE, eight.size), 3, BNB_EINVAL, "size", "3"},
    {LAYER8, AT(DOUBLE, threshold), -1.0, BNB_EINVAL, "threshold", "-1"},
    {LAYER8, AT(POINTER, eight.x), 0, BNB_EINVAL, "x is", "NULL"},
    {LAYER8, AT(POINTER, eight.b), 0, BNB_EINVAL, "b is", "NULL"},
    {LAYER8, AT(POINTER, eight.col_stats), 0, BNB_EINVAL, "col_stats", "NULL"},
    {LAYER8, AT(POINTER, eight.out), 0, BNB_EINVAL, "out", "NULL"},
    {LAYER8, AT(POINTER, outlier), 0, BNB_EINVAL, "outlier", "NULL"},
    {LAYER8, AT(INT64, eight.n), -1, BNB_EINVAL, "n is", "-1"},
    {LAYER8, AT(INT64, eight.k), 131072, BNB_ENOTSUP, "k is", "131072"},
    {LAYER8, AT(INT, eight.dtype), 5, BNB_EDTYPE, "dtype", "5"},
    {LAYER8, AT(INT, eight.bias_dtype), 4, BNB_EDTYPE, "bias_dtype", "4"},
    {ROWS, AT(INT, ex.device), 1, BNB_EDEVICE, "CUDA", ""},
    {ROWS, AT(INT, dtype), 3, BNB_EDTYPE, "dtype", "3"},
    {ROWS, AT(INT64, rows), -1, BNB_EINVAL, "rows", "-1"},
    {ROWS, AT(INT64, cols), -1, BNB_EINVAL, "cols", "-1"},
    {ROWS, AT(INT64, rows), 0x1p62, BNB_EINVAL, "rows", "4611686018427387904"},
    {ROWS, AT(DOUBLE, threshold), -6.0, BNB_EINVAL, "threshold", "-6"},
    {ROWS, AT(DOUBLE, threshold), (double)NAN, BNB_EINVAL, "threshold", "nan"},
    {ROWS, AT(POINTER, x), 0, BNB_EINVAL, "x is", "NULL"},
    {ROWS, AT(POINTER, codes), 0, BNB_EINVAL, "codes", "NULL"},
    {ROWS, AT(POINTER, stats), 0, BNB_EINVAL, "stats", "NULL"},
    {ROWS, AT(POINTER, outlier), 0, BNB_EINVAL, "outlier", "NULL"},
    {COLUMNS, AT(INT, dtype), 4, BNB_EDTYPE, "dtype", "4"},
    {COLUMNS, AT(INT64, cols), -9, BNB_EINVAL, "cols", "-9"},
    {COLUMNS, AT(DOUBLE, threshold), -1e-3, BNB_EINVAL, "threshold", "-0.001"},
    {COLUMNS, AT(POINTER, x), 0, BNB_EINVAL, "x is", "NULL"},
    {COLUMNS, AT(POINTER, stats), 0, BNB_EINVAL, "stats", "NULL"},
    {BOTH, AT(INT, ex.device), 1, BNB_EDEVICE, "CUDA", ""},
    {BOTH, AT(INT64, rows), -2, BNB_EINVAL, "rows", "-2"},
    {BOTH, AT(DOUBLE, threshold), -2.0, BNB_EINVAL, "threshold", "-2"},
    {BOTH, AT(POINTER, x), 0, BNB_EINVAL, "x is", "NULL"},
    {BOTH, AT(POINTER, codes), 0, BNB_EINVAL, "codes", "NULL"},
    {BOTH, AT(POINTER, stats), 0, BNB_EINVAL, "stats", "NULL"},
    {BOTH, AT(POINTER, sums), 0, BNB_EINVAL, "stats", "NULL"},
    {BOTH, AT(POINTER, outlier), 0, BNB_EINVAL, "outlier", "NULL"},
    {BACK, AT(INT, dtype), 3, BNB_EDTYPE, "dtype", "3"},
    {BACK, AT(INT64, rows), -1, BNB_EINVAL, "rows", "-1"},
    {BACK, AT(INT64, rows), 0x1p62, BNB_EINVAL, "rows", "4611686018427387904"},
    {BACK, AT(POINTER, codes), 0, BNB_EINVAL, "codes", "NULL"},
    {BACK, AT(POINTER, stats), 0, BNB_EINVAL, "stats", "NULL"},
    {BACK, AT(POINTER, out), 0, BNB_EINVAL, "out", "NULL"},
    {GATHER, AT(INT, dtype), 3, BNB_EDTYPE, "dtype", "3"},
    {GATHER, AT(INT64, rows), -1, BNB_EINVAL, "rows", "-1"},
    {GATHER, AT(INT64, eight.outliers), -1, BNB_EINVAL, "count", "-1"},
    {GATHER, AT(INT64, eight.outliers), 71, BNB_EINVAL, "count", "71"},
    {GATHER, AT(POINTER, x), 0, BNB_EINVAL, "x->data", "NULL"},
    {GATHER, AT(POINTER, eight.columns), 0, BNB_EINVAL, "columns", "NULL"},
    {GATHER, AT(POINTER, out), 0, BNB_EINVAL, "out", "NULL"},
};

static bnb_status run(enum function f, struct call *c)
{
    c->four.scales = c->no_scales ? NULL : &c->scales;
    const bnb_gemm4_args *four = c->no_args ? NULL : &c->four;
    const bnb_gemm8_args *eight = c->no_args ? NULL : &c->eight;
    const bnb_gemm8_args *g = &c->eight;
    switch (f) {
    case GEMM4:
        return bnb_gemm4(&c->ex, four);
    case GRAD4:
        return bnb_gemm4_grad(&c->ex, four);
    case MATMUL8:
        return bnb_matmul8(&c->ex, g->a, g->b, g->m, g->n, g->k, c->sums);
    case GEMM8:
        return bnb_gemm8(&c->ex, eight);
    case GRAD8:
        return bnb_gemm8_grad(&c->ex, eight);
    case LAYER8:
        return bnb_linear8(&c->ex, eight, c->threshold, c->outlier);
    case BOTH:
        return bnb_quantize_both(&c->ex, &(bnb_matrix){c->x, c->dtype, c->rows, c->cols}, c->threshold,
                                 (int8_t *[]){c->codes, c->out}, (float *[]){c->stats, (float *)c->sums}, c->outlier);
    case ROWS:
        return bnb_quantize_rows(&c->ex, &(bnb_matrix){c->x, c->dtype, c->rows, c->cols}, c->threshold, c->codes,
                                 c->stats, c->outlier);
    case COLUMNS:
        return bnb_quantize_columns(&c->ex, &(bnb_matrix){c->x, c->dtype, c->rows, c->cols}, c->threshold, c->codes,
                                    c->stats);
    case GATHER:
        return bnb_gather_columns(&c->ex, &(bnb_matrix){c->x, c->dtype, c->rows, c->cols}, g->columns, g->outliers,
                                  c->out);
    default:
        return bnb_dequantize_rows(&c->ex, c->codes, c->stats, c->rows, c->cols, c->out, c->dtype);
    }
}

enum { M = 4, N = 6, K = 70, OUTPUTS = 5 };

static float floats[N * K], ones[N * K];
static int8_t int8_codes[N * K];
static const int64_t columns[2] = {3, 69};

/* Pointers become NULL or, GIVEN, a buffer; flags true. */
static void set(struct call *c, const struct row *r)
{
    const int64_t l = isfinite(r->value) ? (int64_t)r->value : 0;
    const int i = (int)l; /* enums too: int is their type */
    const size_t size = (size_t)l;
    const bool flag = true;
    const void *null = NULL, *given = floats;
    const struct {
        const void *value;
        size_t bytes;
    } as[] = {
        [POINTER] = {&null, sizeof null}, [BOOLEAN] = {&flag, sizeof flag}, [INT] = {&i, sizeof i},
        [INT64] = {&l, sizeof l},         [SIZE] = {&size, sizeof size},    [DOUBLE] = {&r->value, sizeof r->value},
        [GIVEN] = {&given, sizeof given},
    };
    memcpy((char *)c + r->place, as[r->kind].value, as[r->kind].bytes);
}

/* A good call of every function, writing to `out` alone. */
static struct call good_call(enum function f, const struct guarded out[OUTPUTS])
{
    struct call c = {
        .ex = {.size = sizeof(bnb_exec), .ordinal = absent_card()},
        .four = {.size = sizeof c.four, .x = floats, .codes = (const uint8_t *)int8_codes, .out = out[0].data},
        .eight = {.size = sizeof c.eight, .a = int8_codes, .b = int8_codes, .row_stats = ones, .col_stats = ones},
        .scales = {int8_codes, ones, ones, ones, 256},
        .x = floats,
        .dtype = BNB_F32,
        .rows = M,
        .cols = K,
        .threshold = 6.0,
        .codes = f == BACK ? int8_codes : out[1].data,
        .stats = f == BACK ? ones : out[2].data,
        .outlier = out[3].data,
        .sums = out[4].data,
        .out = out[0].data,
    };
    c.four.m = c.eight.m = M;
    c.four.n = c.eight.n = N;
    c.four.k = c.eight.k = K;
    c.four.block = 64;
    c.four.type = BNB_NF4;
    c.eight.bias = f == GEMM8 || f == LAYER8 ? floats : NULL;
    c.eight.x = floats;
    c.eight.columns = columns;
    c.eight.outliers = 2;
    c.eight.out = out[0].data;
    return c;
}

static void check_row(size_t i, const struct row *r, const struct guarded out[OUTPUTS])
{
    struct call c = good_call(r->function, out);
    const size_t length = strlen(function_name[r->function]);
    for (int k = 0; k < OUTPUTS; k++)
        guarded_reset(&out[k]);
    set(&c, r);
    const bnb_status status = run(r->function, &c);
    const bool absent = r->status == BNB_EDEVICE;
    const bnb_status wanted = absent ? absent_card_status() : r->status;
    const char *name = absent ? absent_card_word() : r->name;
    CHECK(status == wanted && bnb_last_status() == status, "row %zu: status %d, expected %d", i, (int)status,
          (int)wanted);
    CHECK(!strncmp(bnb_detail(), function_name[r->function], length) && bnb_detail()[length] == ':',
          "row %zu: '%s' does not begin with %s", i, bnb_detail(), function_name[r->function]);
    CHECK(strstr(bnb_detail(), name) && strstr(bnb_detail(), r->shown), "row %zu: '%s' lacks '%s' or '%s'", i,
          bnb_detail(), name, r->shown);
    for (int k = 0; k < OUTPUTS; k++)
        CHECK(guarded_untouched(&out[k]), "row %zu: output %d was written", i, k);
}

/* The calls that the rows spoil are good ones; sizes of 0 need no buffer. */
static void good_calls(const struct guarded out[OUTPUTS])
{
    for (int f = 0; f < FUNCTIONS; f++) {
        struct call c = good_call((enum function)f, out);
        CHECK(run((enum function)f, &c) == BNB_OK, "%s: %s", function_name[f], bnb_detail());
    }
    const bnb_gemm4_args four = {.size = sizeof four, .n = 5, .k = 5, .block = 64, .type = BNB_FP4};
    CHECK(!bnb_gemm4(NULL, &four) && !bnb_gemm4_grad(NULL, &four), "%s", bnb_detail());
    const bnb_gemm8_args eight = {.size = sizeof eight, .n = 5, .k = 5};
    CHECK(!bnb_gemm8(NULL, &eight) && !bnb_gemm8_grad(NULL, &eight) && !bnb_linear8(NULL, &eight, 0.0, NULL), "%s",
          bnb_detail());
    CHECK(!bnb_matmul8(NULL, NULL, NULL, 0, 3, 3, NULL), "%s", bnb_detail());
    CHECK(!bnb_quantize_rows(NULL, &(bnb_matrix){NULL, BNB_F16, 0, 0}, 6.0, NULL, NULL, NULL), "%s", bnb_detail());
    CHECK(!bnb_dequantize_rows(NULL, NULL, NULL, 0, 9, NULL, BNB_BF16), "%s", bnb_detail());
}

int main(void)
{
    struct guarded out[OUTPUTS];
    for (int k = 0; k < OUTPUTS; k++)
        out[k] = guarded_make(M * K * 4, 0);
    for (int i = 0; i < N * K; i++) {
        floats[i] = (float)(i % 13) - 6.0f;
        ones[i] = 1.0f;
        int8_codes[i] = (int8_t)(i % 255 - 127);
    }
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        check_row(i, &rows[i], out);
    good_calls(out);
    for (int k = 0; k < OUTPUTS; k++)
        guarded_free(&out[k]);
    printf("%zu rows\n", sizeof rows / sizeof rows[0]);
    return CHECK_RESULT();
}
