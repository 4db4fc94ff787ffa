/*
 * codebook.c - every number of every codebook, and the public functions that build 256-entry maps
 *
 * Values are computed in f32 in the order that docs/FORMAT.md section 1 gives, so that a map has the same bits
 * everywhere.  Maps with fewer than 256 values are filled up with zeros and stay sorted.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/internal.h"

static int ascending(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Fill values[count ..] with zeros, sort, and hand over. */
static void finish_map(float values[256], int count, float map[256])
{
    for (int i = count; i < 256; i++)
        values[i] = 0.0f;
    qsort(values, 256, sizeof values[0], ascending);
    memcpy(map, values, 256 * sizeof map[0]);
}

static void divide_by_last(float map[256])
{
    const float largest = map[255];
    for (int i = 0; i < 256; i++)
        map[i] /= largest;
}

float bnb_linspace(float start, float end, int steps, int i)
{
    if (steps == 1)
        return start;
    const float step = (end - start) / (float)(steps - 1);
    return i < steps / 2 ? start + step * (float)i : end - step * (float)(steps - 1 - i);
}

/* Append the centres of `cells` equal cells of [0.1, 1], scaled, with their negatives if signed. */
static int add_cells(float *values, int count, int cells, float scale, bool is_signed)
{
    for (int k = 0; k < cells && count + (is_signed ? 2 : 1) <= 256; k++) {
        const float low = bnb_linspace(0.1f, 1.0f, cells + 1, k), high = bnb_linspace(0.1f, 1.0f, cells + 1, k + 1);
        const float centre = (low + high) / 2.0f * scale;
        values[count++] = centre;
        if (is_signed)
            values[count++] = -centre;
    }
    return count;
}

