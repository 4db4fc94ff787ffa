/*
 * test_quant8.c - 8-bit quantisers of every table against the definition: all dtypes, block sizes, lengths, offsets
 *
 * Outputs lie between guard bytes, one element off any alignment.  NUMERICS rules 2 to 4 and 8.
 */
#include <math.h>
#include <string.h>

#include "check.h"
#include "support.h"

enum { LONGEST = 1000003, MOST_BLOCKS = LONGEST };

static const int64_t special_length[] = {0, 1, 2, 63, 64, 65, 255, 256, 257, 4095, 4096, 4097, LONGEST};
static const int64_t block_size[] = {1, 2, 7, 31, 32, 63, 64, 100, 128, 255, 256, 257, 512, 1024, 4096, 16384, 2000000};
enum { LENGTHS = sizeof special_length / sizeof special_length[0], BLOCKS = sizeof block_size / sizeof block_size[0] };

struct expected8 { /* one input and what must come out */
    void *x;
    uint8_t *codes;
    float *absmax;
};

static float map_of[5][256]; /* signed, unsigned, linear, fp8 with repeated zeros, few values */

static void make_maps(void)
{
    bnb_create_dynamic_map(true, 7, 8, map_of[0]);
    bnb_create_dynamic_map(false, 7, 8, map_of[1]);
    bnb_create_linear_map(true, 8, true, map_of[2]);
    bnb_create_fp8_map(true, 4, 3, 8, map_of[3]);
    bnb_create_dynamic_map(true, 3, 4, map_of[4]);
}

struct shape {
    bnb_dtype dtype;
    int64_t n, block;
    int map;
};

static void check_quantise(const struct shape *s, const struct expected8 *want, const struct bnb_cpu_ops *ops)
{
    const int64_t blocks = s->n / s->block + (s->n % s->block != 0);
    struct guarded codes = guarded_make((size_t)s->n, 1), absmax = guarded_make((size_t)blocks * 4, 4);
    float midpoint[256];
    const struct bnb_quant8_args a = {want->x, codes.data, absmax.data,
                                      s->n,    s->block,   bnb_prepare_map(map_of[s->map], midpoint)};
    ops->quant8[s->dtype](&a, 0, blocks);
    CHECK(!memcmp(codes.data, want->codes, (size_t)s->n) && !memcmp(absmax.data, want->absmax, (size_t)blocks * 4),
          "%s %s n %lld block %lld map %d: codes or absmax differ", ops->name, dtype_name[s->dtype], (long long)s->n,
          (long long)s->block, s->map);
    CHECK(guarded_intact(&codes) && guarded_intact(&absmax), "%s %s n %lld block %lld: guard bytes written", ops->name,
          dtype_name[s->dtype], (long long)s->n, (long long)s->block);
    guarded_free(&codes);
    guarded_free(&absmax);
}

/* Decode what was encoded, into one dtype, and compare with one product and one rounding. */
static void check_dequantise(const struct shape *s, const struct expected8 *in, const struct bnb_cpu_ops *ops)
{
    const size_t size = bnb_dtype_size(s->dtype);
    const int64_t blocks = s->n / s->block + (s->n % s->block != 0);
    struct guarded out = guarded_make((size_t)s->n * size, size), want = guarded_make((size_t)s->n * size, size);
    const struct bnb_dequant8_args a = {.codes = in->codes,
                                        .out = out.data,
                                        .n = s->n,
                                        .block = s->block,
                                        .code = map_of[s->map],
                                        .scale = {.absmax = in->absmax}};
    ops->dequant8[s->dtype](&a, 0, blocks);
    for (int64_t i = 0; i < s->n; i++)
        store_at(want.data, s->dtype, i, map_of[s->map][in->codes[i]] * in->absmax[i / s->block]);
    for (int64_t i = 0; i < s->n && memcmp(out.data, want.data, (size_t)s->n * size); i++) {
        const float got = value_at(out.data, s->dtype, i), expected = value_at(want.data, s->dtype, i);
        CHECK(bits_of(got) == bits_of(expected) || (isnan(got) && isnan(expected)),
              "%s %s n %lld block %lld: element %lld is %g, expected %g", ops->name, dtype_name[s->dtype],
              (long long)s->n, (long long)s->block, (long long)i, (double)got, (double)expected);
    }
    CHECK(guarded_intact(&out), "%s %s n %lld block %lld: guard bytes written", ops->name, dtype_name[s->dtype],
          (long long)s->n, (long long)s->block);
    guarded_free(&out);
    guarded_free(&want);
}

