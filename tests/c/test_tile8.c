/*
 * test_tile8.c - who does what in a tile of an int8 product: the numbers of tile8.h under the PTX ISA's layouts
 *
 * Fragments, ldmatrix, stmatrix and mma are played here as the PTX ISA defines them; a mapping that is wrong on one side
 * alone gives a wrong product.  No device code runs.
 */
#include <string.h>

#include "check.h"
#include "core/args.h"
#include "cuda/kernels/tile8.h"

enum { LANES = 32, BANKS = 32, MOST_SHARED = 232448, MOST_OF_TWO = 233472 - 2048 };

static unsigned state = 1;

static int random_below(int n)
{
    state = state * 1664525u + 1013904223u;
    return (int)((state >> 8) % (unsigned)n);
}

/* Accesses of 16 bytes are served for eight lanes at a time: these must be in different banks. */
static void check_banks(const char *what, const int offset[LANES])
{
    for (int phase = 0; phase < LANES; phase += 8) {
        unsigned used = 0;
        for (int l = phase; l < phase + 8; l++) {
            const int first = offset[l] / 4 % BANKS;
            CHECK(offset[l] % 16 == 0, "%s: lane %d at %d", what, l, offset[l]);
            CHECK(!(used >> first & 15u), "%s: lanes from %d on meet in bank %d", what, phase, first);
            used |= 15u << first;
        }
    }
}

/* ---------------------------------------------------------------- results on their way out */

/* stmatrix.x4.trans: row r of matrix i, at the address of lane 8 i + r, holds column r of what the lanes have. */
static void turned(void)
{
    uint16_t memory[TILE8_TURN / 2], fragment[4][8][8];
    int written[LANES], read[LANES];
    for (int l = 0; l < LANES; l++) {
        written[l] = bnb_tile8_written(l);
        read[l] = bnb_tile8_read(l);
    }
    check_banks("written", written);
    check_banks("read", read);
    /* Matrices: rows 0 .. 7 and 8 .. 15 of the first eight tokens, then of the next. */
    for (int i = 0; i < 4; i++)
        for (int row = 0; row < 8; row++)
            for (int token = 0; token < 8; token++)
                fragment[i][row][token] = (uint16_t)(100 * (8 * (i % 2) + row) + 8 * (i / 2) + token);
    memset(memory, 0xff, sizeof memory);
    for (int i = 0; i < 4; i++)
        for (int r = 0; r < 8; r++)
            for (int e = 0; e < 8; e++)
                memory[written[8 * i + r] / 2 + e] = fragment[i][e][r];
    for (int l = 0; l < LANES; l++)
        for (int e = 0; e < 8; e++)
            CHECK(memory[read[l] / 2 + e] == 100 * (l % 2 * 8 + e) + l / 2, "lane %d reads %d", l,
                  memory[read[l] / 2 + e]);
    /* movmatrix: lane 4 g + t then has rows 2 t, 2 t + 1 of token g. */
    for (int i = 0; i < 4; i++)
        for (int l = 0; l < LANES; l++) {
            const int at = bnb_tile8_turned(i / 2 * 8 + l / 4, i % 2) + 4 * (l % 4);
            for (int e = 0; e < 2; e++)
                CHECK(memory[at / 2 + e] == fragment[i][2 * (l % 4) + e][l / 4], "matrix %d lane %d", i, l);
        }
}

/* ---------------------------------------------------------------- outlier columns */

/* mma.m16n8k16 of lane 4 g + t: a holds (g, 2 t ..), (g + 8, 2 t ..), (g, 2 t + 8 ..), (g + 8, 2 t + 8 ..), b (2 t .., g) and
 * (2 t + 8 .., g). */
static void outliers(int tokens)
{
    static int16_t values[256][16];
    static int8_t codes[TILE8_ROWS][16];
    static char chunk[BNB_TILE8_CHUNK(256)];
    const int row = 16 * random_below(8), token = 8 * random_below(tokens / 8);
    for (int i = 0; i < tokens; i++)
        for (int c = 0; c < 16; c++)
            values[i][c] = (int16_t)(random_below(2001) - 1000);
    for (int i = 0; i < TILE8_ROWS; i++)
        for (int c = 0; c < 16; c++)
            codes[i][c] = (int8_t)(random_below(256) - 128);
    for (int i = 0; i < tokens; i++)
        memcpy(chunk + bnb_tile8_values(i, 0), values[i], sizeof values[i]);
    for (int i = 0; i < TILE8_ROWS; i++)
        memcpy(chunk + bnb_tile8_codes(tokens, i, 0), codes[i], sizeof codes[i]);

    int a[16][16], b[16][8];
    for (int l = 0; l < LANES; l++) {
        const int g = l / 4, t = l % 4;
        int8_t upper[4], lower[4];
        int16_t own[4];
        memcpy(upper, chunk + bnb_tile8_codes(tokens, row + g, t), 4);
        memcpy(lower, chunk + bnb_tile8_codes(tokens, row + g + 8, t), 4);
        memcpy(own, chunk + bnb_tile8_values(token + g, t), 8);
        for (int e = 0; e < 2; e++) {
            a[g][2 * t + e] = upper[e], a[g][2 * t + 8 + e] = upper[2 + e];
            a[g + 8][2 * t + e] = lower[e], a[g + 8][2 * t + 8 + e] = lower[2 + e];
            b[2 * t + e][g] = own[e], b[2 * t + 8 + e][g] = own[2 + e];
        }
    }
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8; j++) {
            int got = 0, want = 0;
            for (int k = 0; k < 16; k++) {
                got += a[i][k] * b[k][j];
                want += codes[row + i][k] * values[token + j][k];
            }
            CHECK(got == want, "tokens %d, row %d, token %d: %d, expected %d", tokens, row + i, token + j, got, want);
        }
}

