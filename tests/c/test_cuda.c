/*
 * test_cuda.c - the public functions on a CUDA device, through the driver alone, beside the same calls on the CPU
 *
 * Every buffer is an allocation of its own; with --exact it ends where the data ends, so that compute-sanitizer sees one
 * byte too many.  Otherwise bytes behind the data are checked.  All work is on a stream that the default one does not
 * wait for.  77 without a card.
 */
#include <dlfcn.h>
#include <string.h>

#include "check.h"
#include "cuda/device.h"
#include "optim_subject.h"

enum { GUARD = 64, GUARD_BYTE = 0x5b };

static const struct bnb_driver *cu;
static cu_result (*device_alloc)(cu_address *memory, size_t bytes);
static cu_result (*device_free)(cu_address memory);
static cu_stream stream;
static bool exact;

#define CU(call)                                                              \
    do {                                                                      \
        if (bnb_cuda_check(cu, (call), "test_cuda", #call)) {                 \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, bnb_detail()); \
            exit(EXIT_FAILURE);                                               \
        }                                                                     \
    } while (0)

/* ---------------------------------------------------------------- memory */

/* Device memory [bytes], `shift` bytes off the alignment of an allocation; `data` is what the library is given. */
struct array {
    cu_address base;
    size_t bytes, shift;
    void *data;
};

static void *at(cu_address address) { return (void *)(uintptr_t)address; }

static struct array array_make(const void *from, size_t bytes, size_t shift)
{
    struct array a = {0, bytes, shift, NULL};
    CU(device_alloc(&a.base, shift + bytes + (exact ? 0 : GUARD) + (bytes == 0)));
    CU(cu->set_bytes(a.base, GUARD_BYTE, shift + bytes + (exact ? 0 : GUARD), stream));
    a.data = at(a.base + shift);
    if (from && bytes > 0)
        CU(cu->copy_to_device(a.base + shift, from, bytes, stream));
    CU(cu->stream_synchronize(stream));
    return a;
}

/* The content; a failure where a byte beside it was written. */
static void array_read(const struct array *a, void *to, const char *what)
{
    const size_t behind = exact ? 0 : GUARD, total = a->shift + a->bytes + behind;
    uint8_t *all = malloc(total + 1);
    if (!all)
        abort();
    if (total > 0)
        CU(cu->copy_to_host(all, a->base, total, stream));
    CU(cu->stream_synchronize(stream));
    size_t wrong = 0;
    for (size_t i = 0; i < total; i++)
        wrong += (i < a->shift || i >= a->shift + a->bytes) && all[i] != GUARD_BYTE;
    CHECK(wrong == 0, "%s: %zu bytes beside the data were written", what, wrong);
    memcpy(to, all + a->shift, a->bytes);
    free(all);
}

static void array_check(const struct array *a, const void *expected, const char *what)
{
    uint8_t *got = malloc(a->bytes + 1);
    if (!got)
        abort();
    array_read(a, got, what);
    for (size_t i = 0; i < a->bytes; i++) {
        if (got[i] == ((const uint8_t *)expected)[i])
            continue;
        CHECK(false, "%s: byte %zu of %zu is %u, expected %u", what, i, a->bytes, got[i],
              ((const uint8_t *)expected)[i]);
        break;
    }
    free(got);
}

static void array_free(struct array *a) { CU(device_free(a->base)); }

/* The workspace of a call: bytes of NaN, so that what is read before it is written shows. */
static void *take(void *context, size_t bytes)
{
    cu_address memory = 0;
    int *held = context;
    if (device_alloc(&memory, bytes))
        return NULL;
    CU(cu->set_bytes(memory, 0xff, bytes, stream));
    ++*held;
    return at(memory);
}

static void give(void *context, void *memory, size_t bytes)
{
    int *held = context;
    (void)bytes;
    --*held;
    CU(cu->stream_synchronize(stream)); /* the allocator's order is not the stream's */
    CU(device_free((cu_address)(uintptr_t)memory));
}

static int held; /* workspaces not returned yet */
static bnb_exec on_card;

/* ---------------------------------------------------------------- quantisers */

/* Bytes equal, NaN apart: they may differ in sign and payload. */
static void check_values(const struct array *got, const void *expected, bnb_dtype dtype, int64_t n, const char *what)
{
    void *values = malloc(got->bytes + 1);
    if (!values)
        abort();
    array_read(got, values, what);
    for (int64_t i = 0; i < n; i++) {
        const float x = value_at(values, dtype, i), y = value_at(expected, dtype, i);
        if (bits_of(x) == bits_of(y) || (x != x && y != y))
            continue;
        CHECK(false, "%s: value %lld is %g, expected %g", what, (long long)i, (double)x, (double)y);
        break;
    }
    free(values);
}

struct quant {
    bnb_dtype dtype;
    int64_t n, block;
    bnb_type4 type; /* 0: 8 bits */
    size_t shift;   /* of every buffer, in elements */
};

static bnb_status quantize(const bnb_exec *ex, const struct quant *q, const void *x, const float *map, void *codes,
                           float *absmax)
{
    return q->type ? bnb_quantize4(ex, x, q->dtype, q->n, q->block, q->type, codes, absmax)
                   : bnb_quantize8(ex, x, q->dtype, q->n, q->block, map, codes, absmax);
}

static bnb_status dequantize(const bnb_exec *ex, const struct quant *q, const void *codes, const float *map,
                             const float *absmax, void *out)
{
    const bnb_scales scales = {.absmax = absmax};
    return q->type ? bnb_dequantize4(ex, codes, q->n, q->block, q->type, &scales, out, q->dtype)
                   : bnb_dequantize8(ex, codes, q->n, q->block, map, &scales, out, q->dtype);
}

static void check_quant(const struct quant *q, const float map[256], enum fill kind)
{
    char what[128];
    const size_t size = bnb_dtype_size(q->dtype), n = (size_t)q->n, shift = q->shift;
    const size_t codes = q->type ? (n + 1) / 2 : n, blocks = (size_t)((q->n + q->block - 1) / q->block);
    uint8_t *x = malloc(n * size + 1), *host_codes = malloc(codes + 1), *out = malloc(n * size + 1);
    float *absmax = malloc(blocks * sizeof *absmax + 1);
    if (!x || !host_codes || !out || !absmax)
        abort();
    snprintf(what, sizeof what, "%s n %zu block %lld type %d fill %d shift %zu", dtype_name[q->dtype], n,
             (long long)q->block, (int)q->type, (int)kind, shift);
    fill_values(x, q->dtype, q->n, kind, n);
    CHECK(!quantize(NULL, q, x, map, host_codes, absmax), "%s", bnb_detail());
    CHECK(!dequantize(NULL, q, host_codes, map, absmax, out), "%s", bnb_detail());
    struct array a[] = {array_make(x, n * size, shift * size), array_make(map, 1024, 0), array_make(NULL, codes, shift),
                        array_make(NULL, blocks * 4, shift * 4), array_make(NULL, n * size, shift * size)};
    CHECK(!quantize(&on_card, q, a[0].data, a[1].data, a[2].data, a[3].data), "%s: %s", what, bnb_detail());
    CHECK(!dequantize(&on_card, q, a[2].data, a[1].data, a[3].data, a[4].data), "%s: %s", what, bnb_detail());
    array_check(&a[0], x, what);
    array_check(&a[2], host_codes, what);
    array_check(&a[3], absmax, what);
    check_values(&a[4], out, q->dtype, q->n, what);
    for (size_t i = 0; i < sizeof a / sizeof a[0]; i++)
        array_free(&a[i]);
    free(x);
    free(host_codes);
    free(out);
    free(absmax);
}

static void quantisers(void)
{
    static const int64_t lengths[] = {1, 2, 7, 33, 255, 256, 257, 2049, 4095, 4096, 8193, 20011},
                         blocks8[] = {1, 32, 64, 100, 256, 4096, 5000}, blocks4[] = {32, 64, 512, 4096};
    float map[2][256];
    bnb_create_dynamic_map(true, 7, 8, map[0]);
    bnb_create_fp8_map(true, 4, 3, 8, map[1]);
    unsigned turn = 0;
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        for (int d = 0; d < BNB_FLOATS; d++) {
            struct quant q = {.dtype = (bnb_dtype)d, .n = lengths[i]};
            for (size_t b = 0; b < sizeof blocks8 / sizeof blocks8[0]; b++, turn++) {
                q.block = blocks8[b];
                q.shift = turn % 5 == 4 ? 1 : 0;
                check_quant(&q, map[turn % 2], (enum fill)(turn % FILL_COUNT));
            }
            for (size_t b = 0; b < 2 * sizeof blocks4 / sizeof blocks4[0]; b++, turn++) {
                q.block = blocks4[b / 2];
                q.type = b % 2 ? BNB_NF4 : BNB_FP4;
                q.shift = turn % 3 == 2 ? 1 : 0;
                check_quant(&q, map[0], (enum fill)(turn % FILL_COUNT));
            }
        }
    }
}

