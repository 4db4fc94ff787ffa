/* isa_avx2.c - the kernels for AVX2, FMA and F16C; the only objects compiled with these flags */
#include "cpu/kernels/simd_avx2.h"

#define ISA_NAME "avx2"
#define ISA_NEEDS BNB_CPU_AVX2
#define ISA_OPS bnb_cpu_ops_avx2
#define ISA_INT16_ROWS 4
#include "cpu/kernels/isa.tmpl.h"
