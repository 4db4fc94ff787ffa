/*
 * launch_gemm4.c - products with a 4-bit weight on CUDA: what core/plan_gemm4.c chooses, with its arguments
 *
 * BNB_GEMM4 asks for another kernel, for measuring: bitsandbytes.h.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "core/plan_gemm4.h"
#include "cuda/cuda.h"

/* Of the plain kernels: threads of a block, rows of the weight that one takes at a time, the side of a tile, few rows. */
enum { THREADS = 256, WARPS = 8, TILE = 64, FEW = 8 };

/* Threads of the wide kernels, of those where two ways take steps in turn, and of the tile kernels. */
enum { WIDE_THREADS = 384, WIDE_WAYS_THREADS = 640, TILE_THREADS = 256 };

/* The two variants of a kernel: f16, bf16; an initialiser of struct bnb_cuda_kernel [BNB_FLOATS], of which [0] is empty. */
#define HALVES(file, since, prefix, count, bytes) \
    {                                             \
        [BNB_F16] = {.image = file,               \
                     .name = prefix "_f16",       \
                     .dtype = BNB_F16,            \
                     .threads = count,            \
                     .least = since,              \
                     .shared = bytes},            \
        [BNB_BF16] = {.image = file,              \
                      .name = prefix "_bf16",     \
                      .dtype = BNB_BF16,          \
                      .threads = count,           \
                      .least = since,             \
                      .shared = bytes}            \
    }

static struct bnb_cuda_kernel kernels[BNB_GEMM4_KERNELS][3] = {
    [BNB_GEMM4_KERNEL_FEW8] = HALVES("gemm4_few", 80, "bnb_k_gemm4_few8", 640, BNB_CUDA_ALL_SHARED),
    [BNB_GEMM4_KERNEL_FEW16] = HALVES("gemm4_few", 80, "bnb_k_gemm4_few16", 512, BNB_CUDA_ALL_SHARED),
    [BNB_GEMM4_KERNEL_FEW32] = HALVES("gemm4_few", 80, "bnb_k_gemm4_few32", 384, BNB_CUDA_ALL_SHARED),
    [BNB_GEMM4_KERNEL_FEW64] = HALVES("gemm4_few", 80, "bnb_k_gemm4_few64", 256, BNB_CUDA_ALL_SHARED),
    [BNB_GEMM4_KERNEL_WIDE32] =
        HALVES("gemm4_wide", 90, "bnb_k_gemm4_wide32", WIDE_WAYS_THREADS, BNB_GEMM4_WIDE_SHARED(32, false)),
    [BNB_GEMM4_KERNEL_WIDE64] =
        HALVES("gemm4_wide", 90, "bnb_k_gemm4_wide64", WIDE_WAYS_THREADS, BNB_GEMM4_WIDE_SHARED(64, false)),
    [BNB_GEMM4_KERNEL_WIDE128] =
        HALVES("gemm4_wide", 90, "bnb_k_gemm4_wide128", WIDE_THREADS, BNB_GEMM4_WIDE_SHARED(128, false)),
    [BNB_GEMM4_KERNEL_WIDE256] =
        HALVES("gemm4_wide", 90, "bnb_k_gemm4_wide256", WIDE_THREADS, BNB_GEMM4_WIDE_SHARED(256, false)),
    [BNB_GEMM4_KERNEL_MEET128] =
        HALVES("gemm4_wide", 90, "bnb_k_gemm4_meet128", WIDE_THREADS, BNB_GEMM4_WIDE_SHARED(128, false)),
    [BNB_GEMM4_KERNEL_MEET256] =
        HALVES("gemm4_wide", 90, "bnb_k_gemm4_meet256", WIDE_THREADS, BNB_GEMM4_WIDE_SHARED(256, false)),
    [BNB_GEMM4_KERNEL_GRAD128] =
        HALVES("gemm4_wide", 90, "bnb_k_gemm4_wide_grad128", WIDE_THREADS, BNB_GEMM4_WIDE_SHARED(128, true)),
    [BNB_GEMM4_KERNEL_GRAD256] =
        HALVES("gemm4_wide", 90, "bnb_k_gemm4_wide_grad256", WIDE_THREADS, BNB_GEMM4_WIDE_SHARED(256, true)),
    [BNB_GEMM4_KERNEL_TILE] = HALVES("gemm4_tile", 80, "bnb_k_gemm4_tile", TILE_THREADS, BNB_GEMM4_TILE_SHARED)};
static struct bnb_cuda_kernel tile_grad[3] =
    HALVES("gemm4_tile", 80, "bnb_k_gemm4_tile_grad", TILE_THREADS, BNB_GEMM4_TILE_SHARED);
