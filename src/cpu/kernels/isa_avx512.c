/* isa_avx512.c - the kernels for AVX-512 F, BW, DQ and VL; the only object compiled with these flags */
#include "cpu/kernels/simd_avx512.h"

#define ISA_NAME "avx512"
#define ISA_NEEDS (BNB_CPU_AVX2 | BNB_CPU_AVX512)
#define ISA_OPS bnb_cpu_ops_avx512
#define ISA_INT16_ROWS 4
#include "cpu/kernels/isa.tmpl.h"