static void scales(int64_t n)
{
    const size_t count = (size_t)n, blocks = (count + 255) / 256;
    float map[256], offset = 0.0f, *absmax = malloc(count * 4 + 1), *absmax2 = malloc(blocks * 4 + 1),
                    *plain = malloc(count * 4 + 1);
    uint8_t *codes = malloc(count + 1);
    if (!absmax || !absmax2 || !plain || !codes)
        abort();
    bnb_create_dynamic_map(true, 7, 8, map);
    fill_values(absmax, BNB_F32, n, FILL_HEAVY, 3);
    CHECK(!bnb_quantize_scales(NULL, absmax, n, 256, map, codes, absmax2, &offset), "%s", bnb_detail());
    CHECK(!bnb_dequantize_scales(NULL, &(bnb_scales){codes, map, absmax2, &offset, 256}, n, plain), "%s", bnb_detail());
    struct array a[] = {array_make(absmax, count * 4, 0), array_make(map, 1024, 0), array_make(NULL, count, 0),
                        array_make(NULL, blocks * 4, 0),  array_make(NULL, 4, 0),   array_make(NULL, count * 4, 0)};
    CHECK(!bnb_quantize_scales(&on_card, a[0].data, n, 256, a[1].data, a[2].data, a[3].data, a[4].data), "%s",
          bnb_detail());
    CHECK(
        !bnb_dequantize_scales(&on_card, &(bnb_scales){a[2].data, a[1].data, a[3].data, a[4].data, 256}, n, a[5].data),
        "%s", bnb_detail());
    array_check(&a[2], codes, "codes of scales");
    array_check(&a[3], absmax2, "absmax of scales");
    array_check(&a[4], &offset, "offset");
    array_check(&a[5], plain, "scales");
    for (size_t i = 0; i < sizeof a / sizeof a[0]; i++)
        array_free(&a[i]);
    free(absmax);
    free(absmax2);
    free(plain);
    free(codes);
}

