/*
 * bitsandbytes.h - the public C interface of libbitsandbytes: k-bit quantisation and 8-bit optimizers
 *
 * Conventions, true of every function below:
 *   - The caller owns every buffer.  Sizes are 64-bit element counts, arrays are contiguous and row-major; a quantisation
 *     block is a run of `block` consecutive elements of the flattened array, and the last one may be short.
 *   - All arguments are checked before anything is written: a call that fails its checks has changed nothing.
 *   - The result is a bnb_status; bnb_detail() then names the argument, its value and what was expected.
 *   - The library prints nothing, starts no thread, and holds no state but tables computed when it is loaded.
 *   - Numbers follow docs/NUMERICS.md, byte layouts docs/FORMAT.md.  Both are the same on every device.
 */
#ifndef BITSANDBYTES_H
#define BITSANDBYTES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define BNB_API __attribute__((visibility("default")))
#else
#define BNB_API
#endif

/* The one place where the version is written; the build and the Python package read it from here. */
#define BNB_VERSION "1.0.0"

/* "1.0.0": the version of the library that was loaded, which may differ from the header's BNB_VERSION. */
BNB_API const char *bnb_version(void);

/* ---------------------------------------------------------------- status */

/* X(name, value, text).  Values never change meaning; new ones are appended. */
#define BNB_STATUS_MAP(X)                                       \
    X(OK, 0, "success")                                         \
    X(EINVAL, 1, "an argument is out of range")                 \
    X(EDTYPE, 2, "the operation does not support this dtype")   \
    X(ECUDA, 3, "the CUDA driver refused a call")               \
    X(ENOMEM, 4, "out of memory")                               \
    X(EDEVICE, 5, "the device is absent or has no such kernel") \
    X(ENOTSUP, 6, "a valid request that is not implemented")

typedef enum bnb_status {
#define X(name, value, text) BNB_##name = value,
    BNB_STATUS_MAP(X)
#undef X
} bnb_status;

/* The fixed text of a status; "unknown status" for a value outside the list.  Never NULL. */
BNB_API const char *bnb_strerror(bnb_status status);

/* What the last failing call on this thread said: "quantize4: block is 48, expected a power of two, 32..4096".
 * Never NULL; "" before the first failure.  Valid until the next failing call on this thread. */
BNB_API const char *bnb_detail(void);

/* The status of the last failing call on this thread; BNB_OK before the first failure. */
BNB_API bnb_status bnb_last_status(void);

/* ---------------------------------------------------------------- dtypes and devices */

typedef enum bnb_dtype {
    BNB_F32 = 0,  /* IEEE binary32                              */
    BNB_F16 = 1,  /* IEEE binary16                              */
    BNB_BF16 = 2, /* the upper half of a binary32 (bfloat16)    */
    BNB_U8 = 3,   /* unsigned 8-bit: codes                      */
    BNB_I8 = 4    /* signed 8-bit: LLM.int8() weights           */
} bnb_dtype;

/* Bytes of one element; 0 for a value outside the list. */
BNB_API size_t bnb_dtype_size(bnb_dtype dtype);

typedef enum bnb_device { BNB_CPU = 0, BNB_CUDA = 1 } bnb_device;

/* One piece of a parallel loop: handles the indices begin .. end - 1. */
typedef void (*bnb_range_fn)(void *arg, int64_t begin, int64_t end);

/*
 * bnb_exec - where and how a call runs.  NULL stands for the CPU, one thread, malloc.
 * Plain data, owned by the caller, read only during the call.  Zero every member that is not used.
 */
typedef struct bnb_exec {
    size_t size;       /* sizeof(bnb_exec) as the caller compiled it; members may be appended later       */
    bnb_device device; /* where every buffer of the call lives                                            */
    int ordinal;       /* which device of that kind; 0 for the CPU                                        */
    void *stream;      /* CUstream that orders the call; ignored by the CPU                               */
    void *context;     /* handed to the three callbacks                                                   */
    /* Workspace on `device`, 64-byte aligned, or NULL when memory is out.  NULL callbacks: malloc, CPU only. */
    void *(*alloc)(void *context, size_t bytes);
    void (*free)(void *context, void *ptr, size_t bytes);
    /* Calls body(arg, begin, end) on ranges that cover 0 .. n - 1 once each, any order, any threads, about `grain`
     * indices or more each; returns when all are done.  NULL: the calling thread does everything. */
    void (*parallel_for)(void *context, int64_t n, int64_t grain, bnb_range_fn body, void *arg);
} bnb_exec;

