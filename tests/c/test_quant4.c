/*
 * test_quant4.c - 4-bit quantisers of every table against the definition: dtypes, block sizes, lengths, offsets
 *
 * Outputs lie between guard bytes, one element off any alignment.  NUMERICS rules 2, 3 and 6 to 8.
 */
#include <math.h>
#include <string.h>

#include "check.h"
#include "support.h"

enum { LONGEST = 1000003 };

static const int64_t special_length[] = {0, 1, 2, 63, 64, 65, 255, 256, 257, 4095, 4096, 4097, LONGEST};
static const int64_t block_size[] = {32, 64, 128, 256, 512, 1024, 2048, 4096};
enum { LENGTHS = sizeof special_length / sizeof special_length[0], BLOCKS = sizeof block_size / sizeof block_size[0] };

struct shape {
    bnb_dtype dtype;
    int64_t n, block;
    bnb_type4 type;
};

struct expected4 { /* one input and what must come out */
    const void *x;
    const uint8_t *codes;
    const float *absmax;
};

static const struct bnb_tree4 *tree_of(bnb_type4 type) { return type == BNB_NF4 ? &bnb_tree_nf4 : &bnb_tree_fp4; }

static void check_quantise(const struct shape *s, const struct expected4 *want, const struct bnb_cpu_ops *ops)
{
    const int64_t blocks = s->n / s->block + (s->n % s->block != 0);
    const size_t bytes = (size_t)(s->n + 1) / 2;
    struct guarded codes = guarded_make(bytes, 1), absmax = guarded_make((size_t)blocks * 4, 4);
    const struct bnb_quant4_args a = {want->x, codes.data, absmax.data, s->n, s->block, (int)s->type, tree_of(s->type)};
    ops->quant4[s->dtype](&a, 0, blocks);
    CHECK(!memcmp(codes.data, want->codes, bytes) && !memcmp(absmax.data, want->absmax, (size_t)blocks * 4),
          "%s %s type %d n %lld block %lld: codes or absmax differ", ops->name, dtype_name[s->dtype], (int)s->type,
          (long long)s->n, (long long)s->block);
    CHECK(guarded_intact(&codes) && guarded_intact(&absmax), "%s %s n %lld block %lld: guard bytes written", ops->name,
          dtype_name[s->dtype], (long long)s->n, (long long)s->block);
    guarded_free(&codes);
    guarded_free(&absmax);
}

static void check_dequantise(const struct shape *s, const struct expected4 *in, const struct bnb_cpu_ops *ops)
{
    const float *code = s->type == BNB_NF4 ? define_nf4_values : define_fp4_values;
    const size_t size = bnb_dtype_size(s->dtype);
    const int64_t blocks = s->n / s->block + (s->n % s->block != 0);
    struct guarded out = guarded_make((size_t)s->n * size, size), want = guarded_make((size_t)s->n * size, size);
    const struct bnb_dequant4_args a = {.codes = in->codes,
                                        .out = out.data,
                                        .n = s->n,
                                        .block = s->block,
                                        .code = bnb_map4(s->type),
                                        .scale = {.absmax = in->absmax}};
    ops->dequant4[s->dtype](&a, 0, blocks);
    for (int64_t i = 0; i < s->n; i++) {
        const int c = i % 2 ? in->codes[i / 2] & 15 : in->codes[i / 2] >> 4;
        store_at(want.data, s->dtype, i, code[c] * in->absmax[i / s->block]);
    }
    for (int64_t i = 0; i < s->n && memcmp(out.data, want.data, (size_t)s->n * size); i++) {
        const float got = value_at(out.data, s->dtype, i), expected = value_at(want.data, s->dtype, i);
        CHECK(bits_of(got) == bits_of(expected) || (isnan(got) && isnan(expected)),
              "%s %s type %d n %lld block %lld: element %lld is %g, expected %g", ops->name, dtype_name[s->dtype],
              (int)s->type, (long long)s->n, (long long)s->block, (long long)i, (double)got, (double)expected);
    }
    CHECK(guarded_intact(&out), "%s %s n %lld block %lld: guard bytes written", ops->name, dtype_name[s->dtype],
          (long long)s->n, (long long)s->block);
    guarded_free(&out);
    guarded_free(&want);
}

static void check_shape(const struct shape *s, enum fill kind, size_t shift)
{
    static uint8_t codes[(LONGEST + 1) / 2];
    static float absmax[LONGEST / 32 + 1];
    const size_t size = bnb_dtype_size(s->dtype);
    struct guarded x = guarded_make((size_t)s->n * size, shift * size);
    fill_values(x.data, s->dtype, s->n, kind, (uint64_t)(s->n * 17 + s->block));
    define_quant4(x.data, s->dtype, s->n, s->block, s->type, codes, absmax);
    const struct expected4 want = {x.data, codes, absmax};
    for (int t = 0; t < bnb_cpu_all_count; t++) {
        if (!table_at(t))
            continue;
        check_quantise(s, &want, bnb_cpu_all[t]);
        check_dequantise(s, &want, bnb_cpu_all[t]);
    }
    guarded_free(&x);
}

