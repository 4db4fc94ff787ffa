/*
 * isa.tmpl.h - every kernel of one instruction set, and its table
 *
 * In: ISA_NAME, ISA_NEEDS, ISA_OPS, and the simd_*.h of the instruction set already included.
 */
#include "cpu/kernels/encode.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/rules.h"

#define T float
#define NAME(f) f##_f32
#define LOAD vf_load_f32
#define STORE vf_store_f32
#include "cpu/kernels/quant8.tmpl.h"
#include "cpu/kernels/quant4.tmpl.h"
#include "cpu/kernels/optim.tmpl.h"
#undef T
#undef NAME
#undef LOAD
#undef STORE

#define T bnb_f16
#define NAME(f) f##_f16
#define LOAD vf_load_f16
#define STORE vf_store_f16
#include "cpu/kernels/quant8.tmpl.h"
#include "cpu/kernels/quant4.tmpl.h"
#include "cpu/kernels/optim.tmpl.h"
#undef T
#undef NAME
#undef LOAD
#undef STORE

#define T bnb_bf16
#define NAME(f) f##_bf16
#define LOAD vf_load_bf16
#define STORE vf_store_bf16
#include "cpu/kernels/quant8.tmpl.h"
#include "cpu/kernels/quant4.tmpl.h"
#include "cpu/kernels/optim.tmpl.h"

#define ALL_DTYPES(kernel) {kernel##_f32, kernel##_f16, kernel##_bf16} /* in the order of bnb_dtype */

const struct bnb_cpu_ops ISA_OPS = {
    .name = ISA_NAME,
    .needs = ISA_NEEDS,
    .quant8 = ALL_DTYPES(quant8),
    .dequant8 = ALL_DTYPES(dequant8),
    .quant4 = ALL_DTYPES(quant4),
    .dequant4 = ALL_DTYPES(dequant4),
    .optim8 = {[BNB_RULE_ADAM] = ALL_DTYPES(optim8_adam)},
    .optim32 = {[BNB_RULE_ADAM] = ALL_DTYPES(optim32_adam)},
};
