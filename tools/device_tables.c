/*
 * device_tables.c - prints core/codebook.c and core/maps.c as CUDA C: tables.cuh, which the build makes
 *
 * Every number that device code knows comes from the same place as the host's.  Values are printed in full, as hex.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/internal.h"
#include "cuda/kernels/cells.h"

/* The two files report through this; here there is nobody to report to. */
bnb_status bnb_fail(bnb_status status, const char *format, ...)
{
    fprintf(stderr, "device_tables: %s\n", format);
    exit((int)status);
}

/* Infinity has no literal; nothing that a kernel compares is above the largest float. */
static void print_floats(const float *values, int count)
{
    printf("{");
    for (int i = 0; i < count; i++)
        printf("%s%af", i ? ", " : "", (double)(isinf(values[i]) ? 0x1.fffffep+127f : values[i]));
    printf("}");
}

static void print_form(const struct bnb_dynamic_form *f)
{
    printf("    {");
    print_floats(f->start, 9);
    printf(",\n     ");
    print_floats(f->slope, 8);
    printf(",\n     ");
    print_floats(f->bias, 8);
    printf(",\n     {");
    for (int i = 0; i < 8; i++)
        printf("%s%d", i ? ", " : "", f->last[i]);
    printf("},\n     ");
    print_floats(f->threshold, 257);
    printf(", %d},\n", f->is_signed);
}

/*
 * Thresholds as bins of the scaled value around multiples of 1/16, of which none holds two: the count of thresholds below a value is
 * `base`, and one more above the bin's threshold.  A value near the edge of two bins may come to either, so no threshold
 * may be that close to an edge.
 */
static void print_bins(const float *threshold, int count, float low)
{
    int below = 0;
    printf("    {");
    for (int b = 0; b < 33; b++) {
        const float begin = low + ((float)b - 0.5f) / 16.0f, end = begin + 1.0f / 16.0f;
        const int base = below;
        float at = 0x1.fffffep+127f;
        if (below < count && threshold[below] < end) {
            if (threshold[below] - begin < 0x1p-18f || end - threshold[below] < 0x1p-18f ||
                (below + 1 < count && threshold[below + 1] < end))
                bnb_fail(BNB_EINVAL, "a bin of width 1/16 holds two thresholds, or one at its edge");
            at = threshold[below++];
        }
        printf("%s{%af, %d}", b ? ", " : "", (double)at, base);
    }
    printf("},\n");
}

/* Does no cell of cells.h hold two thresholds of the map, inside it or at its beginning? */
static void check_cells(const struct bnb_dynamic_form *f, int shift)
{
    uint32_t last = 0;
    for (int m = 1; m <= 256 && f->threshold[m] <= 1.0f; m++) {
        uint32_t bits;
        memcpy(&bits, &f->threshold[m], sizeof bits);
        const bool inside = (bits & ((1u << shift) - 1)) != 0; /* one at the beginning belongs to the whole cell */
        if (f->threshold[m] < BNB_CELL_FIRST || (inside && bits >> shift == last))
            bnb_fail(BNB_EINVAL, "a cell of cells.h holds two thresholds, or one lies below the first cell");
        if (inside)
            last = bits >> shift;
    }
}

int main(void)
{
    check_cells(bnb_map_unsigned.form, BNB_CELL_SHIFT_UNSIGNED);
    check_cells(bnb_map_signed.form, BNB_CELL_SHIFT_SIGNED);
    float nf4_threshold[15];
    for (int k = 0; k < 15; k++)
        nf4_threshold[k] = (bnb_map4(BNB_NF4)[k] + bnb_map4(BNB_NF4)[k + 1]) * 0.5f;
    printf("/* Written by the build from core/codebook.c and core/maps.c. */\n\n"
           "/* The default maps of 8-bit codes, unsigned and signed, their closed forms, and their codes of zero. */\n"
           "__device__ const float bnb_default_map[2][256] = {\n    ");
    print_floats(bnb_map_unsigned.code, 256);
    printf(",\n    ");
    print_floats(bnb_map_signed.code, 256);
    printf("};\n\n__device__ const struct bnb_dynamic_form bnb_default_form[2] = {\n");
    print_form(bnb_map_unsigned.form);
    print_form(bnb_map_signed.form);
    printf("};\n\nenum { BNB_ZERO_UNSIGNED = %d, BNB_ZERO_SIGNED = %d };\n\n", bnb_map_unsigned.zero,
           bnb_map_signed.zero);
    unsigned order[2] = {0, 0};
    for (int k = 0; k < 8; k++)
        order[k / 4] |= bnb_fp4_order[k] << 8 * (k % 4);
    printf("/* FP4: the code of each count of thresholds, a byte each; that of none is 0. */\n"
           "#define BNB_FP4_ORDER_LOW 0x%08xu\n#define BNB_FP4_ORDER_HIGH 0x%08xu\n\n",
           order[0], order[1]);
    printf("/* FP4 and NF4: thresholds in bins, and values.  Indexed by bnb_type4 - 1. */\n"
           "__device__ const struct bnb_bin4 bnb_bins[2][33] = {\n");
    print_bins(bnb_fp4_threshold, 7, 0.0f);
    print_bins(nf4_threshold, 15, -1.0f);
    printf("};\n\n__device__ const float bnb_values4[2][16] = {\n    ");
    print_floats(bnb_map4(BNB_FP4), 16);
    printf(",\n    ");
    print_floats(bnb_map4(BNB_NF4), 16);
    printf("};\n");
    return 0;
}
