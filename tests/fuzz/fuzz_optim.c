/*
 * fuzz_optim.c - any bits as parameters, gradients, state and statistics of an optimizer step: all tables must agree
 *
 * Byte 0 picks dtype, state bits and skip_zeros; 1 to 4 the step and rates; 5 the row, 6 its options, 7 the maps; the
 * rest fills the buffers.  NaN may differ in its bits where two NaN meet in 32-bit state; codes and absmax may not
 * differ at all, nor may norms.
 */
#include <stdlib.h>
#include <string.h>

#include "core/half.h"
#include "cpu/cpu.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { BUFFERS = 6, HEAD = 8 }; /* p, g, state1, state2, absmax1, absmax2 */

struct run {
    bnb_optim_config config;
    bnb_dtype dtype;
    int bits;
    int64_t n, blocks, step;
    size_t bytes[BUFFERS];
    double norms[2];
    float map[256];
};

static void copy_out(const uint8_t *data, size_t size, size_t at, uint8_t *out, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        out[i] = data[(at + i) % size];
}

/* Statistics of 8-bit state are finite and not negative: the library never writes anything else. */
static void make_absmax(uint8_t *bytes, size_t size)
{
    for (size_t at = 0; at < size; at += 4) {
        float x;
        memcpy(&x, bytes + at, sizeof x);
        x = bnb_float_of(bnb_bits_of(x) & 0x7effffffu);
        memcpy(bytes + at, &x, sizeof x);
    }
}

static bool is_nan(const uint8_t *p, bnb_dtype dtype)
{
    float x;
    uint16_t h;
    if (dtype == BNB_F32) {
        memcpy(&x, p, sizeof x);
        return x != x;
    }
    memcpy(&h, p, sizeof h);
    return (h & 0x7fffu) > (dtype == BNB_F16 ? 0x7c00u : 0x7f80u);
}

static void same(const uint8_t *a, const uint8_t *b, size_t bytes, size_t item, bnb_dtype dtype)
{
    for (size_t i = 0; i < bytes; i += item)
        if (memcmp(a + i, b + i, item) && (item == 1 || !is_nan(a + i, dtype) || !is_nan(b + i, dtype)))
            abort();
}

static bnb_optim_tensor tensor_of(const struct run *r, uint8_t *buffer[BUFFERS])
{
    const bool scaled = r->bits == 8;
    return (bnb_optim_tensor){.p = buffer[0],
                              .g = buffer[1],
                              .state1 = buffer[2],
                              .state2 = buffer[3],
                              .absmax1 = scaled ? (float *)(void *)buffer[4] : NULL,
                              .absmax2 = scaled ? (float *)(void *)buffer[5] : NULL,
                              .n = r->n,
                              .step = r->step,
                              .seed = (uint64_t)r->n,
                              .dtype = r->dtype,
                              .bits = r->bits};
}

/* The norms before the update, then the update. */
static void run(const struct bnb_cpu_ops *ops, const struct run *r, uint8_t *buffer[BUFFERS], double sums[2])
{
    struct bnb_cpu_step step;
    double direction;
    const bnb_optim_tensor t = tensor_of(r, buffer);
    bnb_cpu_open_step(&step, &r->config, &t, 1);
    const struct bnb_optim_args a = bnb_cpu_optim_args(&step, 0, &direction);
    sums[0] = sums[1] = 0.0;
    ops->optim_norms[step.row->rule](&a, 0, r->blocks, sums);
    (r->bits == 8 ? ops->optim8 : ops->optim32)[step.row->rule](&a, 0, r->blocks);
}

static void compare_runs(const struct run *r, uint8_t *first[BUFFERS], uint8_t *other[BUFFERS], double sums[2][2])
{
    const size_t state = r->bits == 8 ? 1 : 4;
    same(first[0], other[0], r->bytes[0], bnb_dtype_size(r->dtype), r->dtype);
    same(first[2], other[2], r->bytes[2], state, BNB_F32);
    same(first[3], other[3], r->bytes[3], state, BNB_F32);
    if (memcmp(first[1], other[1], r->bytes[1]) || memcmp(first[4], other[4], r->bytes[4]) ||
        memcmp(first[5], other[5], r->bytes[5]))
        abort();
    for (int k = 0; k < 2; k++)
        if (memcmp(&sums[0][k], &sums[1][k], sizeof(double)) && !(sums[0][k] != sums[0][k] && sums[1][k] != sums[1][k]))
            abort();
}

