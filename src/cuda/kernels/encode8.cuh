/*
 * encode8.cuh - from a scaled value to the nearest 8-bit code: NUMERICS rules 4 and 5
 *
 * A map arrives as 256 values in device memory.  A block of threads loads it once and recognises the two default maps.
 * For those it lays out cells: the floats that share sign, exponent and the upper bits of the mantissa.  The bits are so
 * many that no cell holds two thresholds (tools/device_tables.c checks it), so a code is one look-up and one comparison.
 * The cells are filled by the closed form, of which encode.h of the CPU says why it is exact.  Any other sorted map is
 * bisected over its midpoints.
 */
#ifndef BNB_CUDA_ENCODE8_CUH
#define BNB_CUDA_ENCODE8_CUH

#include "cuda/kernels/cells.h"
#include "cuda/kernels/device.cuh"

enum { ENCODE_UNSIGNED, ENCODE_SIGNED, ENCODE_SORTED };

/* A cell: the magnitude code of its first float, times 2^18, plus 2^18 less the threshold's bits within the cell.  So the
 * sum with a float's bits within the cell is 2^18 times its code, and a rest.  A cell without a threshold: the code. */
enum { CELL_UNIT = 18 };

enum { MAP_COPIES = 4 };

/* In shared memory.  CELLS: BNB_CELLS_UNSIGNED or BNB_CELLS_SIGNED, or the larger one where either map may come. */
template <int CELLS> struct map8 {
    union {
        unsigned cell[CELLS];
        float limit[256]; /* the midpoint above each value, of a map that is not a default one */
    };
    float value[256][MAP_COPIES];
    int kind, zero;
};

/* The value of a code, from the copy that a lane shares with few others: codes of a warp meet in fewer banks then. */
template <int CELLS> DEVICE float value_at(const struct map8<CELLS> *m, unsigned code)
{
    return m->value[code][threadIdx.x % MAP_COPIES];
}

/* The bits of a float are a piecewise linear log2: log10(2) / 2^23 per bit; the decade, or one less. */
DEVICE int closed_form(float a, const struct bnb_dynamic_form *f)
{
    const float log = (float)__float_as_int(a) * 3.5885571e-8f + -31.83f;
    const int low = (int)fmaxf(log, 0.0f);
    const int decade = low + (f->start[low + 1] <= a ? 1 : 0);
    const int code = min((int)(a * f->slope[decade] + f->bias[decade]), f->last[decade]);
    return code - (a < f->threshold[code] ? 1 : 0);
}

DEVICE int mantissa_shift(int kind) { return kind == ENCODE_SIGNED ? BNB_CELL_SHIFT_SIGNED : BNB_CELL_SHIFT_UNSIGNED; }

/* All threads of the block together.  It ends with a barrier.  A default map other than `only` counts as any sorted map;
 * -1: both are recognised. */
template <int CELLS> DEVICE void map8_load(struct map8<CELLS> *m, const float *map, int only)
{
    int differs = 0; /* bit k: from default map k */
    for (int k = (int)threadIdx.x; k < 256; k += (int)blockDim.x) {
        const float v = map[k];
        for (int c = 0; c < MAP_COPIES; c++)
            m->value[k][c] = v;
        differs |= (__float_as_uint(v) != __float_as_uint(bnb_default_map[0][k])) |
                   (__float_as_uint(v) != __float_as_uint(bnb_default_map[1][k])) << 1;
    }
    const int not_unsigned = __syncthreads_or(differs & 1), not_signed = __syncthreads_or(differs & 2);
    const int found = !not_unsigned ? ENCODE_UNSIGNED : !not_signed ? ENCODE_SIGNED : ENCODE_SORTED;
    const int kind = only < 0 || found == only ? found : ENCODE_SORTED;
    if (kind == ENCODE_SORTED) {
        for (int k = (int)threadIdx.x; k < 256; k += (int)blockDim.x)
            m->limit[k] = k < 255 ? (m->value[k][0] + m->value[k + 1][0]) * 0.5f : FLOAT_MAX;
    } else {
        const struct bnb_dynamic_form *form = &bnb_default_form[kind];
        const int shift = mantissa_shift(kind), cells = kind == ENCODE_SIGNED ? BNB_CELLS_SIGNED : BNB_CELLS_UNSIGNED;
        const unsigned first = __float_as_uint(BNB_CELL_FIRST) >> shift;
        for (int k = (int)threadIdx.x; k < cells; k += (int)blockDim.x) {
            const unsigned begin = (first + (unsigned)k) << shift, size = 1u << shift;
            const int code = closed_form(__uint_as_float(begin), form);
            const unsigned next = __float_as_uint(form->threshold[code + 1]) - begin;
            m->cell[k] = ((unsigned)code << CELL_UNIT) + (next < size ? (1u << CELL_UNIT) - next : 0u);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        int zero = 0;
        while (kind == ENCODE_SORTED && zero < 255 && m->limit[zero] < 0.0f)
            zero++;
        m->kind = kind;
        m->zero = kind == ENCODE_UNSIGNED ? BNB_ZERO_UNSIGNED
                  : kind == ENCODE_SIGNED ? BNB_ZERO_SIGNED
                                          : zero + (zero % 2 == 1 && zero < 255 && m->limit[zero] == 0.0f);
    }
    __syncthreads();
}

/* The magnitude code of a, which is neither NaN nor above BNB_CELL_LAST. */
template <int KIND, int CELLS> DEVICE int encode_magnitude(float a, const struct map8<CELLS> *m)
{
    const int shift = KIND == ENCODE_SIGNED ? BNB_CELL_SHIFT_SIGNED : BNB_CELL_SHIFT_UNSIGNED;
    const unsigned first = __float_as_uint(BNB_CELL_FIRST) >> shift;
    a = fmaxf(a, BNB_CELL_FIRST);
    const unsigned bits = __float_as_uint(a);
    return (int)((m->cell[(bits >> shift) - first] + (bits & ((1u << shift) - 1))) >> CELL_UNIT);
}

/* The number of midpoints below u, and one more where u is on a midpoint and the index is odd. */
template <int CELLS> DEVICE int encode_sorted(float u, const struct map8<CELLS> *m)
{
    int k = 0;
#pragma unroll
    for (int step = 128; step > 0; step /= 2)
        k += m->limit[k + step - 1] < u ? step : 0;
    return k < 255 && m->limit[k] == u ? k + (k & 1) : k;
}

/* u is not NaN. */
template <int KIND, int CELLS> DEVICE int encode8(float u, const struct map8<CELLS> *m)
{
    if (KIND == ENCODE_SORTED)
        return encode_sorted(u, m);
    if (KIND == ENCODE_UNSIGNED)
        return encode_magnitude<KIND>(u, m);
    const int code = encode_magnitude<KIND>(fabsf(u), m);
    return max(127 + (__float_as_int(u) < 0 ? -code : code), 0); /* there is no -1.0 */
}

#endif