/* x is `shift` elements off alignment. */
static void check_shape(const struct shape *s, enum fill kind, size_t shift)
{
    static uint8_t codes[LONGEST];
    static float absmax[MOST_BLOCKS];
    const size_t size = bnb_dtype_size(s->dtype);
    struct guarded x = guarded_make((size_t)s->n * size, shift * size);
    fill_values(x.data, s->dtype, s->n, kind, (uint64_t)(s->n * 31 + s->block));
    define_quant8(x.data, s->dtype, s->n, s->block, map_of[s->map], codes, absmax);
    const struct expected8 want = {x.data, codes, absmax};
    for (int t = 0; t < bnb_cpu_all_count; t++) {
        if (!table_at(t))
            continue;
        check_quantise(s, &want, bnb_cpu_all[t]);
        check_dequantise(s, &want, bnb_cpu_all[t]);
    }
    guarded_free(&x);
}

static void every_length(void)
{
    for (int64_t n = 0; n <= 600; n++)
        for (int b = 0; b < BLOCKS; b++)
            for (int dtype = 0; dtype < BNB_FLOATS; dtype++)
                check_shape(&(struct shape){(bnb_dtype)dtype, n, block_size[b], (int)(n + b) % 5},
                            (n + b) % 3 == 0 ? FILL_MIXED : FILL_HEAVY, (size_t)n % 3);
}

static void listed_lengths(void)
{
    for (int i = 0; i < LENGTHS; i++)
        for (int b = 0; b < BLOCKS; b++)
            for (int dtype = 0; dtype < BNB_FLOATS; dtype++)
                for (int map = 0; map < (special_length[i] == LONGEST ? 1 : 5); map++)
                    check_shape(&(struct shape){(bnb_dtype)dtype, special_length[i], block_size[b], (map + b) % 5},
                                FILL_HEAVY, 1);
}

static void every_fill(void)
{
    for (int kind = 0; kind < FILL_COUNT; kind++)
        for (int b = 0; b < BLOCKS; b++)
            for (int dtype = 0; dtype < BNB_FLOATS; dtype++)
                for (int map = 0; map < 5; map++)
                    check_shape(&(struct shape){(bnb_dtype)dtype, 2311, block_size[b], map}, (enum fill)kind, 1);
}

/* The blocks that the rules name: what becomes of zero, NaN, Inf and numbers too small to invert. */
static void degenerate(void)
{
    static const struct {
        float value[4];
        float absmax;
        int signed_code[4], unsigned_code[4];
    } row[] = {
        {{0.0f, -0.0f, 0.0f, 0.0f}, 0.0f, {127, 127, 127, 127}, {0, 0, 0, 0}},
        {{0x1p-129f, 0.0f, -0x1p-130f, 0x1p-149f}, 0x1p-129f, {127, 127, 127, 127}, {0, 0, 0, 0}},
        {{NAN, NAN, NAN, NAN}, 0.0f, {127, 127, 127, 127}, {0, 0, 0, 0}},
        {{NAN, 2.0f, -2.0f, 0.0f}, 2.0f, {0, 255, 0, 127}, {0, 255, 0, 0}},
        {{INFINITY, 2.0f, -INFINITY, NAN}, INFINITY, {0, 127, 0, 0}, {0, 0, 0, 0}},
        {{0x1p-128f, -0x1p-149f, 0x1p-128f, 0.0f}, 0x1p-128f, {127, 127, 127, 127}, {0, 0, 0, 0}},
    };
    for (size_t i = 0; i < sizeof row / sizeof row[0]; i++) {
        for (int map = 0; map < 2; map++) {
            uint8_t codes[4];
            float absmax;
            CHECK(bnb_quantize8(NULL, row[i].value, BNB_F32, 4, 4, map_of[map], codes, &absmax) == BNB_OK, "%s",
                  bnb_detail());
            CHECK(bits_of(absmax) == bits_of(row[i].absmax), "row %zu: absmax %g", i, (double)absmax);
            for (int k = 0; k < 4; k++) {
                const int want = map ? row[i].unsigned_code[k] : row[i].signed_code[k];
                CHECK(codes[k] == want, "row %zu map %d element %d: code %d, expected %d", i, map, k, codes[k], want);
            }
        }
    }
}

int main(void)
{
    make_maps();
    every_length();
    listed_lengths();
    every_fill();
    degenerate();
    return CHECK_RESULT();
}
