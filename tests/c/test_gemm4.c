/*
 * test_gemm4.c - products with 4-bit weights, and their gradients, against double sums over weights decoded by definition
 *
 * Bounds.  An f32 sum of k terms rounds k times by at most u = 2^-24 of a partial sum, which is below S = sum |x| |w|;
 * roundings are independent, so sqrt(k) u S bounds them, and 4 u S the scale, the fold of the lanes and the bias.  A
 * 16-bit result adds half its spacing.  Not exact, few rows: 1e-4 |x| |w|, euclidean norms, for the 16-bit integers, whose
 * scale is the largest activation of a run by 2^30: runs below 2^-96, where it stops being a normal f32, may count as 0.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "support.h"

enum { FEW = 8, BLOCK2 = 256, BLOCKS2 = 520 }; /* rows that may take integers; blocks of a nested scale, and scales */

struct options {
    bnb_dtype dtype;
    bnb_type4 type;
    int64_t block;
    bool nested, bias, exact;
};

/* Option number `i`: neighbours differ in everything; 192 numbers cover the whole cross product. */
static struct options options_at(int i)
{
    static const int64_t block[4] = {64, 32, 128, 4096};
    return (struct options){(bnb_dtype)(i % 3), i / 3 % 2 ? BNB_FP4 : BNB_NF4, block[i / 6 % 4], i / 24 % 2, i / 48 % 2,
                            i / 96 % 2};
}

struct problem { /* buffers have exact sizes: a sanitizer sees one byte too many */
    struct options o;
    int64_t m, n, k;
    bool grad;
    int64_t inner, outer; /* of the sum; of the result */
    void *x, *bias, *absmax;
    uint8_t *codes;
    float absmax2[BLOCKS2], offset, map[256];
    bnb_scales scales;
    double *w; /* [n, k] decoded */
};

static void *take(size_t bytes)
{
    void *p = malloc(bytes ? bytes : 1);
    if (!p)
        abort();
    return p;
}

static void fill_scales(struct problem *p, int64_t blocks, uint64_t *state)
{
    p->absmax = take((size_t)blocks * (p->o.nested ? 1 : 4));
    for (int64_t i = 0; i < blocks; i++) {
        if (p->o.nested)
            ((uint8_t *)p->absmax)[i] = (uint8_t)random_bits(state);
        else
            ((float *)p->absmax)[i] = (float)(0.05 + random_unit(state));
    }
    p->scales = (bnb_scales){.absmax = p->absmax};
    if (!p->o.nested)
        return;
    bnb_create_dynamic_map(true, 7, 8, p->map);
    for (int i = 0; i < BLOCKS2; i++)
        p->absmax2[i] = (float)(0.1 + 0.3 * random_unit(state));
    p->offset = 0.625f; /* scales stay positive */
    p->scales = (bnb_scales){p->absmax, p->map, p->absmax2, &p->offset, BLOCK2};
}

static void decode(struct problem *p)
{
    const float *value = p->o.type == BNB_NF4 ? define_nf4_values : define_fp4_values;
    for (int64_t i = 0; i < p->n * p->k; i++) {
        const int64_t b = i / p->o.block;
        const int code = i % 2 ? p->codes[i / 2] & 15 : p->codes[i / 2] >> 4;
        float scale = ((const float *)p->absmax)[p->o.nested ? 0 : b];
        if (p->o.nested) {
            const float product = p->map[((const uint8_t *)p->absmax)[b]] * p->absmax2[b / BLOCK2];
            scale = product + p->offset;
        }
        p->w[i] = (double)(value[code] * scale);
    }
}

static void problem_make(struct problem *p, struct options o, int64_t m, int64_t n, int64_t k, bool grad)
{
    uint64_t state = (uint64_t)(n * 4099 + k * 7 + o.block + grad);
    const size_t size = bnb_dtype_size(o.dtype);
    const int64_t elements = n * k, blocks = bnb_blocks(elements, o.block);
    *p = (struct problem){.o = o, .m = m, .n = n, .k = k, .grad = grad, .inner = grad ? n : k, .outer = grad ? k : n};
    p->x = take((size_t)(m * p->inner) * size);
    fill_values(p->x, o.dtype, m * p->inner, FILL_BELL, random_bits(&state));
    p->codes = take((size_t)(elements + 1) / 2);
    for (int64_t i = 0; i < (elements + 1) / 2; i++)
        p->codes[i] = (uint8_t)random_bits(&state); /* and so the nibble behind an odd end: it counts for nothing */
    if (blocks > BLOCKS2 * BLOCK2)
        abort();
    fill_scales(p, blocks, &state);
    p->w = take((size_t)elements * sizeof(double));
    decode(p);
    if (o.bias && !grad) {
        p->bias = take((size_t)n * size);
        fill_values(p->bias, o.dtype, n, FILL_BELL, 5);
    }
}

