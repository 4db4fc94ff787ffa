/*
 * test_scales.c - nested statistics: the mean's tree, the centred codes, decoding with nested scales in every kernel
 *
 * NUMERICS rules 8 and 9.
 */
#include <math.h>
#include <string.h>

#include "check.h"
#include "support.h"

enum { LONGEST = 1048576 + 1029 }; /* three levels of the tree */

static float signed_map[256];

static void mean_and_codes(int64_t n, int64_t block, enum fill kind)
{
    static float x[LONGEST], centred[LONGEST], want2[LONGEST];
    static uint8_t want[LONGEST];
    const int64_t blocks = n / block + (n % block != 0);
    fill_values(x, BNB_F32, n, kind, (uint64_t)n);
    for (int64_t i = 0; i < n; i++)
        x[i] = fabsf(x[i]);
    struct guarded codes = guarded_make((size_t)n, 1), absmax2 = guarded_make((size_t)blocks * 4, 4),
                   offset = guarded_make(4, 4);
    CHECK(bnb_quantize_scales(NULL, x, n, block, signed_map, codes.data, absmax2.data, offset.data) == BNB_OK, "%s",
          bnb_detail());
    const float mean = define_mean(x, n), got = value_at(offset.data, BNB_F32, 0);
    CHECK(bits_of(got) == bits_of(mean), "n %lld: mean %.9g, expected %.9g", (long long)n, (double)got, (double)mean);
    for (int64_t i = 0; i < n; i++)
        centred[i] = x[i] - mean;
    define_quant8(centred, BNB_F32, n, block, signed_map, want, want2);
    CHECK(!memcmp(codes.data, want, (size_t)n) && !memcmp(absmax2.data, want2, (size_t)blocks * 4),
          "n %lld block %lld: codes or absmax2 differ", (long long)n, (long long)block);
    CHECK(guarded_intact(&codes) && guarded_intact(&absmax2) && guarded_intact(&offset), "n %lld: guards written",
          (long long)n);
    const bnb_scales scales = {codes.data, signed_map, absmax2.data, offset.data, block};
    struct guarded back = guarded_make((size_t)n * 4, 4);
    CHECK(bnb_dequantize_scales(NULL, &scales, n, back.data) == BNB_OK, "%s", bnb_detail());
    for (int64_t i = 0; i < n; i++) {
        const float product = signed_map[want[i]] * want2[i / block], sum = product + mean;
        CHECK(bits_of(value_at(back.data, BNB_F32, i)) == bits_of(sum), "n %lld: scale %lld is %g, expected %g",
              (long long)n, (long long)i, (double)value_at(back.data, BNB_F32, i), (double)sum);
    }
    CHECK(guarded_intact(&back), "n %lld: guards of the expanded scales written", (long long)n);
    guarded_free(&codes);
    guarded_free(&absmax2);
    guarded_free(&offset);
    guarded_free(&back);
}

/* Codes of n elements in blocks whose scales are nested; every kernel against code * scale in f32, rounded once. */
struct nested {
    int64_t n, block, block2;
    uint8_t *codes, *absmax;
    float *absmax2;
    float offset;
};

static float nested_scale(const struct nested *c, int64_t b)
{
    const float product = signed_map[c->absmax[b]] * c->absmax2[b / c->block2];
    return product + c->offset;
}

static struct bnb_scale_args scale_args(const struct nested *c)
{
    return (struct bnb_scale_args){c->absmax, signed_map, c->absmax2, &c->offset, c->block2};
}