bnb_status bnb_create_dynamic_map(bool is_signed, int max_exponent_bits, int total_bits, float map[256])
{
    static const float power_of_ten[8] = {1e-7f, 1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
    const char *f = "create_dynamic_map";
    if (!map)
        return bnb_fail(BNB_EINVAL, "%s: map is NULL, expected 256 floats", f);
    if (total_bits < 1 || total_bits > 8)
        return bnb_fail(BNB_EINVAL, "%s: total_bits is %d, expected 1..8", f, total_bits);
    const int bits = total_bits - 1; /* without the sign, or the first indicator bit */
    const int most = is_signed ? total_bits : (bits > 1 ? bits : 1);
    if (max_exponent_bits < 1 || max_exponent_bits > most)
        return bnb_fail(BNB_EINVAL, "%s: max_exponent_bits is %d, expected 1..%d for %s maps of %d bits", f,
                        max_exponent_bits, most, is_signed ? "signed" : "unsigned", total_bits);
    float values[256];
    int count = 0;
    const int fraction_bits = bits - max_exponent_bits + (is_signed ? 0 : 1);
    for (int i = 0; i < max_exponent_bits; i++) {
        const int shift = i + fraction_bits;
        count =
            add_cells(values, count, shift >= 0 ? 1 << shift : 0, power_of_ten[i + 8 - max_exponent_bits], is_signed);
    }
    /* What is missing to 2^total_bits values goes into the top decade. */
    if (bits > max_exponent_bits) {
        const int per_side = (1 << (bits - max_exponent_bits)) - 1;
        count = add_cells(values, count, is_signed ? per_side : 2 * per_side, 1.0f, is_signed);
    }
    if (count + 2 != 1 << total_bits)
        return bnb_fail(BNB_EINVAL, "%s: max_exponent_bits %d with total_bits %d gives %d values, expected %d", f,
                        max_exponent_bits, total_bits, count + 2, 1 << total_bits);
    values[count++] = 0.0f;
    values[count++] = 1.0f;
    finish_map(values, count, map);
    return BNB_OK;
}

bnb_status bnb_create_linear_map(bool is_signed, int total_bits, bool add_zero, float map[256])
{
    const char *f = "create_linear_map";
    if (!map)
        return bnb_fail(BNB_EINVAL, "%s: map is NULL, expected 256 floats", f);
    const int fewest = is_signed ? 2 : 1;
    if (total_bits < fewest || total_bits > 8)
        return bnb_fail(BNB_EINVAL, "%s: total_bits is %d, expected %d..8 for %s maps", f, total_bits, fewest,
                        is_signed ? "signed" : "unsigned");
    const int count = (1 << total_bits) - (is_signed && (add_zero || total_bits < 8) ? 1 : 0);
    float values[256];
    for (int i = 0; i < count; i++)
        values[i] = bnb_linspace(is_signed ? -1.0f : 0.0f, 1.0f, count, i);
    finish_map(values, count, map);
    return BNB_OK;
}

bnb_status bnb_create_fp8_map(bool is_signed, int exponent_bits, int precision_bits, int total_bits, float map[256])
{
    const char *f = "create_fp8_map";
    if (!map)
        return bnb_fail(BNB_EINVAL, "%s: map is NULL, expected 256 floats", f);
    if (total_bits < 1 || total_bits > 8)
        return bnb_fail(BNB_EINVAL, "%s: total_bits is %d, expected 1..8", f, total_bits);
    if (exponent_bits < 1 || exponent_bits > 8)
        return bnb_fail(BNB_EINVAL, "%s: exponent_bits is %d, expected 1..8", f, exponent_bits);
    if (precision_bits < 0 || (is_signed ? 1 : 0) + exponent_bits + precision_bits != total_bits)
        return bnb_fail(BNB_EINVAL, "%s: precision_bits is %d, expected total_bits - exponent_bits - sign = %d", f,
                        precision_bits, total_bits - exponent_bits - (is_signed ? 1 : 0));
    const int bias = 1 << (exponent_bits - 1), fractions = 1 << precision_bits;
    float values[256];
    int count = 0;
    for (int field = 0; field < 1 << exponent_bits; field++) {
        for (int k = 0; k < fractions; k++) {
            const float fraction = (float)k / (float)fractions;
            const float value = field ? ldexpf(1.0f + fraction, bias + 1 - field) : ldexpf(fraction, -bias);
            values[count++] = value;
            if (is_signed)
                values[count++] = 0.0f - value; /* never -0 */
        }
    }
    finish_map(values, count, map);
    divide_by_last(map);
    return BNB_OK;
}

/* The x > 0 with Phi(x) = p, 0.5 < p < 1.  Newton from the left is monotone, because Phi is concave there. */
static double normal_quantile(double p)
{
    double x = 0.0;
    for (int i = 0; i < 200; i++) {
        const double tail = 0.5 * erfc(x * 0.70710678118654752440);
        const double density = 0.39894228040143267794 * exp(-0.5 * x * x);
        const double next = x + (tail - (1.0 - p)) / density;
        if (fabs(next - x) <= 1e-16 * next)
            return next;
        x = next;
    }
    return x;
}

bnb_status bnb_create_normal_map(double offset, bool use_extra_value, float map[256])
{
    const char *f = "create_normal_map";
    if (!map)
        return bnb_fail(BNB_EINVAL, "%s: map is NULL, expected 256 floats", f);
    if (!(offset > 0.5 && (float)offset < 1.0f))
        return bnb_fail(BNB_EINVAL, "%s: offset is %g, expected a probability between 0.5 and 1", f, offset);
    const int positive = use_extra_value ? 8 : 7;
    float values[256];
    int count = 0;
    for (int i = 0; i < positive; i++)
        values[count++] = (float)normal_quantile((double)bnb_linspace((float)offset, 0.5f, positive + 1, i));
    for (int i = 0; i < 7; i++)
        values[count++] = (float)-normal_quantile((double)bnb_linspace((float)offset, 0.5f, 8, i));
    finish_map(values, count, map);
    divide_by_last(map);
    return BNB_OK;
}

bnb_status bnb_create_quantile_map(const float *quantiles, int count, float map[256])
{
    const char *f = "create_quantile_map";
    if (!quantiles || !map)
        return bnb_fail(BNB_EINVAL, "%s: %s is NULL, expected an array", f, quantiles ? "map" : "quantiles");
    if (count < 1 || count > 255)
        return bnb_fail(BNB_EINVAL, "%s: count is %d, expected 1..255", f, count);
    float values[256], largest = 0.0f;
    for (int i = 0; i < count; i++) {
        if (!isfinite(quantiles[i]))
            return bnb_fail(BNB_EINVAL, "%s: quantiles[%d] is %g, expected a finite number", f, i,
                            (double)quantiles[i]);
        largest = fmaxf(largest, fabsf(quantiles[i]));
    }
    for (int i = 0; i < count; i++)
        values[i] = largest > 0.0f ? quantiles[i] / largest : 0.0f;
    finish_map(values, count, map);
    return BNB_OK;
}

/* In code order, divided by the largest magnitude.  NF4: QLoRA, appendix E.  AF4: Yoshida 2023, for blocks of 64. */
static const float map_nf4[16] = {-1.0f,
                                  -0.6961928009986877f,
                                  -0.5250730514526367f,
                                  -0.39491748809814453f,
                                  -0.28444138169288635f,
                                  -0.18477343022823334f,
                                  -0.09105003625154495f,
                                  0.0f,
                                  0.07958029955625534f,
                                  0.16093020141124725f,
                                  0.24611230194568634f,
                                  0.33791524171829224f,
                                  0.44070982933044434f,
                                  0.5626170039176941f,
                                  0.7229568362236023f,
                                  1.0f};
static const float map_fp4[16] = {0.0f,       0.0625f / 12, 8.0f / 12,  12.0f / 12,    4.0f / 12,  6.0f / 12,
                                  2.0f / 12,  3.0f / 12,    0.0f,       -0.0625f / 12, -8.0f / 12, -12.0f / 12,
                                  -4.0f / 12, -6.0f / 12,   -2.0f / 12, -3.0f / 12};
static const float map_int4[16] = {7.0f / 7,  6.0f / 7,  5.0f / 7,  4.0f / 7,  3.0f / 7,  2.0f / 7,
                                   1.0f / 7,  0.0f,      0.0f,      -1.0f / 7, -2.0f / 7, -3.0f / 7,
                                   -4.0f / 7, -5.0f / 7, -6.0f / 7, -7.0f / 7};
static const float map_af4[16] = {1.0f,        0.72424863f,  0.55496234f,  0.42563882f,  0.31675666f,  0.21961274f,
                                  0.12934483f, 0.04273164f,  0.0f,         -0.04934812f, -0.14982478f, -0.25607552f,
                                  -0.3736951f, -0.51243739f, -0.69441008f, -1.0f};

const float *bnb_map4(bnb_type4 type)
{
    switch (type) {
    case BNB_FP4:
        return map_fp4;
    case BNB_NF4:
        return map_nf4;
    case BNB_INT4:
        return map_int4;
    case BNB_AF4:
        return map_af4;
    }
    return NULL;
}

bnb_status bnb_get_4bit_map(bnb_type4 type, float map[16])
{
    const char *f = "get_4bit_map";
    const float *values = bnb_map4(type);
    if (!map)
        return bnb_fail(BNB_EINVAL, "%s: map is NULL, expected 16 floats", f);
    if (!values)
        return bnb_fail(BNB_EINVAL, "%s: type is %d, expected BNB_FP4 (1), NF4 (2), INT4 (3) or AF4 (4)", f, (int)type);
    memcpy(map, values, 16 * sizeof map[0]);
    return BNB_OK;
}

bnb_status bnb_find_4bit_map(const float map[16], bnb_type4 *type)
{
    const char *f = "find_4bit_map";
    static const bnb_type4 types[] = {BNB_NF4, BNB_FP4};
    if (!map || !type)
        return bnb_fail(BNB_EINVAL, "%s: %s is NULL", f, map ? "type" : "map");
    for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
        const float *values = bnb_map4(types[t]);
        bool same = true;
        for (int i = 0; i < 16; i++)
            same = same && map[i] >= values[i] && map[i] <= values[i]; /* +0 and -0 are one value, NaN none */
        if (same) {
            *type = types[t];
            return BNB_OK;
        }
    }
    return bnb_fail(BNB_ENOTSUP, "%s: map has the values of another type, expected those of NF4 or FP4", f);
}
