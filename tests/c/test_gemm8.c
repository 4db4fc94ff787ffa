/*
 * test_gemm8.c - int8 products: integers against int64 sums, exactly; scales, bias, outliers and gradients against double
 *
 * Bounds, u = 2^-24: the scaled integer, the bias and the sum over s outlier columns (or over n, for the gradient) round
 * at most 8 times each and the sum sqrt(s) times more, all by u of their magnitudes.  A 16-bit result adds half its
 * spacing.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "support.h"

enum { MAX_K = 131071 }; /* 2^31 / 128^2, less one */

static void *take(size_t bytes)
{
    void *p = malloc(bytes ? bytes : 1);
    if (!p)
        abort();
    return p;
}

/* Codes of all values, or of the extremes alone: sums then come close to the ends of int32. */
static int8_t *take_codes(int64_t n, bool extreme, uint64_t *state)
{
    static const int8_t ends[4] = {-128, 127, -128, -127};
    int8_t *codes = take((size_t)n);
    for (int64_t i = 0; i < n; i++) {
        const uint64_t bits = random_bits(state);
        codes[i] = extreme ? ends[bits % 4] : (int8_t)(bits & 255);
    }
    return codes;
}

static int64_t define_sum(const int8_t *a, const int8_t *b, int64_t k)
{
    int64_t sum = 0;
    for (int64_t l = 0; l < k; l++)
        sum += (int64_t)a[l] * b[l];
    return sum;
}

/* ---- the integer product */

static void check_sums(int64_t m, int64_t n, int64_t k, const int8_t *a, const int8_t *b)
{
    struct guarded out = guarded_make((size_t)(m * n) * 4, 4 * (size_t)(k % 3));
    CHECK(!bnb_matmul8(NULL, a, b, m, n, k, out.data), "%s", bnb_detail());
    for (int64_t i = 0; i < m * n; i++) {
        const int32_t got = ((const int32_t *)out.data)[i];
        const int64_t want = define_sum(a + i / n * k, b + i % n * k, k);
        CHECK(got == want, "%s: m %lld, n %lld, k %lld: [%lld] is %d, expected %lld", bnb_cpu_isa(), (long long)m,
              (long long)n, (long long)k, (long long)i, got, (long long)want);
    }
    CHECK(guarded_intact(&out), "%s: m %lld, n %lld, k %lld: guard bytes written", bnb_cpu_isa(), (long long)m,
          (long long)n, (long long)k);
    guarded_free(&out);
}

static void random_sums(int64_t m, int64_t n, int64_t k, bool extreme)
{
    uint64_t state = (uint64_t)(m * 31 + n * 7 + k);
    int8_t *a = take_codes(m * k, extreme, &state), *b = take_codes(n * k, extreme, &state);
    check_sums(m, n, k, a, b);
    free(a);
    free(b);
}

static void sums(void)
{
    static const int64_t m[] = {0, 1, 2, 3, 4, 5, 7, 9, 17}, n[] = {0, 1, 2, 3, 4, 5, 6, 8, 19};
    static const int64_t long_k[] = {255, 256, 257, 1023, 1024, 1025, 2047, 4095, 4096, 4097, 8193, 16384};
    for (int64_t k = 0; k <= 200; k++)
        for (int i = 0; i < 9; i++) {
            random_sums(m[i], n[(i + k) % 9], k, (k + i) % 2);
            random_sums(m[i], n[(2 * i + k) % 9], k, (k + i) % 2 == 0);
        }
    for (size_t j = 0; j < sizeof long_k / sizeof long_k[0]; j++)
        for (int i = 1; i < 9; i++) {
            random_sums(m[i], n[i], long_k[j], true);
            random_sums(m[i], n[9 - i], long_k[j], false);
        }
    for (int64_t rows = 255; rows <= 258; rows++) {
        random_sums(rows, 5, 300, rows % 2);
        random_sums(3, rows, 65, rows % 2 == 0);
    }
}

/* The longest rows of one value each: the sums are the largest that int32 must hold. */
static void longest_rows(void)
{
    static const int8_t value[4][2] = {{-128, -128}, {127, -128}, {-128, 127}, {127, 127}};
    int8_t *a = take(2 * MAX_K), *b = take(3 * MAX_K);
    for (int i = 0; i < 4; i++) {
        memset(a, value[i][0], 2 * MAX_K);
        memset(b, value[i][1], 3 * MAX_K);
        check_sums(2, 3, MAX_K, a, b);
    }
    free(a);
    free(b);
    int32_t out = 7;
    const int8_t one = 1;
    CHECK(bnb_matmul8(NULL, &one, &one, 1, 1, MAX_K + 1, &out) == BNB_ENOTSUP && out == 7, "k %d: %s, out %d",
          MAX_K + 1, bnb_detail(), out);
}

