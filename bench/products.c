/*
 * products.c - matrix products of the instruction set in use: bytes of weight a second for one row, operations for more
 *
 * Whole calls of the library.  Each call takes the next of several weights that together exceed the caches, as the layers
 * of a model do.  One row is compared with the rate at which this machine reads memory, measured in the same run.
 */
#include <stdlib.h>
#include <string.h>

#include "bench.h"

enum { BLOCK = 64, MAX_M = 512, MAX_SETS = 16 };

/* ---- reading */

struct read {
    const uint64_t *from;
    int64_t lines;
    int threads;
    uint64_t sum[2];
};

static void body_read(void *arg, int64_t begin, int64_t end)
{
    struct read *r = arg;
    uint64_t sum[8] = {0};
    for (int64_t i = begin; i < end; i++)
        for (int j = 0; j < 8; j++)
            sum[j] += r->from[i * 8 + j];
    for (int j = 1; j < 8; j++)
        sum[0] += sum[j];
    r->sum[begin > 0] = sum[0];
}

static void job_read(void *arg)
{
    struct read *r = arg;
    run_on(r->threads, r->lines, body_read, r);
}

static void measure_read(struct report *r, struct arena *a)
{
    struct read read = {.from = (const void *)a->base, .lines = (int64_t)(a->size / 4096 * 64)};
    for (read.threads = 1; read.threads <= 2; read.threads++) {
        if (read.threads == 2)
            helper_start();
        r->read[read.threads] = 64.0 * (double)read.lines / median_time(job_read, &read, r->samples);
        if (read.threads == 2)
            helper_stop();
    }
}

/* ---- products */

struct weight {
    const void *codes;
    const float *scale;
};

struct linear {
    struct weight set[MAX_SETS];
    int sets, next;
    bnb_exec ex;
    bnb_gemm4_args four; /* size 0: the product is int8 */
    bnb_gemm8_args eight;
    int8_t *activations;
    float *row_stats;
};

static void check(bnb_status status)
{
    if (status)
        abort();
}

static void job_linear(void *arg)
{
    struct linear *l = arg;
    const struct weight w = l->set[l->next];
    l->next = (l->next + 1) % l->sets;
    if (l->four.size) {
        const bnb_scales scales = {.absmax = w.scale};
        l->four.codes = w.codes;
        l->four.scales = &scales;
        check(bnb_gemm4(&l->ex, &l->four));
        return;
    }
    l->eight.b = w.codes;
    l->eight.col_stats = w.scale;
    check(bnb_quantize_rows(&l->ex, &(bnb_matrix){l->eight.x, l->eight.dtype, l->eight.m, l->eight.k}, 0.0,
                            l->activations, l->row_stats, NULL));
    bnb_gemm8_args args = l->eight;
    args.x = NULL; /* no outliers */
    check(bnb_gemm8(&l->ex, &args));
}

/* Bytes of any value are codes, and a run of small positive floats serves as scales. */
static void take_weights(struct linear *l, struct arena *a, size_t codes, int64_t scales)
{
    const size_t one = codes + (size_t)scales * sizeof(float) + 256;
    for (l->sets = 0; l->sets < MAX_SETS && a->used + one <= a->size; l->sets++) {
        uint8_t *bytes = arena_take(a, codes);
        float *scale = arena_take(a, (size_t)scales * sizeof(float));
        uint32_t state = 1u + (uint32_t)l->sets;
        for (size_t i = 0; i < codes; i++) {
            state = state * 1664525u + 1013904223u;
            bytes[i] = (uint8_t)(state >> 24);
        }
        for (int64_t i = 0; i < scales; i++)
            scale[i] = 0.01f + 0.0001f * (float)(i % 100);
        l->set[l->sets] = (struct weight){bytes, scale};
    }
    if (l->sets < 2)
        abort();
}

static void prepare(struct linear *l, struct arena *a, const struct product *p)
{
    const size_t size = bnb_dtype_size(p->dtype), k = (size_t)p->k;
    a->used = 0;
    *l = (struct linear){.ex = {.size = sizeof l->ex}};
    char *x = arena_take(a, (size_t)p->m * k * size), *out = arena_take(a, (size_t)(p->m * p->n) * size);
    l->activations = arena_take(a, (size_t)p->m * k);
    l->row_stats = arena_take(a, (size_t)p->m * sizeof(float));
    for (int64_t i = 0; i < p->m * p->k; i++) { /* values of both signs around 1 */
        const uint32_t bits = 0x3f000000u + (uint32_t)(i * 2654435761u % 0x1000000u) + ((uint32_t)(i % 3 == 0) << 31);
        const uint16_t upper = (uint16_t)(bits >> 16);
        memcpy(x + (size_t)i * size, size == 4 ? (const void *)&bits : (const void *)&upper, size);
    }
    if (p->bits == 4) {
        l->four = (bnb_gemm4_args){.size = sizeof l->four,
                                   .x = x,
                                   .out = out,
                                   .m = p->m,
                                   .n = p->n,
                                   .k = p->k,
                                   .block = BLOCK,
                                   .type = BNB_NF4,
                                   .dtype = p->dtype};
        take_weights(l, a, (size_t)p->n * k / 2, p->n * p->k / BLOCK);
    } else {
        l->eight = (bnb_gemm8_args){.size = sizeof l->eight,
                                    .a = l->activations,
                                    .row_stats = l->row_stats,
                                    .x = x,
                                    .out = out,
                                    .m = p->m,
                                    .n = p->n,
                                    .k = p->k,
                                    .dtype = p->dtype};
        take_weights(l, a, (size_t)p->n * k, p->n);
    }
}

static void measure(struct report *r, struct arena *a, struct product p)
{
    static struct linear l;
    const int samples = p.m > 1 && r->samples > 5 ? 5 : r->samples;
    prepare(&l, a, &p);
    for (int threads = 1; threads <= 2; threads++) {
        if (threads == 2)
            helper_start();
        l.ex.parallel_for = threads == 2 ? two_halves : NULL;
        p.seconds[threads] = median_time(job_linear, &l, samples);
        if (threads == 2)
            helper_stop();
    }
    r->product[r->product_count++] = p;
    print_product(r, &p);
}

void measure_products(struct report *r, struct arena *a)
{
    static const struct product four[] = {
        {4, BNB_BF16, 1, 4096, 4096, {0}}, {4, BNB_BF16, 1, 14336, 4096, {0}}, {4, BNB_F32, 1, 4096, 4096, {0}},
        {4, BNB_F32, 1, 14336, 4096, {0}}, {4, BNB_BF16, 16, 4096, 4096, {0}}, {4, BNB_BF16, 128, 4096, 4096, {0}},
    };
    static const int64_t eight[] = {1, 16, 128, MAX_M};
    measure_read(r, a);
    print_products_header(r);
    for (size_t i = 0; i < sizeof four / sizeof four[0]; i++)
        measure(r, a, four[i]);
    for (size_t i = 0; i < sizeof eight / sizeof eight[0]; i++)
        measure(r, a, (struct product){8, BNB_BF16, eight[i], 4096, 4096, {0}});
}
