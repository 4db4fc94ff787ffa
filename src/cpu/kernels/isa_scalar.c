/* isa_scalar.c - the kernels in plain C: runs everywhere, and is the vector code's reference */
#include "cpu/kernels/simd_scalar.h"

#define ISA_NAME "scalar"
#define ISA_NEEDS 0
#define ISA_OPS bnb_cpu_ops_scalar
#include "cpu/kernels/isa.tmpl.h"
