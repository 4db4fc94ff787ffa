/*
 * test_parallel.c - any parallel loop gives the bytes of the serial call; memory that is out writes nothing
 *
 * Loops: backwards in odd pieces, and four real threads.  Lengths are several grains and no multiple of a block.
 */
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "support.h"

enum { N = 300007, BLOCK = 64, SCALES = (N + BLOCK - 1) / BLOCK };

struct buffers { /* everything the operations below write */
    uint8_t codes8[N], codes4[(N + 1) / 2], codes_of_scales[N], state1[N], state2[N];
    float absmax8[SCALES], absmax4[SCALES], absmax2[N / 256 + 1], offset, scales[N];
    double update_norms[2], gradient_norm;
    float decoded8[N], quantiles[256], p[N], absmax_m[N / 256 + 1], absmax_v[N / 256 + 1], p32[N], m[N], v[N];
    uint16_t decoded4[N];
};

static float signed_map[256], unsigned_map[256];

/* 8-bit state for n parameters from the first, which opens a block. */
static bnb_optim_tensor part_of(struct buffers *b, const float *g, int64_t first, int64_t n)
{
    return (bnb_optim_tensor){.p = b->p + first,
                              .g = g,
                              .state1 = b->state1 + first,
                              .state2 = b->state2 + first,
                              .absmax1 = b->absmax_m + first / 256,
                              .absmax2 = b->absmax_v + first / 256,
                              .n = n,
                              .dtype = BNB_F32,
                              .bits = 8};
}

static void optimize(const bnb_exec *ex, const float *x, struct buffers *b)
{
    memcpy(b->p, x, sizeof b->p);
    memcpy(b->p32, x, sizeof b->p32);
    const bnb_optim_config config = {.size = sizeof config,
                                     .name = "adam",
                                     .lr = 0.01,
                                     .beta1 = 0.9,
                                     .beta2 = 0.999,
                                     .eps = 1e-8,
                                     .gnorm_scale = 1.0,
                                     .qmap1 = signed_map,
                                     .qmap2 = unsigned_map};
    for (int step = 1; step <= 2; step++) {
        bnb_optim_tensor tensor[4] = {
            part_of(b, x, 0, 100001),
            {.p = b->p32, .g = x, .state1 = b->m, .state2 = b->v, .n = N, .dtype = BNB_F32, .bits = 32},
            {0},
            part_of(b, x + 7, 100352, N - 100352),
        };
        for (int i = 0; i < 4; i++)
            tensor[i].step = step;
        CHECK(bnb_optim_norms(ex, &config, &tensor[1], 1, b->update_norms) == BNB_OK, "%s", bnb_detail());
        CHECK(bnb_optim_step(ex, &config, tensor, 4) == BNB_OK, "%s", bnb_detail());
    }
}

static void run_all(const bnb_exec *ex, const float *x, struct buffers *b)
{
    memset(b, 0, sizeof *b);
    const bnb_scales plain8 = {.absmax = b->absmax8};
    const bnb_scales nested = {b->codes_of_scales, signed_map, b->absmax2, &b->offset, 256};
    CHECK(!bnb_quantize8(ex, x, BNB_F32, N, BLOCK, signed_map, b->codes8, b->absmax8), "%s", bnb_detail());
    CHECK(!bnb_dequantize8(ex, b->codes8, N, BLOCK, signed_map, &plain8, b->decoded8, BNB_F32), "%s", bnb_detail());
    CHECK(!bnb_quantize4(ex, x, BNB_F32, N, BLOCK, BNB_NF4, b->codes4, b->absmax4), "%s", bnb_detail());
    CHECK(!bnb_quantize_scales(ex, x, N, 256, signed_map, b->codes_of_scales, b->absmax2, &b->offset), "%s",
          bnb_detail());
    CHECK(!bnb_dequantize_scales(ex, &nested, N, b->scales), "%s", bnb_detail());
    CHECK(!bnb_dequantize4(ex, b->codes4, N, BLOCK, BNB_NF4, &nested, b->decoded4, BNB_BF16), "%s", bnb_detail());
    CHECK(!bnb_estimate_quantiles(ex, x, BNB_F32, N, 1.0 / 512, 256, b->quantiles), "%s", bnb_detail());
    CHECK(!bnb_gradient_norms(ex, &(bnb_gradient){x, N, BNB_F32}, 1, &b->gradient_norm), "%s", bnb_detail());
    optimize(ex, x, b);
}