/* ---------------------------------------------------------------- operands by ldmatrix */

/* What lane l has in register i of ldmatrix.x4: word t of row g of matrix i. */
static void load(const char *memory, int row, int piece, int by_row, int8_t r[LANES][4][4])
{
    int offset[LANES];
    for (int l = 0; l < LANES; l++)
        offset[l] = bnb_tile8_matrix(l, row, piece, by_row);
    check_banks("ldmatrix", offset);
    for (int l = 0; l < LANES; l++)
        for (int i = 0; i < 4; i++)
            memcpy(r[l][i], memory + offset[8 * i + l / 4] + l % 4 * 4, 4);
}

/* mma.m16n8k32 of lane 4 g + t: a holds (g, 4 t ..), (g + 8, 4 t ..), (g, 4 t + 16 ..), (g + 8, 4 t + 16 ..), b (4 t .., g) and
 * (4 t + 16 .., g). */
static void operands(void)
{
    static char rows[TILE8_SIDE * TILE8_STEP], tokens[TILE8_SIDE * TILE8_STEP];
    static int8_t w[TILE8_SIDE][TILE8_STEP], x[TILE8_SIDE][TILE8_STEP];
    int8_t a[LANES][4][4], b[LANES][4][4];
    const int row = 16 * random_below(8), token = 16 * random_below(8), half = random_below(2);
    for (int i = 0; i < TILE8_SIDE; i++)
        for (int k = 0; k < TILE8_STEP; k++) {
            w[i][k] = (int8_t)(random_below(256) - 128);
            x[i][k] = (int8_t)(random_below(256) - 128);
            rows[bnb_tile8_piece(i, k / 16) + k % 16] = (char)w[i][k];
            tokens[bnb_tile8_piece(i, k / 16) + k % 16] = (char)x[i][k];
        }
    load(rows, row, 2 * half, 1, a);
    load(tokens, token, 2 * half, 0, b);
    for (int block = 0; block < 2; block++)
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 8; j++) {
                int got = 0, want = 0;
                for (int k = 0; k < 32; k++) {
                    const int t = k % 16 / 4, e = k % 4;
                    got += a[4 * (i % 8) + t][i / 8 + 2 * (k / 16)][e] * b[4 * j + t][2 * block + k / 16][e];
                    want += w[row + i][32 * half + k] * x[token + 8 * block + j][32 * half + k];
                }
                CHECK(got == want, "row %d, token %d: %d, expected %d", row + i, token + 8 * block + j, got, want);
            }
}

/* The gradient's: ldmatrix.x4.trans gives lane l words of columns 2 (l / 4), + 1 of rows 2 (l % 4), + 1 of each matrix; then
 * wgmma's operand has row g of a warp's 16 from even columns, g + 8 from odd ones. */
static void gradient_operand(void)
{
    static char codes[TILE8_GRAD_DEPTH * TILE8_ROWS];
    static int8_t w[TILE8_GRAD_DEPTH][TILE8_ROWS];
    for (int n = 0; n < TILE8_GRAD_DEPTH; n++)
        for (int c = 0; c < TILE8_ROWS; c++)
            codes[bnb_tile8_grad_row(n, c / 16) + c % 16] = (char)(w[n][c] = (int8_t)(random_below(256) - 128));
    for (int piece = 0; piece < 8; piece++)
        for (int h = 0; h < 2; h++) {
            int place[LANES];
            for (int l = 0; l < LANES; l++)
                place[l] = bnb_tile8_grad_row(32 * h + l, piece);
            check_banks("gradient", place);
            for (int l = 0; l < LANES; l++)
                for (int i = 0; i < 4; i++)
                    for (int e = 0; e < 2; e++)
                        for (int odd = 0; odd < 2; odd++) {
                            const int n = 32 * h + 8 * i + 2 * (l % 4) + e, column = 16 * piece + 2 * (l / 4) + odd;
                            const int got = codes[place[8 * i + 2 * (l % 4) + e] + 2 * (l / 4) + odd];
                            CHECK((int8_t)got == w[n][column], "row %d, column %d", n, column);
                        }
        }
}

