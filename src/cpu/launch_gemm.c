/*
 * launch_gemm.c - matrix products on the CPU: bring the activations to f32 or packed integers, split the columns of the
 * result among threads, call the table's kernel
 *
 * A task is a range of tiles of columns: it decodes its part of the weight itself and shares nothing with others.
 */
#include <string.h>

#include "cpu/cpu.h"

/* Rows of activations begin at multiples of this many elements: a whole number of vectors of every table. */
#define STRIDE 64

/* Multiplications of one parallel task, at least. */
#define PRODUCTS_PER_TASK (1 << 17)

/* At least n, and no large power of two: such rows would all fall into the same few sets of the cache. */
static int64_t padded(int64_t n)
{
    const int64_t stride = (n + STRIDE - 1) / STRIDE * STRIDE;
    return stride % 512 == 0 ? stride + STRIDE : stride;
}

static int64_t grain_of(int64_t m, int64_t inner, int64_t columns)
{
    const double cost = (double)(m + 1) * (double)(inner + 1) * (double)columns;
    return cost >= PRODUCTS_PER_TASK ? 1 : (int64_t)(PRODUCTS_PER_TASK / cost) + 1;
}

/* Workspace of one product: activations, then the bias. */
struct operands {
    struct bnb_dense_args dense;
    float *memory;
    size_t bytes;
};

struct widen_task {
    void (*widen)(const void *, int64_t, float *);
    const char *x;
    size_t size; /* of an element */
    float *out;
    int64_t inner, stride;
    const float *scale; /* [inner] or NULL: multiplies the columns */
};

static void run_widen(void *arg, int64_t begin, int64_t end)
{
    const struct widen_task *t = arg;
    for (int64_t i = begin; i < end; i++) {
        float *row = t->out + i * t->stride;
        t->widen(t->x + (size_t)(i * t->inner) * t->size, t->inner, row);
        for (int64_t j = 0; t->scale && j < t->inner; j++)
            row[j] *= t->scale[j] / 127.0f;
        memset(row + t->inner, 0, (size_t)(t->stride - t->inner) * sizeof(float));
    }
}

/* What a product reads: x [m, inner] of `dtype`, its columns scaled unless scale is NULL, and bias [n] or NULL. */
struct sources {
    const void *x;
    int64_t m, inner;
    const float *scale;
    const void *bias;
    bnb_dtype bias_dtype;
    int64_t n;
    bnb_dtype dtype; /* of x and of the result */
};

/* The sources in f32.  A few whole f32 rows are read where they are. */
static bnb_status prepare(const bnb_exec *ex, const char *f, const struct sources *s, struct operands *o)
{
    const struct bnb_cpu_ops *ops = bnb_cpu_ops_in_use();
    const bool in_place = s->dtype == BNB_F32 && s->inner % STRIDE == 0 && !s->scale && s->m <= BNB_GEMV_ROWS;
    const int64_t x_floats = in_place ? 0 : s->m * padded(s->inner);
    *o = (struct operands){.dense = {.x = s->x, .stride = s->inner, .dtype = (int)s->dtype}};
    o->bytes = (size_t)(x_floats + (s->bias ? s->n : 0)) * sizeof(float);
    if (o->bytes == 0)
        return BNB_OK;
    o->memory = bnb_cpu_alloc(ex, o->bytes);
    if (!o->memory)
        return bnb_fail(BNB_ENOMEM, "%s: no %zu bytes of workspace", f, o->bytes);
    if (!in_place) {
        o->dense.x = o->memory;
        o->dense.stride = padded(s->inner);
        struct widen_task t = {ops->widen[s->dtype], s->x,    bnb_dtype_size(s->dtype), o->memory, s->inner,
                               o->dense.stride,      s->scale};
        bnb_cpu_parallel(ex, s->m, grain_of(s->inner, 1, 1), run_widen, &t);
    }
    if (s->bias) {
        o->dense.bias = o->memory + x_floats;
        ops->widen[s->bias_dtype](s->bias, s->n, o->memory + x_floats);
    }
    return BNB_OK;
}