/* The CPU instruction set in use: "avx2", "scalar", ...  Chosen once, when first needed; the environment
 * variable BNB_CPU_ISA may name a lesser one. */
BNB_API const char *bnb_cpu_isa(void);

/* Where the memory at `ptr` is, for a caller who was given an address alone: an address that the CUDA driver does not
 * know, and every address if no CUDA driver is loaded, is the CPU's (ordinal 0).  BNB_EINVAL if an argument is NULL. */
BNB_API bnb_status bnb_pointer_device(const void *ptr, bnb_device *device, int *ordinal);

/* Which code would run on a CUDA device, or why none: "machine code of 9.0", "source, compiled on first use by NVRTC 13.0
 * for sm_90 (...)".  Writes at most `size` bytes to text, closed by a zero byte; launches nothing.  BNB_EINVAL, and
 * BNB_EDEVICE with the reason where there is no CUDA driver or no such device. */
BNB_API bnb_status bnb_cuda_card_text(int ordinal, char *text, size_t size);

/* ---------------------------------------------------------------- codebooks */

/*
 * A codebook ("map") is 256 ascending f32 values; a code is an index into it.  Types with fewer than 256 values are
 * filled up with zeros.  These functions run on the host, need no device and write `map` only on success.
 * Layout and anchor values: docs/FORMAT.md, section 1.
 */

/* Dynamic tree map of total_bits bits, of which max_exponent_bits may be exponent.  total_bits 1..8, max_exponent_bits
 * 1..total_bits if signed, 1..total_bits - 1 (at least 1) if unsigned.  Dettmers 2015, "8-Bit Approximations for
 * Parallelism in Deep Learning"; as used in Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization".
 * BNB_EINVAL if the map would not have exactly 2^total_bits values. */
BNB_API bnb_status bnb_create_dynamic_map(bool is_signed, int max_exponent_bits, int total_bits, float map[256]);

/* Evenly spaced values on [-1, 1] or [0, 1].  total_bits 1..8.  add_zero: an odd number of points when signed. */
BNB_API bnb_status bnb_create_linear_map(bool is_signed, int total_bits, bool add_zero, float map[256]);

/* Small float formats, divided by their maximum: exponent_bits >= 1, precision_bits >= 0, and
 * is_signed + exponent_bits + precision_bits == total_bits, 2..8. */
BNB_API bnb_status bnb_create_fp8_map(bool is_signed, int exponent_bits, int precision_bits, int total_bits,
                                      float map[256]);

/* Quantiles of the normal distribution: 8 positive values (7 without use_extra_value) and 7 negative ones.
 * 0.5 < offset < 1.  offset 0.9677083 gives the NF4 values.  Dettmers et al. 2023 (QLoRA), section 3. */
BNB_API bnb_status bnb_create_normal_map(double offset, bool use_extra_value, float map[256]);

/* A map from quantiles of data, as bnb_estimate_quantiles() gives them: sorted, one zero added, divided by the largest
 * magnitude.  quantiles [count], host memory, finite; count 1..255. */
BNB_API bnb_status bnb_create_quantile_map(const float *quantiles, int count, float map[256]);

typedef enum bnb_type4 {
    BNB_FP4 = 1, /* 1 sign, 2 exponent, 1 mantissa bit                         */
    BNB_NF4 = 2, /* quantiles of the normal distribution: QLoRA                */
    BNB_INT4 = 3, /* -7 .. 7; a table only: no quantiser takes it              */
    BNB_AF4 = 4  /* Yoshida 2023, "NF4 Isn't Information Theoretically Optimal"; a table only */
} bnb_type4;

/* The 16 values of a 4-bit type, divided by their largest magnitude, in code order. */
BNB_API bnb_status bnb_get_4bit_map(bnb_type4 type, float map[16]);

/* The inverse, for the types that have a quantiser: NF4 or FP4, whichever has exactly these values, in host memory.
 * BNB_ENOTSUP if neither has. */
BNB_API bnb_status bnb_find_4bit_map(const float map[16], bnb_type4 *type);