/* ---- the whole product */

struct problem {
    int64_t m, n, k, outliers;
    bnb_dtype dtype, bias_dtype;
    bool grad, given; /* the product is given, and a is not */
    int8_t *a, *b;
    int32_t *product;
    float *row_stats, *col_stats;
    void *bias, *x;
    int64_t *columns;
    uint8_t *flags; /* instead of columns */
};

static float *take_stats(int64_t n, uint64_t *state)
{
    float *stats = take((size_t)n * sizeof(float));
    for (int64_t i = 0; i < n; i++)
        stats[i] = (float)(random_bits(state) % 11 == 0 ? 0.0 : 0.05 + random_unit(state));
    return stats;
}

/* x is NaN wherever it may not be read: outside the outlier columns. */
static void take_x(struct problem *p, uint64_t *state)
{
    const size_t size = bnb_dtype_size(p->dtype);
    const int64_t cols = p->grad ? p->n : p->k;
    p->x = take((size_t)(p->m * cols) * size);
    fill_values(p->x, p->dtype, p->m * cols, FILL_BELL, random_bits(state));
    if (p->grad)
        return;
    int64_t next = 0;
    p->columns = take((size_t)p->outliers * sizeof(int64_t));
    for (int64_t c = 0; c < p->k; c++) { /* each column with the chance that takes what is missing from what is left */
        const double chance = (double)(p->outliers - next) / (double)(p->k - c);
        if (next < p->outliers && random_unit(state) < chance)
            p->columns[next++] = c;
        else
            for (int64_t i = 0; i < p->m; i++)
                store_at(p->x, p->dtype, i * p->k + c, NAN);
    }
}

static void problem_make(struct problem *p, uint64_t seed)
{
    uint64_t state = seed;
    p->b = take_codes(p->n * p->k, false, &state);
    p->col_stats = take_stats(p->n, &state);
    if (p->grad || p->outliers > 0)
        take_x(p, &state);
    if (p->grad)
        return;
    p->row_stats = take_stats(p->m, &state);
    if (p->bias_dtype != BNB_U8) {
        p->bias = take((size_t)p->n * bnb_dtype_size(p->bias_dtype));
        fill_values(p->bias, p->bias_dtype, p->n, FILL_BELL, 3);
    }
    if (p->given) {
        p->product = take((size_t)(p->m * p->n) * sizeof(int32_t));
        for (int64_t i = 0; i < p->m * p->n; i++) /* up to the largest, and small ones */
            p->product[i] = (int32_t)((int64_t)(random_bits(&state) >> 32) - ((int64_t)1 << 31)) >> i % 24;
    } else {
        p->a = take_codes(p->m * p->k, false, &state);
    }
}

static void problem_free(struct problem *p)
{
    void *const all[] = {p->a, p->b, p->product, p->row_stats, p->col_stats, p->bias, p->x, p->columns};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        free(all[i]);
}

static bnb_status call(const struct problem *p, const bnb_exec *ex, void *out)
{
    const bnb_gemm8_args args = {.size = sizeof args,
                                 .a = p->a,
                                 .b = p->given && !p->outliers ? NULL : p->b,
                                 .product = p->product,
                                 .row_stats = p->row_stats,
                                 .col_stats = p->col_stats,
                                 .bias = p->bias,
                                 .x = p->x,
                                 .columns = p->flags ? NULL : p->columns,
                                 .outliers = p->flags ? 0 : p->outliers,
                                 .outlier = p->flags,
                                 .out = out,
                                 .m = p->m,
                                 .n = p->n,
                                 .k = p->k,
                                 .dtype = p->dtype,
                                 .bias_dtype = p->bias ? p->bias_dtype : BNB_F32};
    return p->grad ? bnb_gemm8_grad(ex, &args) : bnb_gemm8(ex, &args);
}

struct expected { double value, magnitude; };

static void add(struct expected *e, double term)
{
    e->value += term;
    e->magnitude += fabs(term);
}

static struct expected define(const struct problem *p, int64_t i, int64_t j)
{
    struct expected e = {0.0, 0.0};
    for (int64_t l = 0; p->grad && l < p->n; l++)
        add(&e, (double)value_at(p->x, p->dtype, i * p->n + l) * p->b[l * p->k + j] * (double)p->col_stats[l] / 127.0);
    if (p->grad)
        return e;
    const int64_t sum = p->given ? p->product[i * p->n + j] : define_sum(p->a + i * p->k, p->b + j * p->k, p->k);
    add(&e, (double)sum * (double)p->row_stats[i] * (double)p->col_stats[j] / 16129.0);
    if (p->bias)
        add(&e, (double)value_at(p->bias, p->bias_dtype, j));
    for (int64_t l = 0; l < p->outliers; l++) {
        const int64_t c = p->columns[l];
        add(&e, (double)value_at(p->x, p->dtype, i * p->k + c) * p->b[j * p->k + c] * (double)p->col_stats[j] / 127.0);
    }
    return e;
}

