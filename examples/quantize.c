/*
 * quantize.c - the C interface from end to end: quantise an array to 8 bits and NF4, restore it, print error and size
 *
 * The array stands for a 256 x 256 weight matrix: bell-shaped values around 0.  Everything runs on the calling thread;
 * a program with threads hands over a loop of its own in bnb_exec.parallel_for.
 * Build: cc quantize.c $(pkg-config --cflags --libs bitsandbytes)
 */
#include <bitsandbytes.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { ROWS = 256, COLUMNS = 256, N = ROWS * COLUMNS, BLOCK = 64, BLOCKS = N / BLOCK, NESTED = 256 };

/* Every call returns a status; the detail names the argument, its value and what was expected. */
static void check(bnb_status status)
{
    if (status != BNB_OK) {
        fprintf(stderr, "%s (%s)\n", bnb_detail(), bnb_strerror(status));
        exit(EXIT_FAILURE);
    }
}

/* A sum of four uniform numbers is nearly normal. */
static float bell(uint32_t *state)
{
    float sum = -2.0f;
    for (int k = 0; k < 4; k++) {
        *state = *state * 1664525u + 1013904223u;
        sum += (float)(*state >> 8) * 0x1p-24f;
    }
    return 0.05f * sum;
}

/* Mean error in units of the mean magnitude, against what the format promises for such data. */
static void report(const char *name, const float *x, const float *y, double bytes, double promised)
{
    double size = 0.0, error = 0.0;
    for (int i = 0; i < N; i++) {
        size += fabs((double)x[i]);
        error += fabs((double)x[i] - (double)y[i]);
    }
    printf("%-22s %6.2f bits per value   mean error %5.2f %%\n", name, 8.0 * bytes / N, 100.0 * error / size);
    if (!(error <= promised * size)) {
        fprintf(stderr, "%s: the error exceeds %g %%\n", name, 100.0 * promised);
        exit(EXIT_FAILURE);
    }
}

int main(void)
{
    static float x[N], y[N], absmax[BLOCKS], absmax2[BLOCKS / NESTED], map[256], offset;
    static uint8_t codes8[N], codes4[N / 2], nested[BLOCKS];
    uint32_t state = 1;
    for (int i = 0; i < N; i++)
        x[i] = bell(&state);
    printf("bitsandbytes %s, CPU kernels: %s\n", bnb_version(), bnb_cpu_isa());
    report("32-bit floats", x, x, 4.0 * N, 0.0);

    check(bnb_create_dynamic_map(true, 7, 8, map));
    check(bnb_quantize8(NULL, x, BNB_F32, N, BLOCK, map, codes8, absmax));
    const bnb_scales plain = {.absmax = absmax};
    check(bnb_dequantize8(NULL, codes8, N, BLOCK, map, &plain, y, BNB_F32));
    report("8 bits, dynamic map", x, y, N + 4.0 * BLOCKS, 0.02);

    check(bnb_quantize4(NULL, x, BNB_F32, N, BLOCK, BNB_NF4, codes4, absmax));
    check(bnb_dequantize4(NULL, codes4, N, BLOCK, BNB_NF4, &plain, y, BNB_F32));
    report("NF4", x, y, N / 2.0 + 4.0 * BLOCKS, 0.12);

    /* The scales themselves in 8 bits: about an eighth of a bit per value instead of half a bit. */
    check(bnb_quantize_scales(NULL, absmax, BLOCKS, NESTED, map, nested, absmax2, &offset));
    const bnb_scales twice = {nested, map, absmax2, &offset, NESTED};
    check(bnb_dequantize4(NULL, codes4, N, BLOCK, BNB_NF4, &twice, y, BNB_F32));
    report("NF4, nested scales", x, y, N / 2.0 + BLOCKS + 4.0 * BLOCKS / NESTED + 4.0, 0.12);

    /* A wrong argument is refused before anything is written. */
    if (bnb_quantize4(NULL, x, BNB_F32, N, 48, BNB_NF4, codes4, absmax) != BNB_EINVAL)
        return EXIT_FAILURE;
    printf("refused: %s\n", bnb_detail());
    return EXIT_SUCCESS;
}