static struct bnb_cuda_kernel sum[3] = HALVES("gemm4_few", 80, "bnb_k_gemm4_sum", 256, 0);

/* ---------------------------------------------------------------- what was asked for */

static bool measuring;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void see_wish(void) { measuring = getenv("BNB_GEMM4") != NULL; }

static struct bnb_gemm4_wish read_wish(void)
{
    struct bnb_gemm4_wish wish = {0};
    const char *text = getenv("BNB_GEMM4");
    const size_t length = text ? strcspn(text, ",") : 0;
    for (int i = BNB_GEMM4_PLAIN; text && i < BNB_GEMM4_KERNELS; i++)
        if (strlen(bnb_gemm4_kernel_name[i]) == length && strncmp(text, bnb_gemm4_kernel_name[i], length) == 0)
            wish.kernel = i;
    int *const numbers[] = {&wish.splits, &wish.bands, &wish.depth};
    for (int i = 0; text && i < 3; i++) {
        text = strchr(text, ',');
        if (text)
            *numbers[i] = (int)strtol(++text, NULL, 10);
    }
    return wish;
}

/* ---------------------------------------------------------------- the plain kernels */

/* 0: the values are memory of the device. */
static int type_of(const float *code)
{
    return code == bnb_map4(BNB_NF4) ? (int)BNB_NF4 : code == bnb_map4(BNB_FP4) ? (int)BNB_FP4 : 0;
}

static int64_t tiles_of(int64_t m, int64_t n) { return bnb_blocks(m, TILE) * bnb_blocks(n, TILE); }

static bnb_status launch_plain(const struct bnb_cuda_call *c, const struct bnb_gemm4_block *g, bnb_dtype dtype)
{
    static struct bnb_cuda_kernel few[] = BNB_CUDA_VARIANTS("gemm4", "bnb_k_gemv4", THREADS);
    static struct bnb_cuda_kernel many[] = BNB_CUDA_VARIANTS("gemm4", "bnb_k_gemm4", THREADS);
    static struct bnb_cuda_kernel grad[] = BNB_CUDA_VARIANTS("gemm4", "bnb_k_gemm4_grad", THREADS);
    const int64_t inner = g->grad ? g->n : g->k, outer = g->grad ? g->k : g->n;
    struct bnb_cuda_gemm4 p = {*g, type_of(g->code), __builtin_ctzll((unsigned long long)g->block), 0, 0, 0};
    p.whole = g->k % 8 == 0 && bnb_cuda_aligned(g->codes, 4);
    p.vector = inner % 8 == 0 && bnb_cuda_aligned(g->x, 16);
    p.store = outer % 4 == 0 && bnb_cuda_aligned(g->out, 16);
    const int64_t more = g->first ? g->experts * bnb_blocks(outer, TILE) : 0; /* the last tile of each may be short */
    if (g->grad)
        return bnb_cuda_launch_over(c, &grad[dtype], tiles_of(g->m, outer) + more, &p);
    if (g->m > FEW || g->first)
        return bnb_cuda_launch_over(c, &many[dtype], tiles_of(g->m, outer) + more, &p);
    p.vector = p.vector && g->k % 32 == 0 && bnb_cuda_aligned(g->codes, 16);
    return bnb_cuda_launch_over(c, &few[dtype], bnb_blocks(g->n, WARPS), &p);
}

/* ---------------------------------------------------------------- the fast kernels */

/* What the values of a table are multiplied with so that they round well: the sixteen of NF4 to bf16 with a root mean
 * square error of 6.3e-4 instead of 1.1e-3 of theirs, to f16 with 6.2e-5 instead of 1.6e-4; those of FP4 exactly. */
static float gain_of(int type, bool bf16)
{
    return type == (int)BNB_FP4 ? 3.0f : bf16 ? 1.4370040893554688f : 1.6776885986328125f;
}

static struct bnb_cuda_gemm4_fast fast_of(const struct bnb_gemm4_block *g, const struct bnb_gemm4_plan *plan,
                                          bnb_dtype dtype)
{
    struct bnb_cuda_gemm4_fast p = {.g = *g,
                                    .first = g->first,
                                    .experts = g->first ? (int)g->experts : 1,
                                    .splits = plan->splits,
                                    .steps = plan->steps,
                                    .bands = plan->bands,
                                    .slices = plan->slices,
                                    .depth = plan->depth,
                                    .stage = plan->stage};
    const bool sums = plan->kernel <= BNB_GEMM4_KERNEL_WIDE64; /* their tables are of the dtype, all others of f16 */
    const float gain = gain_of(type_of(g->code), sums && dtype == BNB_BF16);
    p.shrink = 1.0f / gain;
    for (int i = 0; i < 16; i++)
        p.values[i] = g->code[i] * gain;
    p.shift = __builtin_ctzll((unsigned long long)g->block);
    p.shift2 = g->scale.absmax2 ? __builtin_ctzll((unsigned long long)g->scale.block2) : 0;
    p.store = (g->grad ? g->k : g->n) % (plan->kernel == BNB_GEMM4_KERNEL_TILE ? 2 : 8) == 0;
    return p;
}

