/*
 * support.h - what several tests share: input, guarded buffers, definitions by brute force, parallel loops
 *
 * The definitions are written from docs/NUMERICS.md and docs/FORMAT.md and share no code with the library.
 */
#ifndef BNB_TESTS_SUPPORT_H
#define BNB_TESTS_SUPPORT_H

#include "bitsandbytes.h"
#include "cpu/cpu.h"

extern const char *const dtype_name[BNB_FLOATS];

/* ---- input */

uint64_t random_bits(uint64_t *state);
double random_unit(uint64_t *state); /* in [0, 1) */

enum fill {
    FILL_HEAVY,     /* signs and exponents over eight decades: every code of a dynamic map occurs  */
    FILL_BELL,      /* a sum of uniforms: like weights                                             */
    FILL_ANY_BITS,  /* NaN, Inf, subnormals                                                        */
    FILL_ZERO,      /* +0 and -0                                                                   */
    FILL_SUBNORMAL, /* so small that 1 / absmax overflows                                          */
    FILL_MIXED,     /* HEAVY with a NaN, an Inf or a stretch of zeros here and there               */
    FILL_COUNT
};
void fill_values(void *x, bnb_dtype dtype, int64_t n, enum fill kind, uint64_t seed);

/* ---- values of any float dtype, converted by definition: double arithmetic, nearest even */

uint32_t bits_of(float x);
float float_of(uint32_t bits);
float define_from_f16(uint16_t bits);
uint16_t define_to_f16(float x);
uint16_t define_to_bf16(float x);
float value_at(const void *x, bnb_dtype dtype, int64_t i);
void store_at(void *x, bnb_dtype dtype, int64_t i, float value);

/* ---- buffers with guard bytes on both sides; `shift` bytes off a 64-byte boundary */

struct guarded {
    uint8_t *base;
    size_t bytes;
    size_t shift;
    void *data;
};
struct guarded guarded_make(size_t bytes, size_t shift);
bool guarded_untouched(const struct guarded *g); /* the data too still has the bytes it was made with */
bool guarded_intact(const struct guarded *g);    /* the guards have */
void guarded_reset(const struct guarded *g);
void guarded_free(struct guarded *g);

/* ---- workspace callbacks of a bnb_exec: counted, with guard bytes behind each buffer; aborts where they were written */

struct workspace {
    int calls;     /* allocations asked for                             */
    int refuse;    /* the number of the one that fails, from 1; 0: none */
    int64_t taken; /* bytes not returned yet                            */
};
void *workspace_alloc(void *context, size_t bytes);
void workspace_free(void *context, void *ptr, size_t bytes);

/* ---- results of a product in f32 or 16 bits */

/* Half the distance of neighbouring values of the dtype around `value`: what one rounding may add; 0 for f32. */
double half_spacing(bnb_dtype dtype, double value);

/* ---- definitions */

/* The largest |x[i]|, NaN left out. */
float define_absmax(const void *x, bnb_dtype dtype, int64_t n);

/* The code of u in a sorted map, by counting all 255 midpoints; a tie takes the even index. */
int define_code8(float u, const float midpoint[255]);
void define_midpoints(const float code[256], float midpoint[255]);

/* 4-bit code of u by counting thresholds: fp32 midpoints of the typed values (NF4), typed (FP4); u may be NaN. */
int define_nf4(float u);
int define_fp4(float u);
extern const float define_nf4_values[16], define_fp4_values[16];

/* Block-wise quantisation of x [n] -> codes [n] (or packed [(n + 1) / 2]), absmax. */
void define_quant8(const void *x, bnb_dtype dtype, int64_t n, int64_t block, const float code[256], uint8_t *codes,
                   float *absmax);
void define_quant4(const void *x, bnb_dtype dtype, int64_t n, int64_t block, bnb_type4 type, uint8_t *codes,
                   float *absmax);

/* The mean of x [n] by the fixed tree; 0 for n 0. */
float define_mean(const float *x, int64_t n);

/* ---- tables and loops */

/* The table, or NULL where this machine cannot run it. */
const struct bnb_cpu_ops *table_at(int i);

/* parallel_for callbacks: backwards in odd pieces; and with real threads. */
void loop_backwards(void *context, int64_t n, int64_t grain, bnb_range_fn body, void *arg);
void loop_threads(void *context, int64_t n, int64_t grain, bnb_range_fn body, void *arg);

/* The ordinal of a CUDA device that no machine has.  A call for it fails before any kernel sees a pointer of the host:
 * with absent_card_status(), and a detail that holds absent_card_word().  Which ones depends on whether there are cards;
 * absent_card(), called first, finds that out. */
int absent_card(void);
bnb_status absent_card_status(void);
const char *absent_card_word(void);

/* Status for ctest where the table that BNB_CPU_ISA names cannot run here or is unknown; 0 where the test may go on. */
enum { TEST_SKIPPED = 77 };
int skip_foreign_isa(void);

#endif
