/*
 * ops.c - the operations that are measured, their data, and the bytes that each must move at least
 *
 * Kernels are called through the table of an instruction set, as the library calls them, block ranges split in half for
 * two threads.  8-bit blocks have 256 elements, 4-bit blocks 64.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "core/half.h"

enum { BLOCK8 = 256, BLOCK4 = 64, PATTERN = 65536 };

void *arena_take(struct arena *a, size_t bytes)
{
    char *p = a->base + a->used;
    a->used += (bytes + 64 + 63) / 64 * 64; /* one line apart: arrays of a power of two would share cache sets */
    if (a->used > a->size)
        abort();
    return p;
}

static void store(void *x, bnb_dtype dtype, int64_t i, float value)
{
    if (dtype == BNB_F32)
        ((float *)x)[i] = value;
    else if (dtype == BNB_BF16)
        ((bnb_bf16 *)x)[i] = bnb_to_bf16(value);
    else
        ((bnb_f16 *)x)[i] = bnb_to_f16(value);
}

/* Bell-shaped values around 0, a pattern of 65536 repeated. */
static void *take_values(struct arena *a, bnb_dtype dtype, int64_t n, float scale)
{
    const size_t size = bnb_dtype_size(dtype);
    char *x = arena_take(a, (size_t)n * size);
    uint32_t state = 12345;
    for (int64_t i = 0; i < n && i < PATTERN; i++) {
        float sum = -2.0f;
        for (int k = 0; k < 4; k++) {
            state = state * 1664525u + 1013904223u;
            sum += (float)(state >> 8) * 0x1p-24f;
        }
        store(x, dtype, i, scale * sum);
    }
    for (int64_t done = PATTERN; done < n; done += PATTERN)
        memcpy(x + (size_t)done * size, x, (size_t)(n - done < PATTERN ? n - done : PATTERN) * size);
    return x;
}

static void *take_zeros(struct arena *a, size_t bytes) { return memset(arena_take(a, bytes), 0, bytes); }

/* ---- 8 bits */

static void body_quant8(void *arg, int64_t begin, int64_t end)
{
    const struct task *t = arg;
    t->ops->quant8[t->dtype](&t->q8, begin, end);
}

static void body_dequant8(void *arg, int64_t begin, int64_t end)
{
    const struct task *t = arg;
    t->ops->dequant8[t->dtype](&t->d8, begin, end);
}

static void prepare_quant8(struct task *t, struct arena *a, const struct op *op)
{
    (void)op;
    t->units = bnb_blocks(t->n, BLOCK8);
    t->q8 = (struct bnb_quant8_args){.x = take_values(a, t->dtype, t->n, 1.0f),
                                     .codes = arena_take(a, (size_t)t->n),
                                     .absmax = arena_take(a, (size_t)t->units * 4),
                                     .n = t->n,
                                     .block = BLOCK8,
                                     .map = bnb_map_signed};
}

static void prepare_sorted8(struct task *t, struct arena *a, const struct op *op)
{
    prepare_quant8(t, a, op);
    bnb_create_linear_map(true, 8, true, t->map);
    t->q8.map = bnb_prepare_map(t->map, t->midpoint);
}

static void prepare_dequant8(struct task *t, struct arena *a, const struct op *op)
{
    (void)op;
    t->units = bnb_blocks(t->n, BLOCK8);
    uint8_t *codes = take_values(a, BNB_F32, t->n / 4 + 1, 1.0f); /* the bytes of floats: all codes occur */
    float *absmax = take_values(a, BNB_F32, t->units, 1.0f);
    t->d8 = (struct bnb_dequant8_args){.codes = codes,
                                       .out = arena_take(a, (size_t)t->n * bnb_dtype_size(t->dtype)),
                                       .n = t->n,
                                       .block = BLOCK8,
                                       .code = bnb_map_signed.code,
                                       .scale = {.absmax = absmax}};
}

