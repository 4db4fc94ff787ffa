/*
 * test_pages.c - paged states on CUDA, through a stand-in for the driver that does the work of its streams in any order
 *
 * What is computed there is no optimizer, but every array, scalar and index takes part in it: a step over paged states
 * must leave what the same step over states on the device leaves.
 */
#include <dlfcn.h>
#include <string.h>

#include "bitsandbytes.h"
#include "check.h"
#include "core/internal.h"
#include "cuda/driver.h"
#include "support.h"

enum { MOST = 12, KEPT = 4096 };

struct stub {
    void (*seed)(uint64_t seed);
    size_t (*left)(void);
    int *copies_first, *ahead, *calls_left, *captures;
    cu_result (*fill)(cu_address to, unsigned char value, size_t bytes, cu_stream stream);
    cu_result (*synchronize)(cu_stream stream);
    cu_result (*stream_create)(cu_stream *stream, unsigned flags);
} stub;

static cu_stream stream;

/* ---------------------------------------------------------------- workspace: never freed before the end, but spoilt */

static void *kept[KEPT];
static int kept_count;
static size_t largest;

static void *device_alloc(void *context, size_t bytes)
{
    void *memory = malloc(bytes + 1);
    (void)context;
    if (!memory || kept_count == KEPT)
        abort();
    memset(memory, 0xaa, bytes);
    largest = bytes > largest ? bytes : largest;
    return kept[kept_count++] = memory;
}

static void device_free(void *context, void *memory, size_t bytes)
{
    (void)context;
    stub.fill((cu_address)(uintptr_t)memory, 0xdd, bytes, stream);
}

static bnb_exec exec_of(void)
{
    return (bnb_exec){
        .size = sizeof(bnb_exec), .device = BNB_CUDA, .stream = stream, .alloc = device_alloc, .free = device_free};
}

/* ---------------------------------------------------------------- a group of parameters */

struct buffer {
    char *data;
    size_t bytes;
    bool pinned;
};

struct group {
    bnb_optim_tensor tensors[MOST];
    struct buffer buffers[8 * MOST + 2];
    int buffer_count;
    size_t count, paged_bytes;
    double *norms;
    float *lr;
};

static void *add(struct group *g, size_t bytes, bool pinned, uint64_t seed)
{
    struct buffer *b = &g->buffers[g->buffer_count++];
    void *data = NULL;
    *b = (struct buffer){NULL, bytes, pinned};
    if (pinned)
        CHECK(bnb_pages_alloc(0, bytes, &data) == BNB_OK, "%s", bnb_detail());
    else
        data = malloc(bytes + 1);
    if (!data)
        abort();
    b->data = data;
    for (size_t i = 0; i < bytes; i++)
        b->data[i] = (char)(random_bits(&seed) >> 40);
    return data;
}

/* Scales and counters: small whole numbers. */
static float *add_floats(struct group *g, size_t count, float value)
{
    float *data = add(g, count * sizeof *data, false, 1);
    for (size_t i = 0; i < count; i++)
        data[i] = value + (float)(i % 5);
    return data;
}

struct kind {
    const char *name;
    int states;
    int rows; /* of state1 */
    bool remote, stochastic, clipped;
};

static const int64_t sizes[] = {5000, 1, 30001, 0, 2048, 50000, 300, 16384, 20000};
enum { SIZES = sizeof sizes / sizeof sizes[0] };

static void make(struct group *g, const struct kind *kind, bool paged)
{
    memset(g, 0, sizeof *g);
    g->count = SIZES;
    for (size_t i = 0; i < g->count; i++) {
        bnb_optim_tensor *t = &g->tensors[i];
        const bool own = paged && i % 3 != 1;
        const size_t n = (size_t)sizes[i], blocks = (n + 255) / 256;
        t->n = sizes[i];
        t->dtype = i % 2 ? BNB_BF16 : BNB_F32;
        t->bits = i % 4 == 2 ? 32 : 8;
        t->step = 3 + (int64_t)(i % 3);
        t->seed = i;
        t->paged = own;
        if (n == 0)
            continue;
        const size_t size = t->dtype == BNB_F32 ? 4 : 2, width = (size_t)t->bits / 8;
        t->p = add(g, n * size, false, 10 * i);
        t->g = i == 6 ? NULL : add(g, n * size, false, 10 * i + 1);
        t->state1 = add(g, (size_t)kind->rows * n * width, own, 10 * i + 2);
        t->state2 = kind->states == 2 ? add(g, n * width, own, 10 * i + 3) : NULL;
        t->absmax1 = t->bits == 8 ? add_floats(g, (size_t)kind->rows * blocks, 2.0f) : NULL;
        t->absmax2 = t->bits == 8 && kind->states == 2 ? add_floats(g, blocks, 7.0f) : NULL;
        t->step_count = kind->remote ? add_floats(g, 1, 4.0f) : NULL;
        t->unorm = kind->clipped ? add_floats(g, 1, 0.0f) : NULL;
        g->paged_bytes += own ? ((size_t)kind->rows + (size_t)kind->states - 1) * n * width : 0;
    }
    g->norms = kind->clipped ? add(g, 2 * g->count * sizeof(double), false, 5) : NULL;
    g->lr = kind->remote ? add_floats(g, 1, 1.0f) : NULL;
}