/* ---------------------------------------------------------------- optimizers */

enum { TENSORS = 6, STEPS = 3 };

/* The tensors of a step on both sides; arrays [tensor][SUBJECT_BUFFERS], as in a subject. */
struct side {
    struct subject s[TENSORS];
    struct array a[TENSORS][SUBJECT_BUFFERS];
    bnb_optim_tensor t[TENSORS];
};

static void side_open(struct side *side, const char *row)
{
    static const int64_t lengths[TENSORS] = {5, 256, 2049, 0, 777, 9001};
    for (int i = 0; i < TENSORS; i++) {
        side->s[i] = subject_make(row, lengths[i], i % 2 ? BNB_F32 : BNB_BF16, i % 3 == 2 ? 32 : 8);
        const struct subject *s = &side->s[i];
        for (int k = 0; k < SUBJECT_BUFFERS; k++)
            side->a[i][k] = array_make(s->buffer[k].data, s->buffer[k].bytes, i == 4 ? s->buffer[k].shift : 0);
        side->t[i] = s->t;
        side->t[i].p = side->a[i][0].data;
        side->t[i].g = side->a[i][1].data;
        side->t[i].state1 = side->a[i][2].data;
        side->t[i].state2 = s->t.state2 ? side->a[i][3].data : NULL;
        side->t[i].absmax1 = s->t.absmax1 ? side->a[i][4].data : NULL;
        side->t[i].absmax2 = s->t.absmax2 ? side->a[i][5].data : NULL;
    }
}

/* p of f32 to the bit, of bf16 to one in the last place, or of what p and the update were where they nearly cancel; it is
 * then made equal.  All else to the bit. */
static void side_check(struct side *side, const char *row, int step)
{
    char what[64];
    for (int i = 0; i < TENSORS; i++) {
        const struct subject *s = &side->s[i];
        const size_t bytes = s->buffer[0].bytes;
        for (int k = 1; k < SUBJECT_BUFFERS; k++) {
            snprintf(what, sizeof what, "%s step %d tensor %d buffer %d", row, step, i, k);
            array_check(&side->a[i][k], s->buffer[k].data, what);
        }
        snprintf(what, sizeof what, "%s step %d tensor %d p", row, step, i);
        if (s->t.dtype == BNB_F32) {
            array_check(&side->a[i][0], s->buffer[0].data, what);
            continue;
        }
        uint16_t *got = malloc(bytes + 1);
        const uint16_t *expected = s->buffer[0].data;
        if (!got)
            abort();
        array_read(&side->a[i][0], got, what);
        for (int64_t e = 0; e < s->t.n; e++) {
            const int apart = (int)got[e] - (int)expected[e];
            const float x = value_at(got, BNB_BF16, e), y = value_at(expected, BNB_BF16, e);
            CHECK((apart >= -1 && apart <= 1) || (x - y < 0x1p-20f && y - x < 0x1p-20f),
                  "%s element %lld: %g, expected %g", what, (long long)e, (double)x, (double)y);
        }
        if (bytes > 0)
            CU(cu->copy_to_device(side->a[i][0].base + side->a[i][0].shift, expected, bytes, stream));
        CU(cu->stream_synchronize(stream));
        free(got);
    }
}

