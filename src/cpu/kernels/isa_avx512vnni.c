/* isa_avx512vnni.c - the AVX-512 kernels once more, with VNNI for the int8 products */
#include "cpu/kernels/simd_avx512.h"

#define ISA_NAME "avx512vnni"
#define ISA_NEEDS (BNB_CPU_AVX2 | BNB_CPU_AVX512 | BNB_CPU_VNNI)
#define ISA_OPS bnb_cpu_ops_avx512vnni
#define ISA_INT16_ROWS 4
#include "cpu/kernels/isa.tmpl.h"