/* A tensor for the copy engine, whose lines along dimension i are strides[i - 1] bytes apart. */
struct tensor {
    const void *data;
    int type, swizzle;
    unsigned dimensions;
    uint64_t sizes[3], strides[2];
    unsigned box[3];
};

static bnb_status make_map(const struct bnb_cuda_call *c, struct bnb_cuda_map *map, const struct tensor *t)
{
    const unsigned ones[3] = {1, 1, 1};
    if (!c->card->cu->tensor_map)
        return bnb_fail(BNB_ENOTSUP, "%s: the driver is older than CUDA 12 and has no cuTensorMapEncodeTiled",
                        c->function);
    return bnb_cuda_check(c->card->cu,
                          c->card->cu->tensor_map(map, t->type, t->dimensions, (void *)(uintptr_t)t->data, t->sizes,
                                                  t->strides, t->box, ones, 0, t->swizzle, CU_MAP_PROMOTE_128, 0),
                          c->function, "cuTensorMapEncodeTiled");
}

/* Rows of codes, of all experts. */
static struct tensor codes_of(const struct bnb_cuda_gemm4_fast *p, unsigned bytes, unsigned rows, int swizzle)
{
    const struct bnb_gemm4_block *g = &p->g;
    return (struct tensor){.data = g->codes,
                           .type = CU_MAP_UINT8,
                           .swizzle = swizzle,
                           .dimensions = 2,
                           .sizes = {(uint64_t)g->k / 2, (uint64_t)(g->n * p->experts)},
                           .strides = {(uint64_t)g->k / 2},
                           .box = {bytes, rows}};
}

static bnb_status launch_wide(const struct bnb_cuda_call *c, const struct bnb_gemm4_plan *plan,
                              struct bnb_cuda_gemm4_wide *p, struct bnb_cuda_kernel *kernel)
{
    const struct bnb_gemm4_block *g = &p->fast.g;
    const uint64_t inner = (uint64_t)(g->grad ? g->n : g->k);
    const struct tensor x = {.data = g->x,
                             .type = CU_MAP_UINT16,
                             .swizzle = CU_MAP_SWIZZLE_128,
                             .dimensions = 2,
                             .sizes = {inner, (uint64_t)g->m},
                             .strides = {2 * inner},
                             .box = {64, (unsigned)bnb_gemm4_tokens(plan->kernel) / 2}};
    const struct tensor codes =
        g->grad ? codes_of(&p->fast, 64, 64, CU_MAP_SWIZZLE_64) : codes_of(&p->fast, 32, 128, CU_MAP_SWIZZLE_NONE);
    bnb_status status = make_map(c, &p->x, &x);
    if (!status)
        status = make_map(c, &p->codes, &codes);
    const struct bnb_cuda_manner manner = {.cluster = 2, .early = true};
    return status ? status : bnb_cuda_launch_as(c, kernel, plan->grid, manner, p);
}

/* On 9.0 the copy engine brings runs of codes, and of activations all of a step: for each 64 of K, all rows. */
static bnb_status launch_few(const struct bnb_cuda_call *c, const struct bnb_gemm4_plan *plan,
                             struct bnb_cuda_gemm4_wide *p, struct bnb_cuda_kernel *kernel)
{
    const struct bnb_gemm4_block *g = &p->fast.g;
    const unsigned width = (unsigned)bnb_gemm4_width(plan->kernel);
    const struct bnb_cuda_manner manner = {.early = true, .shared = plan->shared};
    const struct tensor x = {.data = g->x,
                             .type = CU_MAP_UINT16,
                             .swizzle = CU_MAP_SWIZZLE_128,
                             .dimensions = 3,
                             .sizes = {64, (uint64_t)g->m, (uint64_t)g->k / 64},
                             .strides = {2 * (uint64_t)g->k, 128},
                             .box = {64, (unsigned)g->m, width / 64 * (unsigned)plan->slices}};
    const int swizzle = width == 256 ? CU_MAP_SWIZZLE_128 : width == 128 ? CU_MAP_SWIZZLE_64 : CU_MAP_SWIZZLE_32;
    const struct tensor codes = codes_of(&p->fast, width / 2, (unsigned)plan->rows, swizzle);
    bnb_status status = BNB_OK;
    if (c->card->capability == 90) {
        status = make_map(c, &p->x, &x);
        if (!status)
            status = make_map(c, &p->codes, &codes);
    }
    return status ? status : bnb_cuda_launch_as(c, kernel, plan->grid, manner, p);
}

