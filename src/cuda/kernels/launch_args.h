/*
 * launch_args.h - what a kernel is told beyond the argument blocks of core/args.h
 *
 * A kernel takes one struct by value.  `vector` says that every buffer is aligned for the widest access that the kernel
 * makes; without it, elements are moved one by one.
 */
#ifndef BNB_CUDA_LAUNCH_ARGS_H
#define BNB_CUDA_LAUNCH_ARGS_H

#include "core/args.h"
#include "core/optim_plan.h"

#if defined(__CUDACC__)
#define BNB_CUDA_ALIGN64 __align__(64)
#else
#define BNB_CUDA_ALIGN64 _Alignas(64)
#endif

/* block == 1 << shift, 32..4096. */
struct bnb_cuda_quant4 {
    struct bnb_quant4_args a;
    int shift, vector;
};

struct bnb_cuda_dequant4 {
    struct bnb_dequant4_args a;
    int type, shift, vector; /* a.code is the host's: the type says which values */
};

/* shift: of a block that is a power of two, 32..4096; the kernel for any block reads `lanes`, threads that share one. */
struct bnb_cuda_quant8 {
    struct bnb_quant8_args a;
    int shift, vector, lanes;
};

struct bnb_cuda_dequant8 {
    struct bnb_dequant8_args a;
    int shift, vector; /* shift of a block that is a power of two, 8 or more; not read by the kernel for any */
};

/* One level of the sum of NUMERICS rule 9: the runs of 1024 values of x (f32) or of partial (double). */
struct bnb_cuda_sum {
    const float *x;
    const double *partial;
    double *sums; /* [ceil(n / 1024)] */
    int64_t n;
};

/* mean: total / n rounded once, to `offset`; centred[i] = x[i] - offset */
struct bnb_cuda_centre {
    const float *x;
    const double *total;
    float *offset, *centred;
    int64_t n;
};

/* out [n]: scales as f32 */
struct bnb_cuda_expand {
    struct bnb_scale_args scale;
    float *out;
    int64_t n;
};

/* ---- optimizers: tables that a call writes into workspace */

/* The elements that a block of threads takes at a time: eight blocks of state, one for each warp. */
enum { BNB_CUDA_CHUNK = 2048 };

/* One tensor of a step, or a piece of one that begins with a block.  States: the two, and the slow average of ademamix. */
struct bnb_cuda_tensor {
    void *p;
    const void *g;
    void *state[BNB_MAX_STATES];
    float *absmax[BNB_MAX_STATES];
    int64_t n;
    int64_t first; /* its first chunk, or run where norms are measured, among those of all tensors of a launch */
    uint64_t key;  /* of stochastic rounding, plus the blocks before the piece */
    int plan;      /* index of its scalars */
    int dtype, bits, vector;
};

struct bnb_cuda_optim {
    const struct bnb_cuda_tensor *tensors;
    const struct bnb_optim_plan *plans;
    const float *map1, *map2; /* NULL without 8-bit state */
    double *partial;          /* norms: [runs][2] */
    int64_t chunks;           /* norms: runs */
    int count, stochastic;
};

/* Where the host cannot know an update's scalars: what they follow from, on the device. */
struct bnb_cuda_origin {
    float *step_count; /* NULL: step */
    const float *gnorm_scale;
    float *unorm;
    uint64_t seed;
    int64_t step;
    int piece, pieces; /* of the tensor, in the table */
};

struct bnb_cuda_planner {
    struct bnb_optim_recipe recipe;
    const struct bnb_cuda_origin *origins;
    struct bnb_cuda_tensor *tensors; /* the keys, so far the blocks before a piece, are completed */
    struct bnb_optim_plan *plans;
    const float *lr_value; /* NULL: lr */
    const double *norms;   /* NULL: no trust clipping */
    double lr;
    int count, advance; /* advance: step counts go on, unorm is written */
};

struct bnb_cuda_gradient {
    const void *g;
    int64_t n, first;
    int dtype;
};

/* The runs of gradients to sums of squares; and the sums of runs to those of tensors, `width` of two apart. */
struct bnb_cuda_squares {
    const struct bnb_cuda_gradient *gradients;
    double *partial;
    int64_t runs;
    int count;
};

struct bnb_cuda_total {
    const double *partial;
    const int64_t *first; /* [count + 1] */
    double *norms;
    int count, width;
};

struct bnb_cuda_history {
    float *history;
    const float *step_count; /* NULL: step */
    int64_t step;
};

struct bnb_cuda_clip {
    const struct bnb_cuda_history *tensors;
    const double *norms;
    float *report;
    int count, percentile;
};

/* Words that a launch carries to the device in its arguments. */
enum { BNB_CUDA_CARRIED = 3840 };

struct bnb_cuda_carry {
    void *to;
    int words;
    unsigned word[BNB_CUDA_CARRIED / 4];
};

/* ---- products */

/* type: bnb_type4, or 0 where g.code is memory of the device.  shift: of a block.  Every row of the weight begins a whole
 * group of eight: `whole`; x (and codes, of few rows) can be read, and out written, in wide accesses: vector, store. */
struct bnb_cuda_gemm4 {
    struct bnb_gemm4_block g;
    int type, shift, whole, vector, store;
};

