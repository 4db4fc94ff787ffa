/*
 * test_errors.c - bad arguments of the functions of quantisation: status, a detail with argument and value, nothing
 * written
 *
 * A row sets one argument of an otherwise good call.
 */
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "check.h"
#include "support.h"

enum function { QUANT8, DEQUANT8, QUANT4, DEQUANT4, QUANT_SCALES, DEQUANT_SCALES, QUANTILES, FUNCTIONS };
struct call { /* every argument of every function */
    bnb_exec ex;
    int64_t n, block;
    bnb_dtype dtype;
    bnb_type4 type;
    int count;
    double offset;
    const void *x;
    const float *code;
    uint8_t *codes;
    float *absmax, *offset_out;
    void *out;
    bnb_scales scales;
    bool no_scales;
};

/* Where an argument lies within a call, and as what. */
enum kind { POINTER, BOOLEAN, INT, INT64, SIZE, DOUBLE };
struct argument {
    enum kind kind;
    size_t place;
};
#define AT(kind, member) {kind, offsetof(struct call, member)}

struct row {
    enum function function;
    struct argument argument;
    double value; /* 0 for a pointer: NULL */
    bnb_status status;
    const char *name, *shown; /* both must be in the detail */
};

static bnb_status run(enum function f, const struct call *c)
{
    const bnb_scales *s = c->no_scales ? NULL : &c->scales;
    switch (f) {
    case QUANT8:
        return bnb_quantize8(&c->ex, c->x, c->dtype, c->n, c->block, c->code, c->codes, c->absmax);
    case DEQUANT8:
        return bnb_dequantize8(&c->ex, c->codes, c->n, c->block, c->code, s, c->out, c->dtype);
    case QUANT4:
        return bnb_quantize4(&c->ex, c->x, c->dtype, c->n, c->block, c->type, c->codes, c->absmax);
    case DEQUANT4:
        return bnb_dequantize4(&c->ex, c->codes, c->n, c->block, c->type, s, c->out, c->dtype);
    case QUANT_SCALES:
        return bnb_quantize_scales(&c->ex, c->x, c->n, c->block, c->code, c->codes, c->absmax, c->offset_out);
    case DEQUANT_SCALES:
        return bnb_dequantize_scales(&c->ex, s, c->n, c->out);
    default:
        return bnb_estimate_quantiles(&c->ex, c->x, c->dtype, c->n, c->offset, c->count, c->out);
    }
}

/* Pointers become NULL, flags true. */
static void set(struct call *c, struct argument a, double v)
{
    void *place = (char *)c + a.place;
    const int64_t l = isfinite(v) ? (int64_t)v : 0;
    const int i = (int)l; /* enums too: int is their type */
    const size_t size = (size_t)l;
    const bool flag = true;
    const void *null = NULL;
    const struct {
        const void *value;
        size_t bytes;
    } as[] = {
        [POINTER] = {&null, sizeof null}, [BOOLEAN] = {&flag, sizeof flag}, [INT] = {&i, sizeof i},
        [INT64] = {&l, sizeof l},         [SIZE] = {&size, sizeof size},    [DOUBLE] = {&v, sizeof v},
    };
    memcpy(place, as[a.kind].value, as[a.kind].bytes);
}

