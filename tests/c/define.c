/*
 * define.c - the formats by definition: slow, obvious, and independent of the library
 *
 * 8-bit codes count the fp32 midpoints below u; 4-bit codes count thresholds; conversions go through double.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "support.h"

float define_from_f16(uint16_t bits)
{
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31 && fraction) /* a NaN keeps sign and payload and becomes quiet */
        return float_of((uint32_t)(bits & 0x8000u) << 16 | 0x7fc00000u | (uint32_t)fraction << 13);
    const double magnitude = exponent == 31  ? (double)INFINITY
                             : exponent == 0 ? ldexp(fraction, -24)
                                             : ldexp(1024 + fraction, exponent - 25);
    return (float)(bits & 0x8000u ? -magnitude : magnitude);
}

uint16_t define_to_f16(float x)
{
    const uint16_t sign = (uint16_t)(bits_of(x) >> 31 << 15);
    if (isnan(x))
        return (uint16_t)(sign | 0x7e00u | (bits_of(x) >> 13 & 0x1ffu));
    const double a = fabs((double)x);
    if (a >= 65520.0) /* halfway between the largest number and what would be next */
        return sign | 0x7c00u;
    if (a < 0x1p-14)
        return (uint16_t)(sign | (unsigned)nearbyint(a * 0x1p24));
    const int exponent = ilogb(a);
    const unsigned significand = (unsigned)nearbyint(ldexp(a, 10 - exponent)); /* 1024 .. 2048 */
    return (uint16_t)(sign | (unsigned)((exponent + 14) * 1024 + (int)significand));
}

uint16_t define_to_bf16(float x)
{
    const uint16_t sign = (uint16_t)(bits_of(x) >> 31 << 15);
    if (isnan(x))
        return (uint16_t)(bits_of(x) >> 16 | 0x40u);
    if (isinf(x))
        return sign | 0x7f80u;
    const double a = fabs((double)x);
    if (a < 0x1p-126)
        return (uint16_t)(sign | (unsigned)nearbyint(a * 0x1p133));
    const int exponent = ilogb(a);
    const unsigned significand = (unsigned)nearbyint(ldexp(a, 7 - exponent)); /* 128 .. 256 */
    return (uint16_t)(sign | (unsigned)((exponent + 126) * 128 + (int)significand));
}

float define_absmax(const void *x, bnb_dtype dtype, int64_t n)
{
    float largest = 0.0f;
    for (int64_t i = 0; i < n; i++) {
        const float a = fabsf(value_at(x, dtype, i));
        if (a > largest) /* false for NaN */
            largest = a;
    }
    return largest;
}

void define_midpoints(const float code[256], float midpoint[255])
{
    for (int k = 0; k < 255; k++)
        midpoint[k] = (code[k] + code[k + 1]) * 0.5f;
}

int define_code8(float u, const float midpoint[255])
{
    int below = 0;
    for (int k = 0; k < 255; k++)
        below += midpoint[k] < u;
    return below < 255 && midpoint[below] == u && below % 2 == 1 ? below + 1 : below;
}

/* docs/FORMAT.md, section 2 */
static const float fp4_threshold[7] = {0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f,
                                       0.4166667f,  0.583333f,  0.8333333f};
static const int fp4_code_above[7] = {1, 6, 7, 4, 5, 2, 3};

const float define_nf4_values[16] = {-1.0f,
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
const float define_fp4_values[16] = {0.0f,
                                     0.0052083334885537624f,
                                     0.6666666865348816f,
                                     1.0f,
                                     0.3333333432674408f,
                                     0.5f,
                                     0.1666666716337204f,
                                     0.25f,
                                     0.0f,
                                     -0.0052083334885537624f,
                                     -0.6666666865348816f,
                                     -1.0f,
                                     -0.3333333432674408f,
                                     -0.5f,
                                     -0.1666666716337204f,
                                     -0.25f};

int define_nf4(float u)
{
    int code = 0;
    for (int k = 0; k < 15; k++)
        code += (define_nf4_values[k] + define_nf4_values[k + 1]) * 0.5f < u;
    return code;
}

int define_fp4(float u)
{
    int code = 0;
    for (int k = 0; k < 7; k++)
        if (fabsf(u) > fp4_threshold[k])
            code = fp4_code_above[k];
    return u < 0.0f ? code + 8 : code;
}

/* The code of zero where 1 / absmax is no number to multiply with. */
static bool scale_of(float absmax, float *r)
{
    *r = 1.0f / absmax;
    return isfinite(*r);
}

void define_quant8(const void *x, bnb_dtype dtype, int64_t n, int64_t block, const float code[256], uint8_t *codes,
                   float *absmax)
{
    float midpoint[255];
    define_midpoints(code, midpoint);
    for (int64_t low = 0; low < n; low += block) {
        const int64_t size = n - low < block ? n - low : block;
        const char *first = (const char *)x + (size_t)low * bnb_dtype_size(dtype);
        float r;
        absmax[low / block] = define_absmax(first, dtype, size);
        const bool scaled = scale_of(absmax[low / block], &r);
        for (int64_t i = 0; i < size; i++) {
            const float u = scaled ? value_at(first, dtype, i) * r : 0.0f;
            codes[low + i] = (uint8_t)(isnan(u) ? 0 : define_code8(u, midpoint));
        }
    }
}

void define_quant4(const void *x, bnb_dtype dtype, int64_t n, int64_t block, bnb_type4 type, uint8_t *codes,
                   float *absmax)
{
    memset(codes, 0, (size_t)(n + 1) / 2);
    for (int64_t low = 0; low < n; low += block) {
        const int64_t size = n - low < block ? n - low : block;
        const char *first = (const char *)x + (size_t)low * bnb_dtype_size(dtype);
        float r;
        absmax[low / block] = define_absmax(first, dtype, size);
        const bool scaled = scale_of(absmax[low / block], &r);
        for (int64_t i = 0; i < size + (size & 1); i++) { /* the nibble behind an odd end holds zero */
            const float u = scaled && i < size ? value_at(first, dtype, i) * r : 0.0f;
            const int c = type == BNB_NF4 ? define_nf4(u) : define_fp4(u);
            codes[(low + i) / 2] = (uint8_t)(codes[(low + i) / 2] | c << (i % 2 == 0 ? 4 : 0));
        }
    }
}

float define_mean(const float *x, int64_t n)
{
    if (n == 0)
        return 0.0f;
    int64_t count = n;
    double *level = malloc((size_t)n * sizeof *level);
    if (!level)
        abort();
    for (int64_t i = 0; i < n; i++)
        level[i] = (double)x[i];
    do { /* sums of runs of 1024 become the values of the next level */
        const int64_t runs = (count + 1023) / 1024;
        for (int64_t run = 0; run < runs; run++) {
            double lane[32] = {0};
            for (int64_t i = run * 1024; i < count && i < (run + 1) * 1024; i++)
                lane[i % 32] += level[i];
            for (int half = 16; half > 0; half /= 2)
                for (int j = 0; j < half; j++)
                    lane[j] += lane[j + half];
            level[run] = lane[0];
        }
        count = runs;
    } while (count > 1);
    const double sum = level[0];
    free(level);
    return (float)(sum / (double)n);
}