static void check_table(const struct nested *c, const struct bnb_cpu_ops *ops, bnb_dtype dtype)
{
    const size_t size = bnb_dtype_size(dtype);
    const int64_t blocks = c->n / c->block + (c->n % c->block != 0);
    struct guarded out8 = guarded_make((size_t)c->n * size, size), out4 = guarded_make((size_t)c->n * size, size);
    const struct bnb_dequant8_args a8 = {c->codes, out8.data, c->n, c->block, signed_map, scale_args(c)};
    const struct bnb_dequant4_args a4 = {c->codes, out4.data, c->n, c->block, bnb_map4(BNB_NF4), scale_args(c)};
    ops->dequant8[dtype](&a8, 0, blocks);
    ops->dequant4[dtype](&a4, 0, blocks);
    for (int64_t i = 0; i < c->n; i++) {
        const float scale = nested_scale(c, i / c->block);
        const int nibble = i % 2 ? c->codes[i / 2] & 15 : c->codes[i / 2] >> 4;
        float want8[1], want4[1];
        store_at(want8, dtype, 0, signed_map[c->codes[i]] * scale);
        store_at(want4, dtype, 0, define_nf4_values[nibble] * scale);
        CHECK(!memcmp((char *)out8.data + (size_t)i * size, want8, size),
              "%s %s 8 bits n %lld block %lld: element %lld", ops->name, dtype_name[dtype], (long long)c->n,
              (long long)c->block, (long long)i);
        CHECK(!memcmp((char *)out4.data + (size_t)i * size, want4, size),
              "%s %s 4 bits n %lld block %lld: element %lld", ops->name, dtype_name[dtype], (long long)c->n,
              (long long)c->block, (long long)i);
    }
    CHECK(guarded_intact(&out8) && guarded_intact(&out4), "%s %s n %lld block %lld: guard bytes written", ops->name,
          dtype_name[dtype], (long long)c->n, (long long)c->block);
    guarded_free(&out8);
    guarded_free(&out4);
}

static void nested_decode(int64_t n, int64_t block, int64_t block2)
{
    static uint8_t codes[20000], absmax[20000];
    static float absmax2[20000];
    uint64_t state = (uint64_t)(n + block);
    for (int i = 0; i < 20000; i++) {
        codes[i] = (uint8_t)random_bits(&state);
        absmax[i] = (uint8_t)random_bits(&state);
        absmax2[i] = (float)random_unit(&state);
    }
    const struct nested c = {n, block, block2, codes, absmax, absmax2, 1.5f};
    for (int t = 0; t < bnb_cpu_all_count; t++)
        for (int dtype = 0; dtype < BNB_FLOATS && table_at(t); dtype++)
            check_table(&c, bnb_cpu_all[t], (bnb_dtype)dtype);
}

/* An all-zero block decodes to exact 0 even where its nested scale does not. */
static void zero_block_stays_zero(void)
{
    enum { N = 64 * 300 };
    static float x[N], y[N], absmax[300], absmax2[2];
    static uint8_t codes[N / 2], codes2[300];
    float offset;
    fill_values(x, BNB_F32, N, FILL_BELL, 3);
    memset(x + 64, 0, 64 * sizeof x[0]);
    CHECK(!bnb_quantize4(NULL, x, BNB_F32, N, 64, BNB_NF4, codes, absmax), "%s", bnb_detail());
    CHECK(!bnb_quantize_scales(NULL, absmax, 300, 256, signed_map, codes2, absmax2, &offset), "%s", bnb_detail());
    const bnb_scales scales = {codes2, signed_map, absmax2, &offset, 256};
    CHECK(!bnb_dequantize4(NULL, codes, N, 64, BNB_NF4, &scales, y, BNB_F32), "%s", bnb_detail());
    for (int i = 64; i < 128; i++)
        CHECK(y[i] == 0.0f, "element %d of a zero block is %g", i, (double)y[i]);
}

int main(void)
{
    static const int64_t length[] = {0,   1,    2,    31,   32,   33,   63,   64,   65,    255,     256,
                                     257, 1000, 1023, 1024, 1025, 2048, 4095, 4097, 33333, 1048576, LONGEST};
    static const int64_t block[] = {1, 64, 256, 1000};
    bnb_create_dynamic_map(true, 7, 8, signed_map);
    for (size_t i = 0; i < sizeof length / sizeof length[0]; i++)
        for (size_t b = 0; b < sizeof block / sizeof block[0]; b++)
            mean_and_codes(length[i], block[b], b % 2 ? FILL_HEAVY : FILL_BELL);
    for (int64_t n = 0; n <= 300; n++)
        nested_decode(n, 32, 3);
    nested_decode(9999, 64, 256);
    nested_decode(9999, 256, 7);
    nested_decode(9999, 4096, 256);
    zero_block_stays_zero();
    return CHECK_RESULT();
}
