/*
 * kernels.h - the table of one CPU instruction set: every kernel for every dtype
 *
 * A kernel handles a range of blocks (or elements) of one argument block on the calling thread.  It checks nothing,
 * allocates nothing and cannot fail.  All tables produce the same bits; docs/KERNELS.md says how they are made.
 */
#ifndef BNB_CPU_KERNELS_H
#define BNB_CPU_KERNELS_H

#include "core/args.h"

/* Bits of the feature mask; each includes the operating system's support for the registers. */
enum {
    BNB_CPU_AVX2 = 1,  /* AVX2, FMA and F16C            */
    BNB_CPU_AVX512 = 2 /* AVX-512 F, BW, DQ and VL      */
};

enum { BNB_FLOATS = 3 }; /* f32, f16, bf16: the values of bnb_dtype that kernels are made for */

struct bnb_cpu_ops {
    const char *name;
    unsigned needs;
    void (*quant8[BNB_FLOATS])(const struct bnb_quant8_args *a, int64_t first_block, int64_t end_block);
    void (*dequant8[BNB_FLOATS])(const struct bnb_dequant8_args *a, int64_t first_block, int64_t end_block);
    void (*quant4[BNB_FLOATS])(const struct bnb_quant4_args *a, int64_t first_block, int64_t end_block);
    void (*dequant4[BNB_FLOATS])(const struct bnb_dequant4_args *a, int64_t first_block, int64_t end_block);
    /* Blocks are of 256 elements; with 32-bit state they are only a unit of work. */
    void (*optim8[BNB_RULE_COUNT][BNB_FLOATS])(const struct bnb_optim_args *a, int64_t first_block, int64_t end_block);
    void (*optim32[BNB_RULE_COUNT][BNB_FLOATS])(const struct bnb_optim_args *a, int64_t first_block, int64_t end_block);
};

extern const struct bnb_cpu_ops bnb_cpu_ops_scalar, bnb_cpu_ops_avx2, bnb_cpu_ops_avx512;

#endif
