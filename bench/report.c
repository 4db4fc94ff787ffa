/*
 * report.c - the table, the list of musts, and the same in JSON
 */
#include <stdio.h>
#include <string.h>

#include "bench.h"

static const char *const place_name[PLACES] = {"cache", "memory"};
static const char *const dtype_name[BNB_FLOATS] = {"f32", "f16", "bf16"};

/* Bytes per second of a result on that many threads, and its share of the copy's. */
static double rate(const struct result *r, int threads) { return r->op->bytes / r->seconds[threads]; }

static double speedup(const struct result *r) { return r->seconds[1] / r->seconds[2]; }

static double copy_speedup(const struct report *r, int place) { return r->copy[place][2] / r->copy[place][1]; }

/* Whether another program took part of the second core: then figures of two threads say nothing. */
static bool disturbed(const struct report *r) { return r->free_cores < 1.8; }

void print_header(const struct report *r)
{
    if (disturbed(r))
        printf("NOTE: the machine is busy; figures of two threads say nothing\n");
    printf("cache: %lld elements; memory: arrays of %.0f MB in all; medians of %d\n", (long long)r->cached_n,
           r->memory_bytes * 1e-6, r->samples);
    printf("GB/s counts the bytes that the operation must read and write at least; copy is memcpy, read + write\n");
    for (int place = 0; place < PLACES; place++)
        printf("copy, %-7s 1 thread %6.1f GB/s   2 threads %6.1f GB/s   speed-up %.2f\n", place_name[place],
               r->copy[place][1] * 1e-9, r->copy[place][2] * 1e-9, copy_speedup(r, place));
    printf("\n%-19s %-4s %-7s %-6s | %8s %6s %6s | %8s %6s %6s | %8s %6s\n", "", "", "", "1 / 2:", "ns/elem", "GB/s",
           "% copy", "ns/elem", "GB/s", "% copy", "speed-up", "copy's");
}

void print_result(const struct report *r, const struct result *one)
{
    printf("%-19s %-4s %-7s %-6s |", one->op->name, dtype_name[one->op->dtype], one->isa, place_name[one->place]);
    for (int threads = 1; threads <= 2; threads++)
        printf(" %8.3f %6.1f %5.0f%% |", one->seconds[threads] * 1e9, rate(one, threads) * 1e-9,
               100.0 * rate(one, threads) / r->copy[one->place][threads]);
    printf(" %8.2f %6.2f\n", speedup(one), copy_speedup(r, one->place));
    fflush(stdout);
}

static const char *verdict(bool met) { return met ? "met" : "MISSED"; }

static void print_must(const struct report *r, const struct result *one)
{
    const char *name = one->op->name, *dtype = dtype_name[one->op->dtype], *place = place_name[one->place];
    const double ns = one->seconds[1] * 1e9;
    printf("%-18s %-4s %-6s  %5.3f ns (must <= %.1f): %-6s", name, dtype, place, ns, one->op->limit,
           verdict(ns <= one->op->limit));
    if (disturbed(r))
        printf("   2 threads: not measured\n");
    else if (one->place == IN_CACHE)
        printf("   2 threads %.2f times (must >= 1.7): %s\n", speedup(one), verdict(speedup(one) >= 1.7));
    else
        printf("   2 threads %.2f of the copy's scaling (must >= 0.9): %s\n",
               speedup(one) / copy_speedup(r, one->place), verdict(speedup(one) >= 0.9 * copy_speedup(r, one->place)));
}

void print_musts(const struct report *r)
{
    printf("\nWhat the AVX2 kernels must reach on one core, and with two threads\n");
    if (disturbed(r))
        printf(
            "The machine is busy: two threads did arithmetic %.2f times as fast as one.  Run again when it is idle.\n",
            r->free_cores);
    int count = 0;
    for (int i = 0; i < r->count; i++) {
        if (r->result[i].op->limit <= 0.0 || strcmp(r->result[i].isa, "avx2"))
            continue;
        print_must(r, &r->result[i]);
        count++;
    }
    if (!count)
        printf("not measured: this run has no AVX2\n");
}

/* ---- products */

static double packed_bytes(const struct product *p) { return (double)p->n * (double)p->k * p->bits / 8.0; }

static const char *kind(const struct product *p) { return p->bits == 4 ? "NF4" : "int8"; }

