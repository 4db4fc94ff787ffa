/*
 * bench.h - what the parts of the benchmark share: operations, timing on one and two threads, results
 */
#ifndef BNB_BENCH_H
#define BNB_BENCH_H

#include "bitsandbytes.h"
#include "cpu/cpu.h"

/* ---- clock.c: time and threads */

double now(void); /* seconds, from a clock that never goes back */

/* body over 0 .. n - 1 on 1 or 2 threads; the second thread waits between helper_start() and helper_stop(). */
void helper_start(void);
void helper_stop(void);
void run_on(int threads, int64_t n, bnb_range_fn body, void *arg);

/* A bnb_exec callback of two halves, for functions that split their own work. */
void two_halves(void *context, int64_t n, int64_t grain, bnb_range_fn body, void *arg);

/* How much faster two threads do pure arithmetic: 2 where both cores are free, 1 where another program has one. */
double free_cores(void);

/* Median seconds of one call of job(arg) over `samples` samples of at least a millisecond each, after a warm-up. */
double median_time(void (*job)(void *arg), void *arg, int samples);

/* ---- ops.c: what is measured */

struct arena { /* memory that was allocated once and is handed out again for each operation */
    char *base;
    size_t size, used;
};
void *arena_take(struct arena *a, size_t bytes);

struct task { /* one operation on its data; the arguments that its body needs are filled in */
    const struct bnb_cpu_ops *ops;
    bnb_dtype dtype;
    int64_t n, units; /* elements; blocks or whatever the body counts */
    int threads;
    struct bnb_quant8_args q8;
    struct bnb_dequant8_args d8;
    struct bnb_quant4_args q4;
    struct bnb_dequant4_args d4;
    struct bnb_optim_args optim;
    const void *x;
    float *out;
    float midpoint[256], map[256];
};

struct op {
    const char *name;
    bnb_dtype dtype;
    double bytes;   /* per element: the least that must be read and written                 */
    double touched; /* per element: memory that the operation's arrays take                 */
    double limit;   /* ns per element that one AVX2 core must reach, or 0                   */
    bool any_isa;   /* the same code whatever the instruction set                           */
    void (*prepare)(struct task *t, struct arena *a, const struct op *op);
    void (*job)(void *task); /* one pass on task->threads threads */
};
extern const struct op ops[];
extern const int op_count;

/* ---- products.c */

struct report;
void measure_products(struct report *r, struct arena *a); /* prints them too */

/* ---- report.c: what came out */

enum { IN_CACHE, FROM_MEMORY, PLACES };

struct result {
    const struct op *op;
    const char *isa;
    int place;
    double seconds[3]; /* per element, by number of threads */
};
struct product { /* of [m, k] activations and an [n, k] weight of so many bits; bf16 or f32 in and out */
    int bits;
    bnb_dtype dtype;
    int64_t m, n, k;
    double seconds[3]; /* per call, by number of threads */
};
struct report {
    struct result result[256];
    int count;
    struct product product[32];
    int product_count;
    double read[3]; /* bytes per second of a pass over more memory than the caches hold, by number of threads */
    double copy[PLACES][3]; /* bytes per second, read and written, by number of threads */
    int64_t cached_n;
    double memory_bytes;
    int samples;
    double free_cores; /* the lesser of before and after */
};
void print_header(const struct report *r);
void print_result(const struct report *r, const struct result *one);
void print_musts(const struct report *r);
void print_products_header(const struct report *r);
void print_product(const struct report *r, const struct product *p);
void print_product_musts(const struct report *r);
int write_json(const struct report *r, const char *path); /* 0, or -1 with errno set */

#endif