/* ---------------------------------------------------------------- order and parts */

static void order(void)
{
    static char seen[60][60];
    const int rows = 1 + random_below(60), columns = 1 + random_below(60), group = 1 + random_below(20);
    memset(seen, 0, sizeof seen);
    for (int t = 0; t < rows * columns; t++) {
        int row = -1, column = -1;
        bnb_tile8_place(t, rows, columns, group, &row, &column);
        CHECK(row >= 0 && row < rows && column >= 0 && column < columns && !seen[row][column],
              "%d x %d, group %d: tile %d is (%d, %d)", rows, columns, group, t, row, column);
        seen[row][column] = 1;
    }
}

static void parts(void)
{
    for (int split = 1; split <= TILE8_MAX_SPLIT; split *= 2) {
        for (int steps = split; steps < 1025; steps += 1 + steps / 3) {
            CHECK(bnb_tile8_first(steps, split, 0) == 0 && bnb_tile8_first(steps, split, split) == steps, "%d", steps);
            for (int r = 0; r < split; r++)
                CHECK(bnb_tile8_first(steps, split, r) < bnb_tile8_first(steps, split, r + 1),
                      "part %d of %d has none of %d steps", r, split, steps);
        }
        for (int tokens = 8; tokens <= 128; tokens *= 2) {
            CHECK(bnb_tile8_token(tokens, split, 0) == 0 && bnb_tile8_token(tokens, split, split) == tokens,
                  "%d tokens, %d parts", tokens, split);
            for (int r = 0; r < split; r++)
                CHECK(bnb_tile8_token(tokens, split, r) % 8 == 0 &&
                          bnb_tile8_token(tokens, split, r) <= bnb_tile8_token(tokens, split, r + 1),
                      "%d tokens, part %d of %d", tokens, r, split);
        }
    }
}

/* One block of these on a multiprocessor of 9.0, or two; all that is copied begins at a multiple of 1024 bytes; the sums of a
 * tile fit where its stages were. */
static void sizes(void)
{
    const struct {
        int tokens, stages, chunks, blocks;
    } kernel[] = {{8, TILE8_STAGES_8, TILE8_NARROW_CHUNKS, 2},     {16, TILE8_STAGES_16, TILE8_NARROW_CHUNKS, 2},
                  {32, TILE8_STAGES_32, TILE8_NARROW_CHUNKS, 2},   {64, TILE8_STAGES_64, TILE8_NARROW_CHUNKS, 1},
                  {128, TILE8_STAGES_128, TILE8_NARROW_CHUNKS, 1}, {128, TILE8_WIDE_STAGES, TILE8_WIDE_CHUNKS, 1},
                  {256, TILE8_WIDE_STAGES, TILE8_WIDE_CHUNKS, 1}};
    for (size_t i = 0; i < sizeof kernel / sizeof kernel[0]; i++) {
        const int barriers = 8 * 2 * (kernel[i].stages + kernel[i].chunks);
        const int bytes = BNB_TILE8_SHARED(kernel[i].tokens, kernel[i].stages, kernel[i].chunks) + barriers;
        CHECK(kernel[i].blocks == 1 ? bytes <= MOST_SHARED : 2 * bytes <= MOST_OF_TWO, "%d tokens: %d bytes",
              kernel[i].tokens, bytes);
        CHECK(BNB_TILE8_STAGE(kernel[i].tokens) % 1024 == 0 && BNB_TILE8_CHUNK(kernel[i].tokens) % 16 == 0, "%d tokens",
              kernel[i].tokens);
        CHECK(kernel[i].tokens * TILE8_ROWS * 4 <= kernel[i].stages * BNB_TILE8_STAGE(kernel[i].tokens), "%d tokens",
              kernel[i].tokens);
    }
    CHECK(BNB_TILE8_CHUNK(TILE8_SIDE) + 8 * 2 * TILE8_TURN <= TILE8_WAITING &&
              TILE8_WAITING + TILE8_SIDE * TILE8_SIDE / 2 * 4 <= TILE8_SHARED,
          "tiles by asynchronous copies");
    CHECK(BNB_TILE8_GRAD_SHARED(128, TILE8_GRAD_STAGES_128) + 16 * TILE8_GRAD_STAGES_128 <= MOST_SHARED &&
              BNB_TILE8_GRAD_SHARED(256, TILE8_GRAD_STAGES_256) + 16 * TILE8_GRAD_STAGES_256 <= MOST_SHARED,
          "gradient");
}

int main(void)
{
    turned();
    for (int i = 0; i < 40; i++) {
        for (int tokens = 8; tokens <= 256; tokens *= 2)
            outliers(tokens);
        operands();
        gradient_operand();
        order();
    }
    parts();
    sizes();
    return CHECK_RESULT();
}