static void lengths_and_fills(bnb_type4 type, bnb_dtype dtype)
{
    for (int b = 0; b < BLOCKS; b++) {
        for (int64_t n = 0; n <= 600; n++)
            check_shape(&(struct shape){dtype, n, block_size[b], type}, n % 3 == 0 ? FILL_MIXED : FILL_BELL,
                        (size_t)n % 3);
        for (int i = 0; i < LENGTHS; i++)
            check_shape(&(struct shape){dtype, special_length[i], block_size[b], type}, FILL_BELL, 1);
        for (int kind = 0; kind < FILL_COUNT; kind++)
            check_shape(&(struct shape){dtype, 2311, block_size[b], type}, (enum fill)kind, 1);
    }
}

/* Every u near a threshold, and a stride over all u of [-1, 1]: blocks hold 1.0, so the factor is 1. */
static void near_thresholds(bnb_type4 type)
{
    static float x[4096];
    static uint8_t codes[2048];
    float absmax;
    const float *value = type == BNB_NF4 ? define_nf4_values : define_fp4_values;
    uint32_t bits = 0;
    while (bits <= 0x3f800000u) {
        int n = 0;
        x[n++] = 1.0f;
        for (; n < 4000 && bits <= 0x3f800000u; bits += 997) {
            x[n++] = float_of(bits);
            x[n++] = float_of(bits | 0x80000000u);
        }
        for (int k = 0; k < 16 && n < 4096 - 5; k++) /* candidates for ties: midpoints of any two values */
            for (uint32_t d = 0; d < 5; d++)
                x[n++] = float_of(bits_of((value[k] + value[bits % 16]) * 0.5f) - 2 + d);
        for (int i = 0; i < n; i++)
            x[i] = fabsf(x[i]) <= 1.0f ? x[i] : 0.0f;
        for (int t = 0; t < bnb_cpu_all_count; t++) {
            const struct bnb_quant4_args a = {x, codes, &absmax, n, 4096, (int)type, tree_of(type)};
            if (!table_at(t))
                continue;
            bnb_cpu_all[t]->quant4[BNB_F32](&a, 0, 1);
            for (int i = 0; i < n; i++) {
                const int got = i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4;
                const int want = type == BNB_NF4 ? define_nf4(x[i]) : define_fp4(x[i]);
                CHECK(got == want, "%s type %d: u %.9g gives %d, expected %d", bnb_cpu_all[t]->name, (int)type,
                      (double)x[i], got, want);
            }
        }
    }
}

static void degenerate(void)
{
    static const struct {
        float value[3];
        float absmax;
        uint8_t nf4[2], fp4[2];
    } row[] = {
        {{0.0f, -0.0f, 0.0f}, 0.0f, {0x77, 0x77}, {0x00, 0x00}},
        {{0x1p-140f, 0.0f, -0x1p-140f}, 0x1p-140f, {0x77, 0x77}, {0x00, 0x00}},
        {{NAN, NAN, NAN}, 0.0f, {0x77, 0x77}, {0x00, 0x00}},
        {{NAN, 1.0f, -1.0f}, 1.0f, {0x0f, 0x07}, {0x03, 0xb0}},
        {{INFINITY, 1.0f, -1.0f}, INFINITY, {0x07, 0x77}, {0x00, 0x00}},
        {{1.0f, 1e-9f, -1e-9f}, 1.0f, {0xf7, 0x77}, {0x30, 0x80}},
    };
    for (size_t i = 0; i < sizeof row / sizeof row[0]; i++) {
        uint8_t codes[2];
        float absmax;
        CHECK(bnb_quantize4(NULL, row[i].value, BNB_F32, 3, 64, BNB_NF4, codes, &absmax) == BNB_OK, "%s", bnb_detail());
        CHECK(!memcmp(codes, row[i].nf4, 2) && bits_of(absmax) == bits_of(row[i].absmax), "row %zu: NF4 %02x %02x, %g",
              i, codes[0], codes[1], (double)absmax);
        CHECK(bnb_quantize4(NULL, row[i].value, BNB_F32, 3, 64, BNB_FP4, codes, &absmax) == BNB_OK, "%s", bnb_detail());
        CHECK(!memcmp(codes, row[i].fp4, 2), "row %zu: FP4 %02x %02x", i, codes[0], codes[1]);
    }
}

int main(void)
{
    for (int dtype = 0; dtype < BNB_FLOATS; dtype++) {
        lengths_and_fills(BNB_NF4, (bnb_dtype)dtype);
        lengths_and_fills(BNB_FP4, (bnb_dtype)dtype);
    }
    near_thresholds(BNB_NF4);
    near_thresholds(BNB_FP4);
    degenerate();
    return CHECK_RESULT();
}
