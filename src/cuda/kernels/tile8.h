/*
 * tile8.h - who does what in an int8 product on matrix units: numbers alone, for the host and for device code
 *
 * A tile is 128 rows of the weight times 8 to 256 tokens (rows of activations).  A warp has 16 of the rows and all tokens;
 * of its 16 x 8 blocks, lane 4 g + t holds (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1).  Results lie token by
 * token, so they are turned over on their way out, two blocks at a time.
 */
#ifndef BNB_CUDA_TILE8_H
#define BNB_CUDA_TILE8_H

#include "core/args.h"

/* Rows of a tile, bytes of a row in one step along the sum, threads that multiply and all threads of a block. */
enum { TILE8_ROWS = 128, TILE8_DEPTH = 128, TILE8_WORKERS = 256, TILE8_THREADS = 384 };

/* Outlier columns that are multiplied at a time, and that are listed beforehand; bytes of a warp's two blocks on their way
 * out, and of the numbers of columns: 16 for each of three warps, the list, how many there are. */
enum { TILE8_COLUMNS = 16, TILE8_ROOM = 64, TILE8_TURN = 512, TILE8_NUMBERS = 4 * (3 * 16 + TILE8_ROOM + 4) };

/* Blocks of threads of a tile with few tokens: they share its sum. */
enum { TILE8_MAX_SPLIT = 8 };

/* ---- shared memory */

/* Outlier columns: 16 values of every token in 16 bits, then 16 codes of every row. */
#define BNB_TILE8_STAGE(tokens) ((TILE8_ROWS + (tokens)) * TILE8_DEPTH)
#define BNB_TILE8_VALUES(tokens) ((tokens) * 32)
#define BNB_TILE8_CHUNK(tokens) (BNB_TILE8_VALUES(tokens) + TILE8_ROWS * 16)

/* Where the values of columns 4 t .. of a token, and the codes of the same columns of a row, lie in it. */
BNB_EITHER_DEVICE int bnb_tile8_values(int token, int t) { return token * 32 + t * 8; }
BNB_EITHER_DEVICE int bnb_tile8_codes(int tokens, int row, int t) { return tokens * 32 + row * 16 + t * 4; }

/* All of it: stages, chunks, what is turned over (two buffers for each warp), statistics (two copies), the numbers of
 * outlier columns, and 1024 bytes to begin at a multiple of as many. */
#define BNB_TILE8_SHARED(tokens, stages, chunks)                                                                     \
    ((stages) * BNB_TILE8_STAGE(tokens) + (chunks) * BNB_TILE8_CHUNK(tokens) + TILE8_WORKERS / 32 * 2 * TILE8_TURN + \
     2 * (tokens) * 4 + TILE8_NUMBERS + 1024)

/* Beside it, where blocks stay: scales and bias of every row. */
enum { TILE8_ROW_SCALES = TILE8_ROWS * 16 };

/* Stages and chunks: of 128 and 256 tokens where blocks stay; of 8, 16, 32, 64 and 128 where they do not. */
enum {
    TILE8_WIDE_STAGES = 4,
    TILE8_WIDE_CHUNKS = 2,
    TILE8_NARROW_CHUNKS = 4,
    TILE8_STAGES_8 = 5,
    TILE8_STAGES_16 = 5,
    TILE8_STAGES_32 = 4,
    TILE8_STAGES_64 = 8,
    TILE8_STAGES_128 = 6
};

/* The gradient: rows of the weight in a step; x in 16 bits and codes of a stage, and all of it with scales; where a piece of 16
 * codes of a row lies. */
enum { TILE8_GRAD_DEPTH = 64, TILE8_GRAD_STAGES_128 = 8, TILE8_GRAD_STAGES_256 = 5 };
#define BNB_TILE8_GRAD_STAGE(tokens) (((tokens) * 2 + TILE8_ROWS) * TILE8_GRAD_DEPTH)
#define BNB_TILE8_GRAD_SHARED(tokens, stages) ((stages) * (BNB_TILE8_GRAD_STAGE(tokens) + 4 * TILE8_GRAD_DEPTH) + 1024)
BNB_EITHER_DEVICE int bnb_tile8_grad_row(int row, int piece) { return row * TILE8_ROWS + (piece ^ (row & 7)) * 16; }

/* Tiles of cards that copy 16 bytes at a time: 128 rows and 128 tokens, steps of 64 bytes; where piece 0 .. 3 of such a row
 * lies in a stage, apart from its neighbours' in the banks. */
enum { TILE8_STEP = 64, TILE8_STAGES = 3, TILE8_SIDE = 128, TILE8_SHARED = TILE8_STAGES * 2 * TILE8_SIDE * TILE8_STEP };

/* There, where half of the sums waits: behind a chunk and what is turned over. */
enum { TILE8_WAITING = TILE8_SIDE * 48 + TILE8_WORKERS / 32 * 2 * TILE8_TURN };

BNB_EITHER_DEVICE int bnb_tile8_piece(int row, int piece) { return row * TILE8_STEP + (piece ^ (row >> 1 & 3)) * 16; }

/* Of four 8 x 16-byte matrices, lane l gives the place of row l % 8 of matrix l / 8.  by_row: both eights of 16 rows at one
 * piece, then at the next; else both pieces of eight rows, then of the next eight. */
BNB_EITHER_DEVICE int bnb_tile8_matrix(int lane, int row, int piece, int by_row)
{
    const int a = lane >> 3 & 1, b = lane >> 4;
    return bnb_tile8_piece(row + lane % 8 + 8 * (by_row ? a : b), piece + (by_row ? b : a));
}

/* ---- turning over: [16 tokens][16 rows] of 16 bits, whose halves of 16 bytes are swapped in every other four tokens */

BNB_EITHER_DEVICE int bnb_tile8_turned(int token, int half) { return token * 32 + (half ^ (token >> 2 & 1)) * 16; }

/* Of the four 8 x 8 matrices that a warp writes, lane l gives the place of row l % 8 of matrix l / 8: rows 0 .. 7 and
 * 8 .. 15 of the first block, then of the second. */
BNB_EITHER_DEVICE int bnb_tile8_written(int lane)
{
    return bnb_tile8_turned((lane >> 4) * 8 + lane % 8, lane >> 3 & 1);
}

/* What lane l reads: half l % 2 of token l / 2. */
BNB_EITHER_DEVICE int bnb_tile8_read(int lane) { return bnb_tile8_turned(lane / 2, lane % 2); }

/* ---- the order of tiles */

/* Tile t of rows x columns of them: bands of `group` rows, in each of which the row changes first. */
BNB_EITHER_DEVICE void bnb_tile8_place(int t, int rows, int columns, int group, int *row, int *column)
{
    const int first = t / (group * columns) * group, height = rows - first < group ? rows - first : group;
    const int within = t - first * columns;
    *row = first + within % height;
    *column = within / height;
}

/* The first of `steps` steps of part `rank` of `split`; part `split` begins at the end. */
BNB_EITHER_DEVICE int bnb_tile8_first(int steps, int split, int rank)
{
    return (int)((unsigned)steps * (unsigned)rank / (unsigned)split);
}

/* The first of `tokens` tokens that part `rank` of `split` finishes, whole blocks of eight. */
BNB_EITHER_DEVICE int bnb_tile8_token(int tokens, int split, int rank)
{
    const int blocks = tokens / 8, each = blocks > split ? blocks / split : 1;
    return 8 * (rank * each < blocks ? rank * each : blocks);
}

#endif