static void destroy(struct group *g)
{
    for (int i = 0; i < g->buffer_count; i++) {
        if (g->buffers[i].pinned)
            CHECK(bnb_pages_free(0, g->buffers[i].data) == BNB_OK, "%s", bnb_detail());
        else
            free(g->buffers[i].data);
    }
}

static bnb_optim_config config_of(const struct kind *kind, const struct group *g, size_t page_bytes)
{
    static const float map[256];
    return (bnb_optim_config){.size = sizeof(bnb_optim_config),
                              .name = kind->name,
                              .lr = 0.5,
                              .lr_value = g->lr,
                              .beta1 = 0.9,
                              .beta2 = 0.95,
                              .beta3 = 0.99,
                              .alpha = 2.0,
                              .eps = 1e-8,
                              .gnorm_scale = 1.0,
                              .max_unorm = kind->clipped ? 1.0 : 0.0,
                              .norms = g->norms,
                              .stochastic_rounding = kind->stochastic,
                              .qmap1 = map,
                              .qmap2 = kind->states == 2 ? map : NULL,
                              .page_bytes = page_bytes};
}

/* The calls of one step. */
static bnb_status update(const struct kind *kind, struct group *g, size_t page_bytes)
{
    const bnb_exec ex = exec_of();
    const bnb_optim_config config = config_of(kind, g, page_bytes);
    bnb_status status = BNB_OK;
    if (kind->clipped)
        status = bnb_optim_norms(&ex, &config, g->tensors, g->count, g->norms);
    return status ? status : bnb_optim_step(&ex, &config, g->tensors, g->count);
}

static void finish(const char *what)
{
    stub.synchronize(stream);
    CHECK(stub.left() == 0, "%s: %zu pieces of work that the stream did not wait for", what, stub.left());
    while (kept_count > 0)
        free(kept[--kept_count]);
}

/* ---------------------------------------------------------------- tests */

static const struct kind kinds[] = {
    {"adam", 2, 1, false, false, false},  {"adam", 2, 1, true, true, false},     {"ademamix", 2, 2, false, true, false},
    {"ademamix", 2, 2, true, true, true}, {"lion", 1, 1, false, false, false},   {"lamb", 2, 1, false, true, true},
    {"momentum", 1, 1, true, true, true}, {"rmsprop", 1, 1, false, true, false},
};
enum { KINDS = sizeof kinds / sizeof kinds[0] };

static void same_result(const struct kind *kind, size_t page_bytes, uint64_t seed)
{
    struct group plain, paged;
    make(&plain, kind, false);
    make(&paged, kind, true);
    stub.seed(seed);
    for (int t = 0; t < 3; t++) {
        CHECK(update(kind, &plain, 0) == BNB_OK, "%s: %s", kind->name, bnb_detail());
        CHECK(update(kind, &paged, page_bytes) == BNB_OK, "%s: %s", kind->name, bnb_detail());
    }
    finish(kind->name);
    for (int i = 0; i < plain.buffer_count; i++)
        CHECK(!memcmp(plain.buffers[i].data, paged.buffers[i].data, plain.buffers[i].bytes),
              "%s, %zu bytes of pages, order %llu: buffer %d of %zu bytes differs", kind->name, page_bytes,
              (unsigned long long)seed, i, plain.buffers[i].bytes);
    destroy(&plain);
    destroy(&paged);
}

/* Tables that no launch can carry, in steps that nobody waits for: their memory is used again, but not too soon. */
static void many_tensors(void)
{
    enum { TENSORS = 700, STEPS = 12 };
    static uint32_t p[2][TENSORS], g[TENSORS], state[2][2][TENSORS];
    static bnb_optim_tensor tensors[TENSORS];
    const struct kind adam = kinds[0];
    const bnb_exec ex = exec_of();
    struct group none = {.count = 0};
    bnb_optim_config config = config_of(&adam, &none, 0);
    for (int late = 0; late < 2; late++) {
        stub.seed(9);
        for (int t = 1; t <= STEPS; t++) {
            for (int i = 0; i < TENSORS; i++) {
                g[i] = (uint32_t)i;
                tensors[i] = (bnb_optim_tensor){.p = &p[late][i],
                                                .g = &g[i],
                                                .state1 = &state[late][0][i],
                                                .state2 = &state[late][1][i],
                                                .n = 1,
                                                .step = t + i % 2,
                                                .bits = 32};
            }
            CHECK(bnb_optim_step(&ex, &config, tensors, TENSORS) == BNB_OK, "%s", bnb_detail());
            if (!late)
                finish("many");
        }
        finish("many");
    }
    CHECK(!memcmp(p[0], p[1], sizeof p[0]) && !memcmp(state[0], state[1], sizeof state[0]), "late steps differ");
}