/*
 * bnb_estimate_quantiles() - exact order statistics of n values
 *   x     [n]      f32, f16 or bf16; n >= 1.  NaN sorts above every number
 *   out   [count]  f32, on the same device: entry j is the element of rank rint(p * (n - 1)), where p is probability
 *                  offset + t (1 - 2 offset) / 255 with t = j for count 256, else t = trunc(linspace(0, 255, count)[j])
 *   offset         in [0, 0.5]; 1/512 with a count below 256 stands for 1 / (2 count); count 1..256
 * Workspace: up to 33 MiB for large n.  BNB_EINVAL, BNB_ENOTSUP (other dtypes, count > 256), BNB_ENOMEM.
 */
BNB_API bnb_status bnb_estimate_quantiles(const bnb_exec *ex, const void *x, bnb_dtype dtype, int64_t n, double offset,
                                          int count, float *out);

/* ---------------------------------------------------------------- block-wise quantisation */

/*
 * bnb_quantize8() - quantise n values to 8-bit codes, one scale per block
 *   x       [n]                f32, f16 or bf16
 *   code    [256]              ascending map (not checked); the default one is the signed dynamic map
 *   codes   [n]                out: index of the nearest entry to x / absmax (NUMERICS rules 3 and 4)
 *   absmax  [ceil(n / block)]  out: largest |x| of each block, in the unit of x
 *   block   any value > 0
 * Nothing is allocated.  BNB_EINVAL, BNB_EDTYPE, BNB_EDEVICE.  Dettmers et al. 2021, section 2.
 */
BNB_API bnb_status bnb_quantize8(const bnb_exec *ex, const void *x, bnb_dtype dtype, int64_t n, int64_t block,
                                 const float *code, uint8_t *codes, float *absmax);

/*
 * bnb_scales - the scale of every block, plain or nested (quantised once more)
 * Plain: absmax is f32, the rest zero.  Nested: absmax is u8, and the scale of block j is
 * code[absmax[j]] * absmax2[j / block2] + *offset, in f32, without a fused multiply-add.
 * Every pointer lives on the device of the call.
 */
typedef struct bnb_scales {
    const void *absmax;   /* [blocks] f32, or u8 when nested          */
    const float *code;    /* [256] map of the nested codes, or NULL   */
    const float *absmax2; /* [ceil(blocks / block2)], or NULL         */
    const float *offset;  /* [1], or NULL                             */
    int64_t block2;       /* 0 when plain                             */
} bnb_scales;

/*
 * bnb_dequantize8() - code[codes[i]] * scale of its block, rounded once to the output dtype
 *   codes [n], code [256], out [n] of dtype f32, f16 or bf16; block > 0
 */
BNB_API bnb_status bnb_dequantize8(const bnb_exec *ex, const uint8_t *codes, int64_t n, int64_t block,
                                   const float *code, const bnb_scales *scales, void *out, bnb_dtype dtype);

/*
 * bnb_quantize4() - quantise n values to 4-bit codes, one scale per block
 *   x       [n]                f32, f16 or bf16
 *   codes   [(n + 1) / 2]      out: element 2i in the HIGH nibble of byte i; an odd n fills the last low nibble with
 *                              the code of zero
 *   absmax  [ceil(n / block)]  out: largest |x| of each block, in the unit of x
 *   block   a power of two, 32..4096;  type BNB_NF4 or BNB_FP4
 * Nothing is allocated.  BNB_EINVAL, BNB_EDTYPE, BNB_EDEVICE.  Dettmers et al. 2023 (QLoRA), section 3.
 */
BNB_API bnb_status bnb_quantize4(const bnb_exec *ex, const void *x, bnb_dtype dtype, int64_t n, int64_t block,
                                 bnb_type4 type, uint8_t *codes, float *absmax);

/* bnb_dequantize4() - the inverse: out [n] of dtype f32, f16 or bf16.  Other arguments as for bnb_quantize4(). */
BNB_API bnb_status bnb_dequantize4(const bnb_exec *ex, const uint8_t *codes, int64_t n, int64_t block, bnb_type4 type,
                                   const bnb_scales *scales, void *out, bnb_dtype dtype);

/*
 * bnb_quantize_scales() - nested ("double") quantisation of n scales: QLoRA, section 3
 *   absmax   [n]                 f32, as a quantiser wrote it
 *   code     [256]               sorted map; block > 0 (256 for 4-bit weights)
 *   codes    [n]                 out: codes of absmax - offset
 *   absmax2  [ceil(n / block)]   out
 *   offset   [1]                 out: the mean of absmax (NUMERICS rule 9); 0 when n is 0
 * Workspace: 4 n bytes.
 */