/* The flags of the columns stand for their list. */
static void check_flags(struct problem p, const void *expected, size_t bytes)
{
    char *out = take(bytes);
    p.flags = take((size_t)p.k);
    memset(p.flags, 0, (size_t)p.k);
    for (int64_t i = 0; i < p.outliers; i++)
        p.flags[p.columns[i]] = 1;
    CHECK(!call(&p, NULL, out), "%s", bnb_detail());
    CHECK(!memcmp(out, expected, bytes), "%s: m %lld, n %lld, k %lld, %lld outliers: flags give another result",
          bnb_cpu_isa(), (long long)p.m, (long long)p.n, (long long)p.k, (long long)p.outliers);
    free(p.flags);
    free(out);
}

static void check_problem(struct problem p)
{
    const int64_t outer = p.grad ? p.k : p.n;
    const size_t size = bnb_dtype_size(p.dtype);
    problem_make(&p, (uint64_t)(p.m * 77 + p.n * 5 + p.k + p.outliers));
    struct guarded out = guarded_make((size_t)(p.m * outer) * size, size * (size_t)(p.k % 3));
    CHECK(!call(&p, NULL, out.data), "%s", bnb_detail());
    for (int64_t i = 0; i < p.m * outer; i++) {
        const struct expected e = define(&p, i / outer, i % outer);
        const double terms = (double)(p.grad ? p.n : p.outliers);
        const double sum = (8.0 + sqrt(terms)) * 0x1p-24 * e.magnitude;
        const double bound = sum + half_spacing(p.dtype, fabs(e.value) + sum);
        const double got = (double)value_at(out.data, p.dtype, i);
        /* beyond the largest f16 there is only infinity */
        const bool beyond = p.dtype == BNB_F16 && fabs(e.value) > 65504.0;
        CHECK(fabs(got - e.value) <= bound || (beyond && isinf(got)),
              "%s%s: m %lld, n %lld, k %lld, %s, bias %d, %lld outliers, product given %d: [%lld] is %.9g, expected "
              "%.9g within %.3g",
              bnb_cpu_isa(), p.grad ? " gradient" : "", (long long)p.m, (long long)p.n, (long long)p.k,
              dtype_name[p.dtype], p.bias ? (int)p.bias_dtype : -1, (long long)p.outliers, p.given, (long long)i, got,
              e.value, bound);
    }
    CHECK(guarded_intact(&out), "%s: m %lld, n %lld, k %lld: guard bytes written", bnb_cpu_isa(), (long long)p.m,
          (long long)p.n, (long long)p.k);
    if (p.outliers > 0)
        check_flags(p, out.data, (size_t)(p.m * outer) * size);
    guarded_free(&out);
    problem_free(&p);
}

static const bnb_dtype bias_dtypes[4] = {BNB_U8, BNB_F32, BNB_F16, BNB_BF16}; /* U8: no bias */

static void products(void)
{
    static const int64_t m[] = {0, 1, 2, 5, 8, 33}, n[] = {0, 1, 3, 4, 7, 30}, k[] = {0, 1, 5, 64, 129, 1030};
    for (int i = 0; i < 6 * 6 * 6; i++)
        for (int option = 0; option < 3 * 4 * 2; option++)
            for (int few = 0; few < 4; few++) {
                const int64_t inner = k[i / 36], outliers[4] = {0, inner > 0, inner / 3, inner};
                if (inner == 1030 && (few == 3) != (option == 5))
                    continue; /* slow by definition: once */
                check_problem((struct problem){.m = m[i % 6],
                                               .n = n[i / 6 % 6],
                                               .k = inner,
                                               .outliers = outliers[few],
                                               .dtype = (bnb_dtype)(option % 3),
                                               .bias_dtype = bias_dtypes[option / 3 % 4],
                                               .given = option / 12});
            }
    for (int64_t rows = 255; rows <= 258; rows++)
        for (int option = 0; option < 12; option++)
            check_problem((struct problem){.m = rows,
                                           .n = 9,
                                           .k = 70,
                                           .outliers = rows - 250,
                                           .dtype = (bnb_dtype)(option % 3),
                                           .bias_dtype = bias_dtypes[option / 3]});
}

static void gradients(void)
{
    static const int64_t size_of[] = {0, 1, 2, 5, 31, 64, 127, 128, 129, 300};
    static const int64_t m[] = {0, 1, 3, 4, 9, 47, 48, 49, 97};
    for (int i = 0; i < 9 * 10 * 10; i++)
        check_problem((struct problem){.m = m[i % 9],
                                       .n = size_of[i / 9 % 10],
                                       .k = size_of[i / 90],
                                       .dtype = (bnb_dtype)((i + i / 9) % 3),
                                       .grad = true});
}