static void release(const bnb_exec *ex, struct operands *o)
{
    if (o->memory)
        bnb_cpu_free(ex, o->memory, o->bytes);
}

/* ---- 4 bits */

struct gemm4_task {
    const struct bnb_cpu_ops *ops;
    const int16_t *integers; /* not NULL: gemv4_int16 */
    const float *scale;
    void (*kernel)(const struct bnb_gemm4_block *, const struct bnb_dense_args *, int64_t, int64_t);
    const struct bnb_gemm4_block *g;
    const struct bnb_dense_args *dense;
};

static void run_gemm4(void *arg, int64_t begin, int64_t end)
{
    const struct gemm4_task *t = arg;
    if (t->integers)
        t->ops->gemv4_int16(t->g, t->dense, t->integers, t->scale, begin, end);
    else
        t->kernel(t->g, t->dense, begin, end);
}

/* The rows of activations as 16-bit integers: [m, k], then [m, k / 64] scales. */
static bnb_status pack_integers(const bnb_exec *ex, struct gemm4_task *t, void **memory, size_t *bytes)
{
    const int64_t m = t->g->m, k = t->g->k;
    *bytes = (size_t)(m * k) * sizeof(int16_t) + (size_t)(m * k / 64) * sizeof(float);
    *memory = bnb_cpu_alloc(ex, *bytes);
    if (!*memory)
        return bnb_fail(BNB_ENOMEM, "gemm4: no %zu bytes of workspace", *bytes);
    int16_t *integers = *memory;
    float *scale = (float *)(void *)(integers + m * k);
    for (int64_t i = 0; i < m; i++)
        t->ops->pack16(t->dense->x + i * t->dense->stride, k, integers + i * k, scale + i * (k / 64));
    t->integers = integers;
    t->scale = scale;
    return BNB_OK;
}

/* The rows of activations in gemv4's order. */
static bnb_status pack_floats(const bnb_exec *ex, const struct gemm4_task *t, struct bnb_dense_args *dense,
                              void **memory, size_t *bytes)
{
    const int64_t m = t->g->m, k = t->g->k;
    *bytes = (size_t)(m * k) * sizeof(float);
    *memory = bnb_cpu_alloc(ex, *bytes);
    if (!*memory)
        return bnb_fail(BNB_ENOMEM, "gemm4: no %zu bytes of workspace", *bytes);
    for (int64_t i = 0; i < m; i++)
        t->ops->pack_pairs(dense->x + i * dense->stride, k, (float *)*memory + i * k);
    dense->x = *memory;
    dense->stride = k;
    return BNB_OK;
}

/* Few rows, whole groups: the kernels that decode into registers.  Returns false where they do not fit. */
static bool takes_few(const struct bnb_gemm4_block *g, int rows, int step, int block)
{
    return !g->grad && g->m <= rows && g->k % step == 0 && g->block % block == 0;
}