BNB_API bnb_status bnb_quantize_scales(const bnb_exec *ex, const float *absmax, int64_t n, int64_t block,
                                       const float *code, uint8_t *codes, float *absmax2, float *offset);

/* bnb_dequantize_scales() - the n scales that `scales` stands for, as plain f32.  scales->block2 > 0. */
BNB_API bnb_status bnb_dequantize_scales(const bnb_exec *ex, const bnb_scales *scales, int64_t n, float *out);

/* ---------------------------------------------------------------- 4-bit matrix products */

/*
 * bnb_gemm4_args - a product with a 4-bit weight W [n, k], read in place, block by block of its row-major flattening
 *   x       [m, k]           f32, f16 or bf16 (the gradient: [m, n])
 *   codes   [(n k + 1) / 2]  as bnb_quantize4() wrote them
 *   scales                   of the blocks of W, plain or nested
 *   bias    [n] of `dtype`, or NULL
 *   out     [m, n] of `dtype` (the gradient: [m, k])
 */
typedef struct bnb_gemm4_args {
    size_t size; /* sizeof(bnb_gemm4_args) as the caller compiled it                        */
    const void *x;
    const uint8_t *codes;
    const bnb_scales *scales;
    const void *bias;
    void *out;
    int64_t m, n, k; /* any values >= 0                                                         */
    int64_t block;   /* a power of two, 32..4096                                                */
    bnb_type4 type;  /* BNB_NF4 or BNB_FP4                                                      */
    bnb_dtype dtype; /* of x, bias and out                                                      */
    bool exact;      /* multiply in f32 throughout.  Else, with a 16-bit dtype: on the CPU, few rows may be
                        multiplied as 16-bit integers, relative error below 1e-4: a twentieth of bf16's own
                        rounding; runs of 64 activations all below 2^-96 then count as zero.  On CUDA, weights
                        may be rounded to the dtype (NUMERICS rule 35)                                   */
    const float *values; /* NULL, or the 16 values of the codes, on ex's device: type is not read then.  On the CPU
                            they must be those of NF4 or FP4; on CUDA they may be any, and are not looked at     */
    /* NULL, or the experts of a mixture: W is [experts, n, k], bias [experts, n], and expert e multiplies the rows
       first[e] .. first[e + 1] - 1 of x into those of out.  first [experts + 1] is memory of ex's device; it ascends
       within 0 .. m, which is not looked at on CUDA; rows of no expert are left as they are                      */
    const int64_t *first;
    int64_t experts; /* 1 or more where `first` is given                                          */
} bnb_gemm4_args;

/*
 * bnb_gemm4() - out [m, n] = x [m, k] W^T + bias: the forward product of QLoRA (Dettmers et al. 2023)
 * Weights are decoded in f32, sums are f32, the result is rounded once (NUMERICS rules 30 to 32).  W is never decoded
 * as a whole; workspace: x in f32 and a panel of W per thread.  BNB_EINVAL, BNB_EDTYPE, BNB_ENOMEM, BNB_EDEVICE.
 */
BNB_API bnb_status bnb_gemm4(const bnb_exec *ex, const bnb_gemm4_args *args);

/* bnb_gemm4_grad() - out [m, k] = x [m, n] W: the gradient of the input, given that of the output.  bias is NULL. */
BNB_API bnb_status bnb_gemm4_grad(const bnb_exec *ex, const bnb_gemm4_args *args);

/*
 * bnb_gemm4_plan() - which kernel this thread's last product with a 4-bit weight on CUDA took, and how it cut the work:
 * "few8 splits 1 bands 7 slices 2 steps 8 depth 4", for measuring; "" before.  Valid until the thread's next product.
 * BNB_GEMM4="wide128,splits,bands,depth" in the environment asks for another; zeros and missing numbers leave the choice,
 * and what cannot be is passed over.  Where it is set at the first product, it is read again at each.
 */
BNB_API const char *bnb_gemm4_plan(void);

/* ---------------------------------------------------------------- LLM.int8() */

/* A row-major matrix [rows, cols] of f32, f16 or bf16 that a call reads. */
typedef struct bnb_matrix {
    const void *data;
    bnb_dtype dtype;
    int64_t rows, cols;
} bnb_matrix;