/* The CPU's step, with norms if it clips. */
static void host_step(const bnb_optim_config *config, bnb_optim_tensor t[TENSORS])
{
    bnb_optim_config c = *config;
    double norms[2 * TENSORS];
    if (c.max_unorm > 0.0)
        CHECK(!bnb_optim_norms(NULL, &c, t, TENSORS, norms), "%s", bnb_detail());
    c.norms = norms;
    CHECK(!bnb_optim_step(NULL, &c, t, TENSORS), "%s", bnb_detail());
}

static void card_step(const bnb_optim_config *config, const struct array maps[2], const bnb_optim_tensor t[TENSORS])
{
    bnb_optim_config c = *config;
    struct array norms = array_make(NULL, 16 * (size_t)TENSORS, 0);
    c.qmap1 = maps[0].data;
    c.qmap2 = c.qmap2 ? maps[1].data : NULL;
    if (c.max_unorm > 0.0)
        CHECK(!bnb_optim_norms(&on_card, &c, t, TENSORS, norms.data), "%s", bnb_detail());
    c.norms = norms.data;
    CHECK(!bnb_optim_step(&on_card, &c, t, TENSORS), "%s: %s", c.name, bnb_detail());
    CU(cu->stream_synchronize(stream));
    array_free(&norms);
}

static void optimizer(const char *row, bool stochastic, double max_unorm)
{
    static struct side side;
    bnb_optim_config c = usual_config(row);
    c.stochastic_rounding = stochastic;
    c.max_unorm = max_unorm;
    side_open(&side, row);
    struct array maps[2] = {array_make(c.qmap1, 1024, 0), array_make(c.qmap2 ? c.qmap2 : c.qmap1, 1024, 0)};
    for (int step = 1; step <= STEPS; step++) {
        bnb_optim_tensor host[TENSORS];
        for (int i = 0; i < TENSORS; i++) {
            const struct subject *s = &side.s[i];
            const struct array *g = &side.a[i][1];
            subject_gradient(s, s->t.bits == 8 && step == 2 ? FILL_MIXED : FILL_BELL, step);
            if (s->buffer[1].bytes > 0)
                CU(cu->copy_to_device(g->base + g->shift, s->buffer[1].data, s->buffer[1].bytes, stream));
            CU(cu->stream_synchronize(stream));
            host[i] = s->t;
            host[i].step = side.t[i].step = step;
        }
        host_step(&c, host);
        card_step(&c, maps, side.t);
        side_check(&side, row, step);
    }
    for (int i = 0; i < TENSORS; i++) {
        for (int k = 0; k < SUBJECT_BUFFERS; k++)
            array_free(&side.a[i][k]);
        CHECK(subject_free(&side.s[i]), "guards written");
    }
    array_free(&maps[0]);
    array_free(&maps[1]);
}

