/*
 * fuzz_optim.c - any bits as parameters, gradients, state and statistics of an optimizer step: all tables must agree
 *
 * Byte 0 picks dtype, state bits and skip_zeros, bytes 1 to 4 the step and rates; the rest fills the buffers.  NaN may
 * differ in its bits where two NaN meet in 32-bit state; codes and absmax may not differ at all.
 */
#include <stdlib.h>
#include <string.h>

#include "core/half.h"
#include "cpu/cpu.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { BUFFERS = 6 }; /* p, g, state1, state2, absmax1, absmax2 */

struct step {
    bnb_dtype dtype;
    int bits;
    int64_t n, blocks;
    size_t bytes[BUFFERS];
    struct bnb_optim_scalars scalars;
};

static void copy_out(const uint8_t *data, size_t size, size_t at, uint8_t *out, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        out[i] = data[(at + i) % size];
}

/* Statistics of 8-bit state are finite and not negative: the library never writes anything else. */
static void make_absmax(uint8_t *bytes, int64_t blocks)
{
    for (int64_t b = 0; b < blocks; b++) {
        float x;
        memcpy(&x, bytes + b * 4, sizeof x);
        x = bnb_float_of(bnb_bits_of(x) & 0x7effffffu);
        memcpy(bytes + b * 4, &x, sizeof x);
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

static void run(const struct bnb_cpu_ops *ops, const struct step *s, uint8_t *buffer[BUFFERS])
{
    const struct bnb_optim_args a = {.p = buffer[0],
                                     .g = buffer[1],
                                     .state1 = buffer[2],
                                     .state2 = buffer[3],
                                     .absmax1 = (float *)(void *)buffer[4],
                                     .absmax2 = (float *)(void *)buffer[5],
                                     .n = s->n,
                                     .map1 = bnb_map_signed,
                                     .map2 = bnb_map_unsigned,
                                     .s = s->scalars};
    (s->bits == 8 ? ops->optim8 : ops->optim32)[BNB_RULE_ADAM][s->dtype](&a, 0, s->blocks);
}

static void compare_tables(const struct step *s, const uint8_t *data, size_t size)
{
    uint8_t *first[BUFFERS], *other[BUFFERS];
    for (int k = 0; k < BUFFERS; k++) {
        first[k] = malloc(s->bytes[k] + 1);
        other[k] = malloc(s->bytes[k] ? s->bytes[k] : 1); /* exact: the table under test writes here */
        if (!first[k] || !other[k])
            abort();
        copy_out(data, size, (size_t)k * 131, first[k], s->bytes[k]);
    }
    if (s->bits == 8) {
        make_absmax(first[4], s->blocks);
        make_absmax(first[5], s->blocks);
    }
    for (int t = 0; t + 1 < bnb_cpu_all_count; t++) {
        if (bnb_cpu_all[t]->needs & ~bnb_cpu_features())
            continue;
        for (int k = 0; k < BUFFERS; k++)
            memcpy(other[k], first[k], s->bytes[k]);
        run(bnb_cpu_all[t], s, other);
        run(&bnb_cpu_ops_scalar, s, first);
        const size_t state = s->bits == 8 ? 1 : 4;
        same(first[0], other[0], s->bytes[0], bnb_dtype_size(s->dtype), s->dtype);
        same(first[2], other[2], s->bytes[2], state, BNB_F32);
        same(first[3], other[3], s->bytes[3], state, BNB_F32);
        if (memcmp(first[4], other[4], s->bytes[4]) || memcmp(first[5], other[5], s->bytes[5]))
            abort();
    }
    for (int k = 0; k < BUFFERS; k++) {
        free(first[k]);
        free(other[k]);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 8)
        return 0;
    struct step s = {.dtype = (bnb_dtype)(data[0] % 3), .bits = data[0] / 3 % 2 ? 8 : 32};
    const size_t state = s.bits == 8 ? 1 : 4, item = bnb_dtype_size(s.dtype);
    const bnb_optim_config config = {.size = sizeof config,
                                     .name = "adam",
                                     .lr = data[2] / 256.0,
                                     .beta1 = data[3] / 256.0,
                                     .beta2 = data[4] / 256.0,
                                     .eps = 1e-8,
                                     .weight_decay = data[2] % 16 / 16.0,
                                     .gnorm_scale = data[4] / 64.0,
                                     .skip_zeros = data[0] / 6 % 2};
    s.scalars = bnb_optim_scalars_of(&config, 1 + data[1]);
    s.n = (int64_t)((size - 5) / 2);
    s.blocks = bnb_blocks(s.n, BNB_OPTIM_BLOCK);
    const size_t n = (size_t)s.n, absmax = s.bits == 8 ? (size_t)s.blocks * 4 : 0;
    const size_t bytes[BUFFERS] = {n * item, n * item, n * state, n * state, absmax, absmax};
    memcpy(s.bytes, bytes, sizeof bytes);
    compare_tables(&s, data + 5, size - 5);
    return 0;
}
