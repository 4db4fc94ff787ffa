/*
 * maps.c - the default 8-bit maps made ready for the encoders, once, when the library is loaded
 *
 * A loader constructor fills them: afterwards they are read only, so no call needs a lock.
 */
#include <math.h>
#include <string.h>

#include "core/internal.h"

static float signed_code[256], signed_midpoint[256], unsigned_code[256], unsigned_midpoint[256];
static struct bnb_dynamic_form signed_form, unsigned_form;

struct bnb_map8 bnb_map_signed, bnb_map_unsigned;

struct bnb_tree4 bnb_tree_nf4, bnb_tree_fp4;

/* Level by level: the threshold in the middle of each remaining range. */
static void fill_tree(const float *threshold, int count, struct bnb_tree4 *tree)
{
    float *level[3] = {tree->level2, tree->level3, tree->level4};
    tree->root = threshold[count / 2];
    for (int l = 0, width = (count + 1) / 4; width > 0; l++, width /= 2)
        for (int k = 0, at = width - 1; at < count; k++, at += 2 * width)
            level[l][k] = threshold[at];
}

/* The nearest code of 0, the even index on a tie: NUMERICS rule 4. */
static int code_of_zero(const float *midpoint)
{
    int k = 0;
    while (k < 255 && midpoint[k] < 0.0f)
        k++;
    return k + (k % 2 == 1 && midpoint[k] == 0.0f);
}

static struct bnb_map8 make_map(const float *code, float *midpoint)
{
    struct bnb_map8 map = {.code = code, .midpoint = midpoint};
    float every_16th[15];
    for (int k = 0; k < 255; k++)
        midpoint[k] = (code[k] + code[k + 1]) * 0.5f;
    midpoint[255] = INFINITY;
    for (int k = 0; k < 15; k++)
        every_16th[k] = midpoint[16 * k + 15];
    fill_tree(every_16th, 15, &map.tree);
    map.zero = code_of_zero(midpoint);
    return map;
}

/* The magnitudes of a default map: code[zero + m], m = 0 .. top. */
static void fill_form(struct bnb_map8 *map, struct bnb_dynamic_form *form)
{
    map->form = form;
    const int zero = map->zero, top = 255 - zero;
    form->is_signed = zero != 0;
    for (int m = 1; m <= 256; m++)
        form->threshold[m] = INFINITY;
    for (int m = 1; m <= top; m++) { /* a tie takes the even index: the upper one may need strictly more */
        const float tie = map->midpoint[zero + m - 1];
        form->threshold[m] = (zero + m) % 2 == 0 ? tie : nextafterf(tie, INFINITY);
    }
    int base = 1;
    double scale = 1e6; /* 10^(6 - i) */
    for (int i = 0; i < 7; i++, scale /= 10) {
        const int cells = form->is_signed ? 1 << i : 2 << i;
        form->start[i] = form->threshold[base];
        form->slope[i] = (float)(scale * cells / 0.9);
        form->bias[i] = (float)(base - cells / 9.0 + 1e-5 * (1 << i));
        form->last[i] = base + cells - 1;
        base += cells;
    }
    /* Below decade 0 lies zero, whose threshold is no cell edge: a line through the first two thresholds instead. */
    form->slope[0] = 1.0f / (form->threshold[2] - form->threshold[1]);
    form->bias[0] = 1.0f - form->threshold[1] * form->slope[0] + 1e-5f;
    form->start[7] = form->threshold[top];
    form->slope[7] = 0.0f;
    form->bias[7] = (float)top + 0.5f;
    form->last[7] = top;
    form->start[8] = INFINITY;
}

/* FP4's thresholds on |u|, ascending, and the magnitude code above each.  The decimals are part of the format. */
const float bnb_fp4_threshold[7] = {0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f,
                                    0.4166667f,  0.583333f,  0.8333333f};
const unsigned bnb_fp4_order[8] = {0, 1, 6, 7, 4, 5, 2, 3};

static void fill_trees(void)
{
    float nf4_threshold[15];
    for (int k = 0; k < 15; k++)
        nf4_threshold[k] = (bnb_map4(BNB_NF4)[k] + bnb_map4(BNB_NF4)[k + 1]) * 0.5f;
    fill_tree(nf4_threshold, 15, &bnb_tree_nf4);
    fill_tree(bnb_fp4_threshold, 7, &bnb_tree_fp4);
    memcpy(bnb_tree_fp4.level4, bnb_fp4_order, sizeof bnb_fp4_order);
}

__attribute__((constructor)) static void fill_maps(void)
{
    bnb_create_dynamic_map(true, 7, 8, signed_code);
    bnb_create_dynamic_map(false, 7, 8, unsigned_code);
    bnb_map_signed = make_map(signed_code, signed_midpoint);
    bnb_map_unsigned = make_map(unsigned_code, unsigned_midpoint);
    fill_form(&bnb_map_signed, &signed_form);
    fill_form(&bnb_map_unsigned, &unsigned_form);
    fill_trees();
}

struct bnb_map8 bnb_prepare_map(const float *code, float *midpoint)
{
    if (!memcmp(code, signed_code, sizeof signed_code))
        return bnb_map_signed;
    if (!memcmp(code, unsigned_code, sizeof unsigned_code))
        return bnb_map_unsigned;
    return make_map(code, midpoint);
}
