/*
 * test_half.c - 16-bit conversions against double arithmetic, in half.h and in the kernels of every table
 *
 * All 65536 patterns upwards; downwards every tie and its neighbours, and a stride over all fp32 patterns.
 */
#include "core/half.h"

#include <math.h>
#include <string.h>

#include "check.h"
#include "support.h"

static void upwards_and_back(void)
{
    for (uint32_t h = 0; h < 0x10000u; h++) {
        const float f16 = bnb_from_f16((bnb_f16){(uint16_t)h}), bf16 = bnb_from_bf16((bnb_bf16){(uint16_t)h});
        CHECK(bits_of(f16) == bits_of(define_from_f16((uint16_t)h)), "f16 %04x is %08x", h, bits_of(f16));
        CHECK(bits_of(bf16) == h << 16, "bf16 %04x is %08x", h, bits_of(bf16));
        const uint32_t quiet16 = isnan(f16) ? h | 0x200u : h, quiet = isnan(bf16) ? h | 0x40u : h;
        CHECK(bnb_to_f16(f16).bits == quiet16, "f16 %04x came back as %04x", h, bnb_to_f16(f16).bits);
        CHECK(bnb_to_bf16(bf16).bits == quiet, "bf16 %04x came back as %04x", h, bnb_to_bf16(bf16).bits);
    }
}

static void downwards(uint32_t bits)
{
    const float x = float_of(bits);
    CHECK(bnb_to_f16(x).bits == define_to_f16(x), "%08x to f16 is %04x, expected %04x", bits, bnb_to_f16(x).bits,
          define_to_f16(x));
    CHECK(bnb_to_bf16(x).bits == define_to_bf16(x), "%08x to bf16 is %04x, expected %04x", bits, bnb_to_bf16(x).bits,
          define_to_bf16(x));
}

static void downwards_many(void)
{
    for (uint64_t bits = 0; bits < (uint64_t)1 << 32; bits += 4093)
        downwards((uint32_t)bits);
    for (uint32_t h = 0; h < 0x10000u; h++) { /* values, ties and their neighbours; NaN payloads */
        for (uint32_t k = 0; k < 5; k++) {
            downwards((h << 16) + 0x7ffeu + k);
            downwards((h << 16) + 0xfffeu + k);
        }
    }
    for (uint32_t h = 0; h < 0x7c00u; h++) {
        const double low = (double)define_from_f16((uint16_t)h);
        const double high = h == 0x7bffu ? 65536.0 : (double)define_from_f16((uint16_t)(h + 1));
        const uint32_t tie = bits_of((float)((low + high) / 2));
        for (uint32_t k = 0; k < 5; k++) {
            downwards(tie - 2 + k);
            downwards((tie - 2 + k) | 0x80000000u);
        }
    }
}

/* The kernels round with their own vector code: the same bits.  A 4-bit block decodes to 16 scaled values. */
static void kernels_round_alike(const struct bnb_cpu_ops *ops)
{
    uint8_t codes[32];
    uint16_t out[32];
    for (int i = 0; i < 32; i++)
        codes[i] = 0x0f; /* -1, 1, -1, 1 ... */
    for (uint64_t bits = 0; bits < (uint64_t)1 << 32; bits += 99991) {
        const float absmax = float_of((uint32_t)bits);
        const struct bnb_dequant4_args a = {
            .codes = codes, .out = out, .n = 32, .block = 32, .code = define_nf4_values, .scale = {.absmax = &absmax}};
        for (int dtype = BNB_F16; dtype <= BNB_BF16; dtype++) {
            ops->dequant4[dtype](&a, 0, 1);
            const float value = define_nf4_values[0] * absmax;
            const uint16_t want = dtype == BNB_F16 ? define_to_f16(value) : define_to_bf16(value);
            const float one = define_nf4_values[15] * absmax;
            const uint16_t want_one = dtype == BNB_F16 ? define_to_f16(one) : define_to_bf16(one);
            CHECK(isnan(absmax) || (out[0] == want && out[1] == want_one), "%s %s: scale %08x gives %04x %04x",
                  ops->name, dtype_name[dtype], bits_of(absmax), out[0], out[1]);
        }
    }
}

int main(void)
{
    upwards_and_back();
    downwards_many();
    for (int i = 0; i < bnb_cpu_all_count; i++)
        if (table_at(i))
            kernels_round_alike(table_at(i));
    return CHECK_RESULT();
}
