/*
 * launch_quantile.c - exact order statistics on CUDA: passes that count, each followed by one that finds the ranks
 *
 * A key of 32 bits takes three passes over the data, one of 16 bits two.  The ranks travel in the arguments of a launch,
 * and what a pass finds stays on the device, so nothing is waited for.  How many bits a pass counts follows from the
 * shared memory of the card.
 */
#include "cuda/cuda.h"

/* Threads of a block that finds ranks; counters of a group; accesses of a thread under way, of 16 bytes each. */
enum { RANKS = BNB_CUDA_RANKS, GROUP = 32, IN_FLIGHT = 4 };

/* Shared memory, by its widths in bits: the counters of the first pass; those of the second and the slots of first digits;
 * the cache of the third and the slots of both digits. */
enum { FIRST = 15, SPREAD = 15, LINES = 14, SMALL_FIRST = 13, SMALL_SPREAD = 13, SMALL_LINES = 12 };
#define FIRST_BYTES(first) (4 << (first))
#define LATER_BYTES(first, spread) ((4 << (spread)) + (2 << (first)))
#define STATIC_BYTES 1024

_Static_assert((4 << LINES) + (2 << SPREAD) <= 4 << SPREAD, "the third pass has the memory of the second");
_Static_assert((4 << SMALL_LINES) + (2 << SMALL_SPREAD) <= 4 << SMALL_SPREAD, "the same");

/* The kernels of each size, [small][dtype]. */
#define KERNEL(kernel, type, kind, count, bytes) \
    {.image = "quantile", .name = "bnb_k_quantile_" kernel "_" type, .dtype = kind, .threads = count, .shared = bytes}
#define KERNELS(kernel, count, bytes)                                                            \
    {KERNEL(kernel, "f32", BNB_F32, count, bytes), KERNEL(kernel, "f16", BNB_F16, count, bytes), \
     KERNEL(kernel, "bf16", BNB_BF16, count, bytes)}
enum { THREADS = 1024, SMALL_THREADS = 512 };

static struct bnb_cuda_kernel count_first[2][3] = {KERNELS("count1", THREADS, FIRST_BYTES(FIRST)),
                                                   KERNELS("count1", SMALL_THREADS, FIRST_BYTES(SMALL_FIRST))};
static struct bnb_cuda_kernel count_second[2][3] = {
    KERNELS("count2", THREADS, LATER_BYTES(FIRST, SPREAD)),
    KERNELS("count2", SMALL_THREADS, LATER_BYTES(SMALL_FIRST, SMALL_SPREAD))};
static struct bnb_cuda_kernel count_third[2] = {
    KERNEL("count3", "f32", BNB_F32, THREADS, LATER_BYTES(FIRST, SPREAD)),
    KERNEL("count3", "f32", BNB_F32, SMALL_THREADS, LATER_BYTES(SMALL_FIRST, SMALL_SPREAD))};
static struct bnb_cuda_kernel locate_first[] = BNB_CUDA_VARIANTS("quantile", "bnb_k_quantile_locate1", RANKS);
static struct bnb_cuda_kernel locate_second[] = BNB_CUDA_VARIANTS("quantile", "bnb_k_quantile_locate2", RANKS);
static struct bnb_cuda_kernel locate_third = KERNEL("locate3", "f32", BNB_F32, RANKS, 0);

/* One call: the arguments of its kernels, and where they run. */
struct selection {
    const struct bnb_cuda_call *c;
    struct bnb_cuda_ranks r;
    int64_t work;
    int small, dtype;
};

/* Where the parts of the workspace lie. */
struct layout { size_t counts[3], groups, targets[2], bytes; };

static struct layout layout_of(const struct bnb_cuda_quantile *q, int dtype)
{
    /* A third digit is widest where the second has least room, beside 256 slots. */
    const int third = 32 - q->first - (q->spread - 8);
    const size_t first = (size_t)1 << q->first, second = (size_t)1 << q->spread;
    struct layout l = {.counts = {0, first * sizeof(uint64_t), (first + second) * sizeof(uint64_t)}};
    l.groups = l.counts[2] + (dtype == BNB_F32 ? ((size_t)RANKS << third) * sizeof(uint64_t) : 0);
    l.targets[0] = l.groups + first / GROUP * sizeof(uint64_t);
    l.targets[1] = l.targets[0] + RANKS * sizeof(struct bnb_cuda_target);
    l.bytes = l.targets[1] + RANKS * sizeof(struct bnb_cuda_target);
    return l;
}

static bnb_status run_passes(struct selection *s)
{
    const struct bnb_cuda_call *c = s->c;
    const struct bnb_cuda_quantile *q = &s->r.q;
    bnb_status status = bnb_cuda_launch_over(c, &count_first[s->small][s->dtype], s->work, q);
    if (!status)
        status = bnb_cuda_launch(c, &locate_first[s->dtype], q->count, &s->r);
    if (!status)
        status = bnb_cuda_launch_over(c, &count_second[s->small][s->dtype], s->work, q);
    if (!status)
        status = bnb_cuda_launch(c, &locate_second[s->dtype], q->count, q);
    if (!status && s->dtype == BNB_F32)
        status = bnb_cuda_launch_over(c, &count_third[s->small], s->work, q);
    if (!status && s->dtype == BNB_F32)
        status = bnb_cuda_launch(c, &locate_third, q->count, q);
    return status;
}

static bnb_status run(struct selection *s)
{
    const struct bnb_cuda_call *c = s->c;
    const struct bnb_driver *cu = c->card->cu;
    struct bnb_cuda_quantile *q = &s->r.q;
    void *memory = NULL;
    const struct layout l = layout_of(q, s->dtype);
    bnb_status status = bnb_cuda_alloc(c, l.bytes, &memory);
    if (status)
        return status;
    char *at = memory;
    for (int p = 0; p < 3; p++)
        q->counts[p] = (void *)(at + l.counts[p]);
    for (int p = 0; p < 2; p++)
        q->targets[p] = (void *)(at + l.targets[p]);
    q->groups = (void *)(at + l.groups);
    status = bnb_cuda_check(cu, cu->set_bytes((cu_address)(uintptr_t)memory, 0, l.bytes, c->stream), c->function,
                            "cuMemsetD8Async");
    if (!status)
        status = run_passes(s);
    bnb_cuda_free(c, memory, l.bytes);
    return status;
}

bnb_status bnb_cuda_select(const bnb_exec *ex, const void *x, bnb_dtype dtype, int64_t n, const int64_t *rank,
                           int count, float *out)
{
    struct bnb_cuda_call c;
    bnb_status status = bnb_cuda_begin(&c, ex, "estimate_quantiles");
    if (status)
        return status;
    const bool small = c.card->shared_bytes < LATER_BYTES(FIRST, SPREAD) + STATIC_BYTES;
    struct selection s = {.c = &c, .small = small, .dtype = (int)dtype};
    s.r.q = (struct bnb_cuda_quantile){.x = x,
                                       .n = n,
                                       .count = count,
                                       .first = small ? SMALL_FIRST : FIRST,
                                       .spread = small ? SMALL_SPREAD : SPREAD,
                                       .lines = small ? SMALL_LINES : LINES};
    s.r.q.out = out;
    for (int j = 0; j < count; j++)
        s.r.rank[j] = rank[j];
    const int64_t bytes = (small ? SMALL_THREADS : THREADS) * IN_FLIGHT * 16;
    s.work = bnb_blocks(n * (dtype == BNB_F32 ? 4 : 2), bytes);
    status = run(&s);
    bnb_cuda_end(&c);
    return status;
}
