/*
 * gemv4_int16.h - a few rows times a 4-bit weight in 16-bit integers, in the words of simd_avx2.h and simd_avx512.h
 *
 * Each run of 64 activations is scaled to 15 bits and a sign, the 16 weight values likewise; a weight's two bytes come
 * from two byte look-ups, and one instruction multiplies a vector of them and adds neighbours.  A sum of two products is
 * exact in int32; further sums are f32.  Relative error of a result about 3e-5.
 */
#ifndef BNB_CPU_GEMV4_INT16_H
#define BNB_CPU_GEMV4_INT16_H

/* Activations that share a scale, and weights of one load. */
enum { RUN = 64, STEP = 2 * VB_BYTES, RUNS = STEP / RUN };

/* The sum of two products of these stays below 2^31. */
#define X_UNIT 32766.0f
#define W_UNIT 32767.0f

/* A run whose largest magnitude is below this counts as zero: its scale would be no normal f32. */
#define SMALLEST 0x1p-96f

/* Activations in the order in which the look-ups give the weights: in each 16 bytes of codes, 8 elements of even index,
 * the next 8 of even index, then those of odd index. */
static void pack16(const float *x, int64_t k, int16_t *out, float *scale)
{
    float inverse[RUNS];
    for (int64_t i = 0; i < k; i += STEP) {
        for (int r = 0; r < RUNS; r++) {
            float m = 0.0f;
            for (int j = 0; j < RUN; j++) {
                const float a = fabsf(x[i + r * RUN + j]);
                m = a > m || a != a ? a : m; /* NaN stays */
            }
            const bool usable = m >= SMALLEST && m <= FLT_MAX;
            inverse[r] = usable ? X_UNIT / m : 0.0f;
            scale[i / RUN + r] = usable ? m / X_UNIT / W_UNIT : m < SMALLEST ? 0.0f : NAN;
        }
        for (int v = 0; v < 4; v++)
            for (int j = 0; j < VB_BYTES / 2; j++) {
                const int element = 32 * (j / 8) + 16 * (v % 2) + 2 * (j % 8) + v / 2;
                const float r = inverse[element / RUN];
                out[i + VB_BYTES / 2 * v + j] = r > 0.0f ? (int16_t)rintf(x[i + element] * r) : (int16_t)0;
            }
    }
}

/* The 16 weight values as low and high bytes. */
struct byte_planes { vb low, high; };

static struct byte_planes planes_load(const float code[16])
{
    uint8_t low[16], high[16];
    for (int k = 0; k < 16; k++) {
        const int w = (int)rintf(code[k] * W_UNIT);
        low[k] = (uint8_t)(w & 255);
        high[k] = (uint8_t)(w >> 8 & 255);
    }
    return (struct byte_planes){vb_table(low), vb_table(high)};
}

/* The STEP weights at `codes`, in pack16's order. */
static ALWAYS_INLINE void planes_decode(const uint8_t *codes, struct byte_planes p, vb w[4])
{
    const vb packed = vb_load(codes), even = vb_high_nibbles(packed), odd = vb_low_nibbles(packed);
    const vb even_low = vb_lookup(p.low, even), even_high = vb_lookup(p.high, even);
    const vb odd_low = vb_lookup(p.low, odd), odd_high = vb_lookup(p.high, odd);
    w[0] = vb_zip_first(even_low, even_high);
    w[1] = vb_zip_second(even_low, even_high);
    w[2] = vb_zip_first(odd_low, odd_high);
    w[3] = vb_zip_second(odd_low, odd_high);
}

static ALWAYS_INLINE void int16_row(const struct bnb_gemm4_block *g, const int16_t *x, const float *scale, int rows,
                                    int64_t column, struct byte_planes planes, float (*sums)[TILE_N])
{
    const int shift = __builtin_ctzll((unsigned long long)g->block);
    const struct bnb_scale_args scales = g->scale;
    const int64_t start = g->start + column * g->k, runs = g->k / RUN;
    vf sum[GEMV_ROWS];
    UNROLL
    for (int i = 0; i < rows; i++)
        sum[i] = vf_set(0.0f);
    for (int64_t l = 0; l < g->k; l += STEP) {
        vb w[4];
        float absmax[RUNS];
        planes_decode(g->codes + (start + l) / 2, planes, w);
        UNROLL
        for (int r = 0; r < RUNS; r++)
            absmax[r] = bnb_block_scale(&scales, (start + l + r * RUN) >> shift);
        UNROLL
        for (int i = 0; i < rows; i++) {
            const int16_t *a = x + i * g->k + l;
            const vf even = vf_add(vf_dot16(w[0], a), vf_dot16(w[1], a + VB_BYTES / 2));
            const vf odd = vf_add(vf_dot16(w[2], a + VB_BYTES), vf_dot16(w[3], a + VB_BYTES / 2 * 3));
            sum[i] = vf_fma(vf_add(even, odd), vf_units(absmax, scale + i * runs + l / RUN), sum[i]);
        }
    }
    for (int i = 0; i < rows; i++)
        sums[i][column % TILE_N] = vf_hsum(sum[i]);
}

static ALWAYS_INLINE void int16_tiles(const struct bnb_gemm4_block *g, const struct bnb_dense_args *d, const int16_t *x,
                                      const float *scale, int rows, int64_t first, int64_t end)
{
    const struct byte_planes planes = planes_load(g->code);
    for (int64_t t = first; t < end; t++) {
        const int64_t column = t * TILE_N, columns = smaller(TILE_N, g->n - column);
        float sums[GEMV_ROWS][TILE_N];
        for (int64_t j = 0; j < columns; j++)
            int16_row(g, x, scale, rows, column + j, planes, sums);
        store_tile(g->out, d->dtype, g->n, &(struct tile){0, rows, column, columns}, &sums[0][0], TILE_N, d->bias);
    }
}

static void gemv4_int16(const struct bnb_gemm4_block *g, const struct bnb_dense_args *d, const int16_t *x,
                        const float *scale, int64_t first, int64_t end)
{
    switch (g->m) {
    case 1:
        int16_tiles(g, d, x, scale, 1, first, end);
        break;
    case 2:
        int16_tiles(g, d, x, scale, 2, first, end);
        break;
    case 3:
        int16_tiles(g, d, x, scale, 3, first, end);
        break;
    default:
        int16_tiles(g, d, x, scale, GEMV_ROWS, first, end);
    }
}

#endif
