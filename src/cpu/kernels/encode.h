/*
 * encode.h - from a scaled value u to the nearest code (NUMERICS rules 4 to 7), in the words of simd_*.h
 *
 * Dynamic maps use their closed form: three small tables in registers and one load of the exact threshold.  Any other
 * sorted map is bisected over its midpoints.  4-bit types walk a tree of thresholds held in registers.
 */
#ifndef BNB_CPU_ENCODE_H
#define BNB_CPU_ENCODE_H

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "core/args.h"
#include "core/scale.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))

/* Before a short loop over an array that is to live in registers. */
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

/* Keeps the compiler from turning the look-ups around it into a gather. */
#define KEEP_SCALAR() __asm__ volatile("")

/* Decade of a, or one less: the bits of a float are a piecewise linear log2.  The step from decade i - 1 to i falls
 * near 4e-7 10^i, well inside [start[i], start[i + 1]), so one comparison with the next start makes it exact. */
#define DECADES_PER_BIT 3.5885571e-8f /* log10(2) / 2^23 */
#define DECADE_OFFSET (-31.83f)       /* 7 - log10(4) - 127 log10(2) */

/* The bias of a decade leans upwards by at most 7e-4, more than the rounding of the line: only a position this close
 * above an integer may be one too high, and is compared with the exact threshold. */
#define NEAR_THRESHOLD 0x1p-9f

struct dynamic_tables {
    lut8 next_start, slope, bias;
    lut8i last;
    const float *threshold;
};

static ALWAYS_INLINE struct dynamic_tables dynamic_load(const struct bnb_dynamic_form *f)
{
    return (struct dynamic_tables){lut8_load(f->start + 1), lut8_load(f->slope), lut8_load(f->bias),
                                   lut8i_load(f->last), f->threshold};
}

/* The magnitude code of a >= 0, not NaN. */
static ALWAYS_INLINE vi encode_magnitude(vf a, const struct dynamic_tables *t)
{
    const vf log = vf_add(vf_mul(vf_of_vi(vi_bits(a)), vf_set(DECADES_PER_BIT)), vf_set(DECADE_OFFSET));
    const vi low = vi_trunc(vf_max(log, vf_set(0.0f)));
    const vi decade = vi_sub(low, vi_of_mask(vf_le(lut8_at(t->next_start, low), a)));
    const vf position = vf_add(vf_mul(a, lut8_at(t->slope, decade)), lut8_at(t->bias, decade));
    const vi guess = vi_trunc(position), m = vi_min(guess, lut8i_at(t->last, decade));
    const vm near = vf_lt(vf_sub(position, vf_of_vi(guess)), vf_set(NEAR_THRESHOLD));
    if (__builtin_expect(!vm_any(near), 1))
        return m;
    return vi_add(m, vi_of_mask(vf_lt(a, vf_gather(t->threshold, m))));
}

static ALWAYS_INLINE vi encode_dynamic_signed(vf u, const struct dynamic_tables *t)
{
    const vi sign = vi_sign(u), m = encode_magnitude(vf_abs(u), t);
    return vi_max(vi_add(vi_sub(vi_xor(m, sign), sign), vi_set(127)), vi_set(0)); /* there is no -1.0 */
}

/* Unsigned: negative values take the code of zero. */
static ALWAYS_INLINE vi encode_dynamic_unsigned(vf u, const struct dynamic_tables *t)
{
    return encode_magnitude(vf_max(u, vf_set(0.0f)), t);
}

/* A tree of up to 15 thresholds: the root, two, four and eight, each level indexed by the bits found above it. */
struct tree4 {
    vf root;
    lut8 level2, level3, level4;
};

static ALWAYS_INLINE struct tree4 tree4_load(const struct bnb_tree4 *t)
{
    return (struct tree4){vf_set(t->root), lut8_load(t->level2), lut8_load(t->level3), lut8_load(t->level4)};
}

/* k, then one more bit: is u above the threshold that k selects? */
static ALWAYS_INLINE vi tree4_step(vf u, vi k, lut8 level)
{
    return vi_sub(vi_add(k, k), vi_of_mask(vf_lt(lut8_at(level, k), u)));
}

/* How many of 15 thresholds lie strictly below u; 0 for NaN. */
static ALWAYS_INLINE vi tree4_count(vf u, const struct tree4 *t)
{
    vi k = vi_sub(vi_set(0), vi_of_mask(vf_lt(t->root, u)));
    k = tree4_step(u, k, t->level2);
    k = tree4_step(u, k, t->level3);
    return tree4_step(u, k, t->level4);
}

/* The number of midpoints below u, and one more where u is on a midpoint and the index is odd.  The first four levels of
 * the bisection are a tree in registers. */
static ALWAYS_INLINE vi encode_sorted(vf u, const float *midpoint, const struct tree4 *t)
{
    vi k = vi_mul16(tree4_count(u, t));
    for (int step = 8; step > 0; step /= 2) {
        const vi up = vi_of_mask(vf_lt(vf_gather(midpoint + step - 1, k), u));
        k = vi_add(k, vi_and(up, vi_set(step)));
    }
    const vi tie = vi_of_mask(vf_eq(vf_gather(midpoint, k), u));
    return vi_add(k, vi_and(vi_and(tie, k), vi_set(1)));
}

/* ---- any 8-bit map */

enum { ENCODE_SORTED, ENCODE_SIGNED, ENCODE_UNSIGNED };

static inline int encode_kind(const struct bnb_map8 *map)
{
    return !map->form ? ENCODE_SORTED : map->form->is_signed ? ENCODE_SIGNED : ENCODE_UNSIGNED;
}

/* A map ready in registers; `kind`, a constant, says which half is filled. */
struct encoder8 {
    int kind;
    struct dynamic_tables form;
    struct tree4 tree;
    const float *midpoint;
};

static ALWAYS_INLINE struct encoder8 encoder8_load(const struct bnb_map8 *map, int kind)
{
    struct encoder8 e = {.kind = kind, .midpoint = map->midpoint};
    if (kind == ENCODE_SORTED)
        e.tree = tree4_load(&map->tree);
    else
        e.form = dynamic_load(map->form);
    return e;
}

/* u is not NaN. */
static ALWAYS_INLINE vi encode8(vf u, const struct encoder8 *e)
{
    return e->kind == ENCODE_SORTED   ? encode_sorted(u, e->midpoint, &e->tree)
           : e->kind == ENCODE_SIGNED ? encode_dynamic_signed(u, &e->form)
                                      : encode_dynamic_unsigned(u, &e->form);
}

/* ---- 4-bit types.  Values of bnb_type4 that have an encoder. */
enum { TYPE_FP4 = 1, TYPE_NF4 = 2 };

/* The magnitude's position among 7 thresholds, translated to its code; bit 3 is u < 0. */
static ALWAYS_INLINE vi encode_fp4(vf u, const struct tree4 *t)
{
    const vf a = vf_abs(u);
    vi k = vi_sub(vi_set(0), vi_of_mask(vf_lt(t->root, a)));
    k = tree4_step(a, k, t->level2);
    k = tree4_step(a, k, t->level3);
    const vi sign = vi_and(vi_of_mask(vf_lt(u, vf_set(0.0f))), vi_set(8));
    return vi_or(vi_bits(lut8_at(t->level4, k)), sign); /* level4 holds the codes, as integer bits */
}

#endif