/* Device memory is bounded by what was asked for, and by a quarter of the states. */
static void bounded(const struct kind *kind)
{
    struct group g;
    make(&g, kind, false);
    largest = 0;
    CHECK(update(kind, &g, 0) == BNB_OK, "%s", bnb_detail());
    finish("bounded");
    const size_t table = largest;
    destroy(&g);
    for (int k = 0; k < 2; k++) {
        make(&g, kind, true);
        const size_t asked = k ? 200000 : 0, allowed = k ? asked : g.paged_bytes / 4;
        largest = 0;
        CHECK(update(kind, &g, asked) == BNB_OK, "%s", bnb_detail());
        finish("bounded");
        CHECK(largest <= table + allowed + 8192, "%zu bytes of workspace, expected %zu + %zu", largest, table, allowed);
        destroy(&g);
    }
}

/* The second span is fetched before the kernel of the first has run. */
static void fetched_ahead(void)
{
    struct group g;
    make(&g, &kinds[0], true);
    *stub.copies_first = 1;
    stub.seed(1);
    CHECK(update(&kinds[0], &g, 200000) == BNB_OK, "%s", bnb_detail());
    finish("ahead");
    const int ahead = *stub.ahead;
    *stub.copies_first = 0;
    CHECK(ahead >= 4, "%d copies before the first kernel", ahead);
    destroy(&g);
}

/* Whichever copy or launch fails, the call says so, and the stream still comes after all that was begun. */
static void failures(void)
{
    int failed = 0;
    for (int calls = 1; calls < 200; calls++) {
        struct group g;
        make(&g, &kinds[0], true);
        *stub.calls_left = calls;
        const bnb_status status = update(&kinds[0], &g, 200000);
        CHECK(status == (*stub.calls_left ? BNB_OK : BNB_ECUDA), "%d: status %d", calls, (int)status);
        CHECK(!status || strstr(bnb_detail(), "CUDA_ERROR_STUB"), "%s", bnb_detail());
        failed += status != BNB_OK;
        *stub.calls_left = 0;
        finish("failure");
        destroy(&g);
        if (!status)
            break;
    }
    CHECK(failed > 20, "%d failures", failed);
}

static void refusals(void)
{
    struct group g;
    void *pages = &g;
    make(&g, &kinds[0], false);
    g.tensors[2].paged = true;
    CHECK(update(&kinds[0], &g, 0) == BNB_EINVAL && strstr(bnb_detail(), "tensors[2].state1"), "%s", bnb_detail());
    finish("refusal");
    destroy(&g);
    CHECK(bnb_pages_alloc(0, 0, &pages) == BNB_EINVAL && !pages, "%s", bnb_detail());
    CHECK(bnb_pages_alloc(7, 1, &pages) == BNB_EINVAL && strstr(bnb_detail(), "7"), "%s", bnb_detail());
    CHECK(bnb_pages_alloc(0, 1, NULL) == BNB_EINVAL, "%s", bnb_detail());
    CHECK(bnb_pages_free(0, NULL) == BNB_OK, "%s", bnb_detail());
    CHECK(bnb_pages_free(0, &g) == BNB_ECUDA, "%s", bnb_detail());
}

static void *symbol(void *library, const char *name)
{
    void *found = dlsym(library, name);
    if (!found) {
        fprintf(stderr, "no %s\n", name);
        exit(EXIT_FAILURE);
    }
    return found;
}

#define TAKE(member, name)                                \
    do {                                                  \
        void *found = symbol(library, name);              \
        memcpy(&stub.member, &found, sizeof stub.member); \
    } while (0)

int main(void)
{
    void *library = dlopen(STUB_DRIVER, RTLD_NOW); /* by its SONAME the one that the library finds */
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        return EXIT_FAILURE;
    }
    TAKE(seed, "stub_seed");
    TAKE(left, "stub_left");
    TAKE(copies_first, "stub_copies_first");
    TAKE(ahead, "stub_ahead");
    TAKE(calls_left, "stub_calls_left");
    TAKE(captures, "stub_captures");
    TAKE(fill, "cuMemsetD8Async");
    TAKE(synchronize, "cuStreamSynchronize");
    TAKE(stream_create, "cuStreamCreate");
    stub.stream_create(&stream, CU_STREAM_NON_BLOCKING);
    const size_t pages[] = {0, 1, 200000, 1 << 20, 1 << 28};
    for (int k = 0; k < KINDS; k++)
        for (size_t i = 0; i < sizeof pages / sizeof pages[0]; i++)
            for (uint64_t seed = 0; seed < 3; seed++)
                same_result(&kinds[k], pages[i], 10 * i + seed);
    *stub.captures = 1;
    same_result(&kinds[3], 1, 99);
    *stub.captures = 0;
    many_tensors();
    bounded(&kinds[0]);
    bounded(&kinds[2]);
    fetched_ahead();
    failures();
    refusals();
    return CHECK_RESULT();
}