/* BNB_EDEVICE stands for what a call for absent_card() gives. */
static const struct row rows[] = {
    {QUANT8, AT(SIZE, ex.size), 8, BNB_EINVAL, "size", "8"},
    {QUANT8, AT(INT, ex.device), 7, BNB_EINVAL, "device", "7"},
    {QUANT8, AT(INT, ex.device), 1, BNB_EDEVICE, "CUDA", ""},
    {QUANT8, AT(INT64, n), -1, BNB_EINVAL, "n is", "-1"},
    {QUANT8, AT(INT64, block), 0, BNB_EINVAL, "block", "0"},
    {QUANT8, AT(INT64, block), -256, BNB_EINVAL, "block", "-256"},
    {QUANT8, AT(INT, dtype), 3, BNB_EDTYPE, "dtype", "3"},
    {QUANT8, AT(INT, dtype), 99, BNB_EDTYPE, "dtype", "99"},
    {QUANT8, AT(POINTER, x), 0, BNB_EINVAL, "x", "NULL"},
    {QUANT8, AT(POINTER, code), 0, BNB_EINVAL, "code", "NULL"},
    {QUANT8, AT(POINTER, codes), 0, BNB_EINVAL, "codes", "NULL"},
    {QUANT8, AT(POINTER, absmax), 0, BNB_EINVAL, "absmax", "NULL"},
    {DEQUANT8, AT(SIZE, ex.size), 0, BNB_EINVAL, "size", "0"},
    {DEQUANT8, AT(INT64, n), -5, BNB_EINVAL, "n is", "-5"},
    {DEQUANT8, AT(INT64, block), 0, BNB_EINVAL, "block", "0"},
    {DEQUANT8, AT(INT, dtype), 4, BNB_EDTYPE, "dtype", "4"},
    {DEQUANT8, AT(POINTER, codes), 0, BNB_EINVAL, "codes", "NULL"},
    {DEQUANT8, AT(POINTER, code), 0, BNB_EINVAL, "code", "NULL"},
    {DEQUANT8, AT(POINTER, out), 0, BNB_EINVAL, "out", "NULL"},
    {DEQUANT8, AT(BOOLEAN, no_scales), 0, BNB_EINVAL, "scales", "NULL"},
    {DEQUANT8, AT(POINTER, scales.absmax), 0, BNB_EINVAL, "absmax", "NULL"},
    {DEQUANT8, AT(POINTER, scales.code), 0, BNB_EINVAL, "code", "NULL"},
    {DEQUANT8, AT(POINTER, scales.absmax2), 0, BNB_EINVAL, "absmax2", "NULL"},
    {DEQUANT8, AT(POINTER, scales.offset), 0, BNB_EINVAL, "offset", "NULL"},
    {DEQUANT8, AT(INT64, scales.block2), 0, BNB_EINVAL, "block2", "0"},
    {DEQUANT8, AT(INT64, scales.block2), -1, BNB_EINVAL, "block2", "-1"},
    {QUANT4, AT(INT, ex.device), 1, BNB_EDEVICE, "CUDA", ""},
    {QUANT4, AT(INT64, n), -1, BNB_EINVAL, "n is", "-1"},
    {QUANT4, AT(INT64, block), 0, BNB_EINVAL, "block", "0"},
    {QUANT4, AT(INT64, block), 16, BNB_EINVAL, "block", "16"},
    {QUANT4, AT(INT64, block), 48, BNB_EINVAL, "block", "48"},
    {QUANT4, AT(INT64, block), 8192, BNB_EINVAL, "block", "8192"},
    {QUANT4, AT(INT64, block), -64, BNB_EINVAL, "block", "-64"},
    {QUANT4, AT(INT, type), 0, BNB_EINVAL, "type", "0"},
    {QUANT4, AT(INT, type), 3, BNB_EINVAL, "type", "3"},
    {QUANT4, AT(INT, type), 4, BNB_EINVAL, "type", "4"},
    {QUANT4, AT(INT, dtype), 3, BNB_EDTYPE, "dtype", "3"},
    {QUANT4, AT(POINTER, x), 0, BNB_EINVAL, "x", "NULL"},
    {QUANT4, AT(POINTER, codes), 0, BNB_EINVAL, "codes", "NULL"},
    {QUANT4, AT(POINTER, absmax), 0, BNB_EINVAL, "absmax", "NULL"},
    {DEQUANT4, AT(INT64, n), -1, BNB_EINVAL, "n is", "-1"},
    {DEQUANT4, AT(INT64, block), 48, BNB_EINVAL, "block", "48"},
    {DEQUANT4, AT(INT, type), 7, BNB_EINVAL, "type", "7"},
    {DEQUANT4, AT(INT, dtype), 3, BNB_EDTYPE, "dtype", "3"},
    {DEQUANT4, AT(POINTER, codes), 0, BNB_EINVAL, "codes", "NULL"},
    {DEQUANT4, AT(POINTER, out), 0, BNB_EINVAL, "out", "NULL"},
    {DEQUANT4, AT(BOOLEAN, no_scales), 0, BNB_EINVAL, "scales", "NULL"},
    {DEQUANT4, AT(POINTER, scales.absmax), 0, BNB_EINVAL, "absmax", "NULL"},
    {DEQUANT4, AT(POINTER, scales.offset), 0, BNB_EINVAL, "offset", "NULL"},
    {QUANT_SCALES, AT(INT64, n), -1, BNB_EINVAL, "n is", "-1"},
    {QUANT_SCALES, AT(INT64, block), 0, BNB_EINVAL, "block", "0"},
    {QUANT_SCALES, AT(POINTER, x), 0, BNB_EINVAL, "absmax", "NULL"},
    {QUANT_SCALES, AT(POINTER, code), 0, BNB_EINVAL, "code", "NULL"},
    {QUANT_SCALES, AT(POINTER, codes), 0, BNB_EINVAL, "codes", "NULL"},
    {QUANT_SCALES, AT(POINTER, absmax), 0, BNB_EINVAL, "absmax2", "NULL"},
    {QUANT_SCALES, AT(POINTER, offset_out), 0, BNB_EINVAL, "offset", "NULL"},
    {DEQUANT_SCALES, AT(INT64, n), -1, BNB_EINVAL, "n is", "-1"},
    {DEQUANT_SCALES, AT(BOOLEAN, no_scales), 0, BNB_EINVAL, "scales", "NULL"},
    {DEQUANT_SCALES, AT(POINTER, scales.code), 0, BNB_EINVAL, "code", "NULL"},
    {DEQUANT_SCALES, AT(INT64, scales.block2), 0, BNB_EINVAL, "block2", "0"},
    {DEQUANT_SCALES, AT(POINTER, out), 0, BNB_EINVAL, "out", "NULL"},
    {QUANTILES, AT(SIZE, ex.size), 1, BNB_EINVAL, "size", "1"},
    {QUANTILES, AT(INT64, n), 0, BNB_EINVAL, "n is", "0"},
    {QUANTILES, AT(INT64, n), -1, BNB_EINVAL, "n is", "-1"},
    {QUANTILES, AT(INT, dtype), 3, BNB_ENOTSUP, "dtype", "3"},
    {QUANTILES, AT(INT, count), 0, BNB_EINVAL, "num_quantiles", "0"},
    {QUANTILES, AT(INT, count), -3, BNB_EINVAL, "num_quantiles", "-3"},
    {QUANTILES, AT(INT, count), 257, BNB_ENOTSUP, "num_quantiles", "257"},
    {QUANTILES, AT(DOUBLE, offset), -0.1, BNB_EINVAL, "offset", "-0.1"},
    {QUANTILES, AT(DOUBLE, offset), 0.75, BNB_EINVAL, "offset", "0.75"},
    {QUANTILES, AT(DOUBLE, offset), 0.75, BNB_EINVAL, "offset", "0.75"},
    {QUANTILES, AT(DOUBLE, offset), (double)NAN, BNB_EINVAL, "offset", "nan"},
    {QUANTILES, AT(POINTER, x), 0, BNB_EINVAL, "x", "NULL"},
    {QUANTILES, AT(POINTER, out), 0, BNB_EINVAL, "out", "NULL"},
};