/*
 * The fast products by a 4-bit weight.  values: those of the codes times a gain, chosen so that they round well; shrink is
 * 1 / gain.  shift2: of block2, a power of two.  store: out can be written in wide accesses.
 *   first    [experts + 1]: the weight is [experts, n, k], and rows first[e] to first[e + 1] of x and out are expert e's;
 *            NULL: one weight, and all m rows
 *   partial  [splits][m][n]: sums of the splits of K, added by another kernel; NULL without splits
 *   meet     [tiles of 128 columns][2][128][tokens / 2]: where the two blocks of a cluster, with half of a split each,
 *            exchange sums, for kernels that do
 *   steps    along K, of each split or half of one
 *   few      a block of threads multiplies `bands` bands of rows of the weight; a band's K lies with `slices` warps in
 *            turn.  depth: steps under way, of `stage` bytes each
 */
struct bnb_cuda_gemm4_fast {
    struct bnb_gemm4_block g;
    const int64_t *first;
    float *partial, *meet;
    float values[16], shrink;
    int shift, shift2, experts, splits, steps, store;
    int bands, slices, depth, stage;
};

/* What the driver makes of the shape of a tensor, for bulk copies of its boxes: cuTensorMapEncodeTiled's CUtensorMap. */
struct bnb_cuda_map { BNB_CUDA_ALIGN64 uint64_t word[16]; };

/* Many rows of activations on 9.0; a step is 64 of K, gain that of f16. */
struct bnb_cuda_gemm4_wide {
    struct bnb_cuda_map x, codes;
    struct bnb_cuda_gemm4_fast fast;
};

/* partial [splits][m][n] + bias -> out [m, n] */
struct bnb_cuda_gemm4_sum {
    const float *partial;
    const void *bias;
    void *out;
    int64_t m, n;
    int splits;
};

/* count: how many columns of outliers there are; NULL: g.outliers.  threshold: as below.  codes, vector, store: a and b, x,
 * and out can be moved in wide accesses. */
struct bnb_cuda_gemm8 {
    struct bnb_gemm8_block g;
    const int64_t *count;
    float threshold;
    int codes, vector, store;
};

/*
 * A product on matrix units.  dtype: of x and out; store: out can be written in accesses of 16 bytes; the maps are those of
 * b and a, for kernels that copy in bulk.  threshold 0: the codes in outlier columns are 0; else they stand as that of
 * the quantiser made them.  mask: bits of the outlier columns, for kernels that copy in bulk, where there are flags; for
 * some of them also list, the first 64 of the columns and how many there are, and values, of 16-bit activations in these,
 * beside their codes, by sixteen columns all tokens.
 * split: blocks of threads that share the sum of a tile; share: those, of neighbouring tiles, that load the same
 * activations once; group: rows of tiles of a band.
 */
struct bnb_cuda_product8 {
    struct bnb_cuda_map weight, tokens;
    struct bnb_gemm8_block g;
    const unsigned *mask;
    int *list;
    void *values;
    float threshold;
    int dtype, store, split, share, group;
};

/* Words of the bits of k columns, bit c % 32 of word c / 32: whole pieces of 32 bytes. */
#define BNB_CUDA_MASK_WORDS(k) (((k) + 255) / 256 * 8)

struct bnb_cuda_rows8 {
    struct bnb_rows_args a;
    int vector;
};

/* Rows that a block holds: as bnb_rows_args, but codes in outlier columns stay.  column_stats [cols] or NULL, zero before.
 * mask: the flags as bits too, or NULL.  a.outlier and mask, where there are any, are zero before, and rows set them; or
 * row_blocks is not 0: so many blocks take rows, and a block for each word of the mask, behind them, finds the flags. */
struct bnb_cuda_held8 {
    struct bnb_rows_args a;
    float *column_stats;
    unsigned *mask;
    int64_t row_blocks;
    int vector;
};

struct bnb_cuda_derows8 {
    struct bnb_derows_args a;
    int vector;
};

/* flags [n] -> columns [n], of which *count are written */
struct bnb_cuda_outliers8 {
    const uint8_t *flags;
    int64_t *columns, *count;
    int64_t n;
};

/* x [rows, cols] and columns [count] -> out [rows, count]; elements of `size` bytes */
struct bnb_cuda_gather8 {
    const void *x;
    const int64_t *columns;
    void *out;
    int64_t rows, cols, count;
    int size;
};

/* ---- quantiles */

enum { BNB_CUDA_RANKS = 256 };

/* A wanted rank: the bits of its key found so far, the rest zero, and its rank among the values with these bits. */
struct bnb_cuda_target {
    int64_t rank;
    uint32_t key;
};

/* Workspace is zero at first.  Widths are in bits; a block of threads has 1 << spread counters in its second pass. */
struct bnb_cuda_quantile {
    const void *x;
    int64_t n;
    struct bnb_cuda_target *targets[2]; /* [count], after the first pass and after the second          */
    uint64_t *groups;                   /* [(1 << first) / 32] sums of the counters of the first digit */
    uint64_t *counts[3];                /* [1 << first], [1 << spread], [256 << rest of the key]       */
    float *out;                         /* [count]                                                     */
    int count, first, spread, lines;    /* lines: of the cache of counters of the third pass           */
};

struct bnb_cuda_ranks {
    struct bnb_cuda_quantile q;
    int64_t rank[BNB_CUDA_RANKS];
};

#endif
