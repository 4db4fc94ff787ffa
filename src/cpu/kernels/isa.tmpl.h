/*
 * isa.tmpl.h - every kernel of one instruction set, and its table
 *
 * In: ISA_NAME, ISA_NEEDS, ISA_OPS, and the simd_*.h of the instruction set already included.
 */
#include "cpu/kernels/encode.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/gemm4.h"
#include "cpu/kernels/gemm8.h"
#if defined(ISA_INT16_ROWS)
#include "cpu/kernels/gemv4_int16.h"
#endif
#include "cpu/kernels/kernels.h"

#define T float
#define NAME(f) f##_f32
#define LOAD vf_load_f32
#define STORE vf_store_f32
#include "cpu/kernels/convert.tmpl.h"
#include "cpu/kernels/quant8.tmpl.h"
#include "cpu/kernels/quant4.tmpl.h"
#include "cpu/kernels/rows.tmpl.h"
#undef T
#undef NAME
#undef LOAD
#undef STORE

#define T bnb_f16
#define NAME(f) f##_f16
#define LOAD vf_load_f16
#define STORE vf_store_f16
#include "cpu/kernels/convert.tmpl.h"
#include "cpu/kernels/quant8.tmpl.h"
#include "cpu/kernels/quant4.tmpl.h"
#include "cpu/kernels/rows.tmpl.h"
#undef T
#undef NAME
#undef LOAD
#undef STORE

#define T bnb_bf16
#define NAME(f) f##_bf16
#define LOAD vf_load_bf16
#define STORE vf_store_bf16
#include "cpu/kernels/convert.tmpl.h"
#include "cpu/kernels/quant8.tmpl.h"
#include "cpu/kernels/quant4.tmpl.h"
#include "cpu/kernels/rows.tmpl.h"

#include "cpu/kernels/optim.h"

#define ALL_DTYPES(kernel) {kernel##_f32, kernel##_f16, kernel##_bf16} /* in the order of bnb_dtype */

const struct bnb_cpu_ops ISA_OPS = {
    .name = ISA_NAME,
    .needs = ISA_NEEDS,
    .quant8 = ALL_DTYPES(quant8),
    .dequant8 = ALL_DTYPES(dequant8),
    .quant4 = ALL_DTYPES(quant4),
    .dequant4 = ALL_DTYPES(dequant4),
    .optim8 = ALL_RULES(optim8),
    .optim32 = ALL_RULES(optim32),
    .optim_norms = ALL_RULES(norms),
    .square_blocks = square_blocks,
    .tile_columns = TILE_N,
    .axpy_columns = AXPY_N,
    .run = 2 * VF_LANES,
    .pack8_bytes = sizeof(dot_a),
    .widen = ALL_DTYPES(widen),
    .gemm4_dot = gemm4_dot,
    .gemm4_axpy = gemm4_axpy,
    .pack_pairs = pack_pairs,
    .gemv4 = gemv4,
#if defined(ISA_INT16_ROWS)
    .int16_rows = ISA_INT16_ROWS,
    .int16_step = STEP,
    .pack16 = pack16,
    .gemv4_int16 = gemv4_int16,
#endif
    .pack8 = pack8,
    .gemm8_dot = gemm8_dot,
    .gemm8_axpy = gemm8_axpy,
    .quant_rows = ALL_DTYPES(quant_rows),
    .dequant_rows = ALL_DTYPES(dequant_rows),
};