void print_products_header(const struct report *r)
{
    printf("\nmatrix products, %s; memory read by 1 thread %.1f GB/s, by 2 %.1f GB/s\n", bnb_cpu_isa(),
           r->read[1] * 1e-9, r->read[2] * 1e-9);
    printf("%-5s %-5s %4s %14s | %10s %8s %7s %8s | %10s %8s %7s %8s\n", "", "", "M", "weight", "1: ms", "Gop/s",
           "GB/s", "% read", "2: ms", "Gop/s", "GB/s", "% read");
}

void print_product(const struct report *r, const struct product *p)
{
    char size[32];
    snprintf(size, sizeof size, "%lldx%lld", (long long)p->n, (long long)p->k);
    printf("%-5s %-5s %4lld %14s", kind(p), dtype_name[p->dtype], (long long)p->m, size);
    for (int threads = 1; threads <= 2; threads++) {
        const double seconds = p->seconds[threads], rate_read = packed_bytes(p) / seconds;
        const double operations = 2.0 * (double)p->m * (double)p->n * (double)p->k;
        printf(" | %10.3f %8.1f %7.1f %7.0f%%", seconds * 1e3, operations / seconds * 1e-9, rate_read * 1e-9,
               100.0 * rate_read / r->read[threads]);
    }
    printf("\n");
    fflush(stdout);
}

/* NF4 and one row of a 16-bit dtype: what generating text waits for. */
void print_product_musts(const struct report *r)
{
    printf("\nWhat a 4-bit linear of one bf16 row must reach (%s)\n", bnb_cpu_isa());
    for (int i = 0; i < r->product_count; i++) {
        const struct product *p = &r->product[i];
        if (p->bits != 4 || p->m != 1 || p->dtype != BNB_BF16)
            continue;
        const double one = packed_bytes(p) / p->seconds[1], share = packed_bytes(p) / p->seconds[2] / r->read[2];
        printf("NF4 %lldx%lld  1 thread %.1f GB/s (must >= 8): %-6s", (long long)p->n, (long long)p->k, one * 1e-9,
               verdict(one >= 8e9));
        if (disturbed(r))
            printf("   2 threads: not measured\n");
        else
            printf("   2 threads %.0f%% of the read rate (must >= 70): %s\n", 100.0 * share, verdict(share >= 0.7));
    }
}

static void write_products(FILE *f, const struct report *r)
{
    fprintf(f, ",\n \"read\": {\"1\": %.4g, \"2\": %.4g}, \"products_isa\": \"%s\", \"products\": [", r->read[1],
            r->read[2], bnb_cpu_isa());
    for (int i = 0; i < r->product_count; i++) {
        const struct product *p = &r->product[i];
        fprintf(f, "%s\n  {\"weight\": \"%s\", \"dtype\": \"%s\", \"m\": %lld, \"n\": %lld, \"k\": %lld, ",
                i ? "," : "", kind(p), dtype_name[p->dtype], (long long)p->m, (long long)p->n, (long long)p->k);
        fprintf(f, "\"seconds\": {\"1\": %.5g, \"2\": %.5g}}", p->seconds[1], p->seconds[2]);
    }
    fprintf(f, "\n ]");
}

int write_json(const struct report *r, const char *path)
{
    FILE *f = fopen(path, "w");
    if (!f)
        return -1;
    fprintf(f,
            "{\"version\": \"%s\", \"samples\": %d, \"cached_elements\": %lld, \"memory_bytes\": %.0f, \"free_cores\": "
            "%.2f,\n \"copy\": {",
            bnb_version(), r->samples, (long long)r->cached_n, r->memory_bytes, r->free_cores);
    for (int place = 0; place < PLACES; place++)
        fprintf(f, "%s\"%s\": {\"1\": %.4g, \"2\": %.4g}", place ? ", " : "", place_name[place], r->copy[place][1],
                r->copy[place][2]);
    fprintf(f, "},\n \"results\": [");
    for (int i = 0; i < r->count; i++) {
        const struct result *one = &r->result[i];
        fprintf(f,
                "%s\n  {\"op\": \"%s\", \"dtype\": \"%s\", \"isa\": \"%s\", \"place\": \"%s\", \"bytes_per_element\": "
                "%.5g, ",
                i ? "," : "", one->op->name, dtype_name[one->op->dtype], one->isa, place_name[one->place],
                one->op->bytes);
        fprintf(f, "\"ns\": {\"1\": %.5g, \"2\": %.5g}, \"must_ns\": %.3g}", one->seconds[1] * 1e9,
                one->seconds[2] * 1e9, one->op->limit);
    }
    fprintf(f, "\n ]");
    write_products(f, r);
    fprintf(f, "}\n");
    return fclose(f);
}
