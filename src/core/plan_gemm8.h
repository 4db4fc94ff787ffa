/*
 * plan_gemm8.h - which kernel multiplies by an int8 weight: a function of shape and card alone
 */
#ifndef BNB_CORE_PLAN_GEMM8_H
#define BNB_CORE_PLAN_GEMM8_H

#include <stdbool.h>
#include <stdint.h>

enum bnb_gemm8_way {
    BNB_GEMM8_PLAIN,  /* any shape, any card                                                        */
    BNB_GEMM8_MMA,    /* matrix units, tiles of 128 rows and 128 tokens                             */
    BNB_GEMM8_NARROW, /* 9.0: few tokens, the sum of a tile over `split` blocks                     */
    BNB_GEMM8_WIDE    /* 9.0: many tokens, blocks that stay, `share` of which load tokens together */
};

struct bnb_gemm8_card {
    int capability; /* 90 for 9.0 */
    int sms;
    bool bulk; /* driver and device code are there for bulk copies and clusters */
};

/* [m, k] times [n, k]^T; whole: both matrices can be read in pieces of 16 bytes. */
struct bnb_gemm8_shape {
    int64_t m, n, k;
    bool whole;
};

/* tokens: of a tile.  split: 1, 2, 4 or 8.  share: 1 or 2.  group: rows of tiles that are neighbours in time. */
struct bnb_gemm8_plan {
    enum bnb_gemm8_way way;
    int tokens, split, share, group;
};

struct bnb_gemm8_plan bnb_plan_gemm8(const struct bnb_gemm8_shape *shape, const struct bnb_gemm8_card *card);

/* Are activations of so many bytes few enough to be read twice, by different blocks? */
bool bnb_plan_linear8_twice(int64_t bytes);

/* Are outlier columns listed, and activations in them gathered, before the product and not by its tiles? */
bool bnb_plan_linear8_lists(const struct bnb_gemm8_plan *plan, int64_t k);

/* The gradient, [m, n] times [n, k]: tokens of a tile on 9.0, 128 or 256; 0: the plain kernel.  whole: both matrices can be
 * read, and the result written, in pieces of 16 bytes. */
int bnb_plan_gemm8_grad(const struct bnb_gemm8_shape *shape, const struct bnb_gemm8_card *card);

/* A plan from text, "wide 256 1 2 8", "narrow 8 4", "mma", "plain": what is left out stays as in *plan.  False, and *plan
 * untouched: it names nothing that can run this shape on this card. */
bool bnb_plan_gemm8_named(const char *text, const struct bnb_gemm8_shape *shape, const struct bnb_gemm8_card *card,
                          struct bnb_gemm8_plan *plan);

#endif