static void problem_free(struct problem *p)
{
    free(p->x);
    free(p->bias);
    free(p->absmax);
    free(p->codes);
    free(p->w);
}

static bnb_status call(const struct problem *p, const bnb_exec *ex, int64_t m, const void *x, void *out)
{
    const bnb_gemm4_args args = {.size = sizeof args,
                                 .x = x,
                                 .codes = p->codes,
                                 .scales = &p->scales,
                                 .bias = p->bias,
                                 .out = out,
                                 .m = m,
                                 .n = p->n,
                                 .k = p->k,
                                 .block = p->o.block,
                                 .type = p->o.type,
                                 .dtype = p->o.dtype,
                                 .exact = p->o.exact};
    return p->grad ? bnb_gemm4_grad(ex, &args) : bnb_gemm4(ex, &args);
}

/* ---- the definition */

struct expected { double value, magnitude, integers; }; /* x w + bias; S with |bias|; what integers may add */

static void define_row(const struct problem *p, int64_t row, struct expected *e)
{
    double *squares = take((size_t)p->outer * sizeof(double)), x2 = 0.0;
    for (int64_t j = 0; j < p->outer; j++) {
        e[j] = (struct expected){0.0, 0.0, 0.0};
        squares[j] = 0.0;
    }
    for (int64_t j = 0; !p->grad && j < p->outer && p->bias; j++) {
        e[j].value = (double)value_at(p->bias, p->o.dtype, j);
        e[j].magnitude = fabs(e[j].value);
    }
    for (int64_t l = 0; l < p->inner; l++) {
        const double x = (double)value_at(p->x, p->o.dtype, row * p->inner + l);
        x2 += x * x;
        for (int64_t j = 0; j < p->outer; j++) {
            const double w = p->w[p->grad ? l * p->k + j : j * p->k + l];
            e[j].value += x * w;
            e[j].magnitude += fabs(x * w);
            squares[j] += w * w;
        }
    }
    for (int64_t j = 0; j < p->outer; j++)
        e[j].integers = (1e-4 * sqrt(x2) + 0x1p-96 * sqrt((double)p->inner)) * sqrt(squares[j]);
    free(squares);
}

static double bound_of(const struct problem *p, int64_t m, const struct expected *e)
{
    const bool integers = !p->grad && !p->o.exact && p->o.dtype != BNB_F32 && m <= FEW;
    const double sum = (4.0 + sqrt((double)p->inner)) * 0x1p-24 * e->magnitude + (integers ? e->integers : 0.0);
    return sum + half_spacing(p->o.dtype, fabs(e->value) + sum);
}

static void check_result(const struct problem *p, int64_t m, const void *out, const struct expected *e)
{
    for (int64_t i = 0; i < m * p->outer; i++) {
        const double got = (double)value_at(out, p->o.dtype, i), bound = bound_of(p, m, &e[i]);
        CHECK(fabs(got - e[i].value) <= bound,
              "%s%s: m %lld of %lld, n %lld, k %lld, block %lld, type %d, %s, nested %d, bias %d, exact %d: [%lld] is "
              "%.9g, expected %.9g within %.3g",
              bnb_cpu_isa(), p->grad ? " gradient" : "", (long long)m, (long long)p->m, (long long)p->n,
              (long long)p->k, (long long)p->o.block, (int)p->o.type, dtype_name[p->o.dtype], p->o.nested,
              p->bias != NULL, p->o.exact, (long long)i, got, e[i].value, bound);
    }
}

/* The first m rows of the problem for every m of the list. */
static void check_problem(struct options o, const int64_t *m, int count, int64_t n, int64_t k, bool grad)
{
    struct problem p;
    problem_make(&p, o, m[count - 1], n, k, grad);
    struct expected *e = take((size_t)(p.m * p.outer) * sizeof *e);
    for (int64_t i = 0; i < p.m; i++)
        define_row(&p, i, e + i * p.outer);
    for (int i = 0; i < count; i++) {
        const size_t size = bnb_dtype_size(o.dtype);
        struct guarded out = guarded_make((size_t)(m[i] * p.outer) * size, (size_t)(i % 3) * size);
        CHECK(!call(&p, NULL, m[i], p.x, out.data), "%s", bnb_detail());
        check_result(&p, m[i], out.data, e);
        CHECK(guarded_intact(&out), "%s: m %lld, n %lld, k %lld, %s: guard bytes written", bnb_cpu_isa(),
              (long long)m[i], (long long)n, (long long)k, dtype_name[o.dtype]);
        guarded_free(&out);
    }
    free(e);
    problem_free(&p);
}

/* ---- shapes */