static void compare_tables(const struct run *r, const uint8_t *data, size_t size)
{
    uint8_t *start[BUFFERS], *first[BUFFERS], *other[BUFFERS];
    double sums[2][2];
    for (int k = 0; k < BUFFERS; k++) {
        start[k] = malloc(r->bytes[k] + 1);
        first[k] = malloc(r->bytes[k] ? r->bytes[k] : 1); /* exact: the tables write here */
        other[k] = malloc(r->bytes[k] ? r->bytes[k] : 1);
        if (!start[k] || !first[k] || !other[k])
            abort();
        copy_out(data, size, (size_t)k * 131, start[k], r->bytes[k]);
        if (k >= 4)
            make_absmax(start[k], r->bytes[k]);
        memcpy(first[k], start[k], r->bytes[k]);
    }
    run(&bnb_cpu_ops_scalar, r, first, sums[0]);
    for (int t = 0; t + 1 < bnb_cpu_all_count; t++) {
        if (bnb_cpu_all[t]->needs & ~bnb_cpu_features())
            continue;
        for (int k = 0; k < BUFFERS; k++)
            memcpy(other[k], start[k], r->bytes[k]);
        run(bnb_cpu_all[t], r, other, sums[1]);
        compare_runs(r, first, other, sums);
    }
    for (int k = 0; k < BUFFERS; k++) {
        free(start[k]);
        free(first[k]);
        free(other[k]);
    }
}

/* Options as the API lets them through. */
static void choose_options(struct run *r, const struct bnb_optim_row *row, uint8_t bits)
{
    bnb_optim_config *c = &r->config;
    c->stochastic_rounding = bits & 1;
    c->max_unorm = bits & 2 ? 0.01 : 0.0;
    c->norms = r->norms;
    if (row->rule == BNB_RULE_ADAM) {
        c->no_bias_correction = bits & 4;
        c->coupled_decay = bits & 8;
    } else if (row->rule == BNB_RULE_ADEMAMIX) {
        c->t_alpha = bits & 4 ? 7.5 : 0.0;
        c->t_beta3 = bits & 8 && c->beta1 > 0.0 && c->beta3 > 0.0 ? 20.0 : 0.0;
    } else if (row->rule == BNB_RULE_MOMENTUM && bits & 4) {
        c->nesterov = true;
        c->beta2 = 0.0;
    }
}

/* Default maps, each other's, or a searched one: ascending, without a zero. */
static void choose_maps(struct run *r, const struct bnb_optim_row *row, uint8_t bits)
{
    const float *usual = row->rule == BNB_RULE_RMSPROP ? bnb_map_unsigned.code : bnb_map_signed.code;
    const float *swapped = row->rule == BNB_RULE_RMSPROP ? bnb_map_signed.code : bnb_map_unsigned.code;
    for (int i = 0; i < 256; i++)
        r->map[i] = ((float)i - 127.5f) / 127.5f;
    r->config.qmap1 = bits % 4 < 2 ? usual : bits % 4 == 2 ? swapped : r->map;
    r->config.qmap2 = bits / 4 % 4 == 3 ? r->map : bnb_map_unsigned.code;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct run r;
    if (size < HEAD + 3)
        return 0;
    int rows = 0;
    while (bnb_optim_name(rows))
        rows++;
    const struct bnb_optim_row *row = bnb_optim_find(bnb_optim_name(data[5] % rows));
    r = (struct run){.dtype = (bnb_dtype)(data[0] % 3), .bits = data[0] / 3 % 2 ? 8 : 32, .step = 1 + data[1]};
    r.config = (bnb_optim_config){.size = sizeof r.config,
                                  .name = row->name,
                                  .lr = data[2] / 256.0,
                                  .beta1 = data[3] / 256.0,
                                  .beta2 = data[4] / 256.0,
                                  .beta3 = data[6] / 256.0,
                                  .alpha = data[7] / 16.0,
                                  .eps = 1e-8,
                                  .weight_decay = data[2] % 16 / 16.0,
                                  .gnorm_scale = data[4] / 64.0,
                                  .skip_zeros = data[0] / 6 % 2};
    r.norms[0] = data[1] * data[1];
    r.norms[1] = data[3];
    choose_options(&r, row, data[6]);
    choose_maps(&r, row, data[7]);
    r.n = (int64_t)((size - HEAD) / 2);
    r.blocks = bnb_blocks(r.n, BNB_OPTIM_BLOCK);
    const size_t n = (size_t)r.n, item = bnb_dtype_size(r.dtype), state = r.bits == 8 ? 1 : 4;
    const size_t absmax = r.bits == 8 ? (size_t)r.blocks * 4 : 0, averages = row->is_double ? 2 : 1;
    const size_t second = row->states == 2 ? 1 : 0;
    const size_t bytes[BUFFERS] = {n * item,           n * item,          averages * n * state,
                                   second * n * state, averages * absmax, second * absmax};
    memcpy(r.bytes, bytes, sizeof bytes);
    compare_tables(&r, data + HEAD, size - HEAD);
    return 0;
}
