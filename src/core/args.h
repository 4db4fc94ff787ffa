/*
 * args.h - argument blocks: what a kernel is told, in plain structs
 *
 * Shared by the host and by device code, which is compiled without any include: hence the two guards.  A launcher
 * fills a block once; a kernel only reads it.  Pointers live on the kernel's device.
 */
#ifndef BNB_CORE_ARGS_H
#define BNB_CORE_ARGS_H

#if defined(__CUDACC_RTC__)
typedef unsigned char uint8_t;
typedef signed char int8_t;
typedef unsigned short uint16_t;
typedef unsigned uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif

/* Before a function that is compiled for the host and for CUDA alike. */
#if defined(__CUDACC__)
#define BNB_EITHER_DEVICE static inline __device__
#else
#define BNB_EITHER_DEVICE static inline
#endif

/*
 * The closed form of a dynamic map, which is a decimal floating point: the magnitude codes of decade i,
 * start[i] <= |u| < start[i + 1], are m = trunc(|u| slope[i] + bias[i]), at most last[i], and one less where
 * |u| < threshold[m].  Decade 7 is the single value 1.0.  The last step makes the result exact; NUMERICS rule 5.
 */
struct bnb_dynamic_form {
    float start[9]; /* [8] is +Inf                                                             */
    float slope[8];
    float bias[8];
    int last[8];          /* the largest magnitude code of the decade                                */
    float threshold[257]; /* the smallest |u| that takes magnitude code m; [0] is 0                  */
    int is_signed;        /* the code is 127 + m or 127 - m; else it is m                            */
};

/*
 * 15 thresholds as a search tree: level l is indexed by the l - 1 bits found above it, and u strictly above a threshold
 * gives the bit 1.  8-bit maps: every 16th midpoint, the first half of a bisection.  NF4: all thresholds.  FP4 searches
 * |u| in three levels; its level4 holds the 8 magnitude codes, as integer bits.  NUMERICS rules 4, 6 and 7.
 */
struct bnb_tree4 {
    float root;
    float level2[8], level3[8], level4[8]; /* 2, 4 and 8 are used */
};

/* A sorted 256-entry map made ready for the encoder: NUMERICS rule 4. */
struct bnb_map8 {
    const float *code;                   /* [256] the values                                         */
    const float *midpoint;               /* [256] (code[k] + code[k + 1]) / 2; the last is +Inf      */
    const struct bnb_dynamic_form *form; /* not NULL for the default maps: no search is needed       */
    struct bnb_tree4 tree;               /* of the midpoints 15, 31, ... 239                         */
    int zero;                            /* the code of zero                                         */
};

/* x [n] -> codes [n], absmax [ceil(n / block)] */
struct bnb_quant8_args {
    const void *x;
    uint8_t *codes;
    float *absmax;
    int64_t n;
    int64_t block;
    struct bnb_map8 map;
};

/* The scale of every block: bnb_scales in bitsandbytes.h says what the members mean.  absmax2 NULL: plain. */
struct bnb_scale_args {
    const void *absmax;
    const float *code;
    const float *absmax2;
    const float *offset;
    int64_t block2;
};

/* codes [n] -> out [n] */
struct bnb_dequant8_args {
    const uint8_t *codes;
    void *out;
    int64_t n;
    int64_t block;
    const float *code;
    struct bnb_scale_args scale;
};

/* x [n] -> codes [(n + 1) / 2], absmax [ceil(n / block)] */
struct bnb_quant4_args {
    const void *x;
    uint8_t *codes;
    float *absmax;
    int64_t n;
    int64_t block;
    int type; /* bnb_type4: NF4 or FP4 */
    const struct bnb_tree4 *thresholds;
};

/* codes [(n + 1) / 2] -> out [n] */
struct bnb_dequant4_args {
    const uint8_t *codes;
    void *out;
    int64_t n;
    int64_t block;
    const float *code; /* [16] */
    struct bnb_scale_args scale;
};