/*
 * bnb_quantize_rows() - int8 codes and one scale per row: Dettmers et al. 2022, "LLM.int8()", section 3
 *   threshold  0: none.  Above 0: elements with |x| >= threshold are outliers.  They do not count for stats, their codes
 *              are 0, and with more than one row so are all codes of their columns
 *   codes      [rows, cols]  out: x 127 / stats, rounded to nearest even (NUMERICS rule 33)
 *   stats      [rows]        out: largest |x| of the row, NaN if it holds one; 0, infinity and NaN make all its codes 0
 *   outlier    [cols]        out: 1 for a column that holds an outlier, else 0; NULL if threshold is 0
 */
BNB_API bnb_status bnb_quantize_rows(const bnb_exec *ex, const bnb_matrix *x, double threshold, int8_t *codes,
                                     float *stats, uint8_t *outlier);

/* bnb_quantize_columns() - the same with one scale per column; stats [cols].  Outliers count as 0. */
BNB_API bnb_status bnb_quantize_columns(const bnb_exec *ex, const bnb_matrix *x, double threshold, int8_t *codes,
                                        float *stats);

/* bnb_quantize_both() - the two above in one call; by row and by column, codes [rows, cols] and stats [rows], [cols] */
BNB_API bnb_status bnb_quantize_both(const bnb_exec *ex, const bnb_matrix *x, double threshold, int8_t *codes[2],
                                     float *stats[2], uint8_t *outlier);

/* bnb_dequantize_rows() - out [rows, cols] = codes * stats / 127, f32, f16 or bf16 */
BNB_API bnb_status bnb_dequantize_rows(const bnb_exec *ex, const int8_t *codes, const float *stats, int64_t rows,
                                       int64_t cols, void *out, bnb_dtype dtype);

/* bnb_matmul8() - out [m, n] = a [m, k] b [n, k]^T in exact int32 arithmetic; -128 is a value like any other */
BNB_API bnb_status bnb_matmul8(const bnb_exec *ex, const int8_t *a, const int8_t *b, int64_t m, int64_t n, int64_t k,
                               int32_t *out);

/*
 * bnb_gemm8_args - an int8 product with its scales, bias and outliers
 *   a, row_stats  [m, k], [m]     quantised activations; a is NULL where `product` is given
 *   b, col_stats  [n, k], [n]     quantised weight
 *   product       [m, n]          a b^T, if it is known already; else NULL
 *   bias          [n] of bias_dtype (f32, f16 or bf16), or NULL
 *   x, columns    [m, k] of `dtype`, [outliers] ascending: the outlier columns and the values they had, or NULL, NULL, 0
 *   outlier       [k] flags of the outlier columns, as bnb_quantize_rows() wrote them, or NULL: instead of columns and
 *                 outliers, where the host does not know how many there are; x is given
 *   out           [m, n] of `dtype`
 */
typedef struct bnb_gemm8_args {
    size_t size; /* sizeof(bnb_gemm8_args) as the caller compiled it */
    const int8_t *a;
    const int8_t *b;
    const int32_t *product;
    const float *row_stats;
    const float *col_stats;
    const void *bias;
    const void *x;
    const int64_t *columns;
    int64_t outliers;
    void *out;
    int64_t m, n, k;
    bnb_dtype dtype;
    bnb_dtype bias_dtype;
    const uint8_t *outlier;
} bnb_gemm8_args;

/*
 * bnb_gemm8() - out = (a b^T) row_stats col_stats / 127^2 + bias + x[:, columns] W[:, columns]^T, W = b col_stats / 127
 * The integer part is exact; scales, bias and outliers are f32; the result is rounded once.  LLM.int8(), section 3.2.
 */
BNB_API bnb_status bnb_gemm8(const bnb_exec *ex, const bnb_gemm8_args *args);

/* bnb_linear8() - bnb_quantize_rows(x, threshold), then bnb_gemm8() with its results: a layer in one call.  Uses x, b,
 * col_stats, bias, out, m, n, k, dtype, bias_dtype; outlier [k] is written, NULL if threshold is 0.  On a GPU nothing waits
 * for the host (NUMERICS rule 34); workspace is m k bytes and some.  Returns what these return, and BNB_ENOMEM. */
BNB_API bnb_status bnb_linear8(const bnb_exec *ex, const bnb_gemm8_args *args, double threshold, uint8_t *outlier);

/* bnb_gather_columns() - out [x->rows, count] of x's dtype = x[:, columns]; every column is in 0..x->cols - 1, unchecked */
BNB_API bnb_status bnb_gather_columns(const bnb_exec *ex, const bnb_matrix *x, const int64_t *columns, int64_t count,
                                      void *out);

