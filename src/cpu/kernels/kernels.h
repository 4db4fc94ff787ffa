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
    BNB_CPU_AVX512 = 2, /* AVX-512 F, BW, DQ and VL      */
    BNB_CPU_VNNI = 4    /* AVX-512 VNNI                  */
};

enum { BNB_GEMV_ROWS = 4 };

enum { BNB_FLOATS = 3 }; /* f32, f16, bf16: the values of bnb_dtype that kernels are made for */

struct bnb_cpu_ops {
    const char *name;
    unsigned needs;
    void (*quant8[BNB_FLOATS])(const struct bnb_quant8_args *a, int64_t first_block, int64_t end_block);
    void (*dequant8[BNB_FLOATS])(const struct bnb_dequant8_args *a, int64_t first_block, int64_t end_block);
    void (*quant4[BNB_FLOATS])(const struct bnb_quant4_args *a, int64_t first_block, int64_t end_block);
    void (*dequant4[BNB_FLOATS])(const struct bnb_dequant4_args *a, int64_t first_block, int64_t end_block);
    /* Blocks are of 256 elements; with 32-bit state they are only a unit of work. */
    void (*optim8[BNB_RULE_COUNT])(const struct bnb_optim_args *a, int64_t first_block, int64_t end_block);
    void (*optim32[BNB_RULE_COUNT])(const struct bnb_optim_args *a, int64_t first_block, int64_t end_block);
    /* sums += {sum of u^2, sum of p^2} of the blocks: NUMERICS rule 27 */
    void (*optim_norms[BNB_RULE_COUNT])(const struct bnb_optim_args *a, int64_t first_block, int64_t end_block,
                                        double sums[2]);
    double (*square_blocks)(int dtype, const void *x, int64_t n);
    /* Matrix products.  Ranges count tiles of columns of the result; the launcher has brought x to f32 (widen) or to
     * packed integers (pack8).  gemv4: up to BNB_GEMV_ROWS rows, packed by pack_pairs; k and block are whole runs. */
    int tile_columns; /* of gemm4_dot, gemv4, gemm8_dot */
    int axpy_columns; /* of gemm4_axpy, gemm8_axpy      */
    int run;          /* of gemv4: elements that pack_pairs reorders */
    int pack8_bytes;  /* of one packed int8 activation  */
    int int16_rows;   /* most rows of a 16-bit dtype that gemv4_int16 should take; 0: it is NULL */
    int int16_step;   /* of gemv4_int16: k is a multiple  */
    void (*widen[BNB_FLOATS])(const void *x, int64_t n, float *out);
    void (*gemm4_dot)(const struct bnb_gemm4_block *g, const struct bnb_dense_args *d, int64_t first, int64_t end);
    void (*gemm4_axpy)(const struct bnb_gemm4_block *g, const struct bnb_dense_args *d, int64_t first, int64_t end);
    void (*pack_pairs)(const float *x, int64_t k, float *out);
    void (*gemv4)(const struct bnb_gemm4_block *g, const struct bnb_dense_args *d, int64_t first, int64_t end);
    /* The same in 16-bit integers, for block a multiple of 64: rows of k integers and k / 64 scales. */
    void (*pack16)(const float *x, int64_t k, int16_t *out, float *scale);
    void (*gemv4_int16)(const struct bnb_gemm4_block *g, const struct bnb_dense_args *d, const int16_t *x,
                        const float *scale, int64_t first, int64_t end);
    void (*pack8)(const int8_t *a, int64_t n, int64_t padded, void *out);
    void (*gemm8_dot)(const struct bnb_gemm8_block *g, const struct bnb_dense_args *d, const void *packed,
                      int64_t stride, int64_t first, int64_t end);
    void (*gemm8_axpy)(const struct bnb_gemm8_block *g, const struct bnb_dense_args *d, int64_t first, int64_t end);
    void (*quant_rows[BNB_FLOATS])(const struct bnb_rows_args *a, int64_t first, int64_t end);
    void (*dequant_rows[BNB_FLOATS])(const struct bnb_derows_args *a, int64_t first, int64_t end);
};

extern const struct bnb_cpu_ops bnb_cpu_ops_scalar, bnb_cpu_ops_avx2, bnb_cpu_ops_avx512, bnb_cpu_ops_avx512vnni;

#endif