static const int64_t size_of[] = {0,  1,   2,   3,   5,   7,   31,  32,  33,   63,   64,   65,
                                  96, 127, 128, 129, 256, 300, 320, 400, 1023, 1024, 1025, 2049};
enum { SIZES = sizeof size_of / sizeof size_of[0] };

static void every_pair(void)
{
    static const int64_t every[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, some[] = {1, 3, 9}, one[] = {1};
    int number = 0;
    for (int a = 0; a < SIZES; a++)
        for (int b = 0; b < SIZES; b++) {
            const int64_t n = size_of[a], k = size_of[b], elements = n * k;
            for (int grad = 0; grad < 2; grad++) {
                const struct options o = options_at(number += 37); /* 37 and 192 have no common divisor */
                if (elements <= 20000)
                    check_problem(o, every, 10, n, k, grad);
                else if (elements <= 150000)
                    check_problem(o, some, 3, n, k, grad);
                else if (elements <= 700000 || (n == 1024 && k == 1024) || (a + b) % 5 == 0)
                    check_problem(o, one, 1, n, k, grad);
            }
        }
}

static void every_option(void)
{
    static const int64_t m[] = {1, 2, 3, 4, 5, 13}, k[] = {64, 65, 128, 129, 192, 320, 1088};
    for (int i = 0; i < 192; i++)
        for (int j = 0; j < 7; j++)
            check_problem(options_at(i), m, 6, 19, k[j], i % 4 == 3);
}

static void many_rows(void)
{
    static const int64_t m[] = {255, 256, 257, 258}, n[] = {1, 5, 33, 65}, k[] = {0, 1, 7, 64, 129, 1025};
    int number = 0;
    for (int a = 0; a < 4; a++)
        for (int b = 0; b < 6; b++)
            for (int grad = 0; grad < 2; grad++)
                check_problem(options_at(number += 37), m, 4, grad ? k[b] : n[a], grad ? n[a] : k[b], grad);
}

/* ---- values that spread */

/* Results of the bad row that are wrong: finite, or where the product is exact other than bad w. */
static int wrong_results(const struct problem *p, const void *row, int64_t at, float bad)
{
    int wrong = 0;
    for (int64_t j = 0; j < p->outer; j++) {
        const double want = (double)bad * p->w[p->grad ? at * p->k + j : j * p->k + at];
        const double is = (double)value_at(row, p->o.dtype, j);
        wrong += isfinite(is) || (p->o.exact && !(isnan(want) ? isnan(is) : is == want));
    }
    return wrong;
}

/* One value of one row is bad: that row is not finite, the others keep their bytes. */
static void bad_value(struct options o, int64_t m, int64_t k, bool grad, float bad)
{
    struct problem p;
    problem_make(&p, o, m, grad ? k : 21, grad ? 21 : k, grad);
    const size_t row = (size_t)p.outer * bnb_dtype_size(o.dtype);
    const int64_t victim = m > 1;
    char *good = take((size_t)m * row), *got = take((size_t)m * row), *after = got + (victim + 1) * (int64_t)row;
    CHECK(!call(&p, NULL, m, p.x, good), "%s", bnb_detail());
    for (int64_t at = 0; at < p.inner; at += p.inner / 3 + 1) {
        const float was = value_at(p.x, o.dtype, victim * p.inner + at);
        store_at(p.x, o.dtype, victim * p.inner + at, bad);
        CHECK(!call(&p, NULL, m, p.x, got), "%s", bnb_detail());
        store_at(p.x, o.dtype, victim * p.inner + at, was);
        const int wrong = wrong_results(&p, got + (size_t)victim * row, at, bad);
        CHECK(wrong == 0, "%s: m %lld, k %lld, %s, exact %d, gradient %d: %g at %lld is lost in %d of %lld results",
              bnb_cpu_isa(), (long long)m, (long long)k, dtype_name[o.dtype], o.exact, grad, (double)bad, (long long)at,
              wrong, (long long)p.outer);
        CHECK(!memcmp(got, good, (size_t)victim * row) &&
                  !memcmp(after, good + (after - got), (size_t)(m - 1 - victim) * row),
              "%s: m %lld, k %lld, %s, exact %d, gradient %d: %g changed another row", bnb_cpu_isa(), (long long)m,
              (long long)k, dtype_name[o.dtype], o.exact, grad, (double)bad);
    }
    free(good);
    free(got);
    problem_free(&p);
}

static void bad_values(void)
{
    static const int64_t m[] = {1, 2, 4, 9, 260}, k[] = {64, 128, 321};
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 5 * 3 * 3; i++)
        for (int dtype = 0; dtype < BNB_FLOATS; dtype++)
            for (int mode = 0; mode < 3; mode++) {
                const struct options o = {(bnb_dtype)dtype, BNB_NF4, 64, false, false, mode > 0};
                bad_value(o, m[i / 9], k[i / 3 % 3], mode == 2, bad[i % 3]);
            }
}

