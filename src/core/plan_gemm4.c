/*
 * plan_gemm4.c - the choice of a kernel for products with a 4-bit weight, as data and a few lines of arithmetic
 *
 * Times in nanoseconds stand behind the choice among the wide kernels: they need not be right, only in proportion.
 */
#include "core/plan_gemm4.h"

#include "core/internal.h"

const char *const bnb_gemm4_kernel_name[BNB_GEMM4_KERNELS] = {"plain",  "few8",    "few16",   "few32", "few64",
                                                              "wide64", "wide128", "wide256", "tile"};

/* Of kernels few8, few16, ... */
static const struct few {
    int tiles, tokens, width, warps;
} few[] = {{BNB_GEMM4_FEW8}, {BNB_GEMM4_FEW16}, {BNB_GEMM4_FEW32}, {BNB_GEMM4_FEW64}};

/* Of kernels wide64, ...: rows of activations in a tile, and the time of a step of 64 along K. */
static const struct wide { int tokens, step_ns; } wide[] = {{64, 200}, {128, 330}, {256, 600}};

/* The largest m of each kernel on cards with wgmma, and on others; where one cannot, the next that can. */
static const struct limit {
    int64_t hopper, other;
    enum bnb_gemm4_kernel kernel;
} limits[] = {
    {8, 8, BNB_GEMM4_KERNEL_FEW8},   {16, 16, BNB_GEMM4_KERNEL_FEW16},         {0, 32, BNB_GEMM4_KERNEL_FEW32},
    {0, 64, BNB_GEMM4_KERNEL_FEW64}, {INT64_MAX, 0, BNB_GEMM4_KERNEL_WIDE256}, {0, INT64_MAX, BNB_GEMM4_KERNEL_TILE}};

/* Adding up the sums of splits: a launch, and memory that is written once and read once. */
enum { SUM_NS = 2500, SUM_BYTES_PER_NS = 2500, FEWEST_STEPS = 4, SPLITS_MOST = 16, PAIR = 256, TILE = 128 };

/* Below this, where rows of the weight begin anywhere, the plain kernel reads them better than tiles do. */
enum { FEWEST_ROWS = 8 };

static bool is_few(enum bnb_gemm4_kernel k) { return k >= BNB_GEMM4_KERNEL_FEW8 && k <= BNB_GEMM4_KERNEL_FEW64; }
static bool is_wide(enum bnb_gemm4_kernel k) { return k >= BNB_GEMM4_KERNEL_WIDE64 && k <= BNB_GEMM4_KERNEL_WIDE256; }

static int few_shared(const struct few *f, const struct bnb_gemm4_plan *p)
{
    const int codes = f->tiles * 16 * f->width / 2, x = 8 * f->tokens * f->width * 2;
    const int sums = p->bands * p->slices * f->tiles * f->tokens * BNB_GEMM4_FEW_SUMS * 4;
    const int stages = p->depth * p->slices * (p->bands * codes + x);
    return BNB_GEMM4_FEW_FIXED(f->tiles, f->width, f->warps) + (stages > sums ? stages : sums);
}

bool bnb_gemm4_can(enum bnb_gemm4_kernel kernel, const struct bnb_gemm4_shape *s, const struct bnb_gemm4_card *card)
{
    const int64_t inner = s->grad ? s->n : s->k, experts = s->experts ? s->experts : 1, most = INT32_MAX / 2;
    if (kernel == BNB_GEMM4_PLAIN)
        return s->experts == 0;
    if (!s->half || !s->aligned || card->capability < 80 || s->m > most || s->n > most / experts || s->k > most)
        return false;
    if (kernel == BNB_GEMM4_KERNEL_TILE)
        return s->k % 32 == 0 && inner % 8 == 0;
    if (s->grad || s->k % 64 != 0)
        return false;
    if (is_wide(kernel))
        return card->capability == 90 && card->tensor_copies;
    const struct few *f = &few[kernel - BNB_GEMM4_KERNEL_FEW8];
    const struct bnb_gemm4_plan least = {.bands = 1, .slices = 1, .depth = 2};
    return s->experts == 0 && s->m <= 8 * f->tokens && few_shared(f, &least) <= card->shared_bytes;
}

/* ---------------------------------------------------------------- few rows */

/* Bands so that the last wave of blocks is nearly full; then as many warps along K, and steps under way, as there is room. */
static struct bnb_gemm4_plan plan_few(enum bnb_gemm4_kernel kernel, const struct bnb_gemm4_shape *s,
                                      const struct bnb_gemm4_card *card, const struct bnb_gemm4_wish *wish)
{
    const struct few *f = &few[kernel - BNB_GEMM4_KERNEL_FEW8];
    const int64_t bands = bnb_blocks(s->n, 16 * f->tiles), units = bnb_blocks(s->k, f->width);
    struct bnb_gemm4_plan p = {.kernel = kernel, .bands = 1, .splits = 1, .depth = 2, .slices = 1};
    int64_t best = INT64_MAX;
    for (int b = 1; b <= f->warps; b++) { /* a wave costs its bands, and two more to begin and end */
        const int64_t waves = bnb_blocks(bnb_blocks(bands, b), card->sms);
        p.bands = b;
        if (waves * (b + 2) < best && few_shared(f, &p) <= card->shared_bytes) {
            best = waves * (b + 2);
            p.grid = b;
        }
    }
    p.bands = wish->bands > 0 && wish->bands <= f->warps ? wish->bands : (int)p.grid;
    const int64_t blocks = bnb_blocks(bands, p.bands);
    int slices = f->warps / p.bands;
    while (slices > 1 && slices > units)
        slices--;
    for (p.slices = slices; p.slices > 1 && few_shared(f, &p) > card->shared_bytes; p.slices--)
        ;
    const int64_t all = bnb_blocks(units, p.slices), room = card->sms / blocks, most = all / FEWEST_STEPS;
    p.splits = (int)(room < most ? room : most);
    if (wish->splits > 0)
        p.splits = (int)(wish->splits < all ? wish->splits : all);
    p.splits = p.splits < 1 ? 1 : p.splits > SPLITS_MOST ? SPLITS_MOST : p.splits;
    p.steps = (int)bnb_blocks(all, p.splits);
    p.splits = (int)bnb_blocks(all, p.steps);
    const int deepest = wish->depth >= 2 && wish->depth <= 4 ? wish->depth : 4;
    for (p.depth = p.steps < 2             ? 2
                   : p.steps + 1 < deepest ? p.steps + 1
                                           : deepest;
         p.depth > 2 && few_shared(f, &p) > card->shared_bytes; p.depth--)
        ;
    p.shared = few_shared(f, &p);
    p.grid = blocks * p.splits;
    return p;
}

