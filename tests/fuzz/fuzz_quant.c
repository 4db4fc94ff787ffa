/*
 * fuzz_quant.c - any bits through every quantiser and dequantiser: all tables must agree, byte for byte
 *
 * Byte 0 picks dtype and map or type, bytes 1 and 2 the block; the rest is the data.  Buffers have their exact sizes,
 * so that the address sanitizer sees one byte too many.
 */
#include <stdlib.h>
#include <string.h>

#include "cpu/cpu.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct input {
    const void *x;
    bnb_dtype dtype;
    int64_t n, block, blocks;
    int map; /* 0 and 1: default maps, 2: a searched one; NF4, FP4 */
};

static void *exact(size_t bytes)
{
    void *p = malloc(bytes ? bytes : 1);
    if (!p)
        abort();
    return memset(p, 0, bytes);
}

static void same(const void *a, const void *b, size_t bytes)
{
    if (memcmp(a, b, bytes))
        abort();
}

/* ---- 8 bits: q[k], a[k] of table k */

static void quantise8(const struct bnb_cpu_ops *ops, const struct input *in, uint8_t *codes, float *absmax, void *out)
{
    static float linear[256];
    float midpoint[256];
    bnb_create_linear_map(true, 8, false, linear);
    const struct bnb_map8 map = in->map == 0   ? bnb_map_signed
                                : in->map == 1 ? bnb_map_unsigned
                                               : bnb_prepare_map(linear, midpoint);
    const struct bnb_quant8_args a = {in->x, codes, absmax, in->n, in->block, map};
    ops->quant8[in->dtype](&a, 0, in->blocks);
    const struct bnb_dequant8_args d = {codes, out, in->n, in->block, map.code, {.absmax = absmax}};
    ops->dequant8[in->dtype](&d, 0, in->blocks);
}

static void quantise4(const struct bnb_cpu_ops *ops, const struct input *in, uint8_t *codes, float *absmax, void *out)
{
    const bnb_type4 type = in->map % 2 ? BNB_NF4 : BNB_FP4;
    const struct bnb_quant4_args a = {
        in->x, codes, absmax, in->n, in->block, (int)type, type == BNB_NF4 ? &bnb_tree_nf4 : &bnb_tree_fp4};
    ops->quant4[in->dtype](&a, 0, in->blocks);
    const struct bnb_dequant4_args d = {codes, out, in->n, in->block, bnb_map4(type), {.absmax = absmax}};
    ops->dequant4[in->dtype](&d, 0, in->blocks);
}

typedef void run_fn(const struct bnb_cpu_ops *, const struct input *, uint8_t *, float *, void *);

static void compare_tables(run_fn *run, const struct input *in, size_t code_bytes)
{
    const size_t out_bytes = (size_t)in->n * bnb_dtype_size(in->dtype), absmax_bytes = (size_t)in->blocks * 4;
    uint8_t *codes[2] = {exact(code_bytes), exact(code_bytes)};
    float *absmax[2] = {exact(absmax_bytes), exact(absmax_bytes)};
    void *out[2] = {exact(out_bytes), exact(out_bytes)};
    run(&bnb_cpu_ops_scalar, in, codes[0], absmax[0], out[0]);
    for (int k = 0; k < bnb_cpu_all_count; k++) {
        if (bnb_cpu_all[k]->needs & ~bnb_cpu_features())
            continue;
        run(bnb_cpu_all[k], in, codes[1], absmax[1], out[1]);
        same(codes[0], codes[1], code_bytes);
        same(absmax[0], absmax[1], absmax_bytes);
        same(out[0], out[1], out_bytes);
    }
    for (int k = 0; k < 2; k++) {
        free(codes[k]);
        free(absmax[k]);
        free(out[k]);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 3)
        return 0;
    struct input in = {.dtype = (bnb_dtype)(data[0] % 3), .map = data[0] / 3 % 3};
    const bool four = data[0] / 9 % 2;
    const unsigned selector = data[1] + 256u * data[2];
    in.n = (int64_t)((size - 3) / bnb_dtype_size(in.dtype));
    in.block = four ? (int64_t)32 << selector % 8 : 1 + (int64_t)(selector % 5000);
    in.blocks = bnb_blocks(in.n, in.block);
    const size_t bytes = (size_t)in.n * bnb_dtype_size(in.dtype);
    void *x = exact(bytes);
    memcpy(x, data + 3, bytes);
    in.x = x;
    if (four)
        compare_tables(quantise4, &in, (size_t)(in.n + 1) / 2);
    else
        compare_tables(quantise8, &in, (size_t)in.n);
    free(x);
    return 0;
}