static bnb_status launch_sum(const struct bnb_cuda_call *c, const struct bnb_cuda_gemm4_fast *p, bnb_dtype dtype)
{
    const struct bnb_gemm4_block *g = &p->g;
    const int64_t outer = g->grad ? g->k : g->n;
    const struct bnb_cuda_gemm4_sum s = {p->partial, g->bias, g->out, g->m, outer, p->splits};
    const int64_t blocks = bnb_blocks(g->m * outer, 256), most = 8 * (int64_t)c->card->sms;
    return bnb_cuda_launch_as(c, &sum[dtype], blocks < most ? blocks : most, (struct bnb_cuda_manner){.early = true},
                              &s);
}

static bnb_status launch_fast(const struct bnb_cuda_call *c, const struct bnb_gemm4_block *g,
                              const struct bnb_gemm4_plan *plan, bnb_dtype dtype)
{
    struct bnb_cuda_gemm4_wide p = {.fast = fast_of(g, plan, dtype)};
    struct bnb_cuda_kernel *kernel = &kernels[plan->kernel][dtype];
    const int64_t outer = g->grad ? g->k : g->n;
    const size_t partial = plan->splits > 1 ? (size_t)(plan->splits * g->m * outer) * sizeof(float) : 0;
    const size_t meet =
        plan->meets > 0 ? (size_t)(plan->meets * 128 * bnb_gemm4_tokens(plan->kernel)) * sizeof(float) : 0;
    const size_t behind = (partial + 255) / 256 * 256, bytes = meet ? behind + meet : partial;
    bnb_status status = BNB_OK;
    void *memory = NULL;
    if (bytes > 0)
        status = bnb_cuda_alloc(c, bytes, &memory);
    p.fast.partial = partial > 0 ? memory : NULL;
    p.fast.meet = meet > 0 && memory ? (float *)((char *)memory + behind) : NULL;
    if (!status && plan->kernel == BNB_GEMM4_KERNEL_TILE)
        status = bnb_cuda_launch_over(c, g->grad ? &tile_grad[dtype] : kernel, plan->grid, &p.fast);
    else if (!status && plan->kernel >= BNB_GEMM4_KERNEL_WIDE32)
        status = launch_wide(c, plan, &p, kernel);
    else if (!status)
        status = launch_few(c, plan, &p, kernel);
    if (!status && partial > 0)
        status = launch_sum(c, &p.fast, dtype);
    bnb_cuda_free(c, memory, bytes);
    return status;
}

bnb_status bnb_cuda_gemm4(const bnb_exec *ex, const struct bnb_gemm4_block *g, bnb_dtype dtype)
{
    struct bnb_cuda_call c;
    bnb_status status = bnb_cuda_begin(&c, ex, g->grad ? "gemm4_grad" : "gemm4");
    if (status || !c.card)
        return status;
    pthread_once(&once, see_wish);
    const struct bnb_gemm4_wish wish = measuring ? read_wish() : (struct bnb_gemm4_wish){0};
    const int64_t block2 = g->scale.absmax2 ? g->scale.block2 : 1;
    const struct bnb_gemm4_card card = {c.card->capability, c.card->sms, c.card->shared_bytes,
                                        c.card->cu->tensor_map != NULL};
    const struct bnb_gemm4_shape shape = {
        .m = g->m,
        .n = g->n,
        .k = g->k,
        .experts = g->first ? (int)g->experts : 0,
        .block = (int)g->block,
        .grad = g->grad,
        .half = dtype != BNB_F32 && !g->exact && type_of(g->code) > 0 && (block2 & (block2 - 1)) == 0,
        .aligned = bnb_cuda_aligned(g->x, 16) && bnb_cuda_aligned(g->codes, 16) && bnb_cuda_aligned(g->out, 16)};
    struct bnb_gemm4_plan plan = {.kernel = BNB_GEMM4_PLAIN};
    if (g->n > 0 && g->k > 0)
        plan = bnb_gemm4_plan_of(&shape, &card, &wish);
    bnb_gemm4_note(&plan);
    if (plan.kernel != BNB_GEMM4_PLAIN)
        status = launch_fast(&c, g, &plan, dtype);
    else
        status = launch_plain(&c, g, dtype);
    bnb_cuda_end(&c);
    return status;
}