/* A row of activations that is not finite, or a scale that is not, spoils its own results alone. */
static void bad_values(void)
{
    enum { M = 6, N = 9, K = 70, OUTLIERS = 5 };
    for (int i = 0; i < 12; i++) {
        struct problem p = {.m = M, .n = N, .k = K, .dtype = (bnb_dtype)(i % 3), .bias_dtype = BNB_U8};
        p.outliers = OUTLIERS;
        float good[M * N], got[M * N];
        problem_make(&p, 9);
        for (int j = 0; j < N; j++)
            p.col_stats[j] += 0.5f;
        CHECK(!call(&p, NULL, good), "%s", bnb_detail());
        if (i / 3 % 2)
            store_at(p.x, p.dtype, 2 * K + p.columns[3], i / 6 ? NAN : INFINITY);
        else
            p.row_stats[2] = i / 6 ? NAN : INFINITY;
        CHECK(!call(&p, NULL, got), "%s", bnb_detail());
        for (int j = 0; j < M * N; j++) {
            const float is = value_at(got, p.dtype, j);
            CHECK(j / N == 2 ? !isfinite(is) : is == value_at(good, p.dtype, j), "%s: case %d: [%d, %d] is %g",
                  bnb_cpu_isa(), i, j / N, j % N, (double)is);
        }
        problem_free(&p);
    }
}

/* ---- loops and memory */

static void loops(const struct problem *p)
{
    const size_t bytes = (size_t)(p->m * (p->grad ? p->k : p->n)) * bnb_dtype_size(p->dtype);
    char *serial = take(bytes), *split = take(bytes);
    CHECK(!call(p, NULL, serial), "%s", bnb_detail());
    const bnb_exec ex[2] = {{.size = sizeof ex[0], .parallel_for = loop_backwards},
                            {.size = sizeof ex[0], .parallel_for = loop_threads}};
    for (int i = 0; i < 2; i++) {
        memset(split, 0x5a, bytes);
        CHECK(!call(p, &ex[i], split), "%s", bnb_detail());
        CHECK(!memcmp(serial, split, bytes), "%s: %s, m %lld, n %lld, k %lld, gradient %d: bytes differ", bnb_cpu_isa(),
              i ? "threads" : "backwards", (long long)p->m, (long long)p->n, (long long)p->k, p->grad);
    }
    free(serial);
    free(split);
}

/* Every allocation refused in turn: BNB_ENOMEM, nothing written, nothing kept; then the call succeeds. */
static void memory(const struct problem *p)
{
    struct guarded out = guarded_make((size_t)(p->m * (p->grad ? p->k : p->n)) * bnb_dtype_size(p->dtype), 0);
    struct workspace w = {0, 0, 0};
    const bnb_exec ex = {.size = sizeof ex, .context = &w, .alloc = workspace_alloc, .free = workspace_free};
    bnb_status status = BNB_ENOMEM;
    for (int refuse = 1; refuse < 20 && status; refuse++) {
        w = (struct workspace){.refuse = refuse};
        status = call(p, &ex, out.data);
        CHECK(w.taken == 0, "allocation %d refused: %lld bytes kept", refuse, (long long)w.taken);
        CHECK(status == (w.calls < refuse ? BNB_OK : BNB_ENOMEM), "allocation %d of %d refused: status %d", refuse,
              w.calls, (int)status);
        if (status)
            CHECK(guarded_untouched(&out) && strstr(bnb_detail(), p->grad ? "gemm8_grad" : "gemm8"),
                  "allocation %d refused: out was written, or '%s'", refuse, bnb_detail());
    }
    CHECK(!status && guarded_intact(&out), "never enough memory: %s", bnb_detail());
    guarded_free(&out);
}

static void resources(void)
{
    static const int64_t m[] = {1, 3, 70}, k[] = {64, 333, 2112};
    for (int i = 0; i < 36; i++) {
        struct problem p = {.m = m[i % 3],
                            .n = 301,
                            .k = k[i / 3 % 3],
                            .outliers = i % 2 ? 7 : 0,
                            .dtype = (bnb_dtype)(i / 2 % 3),
                            .bias_dtype = bias_dtypes[i % 4],
                            .grad = i / 9 == 3,
                            .given = i / 9 == 2};
        p.outliers = p.grad ? 0 : p.outliers;
        problem_make(&p, (uint64_t)i);
        loops(&p);
        memory(&p);
        problem_free(&p);
    }
}

int main(void)
{
    if (skip_foreign_isa())
        return TEST_SKIPPED;
    sums();
    longest_rows();
    products();
    gradients();
    bad_values();
    resources();
    return CHECK_RESULT();
}