static void loops_agree(const float *x)
{
    struct buffers *serial = malloc(sizeof *serial), *parallel = malloc(sizeof *parallel);
    if (!serial || !parallel)
        abort();
    run_all(NULL, x, serial);
    const bnb_exec backwards = {.size = sizeof backwards, .parallel_for = loop_backwards};
    run_all(&backwards, x, parallel);
    CHECK(!memcmp(serial, parallel, sizeof *serial), "backwards in odd pieces: bytes differ");
    const bnb_exec threads = {.size = sizeof threads, .parallel_for = loop_threads};
    run_all(&threads, x, parallel);
    CHECK(!memcmp(serial, parallel, sizeof *serial), "four threads: bytes differ");
    free(serial);
    free(parallel);
}

/* ---- workspace: counted, or refused */

struct memory { size_t bytes, calls, freed; };

static void *counting_alloc(void *context, size_t bytes)
{
    struct memory *m = context;
    m->bytes += bytes;
    m->calls++;
    return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

static void counting_free(void *context, void *ptr, size_t bytes)
{
    struct memory *m = context;
    m->freed += bytes;
    free(ptr);
}

static void *no_memory(void *context, size_t bytes)
{
    (void)bytes;
    ++*(int *)context;
    return NULL;
}

static void never_free(void *context, void *ptr, size_t bytes)
{
    (void)context;
    CHECK(false, "free of %p, %zu bytes, after a refused allocation", ptr, bytes);
}

static void workspace_is_returned(const float *x)
{
    struct memory m = {0, 0, 0};
    const bnb_exec ex = {.size = sizeof ex, .context = &m, .alloc = counting_alloc, .free = counting_free};
    struct buffers *b = malloc(sizeof *b);
    if (!b)
        abort();
    run_all(&ex, x, b);
    CHECK(m.bytes == m.freed, "%zu bytes taken, %zu returned", m.bytes, m.freed);
    CHECK(m.calls == 5, "%zu allocations: nested statistics, quantiles and three norms take workspace, once each",
          m.calls);
    free(b);
}

static void out_of_memory(const float *x)
{
    int refused = 0;
    const bnb_exec ex = {.size = sizeof ex, .context = &refused, .alloc = no_memory, .free = never_free};
    struct guarded codes = guarded_make(N, 0), absmax2 = guarded_make(4 * (N / 256 + 1), 0),
                   offset = guarded_make(4, 0), quantiles = guarded_make(1024, 0);
    CHECK(bnb_quantize_scales(&ex, x, N, 256, signed_map, codes.data, absmax2.data, offset.data) == BNB_ENOMEM,
          "quantize_scales without memory: %s", bnb_strerror(bnb_last_status()));
    CHECK(strstr(bnb_detail(), "quantize_scales"), "detail is '%s'", bnb_detail());
    CHECK(bnb_estimate_quantiles(&ex, x, BNB_F32, N, 0.0, 256, quantiles.data) == BNB_ENOMEM,
          "estimate_quantiles without memory: %s", bnb_strerror(bnb_last_status()));
    CHECK(strstr(bnb_detail(), "estimate_quantiles"), "detail is '%s'", bnb_detail());
    double norms[2] = {-1.0, -1.0};
    const bnb_optim_config config = {.size = sizeof config, .name = "lion", .gnorm_scale = 1.0};
    float p[4] = {0}, state[4] = {0};
    const bnb_optim_tensor tensor = {.p = p, .g = x, .state1 = state, .n = 4, .step = 1, .dtype = BNB_F32, .bits = 32};
    CHECK(bnb_gradient_norms(&ex, &(bnb_gradient){x, N, BNB_F32}, 1, norms) == BNB_ENOMEM, "gradient_norms: %s",
          bnb_strerror(bnb_last_status()));
    CHECK(bnb_optim_norms(&ex, &config, &tensor, 1, norms) == BNB_ENOMEM, "optim_norms: %s",
          bnb_strerror(bnb_last_status()));
    CHECK(strstr(bnb_detail(), "norms") && norms[0] == -1.0 && norms[1] == -1.0, "norms were written, or '%s'",
          bnb_detail());
    CHECK(guarded_untouched(&codes) && guarded_untouched(&absmax2) && guarded_untouched(&offset) &&
              guarded_untouched(&quantiles),
          "an output was written");
    CHECK(refused == 4, "%d allocations were tried", refused);
    guarded_free(&codes);
    guarded_free(&absmax2);
    guarded_free(&offset);
    guarded_free(&quantiles);
}

int main(void)
{
    static float x[N + 8];
    bnb_create_dynamic_map(true, 7, 8, signed_map);
    bnb_create_dynamic_map(false, 7, 8, unsigned_map);
    fill_values(x, BNB_F32, N + 8, FILL_HEAVY, 77);
    loops_agree(x);
    workspace_is_returned(x);
    out_of_memory(x);
    return CHECK_RESULT();
}