static bnb_status multiply4(const bnb_exec *ex, const struct bnb_gemm4_block *g, bnb_dtype dtype)
{
    const struct bnb_cpu_ops *ops = bnb_cpu_ops_in_use();
    struct operands o;
    const int64_t inner = g->grad ? g->n : g->k, outer = g->grad ? g->k : g->n;
    const bnb_status status = prepare(
        ex, g->grad ? "gemm4_grad" : "gemm4",
        &(struct sources){
            .x = g->x, .m = g->m, .inner = inner, .bias = g->bias, .bias_dtype = dtype, .n = outer, .dtype = dtype},
        &o);
    if (status)
        return status;
    struct gemm4_task t = {.ops = ops, .kernel = ops->gemm4_dot, .g = g, .dense = &o.dense};
    void *memory = NULL;
    size_t bytes = 0;
    bnb_status packed = BNB_OK;
    int columns = ops->tile_columns;
    if (g->grad) {
        t.kernel = ops->gemm4_axpy;
        columns = ops->axpy_columns;
    } else if (!g->exact && ops->int16_rows && takes_few(g, ops->int16_rows, ops->int16_step, 64)) {
        packed = pack_integers(ex, &t, &memory, &bytes);
    } else if (takes_few(g, BNB_GEMV_ROWS, ops->run, ops->run)) {
        t.kernel = ops->gemv4;
        packed = pack_floats(ex, &t, &o.dense, &memory, &bytes);
    }
    if (!packed)
        bnb_cpu_parallel(ex, bnb_blocks(outer, columns), grain_of(g->m, inner, columns), run_gemm4, &t);
    if (memory)
        bnb_cpu_free(ex, memory, bytes);
    release(ex, &o);
    return packed;
}

/* Expert by expert, each with its rows. */
static bnb_status multiply_experts(const bnb_exec *ex, const struct bnb_gemm4_block *g, bnb_dtype dtype)
{
    const int64_t inner = g->grad ? g->n : g->k, outer = g->grad ? g->k : g->n;
    const int64_t size = (int64_t)bnb_dtype_size(dtype);
    for (int64_t e = 0; e <= g->experts; e++)
        if (g->first[e] < (e > 0 ? g->first[e - 1] : 0) || g->first[e] > g->m)
            return bnb_fail(BNB_EINVAL, "%s: first[%lld] is %lld, expected numbers that ascend within 0..%lld",
                            g->grad ? "gemm4_grad" : "gemm4", (long long)e, (long long)g->first[e], (long long)g->m);
    bnb_status status = BNB_OK;
    for (int64_t e = 0; e < g->experts && !status; e++) {
        struct bnb_gemm4_block one = *g;
        one.first = NULL;
        one.m = g->first[e + 1] - g->first[e];
        one.start = e * g->n * g->k;
        one.x = (const char *)g->x + g->first[e] * inner * size;
        one.out = (char *)g->out + g->first[e] * outer * size;
        one.bias = g->bias ? (const char *)g->bias + e * outer * size : NULL;
        if (one.m > 0)
            status = multiply4(ex, &one, dtype);
    }
    return status;
}

bnb_status bnb_cpu_gemm4(const bnb_exec *ex, const struct bnb_gemm4_block *g, bnb_dtype dtype)
{
    return g->first ? multiply_experts(ex, g, dtype) : multiply4(ex, g, dtype);
}

/* ---- int8 */

struct gemm8_task {
    const struct bnb_cpu_ops *ops;
    const struct bnb_gemm8_block *g;
    const struct bnb_dense_args *dense;
    char *packed;
    int64_t stride;
};

static void run_pack8(void *arg, int64_t begin, int64_t end)
{
    const struct gemm8_task *t = arg;
    for (int64_t i = begin; i < end; i++)
        t->ops->pack8(t->g->a + i * t->g->k, t->g->k, t->stride, t->packed + i * t->stride * t->ops->pack8_bytes);
}

static void run_gemm8(void *arg, int64_t begin, int64_t end)
{
    const struct gemm8_task *t = arg;
    if (t->g->grad)
        t->ops->gemm8_axpy(t->g, t->dense, begin, end);
    else
        t->ops->gemm8_dot(t->g, t->dense, t->packed, t->stride, begin, end);
}

/* The outlier columns of x, gathered: [m, outliers] of the same dtype. */
static void gather_columns(const struct bnb_gemm8_block *g, size_t size, char *out)
{
    const char *x = g->x;
    for (int64_t i = 0; i < g->m; i++)
        for (int64_t j = 0; j < g->outliers; j++)
            memcpy(out + (size_t)(i * g->outliers + j) * size, x + (size_t)(i * g->k + g->columns[j]) * size, size);
}