/* Activations near the ends of the range of their dtype, one magnitude per row; results stay finite. */
static void extreme_magnitudes(void)
{
    static const float bf16[4] = {0x1p-130f, 0x1p-98f, 0x1p100f, 0.0f}, f16[4] = {0x1p-24f, 0x1p-14f, 1024.0f, 0.0f};
    for (int i = 0; i < 12; i++) {
        const struct options o = {(bnb_dtype)(i % 3), BNB_NF4, 64, false, false, i / 3 % 2};
        const int64_t m = i < 6 ? 4 : 11;
        struct problem p;
        problem_make(&p, o, m, 9, 128, false);
        for (int64_t j = 0; j < m * 128; j++)
            store_at(p.x, o.dtype, j,
                     (o.dtype == BNB_F16 ? f16 : bf16)[j / 128 % 4] * (float)(1 + j % 3) * (j % 2 ? 1.0f : -1.0f));
        struct expected *e = take((size_t)(m * 9) * sizeof *e);
        char *out = take((size_t)(m * 9) * 4);
        for (int64_t j = 0; j < m; j++)
            define_row(&p, j, e + j * 9);
        for (int64_t j = 0; j < m * 9; j++)
            e[j].magnitude += 0x1p-120; /* f32 products may be subnormal: 2^-149 apart */
        CHECK(!call(&p, NULL, m, p.x, out), "%s", bnb_detail());
        check_result(&p, m, out, e);
        free(e);
        free(out);
        problem_free(&p);
    }
}

/* ---- loops and memory */

static void loops(const struct problem *p)
{
    const size_t bytes = (size_t)(p->m * p->outer) * bnb_dtype_size(p->o.dtype);
    char *serial = take(bytes), *split = take(bytes);
    CHECK(!call(p, NULL, p->m, p->x, serial), "%s", bnb_detail());
    const bnb_exec ex[2] = {{.size = sizeof ex[0], .parallel_for = loop_backwards},
                            {.size = sizeof ex[0], .parallel_for = loop_threads}};
    for (int i = 0; i < 2; i++) {
        memset(split, 0x5a, bytes);
        CHECK(!call(p, &ex[i], p->m, p->x, split), "%s", bnb_detail());
        CHECK(!memcmp(serial, split, bytes), "%s: %s, m %lld, n %lld, k %lld, gradient %d: bytes differ", bnb_cpu_isa(),
              i ? "threads" : "backwards", (long long)p->m, (long long)p->n, (long long)p->k, p->grad);
    }
    free(serial);
    free(split);
}

/* Every allocation refused in turn: BNB_ENOMEM, nothing written, nothing kept; then the call succeeds. */
static void memory(const struct problem *p)
{
    struct guarded out = guarded_make((size_t)(p->m * p->outer) * bnb_dtype_size(p->o.dtype), 0);
    struct workspace w = {0, 0, 0};
    const bnb_exec ex = {.size = sizeof ex, .context = &w, .alloc = workspace_alloc, .free = workspace_free};
    bnb_status status = BNB_ENOMEM;
    for (int refuse = 1; refuse < 20 && status; refuse++) {
        w = (struct workspace){.refuse = refuse};
        status = call(p, &ex, p->m, p->x, out.data);
        CHECK(w.taken == 0, "allocation %d refused: %lld bytes kept", refuse, (long long)w.taken);
        CHECK(status == (w.calls < refuse ? BNB_OK : BNB_ENOMEM), "allocation %d of %d refused: status %d", refuse,
              w.calls, (int)status);
        if (status)
            CHECK(guarded_untouched(&out) && strstr(bnb_detail(), p->grad ? "gemm4_grad" : "gemm4"),
                  "allocation %d refused: out was written, or '%s'", refuse, bnb_detail());
    }
    CHECK(!status && guarded_intact(&out), "never enough memory: %s", bnb_detail());
    guarded_free(&out);
}

static void resources(void)
{
    static const int64_t m[] = {1, 4, 7, 70}, k[] = {192, 333, 2112};
    for (int i = 0; i < 4 * 3 * 6; i++) {
        struct problem p;
        struct options o = options_at(i * 37);
        o.block = i % 2 ? 64 : o.block;
        problem_make(&p, o, m[i % 4], 301, k[i / 4 % 3], i % 6 == 5);
        loops(&p);
        memory(&p);
        problem_free(&p);
    }
}

int main(void)
{
    if (skip_foreign_isa())
        return TEST_SKIPPED;
    every_pair();
    every_option();
    many_rows();
    bad_values();
    extreme_magnitudes();
    resources();
    return CHECK_RESULT();
}