/* bnb_gemm4_args, checked.  grad: x is [m, n] and out [m, k]. */
struct bnb_gemm4_block {
    const void *x;
    const uint8_t *codes;
    const void *bias;
    void *out;
    int64_t m, n, k, block;
    const float *code; /* [16], bnb_map4() of a type, else memory of the device */
    struct bnb_scale_args scale;
    int grad;
    int exact;
    const int64_t *first; /* [experts + 1]: bnb_gemm4_args says what; NULL: one weight */
    int64_t experts;
    int64_t start; /* where the weight begins in codes and scales, an element: not 0 for an expert on the CPU */
};

/*
 * What a product kernel reads beside the block: its activations in f32, rows `stride` apart and zero up to there, and
 * the bias in f32.  dtype is that of the result.
 */
struct bnb_dense_args {
    const float *x;
    int64_t stride;
    const float *bias;
    int dtype;
};

/* The inner size up to which int32 sums of int8 products cannot overflow: 2^31 / 128^2, less one. */
#define BNB_MAX_K8 131071

/* bnb_gemm8_args, checked.  sums not NULL: the int32 product is the result.  grad: x is [m, n] and out [m, k]. */
struct bnb_gemm8_block {
    const int8_t *a;
    const int8_t *b;
    const int *product;
    int *sums;
    const float *row_stats;
    const float *col_stats;
    const void *bias;
    int bias_dtype;
    const void *x;
    const int64_t *columns;
    int64_t outliers;
    const uint8_t *outlier; /* [k] flags, or NULL: instead of columns and outliers */
    void *out;
    int64_t m, n, k;
    int grad;
};

/* A layer: outlier [k] is written, NULL where threshold is 0. */
struct bnb_linear8_block {
    const void *x;
    const int8_t *b;
    const float *col_stats;
    const void *bias;
    int bias_dtype;
    uint8_t *outlier;
    void *out;
    int64_t m, n, k;
    float threshold;
};

/* x [rows, cols] -> int8 codes; stats per row, or per column where by_column.  outlier [cols] or NULL. */
struct bnb_rows_args {
    const void *x;
    int8_t *codes;
    float *stats;
    uint8_t *outlier;
    int64_t rows, cols;
    float threshold; /* 0: no outliers */
    int by_column;
};

/* codes [rows, cols] and stats [rows] -> out */
struct bnb_derows_args {
    const int8_t *codes;
    const float *stats;
    void *out;
    int64_t rows, cols;
};

/* ---- optimizers */

/* Which update rule a row of the optimizer table runs; how many f32 values of state an element has under it. */
enum bnb_optim_rule {
    BNB_RULE_ADAM,
    BNB_RULE_ADEMAMIX,
    BNB_RULE_MOMENTUM,
    BNB_RULE_LION,
    BNB_RULE_RMSPROP,
    BNB_RULE_COUNT
};
enum { BNB_MAX_STATES = 3 };

/* What the scalars of an update follow from: a row of the optimizer table and bnb_optim_config, whose names these are. */
struct bnb_optim_recipe {
    int rule, states, decoupled, no_gain;
    int skip_zeros, nesterov, corrected, stochastic;
    double beta1, beta2, beta3, alpha, t_alpha, t_beta3, eps, weight_decay, gnorm_scale, max_unorm;
};

/* The scalars of one update of one tensor, each computed in double and rounded once (NUMERICS rules 12 and 21). */
struct bnb_optim_scalars {
    float beta1, gain1; /* first average: beta1 m + gain1 g            */
    float beta2, gain2; /* second                                       */
    float beta3, gain3; /* ademamix: the slow average                   */
    float mix1, mix2;   /* of ademamix and momentum                     */
    float step_size, eps;
    float decay;       /* what p is multiplied with                     */
    float coupled;     /* weight decay added to the gradient; 0: none   */
    float gnorm_scale;
    int skip_zeros;
};

/* One tensor of one update.  state and absmax: m, v, and the slow average; those that the rule has not are NULL, and
 * absmax is NULL for 32-bit state.  map: of state 0 and 2, and of state 1. */
struct bnb_optim_args {
    void *p;
    const void *g;
    void *state[BNB_MAX_STATES];
    float *absmax[BNB_MAX_STATES];
    int64_t n;
    int dtype; /* bnb_dtype of p and g */
    int bits;
    int stochastic; /* rounding of p: NUMERICS rule 29, with the random key of this tensor and update */
    uint64_t key;
    struct bnb_map8 map[2];
    struct bnb_optim_scalars s;
};

#endif
