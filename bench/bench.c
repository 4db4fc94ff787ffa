/*
 * bench.c - how fast every operation of every instruction set is, as a share of what the machine's memory can do
 *
 * Usage: bnb_bench [--json FILE] [--isa NAME] [--products] [--quick].  For each operation: ns per element, GB/s and the share of
 * memcpy's rate from the same run, on one thread and two, with data in the cache and from memory.  Then the matrix products
 * of the instruction set in use, which BNB_CPU_ISA chooses; --products measures nothing else.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"

enum { CACHED_N = 131072 }; /* 640 KiB for the 8-bit encoder of f32 */

struct options {
    const char *json, *isa;
    bool products;
    int samples;
};

/* ---- the copy that everything is compared with
 *
 * memcpy of a whole half, or in pieces, whichever is faster here: a large memcpy goes around the caches, which some
 * machines reward and others do not. */

struct copy {
    char *to;
    const char *from;
    int64_t bytes, piece;
    int threads;
};

static void body_copy(void *arg, int64_t begin, int64_t end)
{
    const struct copy *c = arg;
    for (int64_t i = begin * 64; i < end * 64; i += c->piece)
        memcpy(c->to + i, c->from + i, (size_t)(end * 64 - i < c->piece ? end * 64 - i : c->piece));
}

static void job_copy(void *arg)
{
    const struct copy *c = arg;
    run_on(c->threads, c->bytes / 64, body_copy, arg);
}

static double copy_rate(struct copy *c, int threads, int samples)
{
    double best = 0.0;
    c->threads = threads;
    if (threads == 2)
        helper_start();
    for (int whole = 0; whole < 2; whole++) {
        c->piece = whole ? c->bytes : 32768;
        const double rate = 2.0 * (double)c->bytes / median_time(job_copy, c, samples);
        best = rate > best ? rate : best;
    }
    if (threads == 2)
        helper_stop();
    return best;
}

static void measure_copy(struct report *r, struct arena *a)
{
    for (int place = 0; place < PLACES; place++) {
        const int64_t bytes = place == IN_CACHE ? CACHED_N * 5 / 2 : (int64_t)(r->memory_bytes / 2) / 64 * 64;
        a->used = 0;
        struct copy c = {.to = arena_take(a, (size_t)bytes), .from = arena_take(a, (size_t)bytes), .bytes = bytes};
        for (int threads = 1; threads <= 2; threads++)
            r->copy[place][threads] = copy_rate(&c, threads, r->samples);
    }
}

/* ---- one operation */

static void measure(struct report *r, struct arena *a, const struct op *op, const struct bnb_cpu_ops *table, int place)
{
    static struct task t; /* the arguments point into it */
    const int64_t n = place == IN_CACHE ? CACHED_N : (int64_t)(r->memory_bytes / op->touched) / 4096 * 4096;
    struct result *one = &r->result[r->count++];
    *one = (struct result){.op = op, .isa = op->any_isa ? "any" : table->name, .place = place};
    a->used = 0;
    t = (struct task){.ops = table, .dtype = op->dtype, .n = n};
    op->prepare(&t, a, op);
    for (t.threads = 1; t.threads <= 2; t.threads++) {
        if (t.threads == 2)
            helper_start();
        one->seconds[t.threads] = median_time(op->job, &t, r->samples) / (double)n;
        if (t.threads == 2)
            helper_stop();
    }
    print_result(r, one);
}

static void measure_all(struct report *r, struct arena *a, const char *isa)
{
    for (int i = 0; i < op_count; i++) {
        for (int k = 0; k < bnb_cpu_all_count; k++) {
            const struct bnb_cpu_ops *table = bnb_cpu_all[k];
            if (table->needs & ~bnb_cpu_features() || (isa && strcmp(isa, table->name)))
                continue;
            for (int place = 0; place < PLACES; place++)
                measure(r, a, &ops[i], table, place);
            if (ops[i].any_isa)
                break;
        }
    }
}

/* What one core sees as its last cache.  sysconf() may count the caches of a whole machine. */
static size_t last_cache(void)
{
    unsigned kib = 0;
    FILE *f = fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r");
    if (f) {
        if (fscanf(f, "%uK", &kib) != 1)
            kib = 0;
        fclose(f);
    }
    return kib ? (size_t)kib << 10 : (size_t)32 << 20;
}

static int usage(const char *program)
{
    fprintf(stderr, "usage: %s [--json FILE] [--isa NAME] [--products] [--quick]\n", program);
    return EXIT_FAILURE;
}

int main(int argc, char **argv)
{
    static struct report r;
    struct options o = {NULL, NULL, false, 15};
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--quick"))
            o.samples = 3;
        else if (!strcmp(argv[i], "--products"))
            o.products = true;
        else if (!strcmp(argv[i], "--json") && i + 1 < argc)
            o.json = argv[++i];
        else if (!strcmp(argv[i], "--isa") && i + 1 < argc)
            o.isa = argv[++i];
        else
            return usage(argv[0]);
    }
    r.samples = o.samples;
    r.cached_n = CACHED_N;
    r.memory_bytes = 5.0 * (double)last_cache(); /* more than four times what the caches hold */
    struct arena a = {.size = (size_t)(r.memory_bytes * 1.05) + ((size_t)16 << 20)};
    a.base = aligned_alloc(4096, a.size / 4096 * 4096);
    if (!a.base) {
        fprintf(stderr, "%s: no %zu bytes of memory\n", argv[0], a.size);
        return EXIT_FAILURE;
    }
    memset(a.base, 1, a.size / 4096 * 4096);
    r.free_cores = free_cores();
    if (!o.products) {
        measure_copy(&r, &a);
        print_header(&r);
        measure_all(&r, &a, o.isa);
    }
    measure_products(&r, &a);
    const double after = free_cores();
    r.free_cores = after < r.free_cores ? after : r.free_cores;
    if (!o.products)
        print_musts(&r);
    print_product_musts(&r);
    free(a.base);
    if (o.json && write_json(&r, o.json)) {
        fprintf(stderr, "%s: cannot write %s: %s\n", argv[0], o.json, strerror(errno));
        return EXIT_FAILURE;
    }
    return EXIT_SUCCESS;
}