/* bnb_gemm8_grad() - out [m, k] = x [m, n] W: the gradient of the input.  Uses x, b, col_stats, out, m, n, k, dtype. */
BNB_API bnb_status bnb_gemm8_grad(const bnb_exec *ex, const bnb_gemm8_args *args);

/* ---------------------------------------------------------------- optimizers */

/* 8-bit optimizer state has one absmax per this many elements. */
#define BNB_OPTIM_BLOCK 256

/*
 * bnb_optim_tensor - one parameter of a step.  n = 0, or g = NULL (no gradient), skips it.  Zero every unused member.
 *   p        [n]  updated in place                     g  [n]  read only
 *   state1, state2 [n]: f32 when bits is 32, codes (u8) when bits is 8; state2 NULL for one-state algorithms
 *   absmax1, absmax2 [ceil(n / 256)]: scales of 8-bit state, NULL when bits is 32
 *   "ademamix": state1 is [2][n] and absmax1 [2][ceil(n / 256)], the fast average before the slow one
 * New state is all zero bytes.  Parameters of one step must not overlap.
 */
typedef struct bnb_optim_tensor {
    void *p;
    const void *g;
    void *state1;
    void *state2;
    float *absmax1;
    float *absmax2;
    int64_t n;
    int64_t step;             /* t of this update: 1 for the first; not read where step_count is given       */
    float *step_count;        /* [1] t - 1, on the device; the step adds 1.  NULL: `step` counts             */
    const float *gnorm_scale; /* [1] on the device: g is multiplied by this too.  NULL: 1                    */
    float *unorm;             /* [1] receives the sum of squares of the update if max_unorm > 0; may be NULL */
    uint64_t seed;            /* of stochastic rounding: one for each parameter                              */
    bnb_dtype dtype;          /* of p and g: f32, f16 or bf16                                                */
    int bits;                 /* of the state: 8 or 32                                                       */
    bool paged;               /* CUDA: state1 and state2 are page-locked memory of the host, bnb_pages_alloc */
} bnb_optim_tensor;

/* bnb_optim_config - what the tensors of one step share.  Zero every member that is not used. */
typedef struct bnb_optim_config {
    size_t size;               /* sizeof(bnb_optim_config) as the caller compiled it                            */
    const char *name;          /* a row of the optimizer table: see bnb_optim_name()                            */
    double lr;                 /* learning rate, >= 0                                                           */
    const float *lr_value;     /* [1] the learning rate, on the device, instead of lr.  NULL: lr                */
    double beta1;              /* in [0, 1): adam, lamb, ademamix, lion; the momentum of momentum and lars; the
                                  smoothing constant (alpha) of rmsprop                                         */
    double beta2;              /* in [0, 1): adam, lamb, ademamix, lion; the dampening of momentum and lars     */
    double beta3;              /* in [0, 1): the slow average of ademamix                                       */
    double alpha;              /* >= 0: the weight of the slow average of ademamix                              */
    double t_alpha;            /* ademamix: updates over which alpha rises to its value; 0: none                */
    double t_beta3;            /* ademamix: updates over which beta3 rises from beta1 to its value; 0: none     */
    double eps;                /* >= 0, added outside the square root                                           */
    double weight_decay;       /* >= 0; decoupled for adam, lamb, ademamix, lion; else added to the gradient    */
    double gnorm_scale;        /* every gradient is multiplied by this; 1 leaves it                             */
    double max_unorm;          /* > 0: trust clipping; the norm of the update is at most this times that of p   */
    const double *norms;       /* [count][2] of bnb_optim_norms(), on the device; needed if max_unorm > 0       */
    bool skip_zeros;           /* elements whose gradient is 0 keep their state and parameter                   */
    bool nesterov;             /* momentum, lars: step along g + momentum m                                     */
    bool no_bias_correction;   /* adam, lamb: first and second average as they are                              */
    bool coupled_decay;        /* adam, lamb: weight decay is added to the gradient (Adam's L2 form)            */
    bool stochastic_rounding;  /* round 16-bit parameters up or down at random, with the right mean             */
    const float *qmap1;        /* [256] sorted map of 8-bit state1, on the device of the call                   */
    const float *qmap2;        /* [256] sorted map of 8-bit state2, on the device of the call                   */
    size_t page_bytes;         /* of device memory that paged states pass through; 0: a quarter of their bytes,
                                  but at most 256 MiB.  Too little to work with is taken as the least that does */
} bnb_optim_config;