static bnb_status forward8(const bnb_exec *ex, const struct bnb_gemm8_block *g, bnb_dtype dtype)
{
    const char *f = g->sums ? "matmul8" : "gemm8";
    const struct bnb_cpu_ops *ops = bnb_cpu_ops_in_use();
    const int64_t stride = padded(g->k);
    const size_t a_bytes = g->product ? 0 : (size_t)(g->m * stride) * (size_t)ops->pack8_bytes;
    const size_t x_bytes = (size_t)(g->m * g->outliers) * bnb_dtype_size(dtype);
    const size_t bytes = a_bytes + x_bytes;
    char *memory = bytes ? bnb_cpu_alloc(ex, bytes) : NULL;
    struct operands o;
    if (bytes && !memory)
        return bnb_fail(BNB_ENOMEM, "%s: no %zu bytes of workspace", f, bytes);
    char *gathered = memory && x_bytes > 0 ? memory + a_bytes : NULL;
    if (gathered)
        gather_columns(g, bnb_dtype_size(dtype), gathered);
    const bnb_status status = prepare(ex, f,
                                      &(struct sources){.x = gathered,
                                                        .m = g->m,
                                                        .inner = g->outliers,
                                                        .bias = g->bias,
                                                        .bias_dtype = (bnb_dtype)g->bias_dtype,
                                                        .n = g->n,
                                                        .dtype = dtype},
                                      &o);
    if (!status) {
        struct gemm8_task t = {ops, g, &o.dense, memory, stride};
        if (!g->product)
            bnb_cpu_parallel(ex, g->m, grain_of(g->k, 1, 1), run_pack8, &t);
        bnb_cpu_parallel(ex, bnb_blocks(g->n, ops->tile_columns), grain_of(g->m, g->k, ops->tile_columns), run_gemm8,
                         &t);
        release(ex, &o);
    }
    if (memory)
        bnb_cpu_free(ex, memory, bytes);
    return status;
}

/* The same with the flagged columns as a list. */
static bnb_status forward8_flagged(const bnb_exec *ex, const struct bnb_gemm8_block *g, bnb_dtype dtype)
{
    struct bnb_gemm8_block listed = *g;
    listed.outlier = NULL;
    for (int64_t i = 0; i < g->k; i++)
        listed.outliers += g->outlier[i] != 0;
    if (listed.outliers == 0)
        return forward8(ex, &listed, dtype);
    const size_t bytes = (size_t)listed.outliers * sizeof(int64_t);
    int64_t *columns = bnb_cpu_alloc(ex, bytes), count = 0;
    if (!columns)
        return bnb_fail(BNB_ENOMEM, "gemm8: no %zu bytes of workspace", bytes);
    for (int64_t i = 0; i < g->k; i++)
        if (g->outlier[i])
            columns[count++] = i;
    listed.columns = columns;
    const bnb_status status = forward8(ex, &listed, dtype);
    bnb_cpu_free(ex, columns, bytes);
    return status;
}

bnb_status bnb_cpu_gemm8(const bnb_exec *ex, const struct bnb_gemm8_block *g, bnb_dtype dtype)
{
    if (!g->grad)
        return g->outlier ? forward8_flagged(ex, g, dtype) : forward8(ex, g, dtype);
    const struct bnb_cpu_ops *ops = bnb_cpu_ops_in_use();
    struct operands o;
    const bnb_status status =
        prepare(ex, "gemm8_grad",
                &(struct sources){.x = g->x, .m = g->m, .inner = g->n, .scale = g->col_stats, .dtype = dtype}, &o);
    if (status)
        return status;
    struct gemm8_task t = {ops, g, &o.dense, NULL, 0};
    bnb_cpu_parallel(ex, bnb_blocks(g->k, ops->axpy_columns), grain_of(g->m, g->n, ops->axpy_columns), run_gemm8, &t);
    release(ex, &o);
    return BNB_OK;
}