enum { BUFFERS = 4, N_GOOD = 500 };

static float map1[256], input[N_GOOD];
static uint8_t nested_absmax[N_GOOD];

/* A good call of every function, writing to `out` alone. */
static struct call good_call(const struct guarded out[BUFFERS])
{
    static const float absmax2[N_GOOD] = {1.0f}, offset = 0.0f;
    struct call c = {
        .ex = {.size = sizeof(bnb_exec), .ordinal = absent_card()},
        .n = N_GOOD,
        .block = 64,
        .dtype = BNB_F32,
        .type = BNB_NF4,
        .count = 256,
        .offset = 1.0 / 512,
        .x = input,
        .code = map1,
        .codes = out[0].data,
        .absmax = out[1].data,
        .offset_out = out[2].data,
        .out = out[3].data,
        .scales = {nested_absmax, map1, absmax2, &offset, 256},
    };
    return c;
}

static void check_row(size_t i, const struct row *r, const struct guarded out[BUFFERS])
{
    struct call c = good_call(out);
    set(&c, r->argument, r->value);
    for (int k = 0; k < BUFFERS; k++)
        guarded_reset(&out[k]);
    const bnb_status status = run(r->function, &c);
    const bool absent = r->status == BNB_EDEVICE;
    const bnb_status wanted = absent ? absent_card_status() : r->status;
    const char *name = absent ? absent_card_word() : r->name;
    CHECK(status == wanted && bnb_last_status() == status, "row %zu: status %d, expected %d", i, (int)status,
          (int)wanted);
    CHECK(strstr(bnb_detail(), name) && strstr(bnb_detail(), r->shown), "row %zu: '%s' lacks '%s' or '%s'", i,
          bnb_detail(), name, r->shown);
    for (int k = 0; k < BUFFERS; k++)
        CHECK(guarded_untouched(&out[k]), "row %zu: output %d was written", i, k);
}

/* The calls that the rows spoil are good ones, and n = 0 needs no buffer at all. */
static void good_calls(const struct guarded out[BUFFERS])
{
    for (int f = 0; f < FUNCTIONS; f++) {
        struct call c = good_call(out);
        for (int k = 0; k < BUFFERS; k++)
            guarded_reset(&out[k]);
        if (f == DEQUANT8 || f == DEQUANT4)
            memset(out[0].data, 3, out[0].bytes);
        CHECK(run((enum function)f, &c) == BNB_OK, "function %d: %s", f, bnb_detail());
    }
    CHECK(!bnb_quantize8(NULL, NULL, BNB_F32, 0, 64, NULL, NULL, NULL), "%s", bnb_detail());
    CHECK(!bnb_dequantize8(NULL, NULL, 0, 64, NULL, NULL, NULL, BNB_F32), "%s", bnb_detail());
    CHECK(!bnb_quantize4(NULL, NULL, BNB_F16, 0, 64, BNB_FP4, NULL, NULL), "%s", bnb_detail());
    CHECK(!bnb_dequantize4(NULL, NULL, 0, 64, BNB_NF4, NULL, NULL, BNB_BF16), "%s", bnb_detail());
    CHECK(!bnb_dequantize_scales(NULL, NULL, 0, NULL), "%s", bnb_detail());
}

int main(void)
{
    struct guarded out[BUFFERS];
    for (int k = 0; k < BUFFERS; k++)
        out[k] = guarded_make(N_GOOD * 4, 0);
    bnb_create_dynamic_map(true, 7, 8, map1);
    fill_values(input, BNB_F32, N_GOOD, FILL_BELL, 1);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        check_row(i, &rows[i], out);
    good_calls(out);
    for (int k = 0; k < BUFFERS; k++)
        guarded_free(&out[k]);
    printf("%zu rows\n", sizeof rows / sizeof rows[0]);
    return CHECK_RESULT();
}