/* ---------------------------------------------------------------- many rows */

static int64_t wide_time(const struct wide *w, const struct bnb_gemm4_shape *s, const struct bnb_gemm4_card *card,
                         int splits)
{
    const int64_t tiles = bnb_blocks(s->m, w->tokens) * bnb_blocks(s->n, PAIR) * splits, clusters = card->sms / 2;
    const int64_t steps = bnb_blocks(s->k / 64, splits) + 8; /* and what it takes to begin and end */
    const int64_t sum = splits > 1 ? SUM_NS + 8 * s->m * s->n * splits / SUM_BYTES_PER_NS : 0;
    return bnb_blocks(tiles, clusters) * steps * w->step_ns + sum;
}

static struct bnb_gemm4_plan plan_wide(const struct bnb_gemm4_shape *s, const struct bnb_gemm4_card *card,
                                       const struct bnb_gemm4_wish *wish)
{
    struct bnb_gemm4_plan p = {.kernel = BNB_GEMM4_KERNEL_WIDE64, .splits = 1};
    const int64_t steps = s->k / 64;
    const int wanted = s->experts == 0 && wish->splits <= SPLITS_MOST && wish->splits <= steps ? wish->splits : 0;
    int64_t best = INT64_MAX;
    for (int i = 0; i < 3; i++) {
        const enum bnb_gemm4_kernel kernel = (enum bnb_gemm4_kernel)(BNB_GEMM4_KERNEL_WIDE64 + i);
        if (is_wide((enum bnb_gemm4_kernel)wish->kernel) && wish->kernel != (int)kernel)
            continue;
        for (int splits = 1; splits <= SPLITS_MOST; splits++) {
            if (wanted > 0 ? splits != wanted : splits > 1 && (s->experts > 0 || steps / splits < FEWEST_STEPS))
                continue;
            const int64_t time = wide_time(&wide[i], s, card, splits);
            if (time < best) {
                best = time;
                p.kernel = kernel;
                p.splits = splits;
            }
        }
    }
    const int tokens = wide[p.kernel - BNB_GEMM4_KERNEL_WIDE64].tokens;
    p.steps = (int)bnb_blocks(steps, p.splits);
    p.splits = (int)bnb_blocks(steps, p.steps);
    const int64_t tiles = bnb_blocks(s->m, tokens) * bnb_blocks(s->n, PAIR) * p.splits, clusters = card->sms / 2;
    p.grid = 2 * (tiles < clusters && s->experts == 0 ? tiles : clusters);
    return p;
}

static enum bnb_gemm4_kernel choose(const struct bnb_gemm4_shape *s, const struct bnb_gemm4_card *card)
{
    const bool hopper = card->capability == 90 && card->tensor_copies;
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++)
        if (s->m <= (hopper ? limits[i].hopper : limits[i].other) && bnb_gemm4_can(limits[i].kernel, s, card))
            return limits[i].kernel;
    const bool tile = s->grad || s->experts > 0 || s->m > FEWEST_ROWS;
    return tile && bnb_gemm4_can(BNB_GEMM4_KERNEL_TILE, s, card) ? BNB_GEMM4_KERNEL_TILE : BNB_GEMM4_PLAIN;
}

struct bnb_gemm4_plan bnb_gemm4_plan_of(const struct bnb_gemm4_shape *s, const struct bnb_gemm4_card *card,
                                        const struct bnb_gemm4_wish *wish)
{
    static const struct bnb_gemm4_wish none = {0};
    wish = wish ? wish : &none;
    const enum bnb_gemm4_kernel wanted = (enum bnb_gemm4_kernel)wish->kernel;
    const bool able = wanted > BNB_GEMM4_PLAIN && wanted < BNB_GEMM4_KERNELS && bnb_gemm4_can(wanted, s, card);
    const enum bnb_gemm4_kernel kernel = able ? wanted : choose(s, card);
    if (is_few(kernel))
        return plan_few(kernel, s, card, wish);
    if (is_wide(kernel))
        return plan_wide(s, card, able ? wish : &none);
    struct bnb_gemm4_plan p = {.kernel = kernel, .splits = 1};
    p.grid = bnb_blocks(s->m, TILE) * bnb_blocks(s->grad ? s->k : s->n, TILE);
    if (s->experts > 0)
        p.grid = 2 * (int64_t)card->sms;
    return p;
}