static void job_quant8(void *task)
{
    struct task *t = task;
    run_on(t->threads, t->units, body_quant8, t);
}

static void job_dequant8(void *task)
{
    struct task *t = task;
    run_on(t->threads, t->units, body_dequant8, t);
}

/* ---- 4 bits */

static void body_quant4(void *arg, int64_t begin, int64_t end)
{
    const struct task *t = arg;
    t->ops->quant4[t->dtype](&t->q4, begin, end);
}

static void body_dequant4(void *arg, int64_t begin, int64_t end)
{
    const struct task *t = arg;
    t->ops->dequant4[t->dtype](&t->d4, begin, end);
}

static void prepare_quant4(struct task *t, struct arena *a, const struct op *op)
{
    const bool nf4 = op->name[0] == 'N';
    t->units = bnb_blocks(t->n, BLOCK4);
    t->q4 = (struct bnb_quant4_args){.x = take_values(a, t->dtype, t->n, 1.0f),
                                     .codes = arena_take(a, (size_t)(t->n + 1) / 2),
                                     .absmax = arena_take(a, (size_t)t->units * 4),
                                     .n = t->n,
                                     .block = BLOCK4,
                                     .type = nf4 ? BNB_NF4 : BNB_FP4,
                                     .thresholds = nf4 ? &bnb_tree_nf4 : &bnb_tree_fp4};
}

static void prepare_dequant4(struct task *t, struct arena *a, const struct op *op)
{
    (void)op;
    t->units = bnb_blocks(t->n, BLOCK4);
    uint8_t *codes = take_values(a, BNB_F32, t->n / 8 + 1, 1.0f);
    float *absmax = take_values(a, BNB_F32, t->units, 1.0f);
    t->d4 = (struct bnb_dequant4_args){.codes = codes,
                                       .out = arena_take(a, (size_t)t->n * bnb_dtype_size(t->dtype)),
                                       .n = t->n,
                                       .block = BLOCK4,
                                       .code = bnb_map4(BNB_NF4),
                                       .scale = {.absmax = absmax}};
}

static void job_quant4(void *task)
{
    struct task *t = task;
    run_on(t->threads, t->units, body_quant4, t);
}

static void job_dequant4(void *task)
{
    struct task *t = task;
    run_on(t->threads, t->units, body_dequant4, t);
}

/* ---- optimizers: lr is 0, so that a million steps leave the parameters where they are */

static void body_optim8(void *arg, int64_t begin, int64_t end)
{
    const struct task *t = arg;
    t->ops->optim8[BNB_RULE_ADAM][t->dtype](&t->optim, begin, end);
}

static void body_optim32(void *arg, int64_t begin, int64_t end)
{
    const struct task *t = arg;
    t->ops->optim32[BNB_RULE_ADAM][t->dtype](&t->optim, begin, end);
}

static void prepare_optim(struct task *t, struct arena *a, const struct op *op)
{
    const bnb_optim_config config = {.size = sizeof config,
                                     .name = "adam",
                                     .lr = 0.0,
                                     .beta1 = 0.9,
                                     .beta2 = 0.999,
                                     .eps = 1e-8,
                                     .weight_decay = 0.01,
                                     .gnorm_scale = 1.0};
    const size_t state = strstr(op->name, "8bit") ? 1 : 4, n = (size_t)t->n;
    t->units = bnb_blocks(t->n, BNB_OPTIM_BLOCK);
    t->optim = (struct bnb_optim_args){.p = take_values(a, t->dtype, t->n, 1.0f),
                                       .g = take_values(a, t->dtype, t->n, 0.01f),
                                       .state1 = take_zeros(a, n * state),
                                       .state2 = take_zeros(a, n * state),
                                       .n = t->n,
                                       .map1 = bnb_map_signed,
                                       .map2 = bnb_map_unsigned,
                                       .s = bnb_optim_scalars_of(&config, 100)};
    if (state == 1) {
        t->optim.absmax1 = take_zeros(a, (size_t)t->units * 4);
        t->optim.absmax2 = take_zeros(a, (size_t)t->units * 4);
    }
}

