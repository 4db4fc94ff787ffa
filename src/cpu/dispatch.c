/*
 * dispatch.c - which instruction set runs, and the CPU's device table
 *
 * The choice is made once, by a loader constructor, so that no call needs a lock.
 */
#include <stdlib.h>
#include <string.h>

#include "cpu/cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>

/* Bits of XCR0: the registers that the operating system saves. */
enum { YMM_SAVED = 0x06, ZMM_SAVED = 0xe6 };

static unsigned saved_registers(void)
{
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static bool has_all(unsigned value, unsigned bits) { return (value & bits) == bits; }

unsigned bnb_cpu_features(void)
{
    const unsigned fma = 1u << 12, osxsave = 1u << 27, f16c = 1u << 29; /* leaf 1, ecx */
    const unsigned avx2 = 1u << 5, avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* leaf 7, ebx: F, DQ, BW, VL */
    const unsigned vnni = 1u << 11; /* leaf 7, ecx */
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !has_all(c, fma | osxsave | f16c))
        return 0;
    const unsigned saved = saved_registers();
    if (!has_all(saved, YMM_SAVED) || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !has_all(b, avx2))
        return 0;
    if (!has_all(saved, ZMM_SAVED) || !has_all(b, avx512))
        return BNB_CPU_AVX2;
    return BNB_CPU_AVX2 | BNB_CPU_AVX512 | (c & vnni ? (unsigned)BNB_CPU_VNNI : 0u);
}
#else
unsigned bnb_cpu_features(void) { return 0; }
#endif

const struct bnb_cpu_ops *const bnb_cpu_all[] = {
#if defined(__x86_64__)
    &bnb_cpu_ops_avx512vnni,
    &bnb_cpu_ops_avx512,
    &bnb_cpu_ops_avx2,
#endif
    &bnb_cpu_ops_scalar,
};
const int bnb_cpu_all_count = sizeof bnb_cpu_all / sizeof bnb_cpu_all[0];

const struct bnb_cpu_ops *bnb_cpu_pick(unsigned features)
{
    int i = 0;
    while (bnb_cpu_all[i]->needs & ~features)
        i++; /* ends: the scalar table is last and needs nothing */
    return bnb_cpu_all[i];
}

static const struct bnb_cpu_ops *in_use = &bnb_cpu_ops_scalar;

__attribute__((constructor)) static void choose(void)
{
    const unsigned features = bnb_cpu_features();
    const char *wanted = getenv("BNB_CPU_ISA");
    in_use = bnb_cpu_pick(features);
    for (int i = 0; wanted && i < bnb_cpu_all_count; i++)
        if (!strcmp(bnb_cpu_all[i]->name, wanted) && !(bnb_cpu_all[i]->needs & ~features))
            in_use = bnb_cpu_all[i];
}

const struct bnb_cpu_ops *bnb_cpu_ops_in_use(void) { return in_use; }

const char *bnb_cpu_isa(void) { return in_use->name; }

void bnb_cpu_parallel(const bnb_exec *ex, int64_t n, int64_t grain, bnb_range_fn body, void *arg)
{
    if (ex && ex->parallel_for && n > grain)
        ex->parallel_for(ex->context, n, grain, body, arg);
    else if (n > 0)
        body(arg, 0, n);
}

void *bnb_cpu_alloc(const bnb_exec *ex, size_t bytes)
{
    return ex && ex->alloc ? ex->alloc(ex->context, bytes) : malloc(bytes);
}

void bnb_cpu_free(const bnb_exec *ex, void *ptr, size_t bytes)
{
    if (ex && ex->alloc) {
        if (ex->free)
            ex->free(ex->context, ptr, bytes);
    } else {
        free(ptr);
    }
}

const struct bnb_device_ops bnb_cpu_device = {
    .quantize8 = bnb_cpu_quantize8,
    .dequantize8 = bnb_cpu_dequantize8,
    .quantize4 = bnb_cpu_quantize4,
    .dequantize4 = bnb_cpu_dequantize4,
    .quantize_scales = bnb_cpu_quantize_scales,
    .expand_scales = bnb_cpu_expand_scales,
    .select = bnb_cpu_select,
    .gemm4 = bnb_cpu_gemm4,
    .gemm8 = bnb_cpu_gemm8,
    .quantize_rows = bnb_cpu_quantize_rows,
    .dequantize_rows = bnb_cpu_dequantize_rows,
    .gather_columns = bnb_cpu_gather_columns,
    .optim_step = bnb_cpu_optim_step,
    .optim_norms = bnb_cpu_optim_norms,
    .gradient_norms = bnb_cpu_gradient_norms,
    .clip_percentile = bnb_cpu_clip_percentile,
};
