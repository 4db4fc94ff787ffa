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
#include "core/optim_plan.h"

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

static const struct {
    const char *class, *row; /* the beginning of an operation's name; its row in the optimizer table */
    double beta1, beta2;
} optimizers[] = {
    {"AdamW", "adam", 0.9, 0.999},    {"LAMB", "lamb", 0.9, 0.999}, {"AdEMAMix", "ademamix", 0.9, 0.999},
    {"SGD", "momentum", 0.9, 0.0},    {"Lion", "lion", 0.9, 0.99},  {"RMSprop", "rmsprop", 0.99, 0.0},
    {"Adagrad", "adagrad", 0.0, 0.0},
};

static bnb_optim_config config_of(const char *name)
{
    size_t i = 0;
    while (strncmp(name, optimizers[i].class, strlen(optimizers[i].class)) != 0)
        i++; /* ends: the operations below are all in the table */
    return (bnb_optim_config){.size = sizeof(bnb_optim_config),
                              .name = optimizers[i].row,
                              .lr = 0.0,
                              .beta1 = optimizers[i].beta1,
                              .beta2 = optimizers[i].beta2,
                              .beta3 = 0.9999,
                              .alpha = 5.0,
                              .eps = 1e-8,
                              .weight_decay = 0.01,
                              .gnorm_scale = 1.0};
}

static void prepare_optim(struct task *t, struct arena *a, const struct op *op)
{
    const bnb_optim_config config = config_of(op->name);
    const struct bnb_optim_row *row = bnb_optim_find(config.name);
    const struct bnb_optim_recipe recipe = bnb_optim_recipe_of(row, &config);
    const bool coded = strstr(op->name, "8bit");
    const size_t n = (size_t)t->n;
    t->units = bnb_blocks(t->n, BNB_OPTIM_BLOCK);
    t->optim = (struct bnb_optim_args){.p = take_values(a, t->dtype, t->n, 1.0f),
                                       .g = take_values(a, t->dtype, t->n, 0.01f),
                                       .n = t->n,
                                       .dtype = (int)t->dtype,
                                       .bits = coded ? 8 : 32,
                                       .map = {bnb_map_signed, bnb_map_unsigned},
                                       .s = bnb_optim_plan_of(&recipe, config.lr, 100, 1.0, NULL).scalars};
    if (row->rule == BNB_RULE_RMSPROP)
        t->optim.map[0] = bnb_map_unsigned;
    for (int k = 0; k < (row->is_double ? 3 : row->states); k++) {
        t->optim.state[k] = take_zeros(a, coded ? n : 4 * n);
        t->optim.absmax[k] = coded ? take_zeros(a, (size_t)t->units * 4) : NULL;
    }
}

/* A kernel of the table on the blocks of a task. */
struct pass {
    const struct bnb_optim_args *args;
    void (*step)(const struct bnb_optim_args *a, int64_t first, int64_t end);
    void (*norms)(const struct bnb_optim_args *a, int64_t first, int64_t end, double sums[2]);
};

static void body_step(void *arg, int64_t begin, int64_t end)
{
    const struct pass *p = arg;
    p->step(p->args, begin, end);
}

static void body_norms(void *arg, int64_t begin, int64_t end)
{
    const struct pass *p = arg;
    double sums[2] = {0.0, 0.0};
    p->norms(p->args, begin, end, sums);
}

static void step8(const struct task *t, enum bnb_optim_rule rule)
{
    struct pass p = {.args = &t->optim, .step = t->ops->optim8[rule]};
    run_on(t->threads, t->units, body_step, &p);
}

static void job_adam8(void *task) { step8(task, BNB_RULE_ADAM); }
static void job_ademamix8(void *task) { step8(task, BNB_RULE_ADEMAMIX); }
static void job_momentum8(void *task) { step8(task, BNB_RULE_MOMENTUM); }
static void job_lion8(void *task) { step8(task, BNB_RULE_LION); }
static void job_rmsprop8(void *task) { step8(task, BNB_RULE_RMSPROP); }

/* With trust clipping: the norms of all updates, then the updates. */
static void job_lamb8(void *task)
{
    const struct task *t = task;
    struct pass p = {.args = &t->optim, .norms = t->ops->optim_norms[BNB_RULE_ADAM]};
    run_on(t->threads, t->units, body_norms, &p);
    step8(t, BNB_RULE_ADAM);
}

static void job_adam32(void *task)
{
    const struct task *t = task;
    struct pass p = {.args = &t->optim, .step = t->ops->optim32[BNB_RULE_ADAM]};
    run_on(t->threads, t->units, body_step, &p);
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
#define STATE8 (2 + 8.0 / BNB_OPTIM_BLOCK) /* codes and scales of one state, read and written */

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
    {"AdamW8bit", BNB_F32, 12 + 2 * STATE8, 8 + STATE8, 3.5, false, prepare_optim, job_adam8},
    {"AdamW8bit", BNB_BF16, 6 + 2 * STATE8, 4 + STATE8, 3.5, false, prepare_optim, job_adam8},
    {"AdamW 32-bit state", BNB_F32, 28, 16, 1.6, false, prepare_optim, job_adam32},
    {"AdamW 32-bit state", BNB_BF16, 22, 12, 1.6, false, prepare_optim, job_adam32},
    {"Lion8bit", BNB_BF16, 6 + STATE8, 4 + STATE8 / 2, 2.5, false, prepare_optim, job_lion8},
    {"SGD8bit", BNB_BF16, 6 + STATE8, 4 + STATE8 / 2, 2.5, false, prepare_optim, job_momentum8},
    /* Adagrad8bit is the same kernel */
    {"RMSprop8bit", BNB_BF16, 6 + STATE8, 4 + STATE8 / 2, 2.5, false, prepare_optim, job_rmsprop8},
    {"AdEMAMix8bit", BNB_BF16, 6 + 3 * STATE8, 4 + 1.5 * STATE8, 0, false, prepare_optim, job_ademamix8},
    {"LAMB8bit", BNB_BF16, 10 + 3 * STATE8, 4 + STATE8, 0, false, prepare_optim, job_lamb8},
    {"256 quantiles", BNB_F32, 4, 4, 0, true, prepare_quantiles, job_quantiles},
    {"256 quantiles", BNB_BF16, 2, 2, 0, true, prepare_quantiles, job_quantiles},
};
const int op_count = sizeof ops / sizeof ops[0];