static void job_optim8(void *task)
{
    struct task *t = task;
    run_on(t->threads, t->units, body_optim8, t);
}

static void job_optim32(void *task)
{
    struct task *t = task;
    run_on(t->threads, t->units, body_optim32, t);
}

/* ---- quantiles: a whole call of the library */

static void prepare_quantiles(struct task *t, struct arena *a, const struct op *op)
{
    (void)op;
    t->x = take_values(a, t->dtype, t->n, 1.0f);
    t->out = arena_take(a, 1024);
}

static void job_quantiles(void *task)
{
    struct task *t = task;
    const bnb_exec two = {.size = sizeof two, .parallel_for = two_halves};
    if (bnb_estimate_quantiles(t->threads == 2 ? &two : NULL, t->x, t->dtype, t->n, 1.0 / 512, 256, t->out))
        abort();
}

#define SCALE8 (4.0 / BLOCK8)
#define SCALE4 (4.0 / BLOCK4)
#define STATE8 (2 * (2 + 8.0 / BNB_OPTIM_BLOCK)) /* codes and scales of two states, read and written */

const struct op ops[] = {
    {"encode 8, dynamic", BNB_F32, 5 + SCALE8, 5 + SCALE8, 1.3, false, prepare_quant8, job_quant8},
    {"encode 8, dynamic", BNB_BF16, 3 + SCALE8, 3 + SCALE8, 1.3, false, prepare_quant8, job_quant8},
    {"encode 8, any map", BNB_F32, 5 + SCALE8, 5 + SCALE8, 0, false, prepare_sorted8, job_quant8},
    {"encode 8, any map", BNB_BF16, 3 + SCALE8, 3 + SCALE8, 0, false, prepare_sorted8, job_quant8},
    {"decode 8", BNB_F32, 5 + SCALE8, 5 + SCALE8, 0.4, false, prepare_dequant8, job_dequant8},
    {"decode 8", BNB_BF16, 3 + SCALE8, 3 + SCALE8, 0.4, false, prepare_dequant8, job_dequant8},
    {"NF4 encode", BNB_F32, 4.5 + SCALE4, 4.5 + SCALE4, 0.5, false, prepare_quant4, job_quant4},
    {"NF4 encode", BNB_BF16, 2.5 + SCALE4, 2.5 + SCALE4, 0.5, false, prepare_quant4, job_quant4},
    {"FP4 encode", BNB_F32, 4.5 + SCALE4, 4.5 + SCALE4, 0, false, prepare_quant4, job_quant4},
    {"FP4 encode", BNB_BF16, 2.5 + SCALE4, 2.5 + SCALE4, 0, false, prepare_quant4, job_quant4},
    {"4-bit decode", BNB_F32, 4.5 + SCALE4, 4.5 + SCALE4, 0.3, false, prepare_dequant4, job_dequant4},
    {"4-bit decode", BNB_BF16, 2.5 + SCALE4, 2.5 + SCALE4, 0.3, false, prepare_dequant4, job_dequant4},
    {"AdamW8bit", BNB_F32, 12 + STATE8, 8 + STATE8 / 2, 4.5, false, prepare_optim, job_optim8},
    {"AdamW8bit", BNB_BF16, 6 + STATE8, 4 + STATE8 / 2, 4.5, false, prepare_optim, job_optim8},
    {"AdamW 32-bit state", BNB_F32, 28, 16, 0, false, prepare_optim, job_optim32},
    {"AdamW 32-bit state", BNB_BF16, 22, 12, 0, false, prepare_optim, job_optim32},
    {"256 quantiles", BNB_F32, 4, 4, 0, true, prepare_quantiles, job_quantiles},
    {"256 quantiles", BNB_BF16, 2, 2, 0, true, prepare_quantiles, job_quantiles},
};
const int op_count = sizeof ops / sizeof ops[0];