/*
 * bnb_pages_alloc() - page-locked host memory for the states of CUDA parameters that do not fit into device memory
 * ordinal: of the CUDA device whose driver context gives it; every device can use it.  `bytes` > 0; the content is not
 * set.  Steps read and write it in stream order: synchronise before the host does.  *pages is NULL after a failure:
 * BNB_EINVAL, BNB_ENOMEM, BNB_EDEVICE.
 */
BNB_API bnb_status bnb_pages_alloc(int ordinal, size_t bytes, void **pages);

/* Waits until the device has done all its work, then frees.  NULL: nothing happens. */
BNB_API bnb_status bnb_pages_free(int ordinal, void *pages);

/* The number of elements from which on the states of a parameter are worth paging, where the caller has no opinion. */
BNB_API int64_t bnb_pages_least(void);

/*
 * bnb_optim_step() - one update of `count` parameters, equal to one call per parameter
 * Rows and formulas: docs/OPTIMIZERS.md; numbers: docs/NUMERICS.md, rules 20 and on.  Needs workspace on CUDA alone.
 * BNB_EINVAL (unknown name, a value out of range, a missing buffer), BNB_EDTYPE, BNB_EDEVICE.
 */
BNB_API bnb_status bnb_optim_step(const bnb_exec *ex, const bnb_optim_config *config, const bnb_optim_tensor *tensors,
                                  size_t count);

/*
 * bnb_optim_norms() - what trust clipping needs to know: norms[i] = {sum of u^2, sum of p^2} of tensors[i]
 * u is the update that bnb_optim_step() would make with the same arguments, without learning rate and weight decay.
 * Writes `norms` [count][2] alone, on the device; zeros for a skipped tensor.  A caller that holds a part of each
 * parameter adds the parts up before the step.  Needs workspace.  Errors as bnb_optim_step(), and BNB_ENOMEM.
 */
BNB_API bnb_status bnb_optim_norms(const bnb_exec *ex, const bnb_optim_config *config, const bnb_optim_tensor *tensors,
                                   size_t count, double *norms);

/* bnb_gradient - one gradient: g [n], f32, f16 or bf16 */
typedef struct bnb_gradient {
    const void *g;
    int64_t n;
    bnb_dtype dtype;
} bnb_gradient;

/* bnb_gradient_norms() - norms[i] = sum of the squares of gradients[i], in double; norms [count] on the device */
BNB_API bnb_status bnb_gradient_norms(const bnb_exec *ex, const bnb_gradient *gradients, size_t count, double *norms);

/* bnb_clip_tensor - the history of one gradient: history [100] squared norms, step its t, from 1 */
typedef struct bnb_clip_tensor {
    float *history;
    int64_t step;
    float *step_count; /* [1] t - 1, on the device, only read.  NULL: `step` counts */
} bnb_clip_tensor;

/*
 * bnb_clip_percentile() - scale gradients so that no norm exceeds a percentile of the last 100
 * norms [count] (bnb_gradient_norms) enters the histories: every slot at t = 1 or where all are 0 (clipping that starts
 * late), else slot t mod 100.
 * report[i] = {norm, limit, scale}: limit is the norm at rank `percentile` of the sorted history, scale = limit / norm
 * where the norm is above it, else 1.  report [count][3] on the device; scale is what bnb_optim_tensor calls gnorm_scale.
 * BNB_EINVAL unless 0 <= percentile <= 99.
 */
BNB_API bnb_status bnb_clip_percentile(const bnb_exec *ex, const bnb_clip_tensor *tensors, size_t count, int percentile,
                                       const double *norms, float *report);

/* Row i of the optimizer table: its name, how many states it has, and how many averages state1 holds, one behind the
 * other (2 for "ademamix", else 1).  NULL, 0 and 0 behind the last row. */
BNB_API const char *bnb_optim_name(int i);
BNB_API int bnb_optim_states(int i);
BNB_API int bnb_optim_averages(int i);

/* Does state `state` (0 or 1) of row i take both signs?  Its default map is the signed one then, else the unsigned. */
BNB_API bool bnb_optim_is_signed(int i, int state);

#ifdef __cplusplus
}
#endif

#endif /* BITSANDBYTES_H */
