/*
 * cells.h - how the floats of [0, 1] are cut into cells for the default 8-bit maps: encode8.cuh
 *
 * A cell is what is left of a float's bits above the shift.  The first one begins at BNB_CELL_FIRST, below every threshold;
 * the last one is that of 1.0, which no scaled value leaves upwards.
 */
#ifndef BNB_CUDA_CELLS_H
#define BNB_CUDA_CELLS_H

#define BNB_CELL_FIRST 0x1p-24f

enum {
    BNB_CELL_SHIFT_UNSIGNED = 16, /* 7 bits of the mantissa stay */
    BNB_CELL_SHIFT_SIGNED = 17,   /* 6 bits                      */
    BNB_CELLS_UNSIGNED = 24 * 128 + 1,
    BNB_CELLS_SIGNED = 24 * 64 + 1
};

#endif