/* Norms of gradients, and clipping by their history. */
static void clipping(void)
{
    enum { COUNT = 3, N = 5003 };
    static float g[COUNT][N], history[COUNT][100];
    double norms[COUNT];
    float report[COUNT][3];
    bnb_gradient host[COUNT], card[COUNT];
    bnb_clip_tensor clip[COUNT], card_clip[COUNT];
    struct array a[COUNT], h[COUNT], n = array_make(NULL, sizeof norms, 0), r = array_make(NULL, sizeof report, 0);
    for (int i = 0; i < COUNT; i++) {
        a[i] = array_make(NULL, sizeof g[i], 0);
        h[i] = array_make(history[i], sizeof history[i], 0);
    }
    for (int step = 1; step <= 5; step++) {
        for (int i = 0; i < COUNT; i++) {
            fill_values(g[i], BNB_F32, N, FILL_BELL, (uint64_t)(step * 10 + i));
            CU(cu->copy_to_device(a[i].base, g[i], sizeof g[i], stream));
            host[i] = (bnb_gradient){g[i], N - i * 1000, BNB_F32};
            card[i] = (bnb_gradient){a[i].data, N - i * 1000, BNB_F32};
            clip[i] = (bnb_clip_tensor){.history = history[i], .step = step};
            card_clip[i] = (bnb_clip_tensor){.history = h[i].data, .step = step};
        }
        CHECK(!bnb_gradient_norms(NULL, host, COUNT, norms), "%s", bnb_detail());
        CHECK(!bnb_gradient_norms(&on_card, card, COUNT, n.data), "%s", bnb_detail());
        CHECK(!bnb_clip_percentile(NULL, clip, COUNT, 30, norms, report[0]), "%s", bnb_detail());
        CHECK(!bnb_clip_percentile(&on_card, card_clip, COUNT, 30, n.data, r.data), "%s", bnb_detail());
        array_check(&n, norms, "norms of gradients");
        array_check(&r, report, "report of clipping");
        for (int i = 0; i < COUNT; i++)
            array_check(&h[i], history[i], "history");
    }
    for (int i = 0; i < COUNT; i++) {
        array_free(&a[i]);
        array_free(&h[i]);
    }
    array_free(&n);
    array_free(&r);
}

/* ---------------------------------------------------------------- without a launch */

/* The text of a card, and refusals. */
static void card_text(int count)
{
    char text[256] = "?", tiny[4] = "???";
    CHECK(bnb_cuda_card_text(0, NULL, 9) == BNB_EINVAL && strstr(bnb_detail(), "text"), "%s", bnb_detail());
    CHECK(bnb_cuda_card_text(0, text, 0) == BNB_EINVAL && strstr(bnb_detail(), "size"), "%s", bnb_detail());
    CHECK(bnb_cuda_card_text(-1, text, sizeof text) == BNB_EINVAL && strstr(bnb_detail(), "-1"), "%s", bnb_detail());
    CHECK(bnb_cuda_card_text(absent_card(), text, sizeof text) == absent_card_status() &&
              strstr(bnb_detail(), absent_card_word()),
          "%s", bnb_detail());
    CHECK(!strcmp(text, "?"), "a refused call wrote '%s'", text);
    if (count == 0)
        return;
    CHECK(!bnb_cuda_card_text(0, text, sizeof text) && strlen(text) > 8, "%s", bnb_detail());
    CHECK(!bnb_cuda_card_text(0, tiny, sizeof tiny) && strlen(tiny) == 3, "'%s' of '%s'", tiny, text);
    printf("card 0: %s\n", text);
}

static bool open_card(void)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    cu_device device = 0;
    cu_context context = NULL;
    const struct {
        const char *symbol;
        void *to;
    } wanted[] = {{"cuMemAlloc_v2", &device_alloc}, {"cuMemFree_v2", &device_free}};
    cu = bnb_cuda_driver("test_cuda");
    for (size_t i = 0; library && i < sizeof wanted / sizeof wanted[0]; i++) {
        void *address = dlsym(library, wanted[i].symbol);
        memcpy(wanted[i].to, &address, sizeof address);
    }
    if (!cu || !device_alloc || !device_free)
        return false;
    CU(cu->device_get(&device, 0));
    CU(cu->primary_retain(&context, device));
    CU(cu->context_push(context));
    CU(cu->stream_create(&stream, CU_STREAM_NON_BLOCKING));
    on_card = (bnb_exec){
        .size = sizeof on_card, .device = BNB_CUDA, .stream = stream, .context = &held, .alloc = take, .free = give};
    return true;
}

int main(int argc, char **argv)
{
    absent_card();
    const int count = bnb_cuda_count();
    exact = argc > 1 && !strcmp(argv[1], "--exact");
    card_text(count);
    if (check_failures || count == 0)
        return check_failures ? EXIT_FAILURE : TEST_SKIPPED;
    if (!open_card()) {
        fprintf(stderr, "no access to device memory: %s\n", bnb_detail());
        return EXIT_FAILURE;
    }
    quantisers();
    for (int64_t n = 1; n < 3000000; n = n * 40 + 1)
        scales(n);
    for (int r = 0; r < REFERENCE_ROWS; r++) {
        optimizer(reference_rows[r].name, false, 0.0);
        optimizer(reference_rows[r].name, true, 0.0);
        optimizer(reference_rows[r].name, false, 0.05);
    }
    clipping();
    CHECK(held == 0, "%d workspaces were not returned", held);
    return CHECK_RESULT();
}
