/*
 * plan_gemm4.c - the choice of a kernel for products with a 4-bit weight, as data and a few lines of arithmetic
 *
 * Times in nanoseconds stand behind the choice among the wide kernels: they need not be right, only in proportion.
 */
#include "core/plan_gemm4.h"

#include "core/internal.h"

const char *const bnb_gemm4_kernel_name[BNB_GEMM4_KERNELS] = {"",        "plain",   "few8",    "few16",   "few32",
                                                              "few64",   "wide32",  "wide64",  "wide128", "wide256",
                                                              "meet128", "meet256", "grad128", "grad256", "tile"};

/* Of kernels few8, few16, ... */
static const struct few {
    int tiles, tokens, width, warps, bringers, registers;
} few[] = {{BNB_GEMM4_FEW8}, {BNB_GEMM4_FEW16}, {BNB_GEMM4_FEW32}, {BNB_GEMM4_FEW64}};

/* Of kernels wide32, ... grad256: rows of activations and columns in a tile of a cluster, parts of its steps that its blocks
 * take, and the time of a step of 64 along the sum. */
static const struct wide {
    int tokens, columns, parts, step_ns;
} wide[] = {{32, 256, 1, 275},  {64, 256, 1, 345},  {128, 256, 1, 520}, {256, 256, 1, 715},
            {128, 128, 2, 520}, {256, 128, 2, 715}, {128, 256, 1, 560}, {256, 256, 1, 850}};

/* The largest m of each kernel on cards with wgmma, and on others; where one cannot, the next that can.  What follows the
 * few is chosen by its time. */
static const struct limit {
    int64_t hopper, other;
    enum bnb_gemm4_kernel kernel;
} limits[] = {{8, 8, BNB_GEMM4_KERNEL_FEW8},
              {16, 16, BNB_GEMM4_KERNEL_FEW16},
              {0, 32, BNB_GEMM4_KERNEL_FEW32},
              {0, 64, BNB_GEMM4_KERNEL_FEW64},
              {INT64_MAX, 0, BNB_GEMM4_KERNEL_WIDE256},
              {INT64_MAX, 0, BNB_GEMM4_KERNEL_GRAD256},
              {0, INT64_MAX, BNB_GEMM4_KERNEL_TILE}};

/* What a tile costs beside its steps, as steps, and where its blocks exchange sums.  Adding up the sums of splits: a launch,
 * and memory that is written once and read once. */
enum { EDGE = 3, MEET_NS = 5300, SUM_NS = 1800, SUM_BYTES_PER_NS = 4950, FEWEST_STEPS = 4, SPLITS_MOST = 16 };

/* Steps of a part, more than any ring has slots: so that no warp of a block is a whole tile ahead of another. */
enum { FEWEST_MET = 8 };

/* The side of a tile of the tile kernel. */
enum { TILE = 128 };

/* Rows of the weight that the copy engine takes at a time. */
enum { BOX = 256 };

/* Below this, where rows of the weight begin anywhere, the plain kernel reads them better than tiles do. */
enum { FEWEST_ROWS = 8 };

static bool is_few(enum bnb_gemm4_kernel k) { return k >= BNB_GEMM4_KERNEL_FEW8 && k <= BNB_GEMM4_KERNEL_FEW64; }
static bool is_wide(enum bnb_gemm4_kernel k) { return k >= BNB_GEMM4_KERNEL_WIDE32 && k <= BNB_GEMM4_KERNEL_GRAD256; }

/* A step: codes of every band, activations once for all of them; and all of it as a block has it. */
static void few_memory(const struct few *f, const struct bnb_gemm4_shape *s, struct bnb_gemm4_plan *p)
{
    p->rows = p->bands * f->tiles * 16;
    const int sums = p->bands * p->slices * f->tiles * f->tokens * BNB_GEMM4_FEW_SUMS * 4;
    p->stage = p->slices * (p->rows * (f->width / 2) + (int)s->m * f->width * 2);
    p->stage = (p->stage + 1023) / 1024 * 1024;
    const int stages = p->depth * p->stage + (f->tokens > 1 ? f->tokens * 8 * 128 : 0); /* rows beyond m are read too */
    p->shared = BNB_GEMM4_FEW_FIXED + (stages > sums ? stages : sums);
}

static bool few_fits(const struct few *f, const struct bnb_gemm4_shape *s, const struct bnb_gemm4_card *card,
                     struct bnb_gemm4_plan *p)
{
    few_memory(f, s, p);
    return p->shared <= card->shared_bytes && p->rows <= BOX && p->slices * f->width / 64 <= BOX;
}

int bnb_gemm4_tokens(enum bnb_gemm4_kernel kernel) { return wide[kernel - BNB_GEMM4_KERNEL_WIDE32].tokens; }

int bnb_gemm4_width(enum bnb_gemm4_kernel kernel) { return few[kernel - BNB_GEMM4_KERNEL_FEW8].width; }

bool bnb_gemm4_can(enum bnb_gemm4_kernel kernel, const struct bnb_gemm4_shape *s, const struct bnb_gemm4_card *card)
{
    const int64_t inner = s->grad ? s->n : s->k, experts = s->experts ? s->experts : 1, most = INT32_MAX / 2;
    if (kernel == BNB_GEMM4_ANY || kernel == BNB_GEMM4_PLAIN)
        return kernel == BNB_GEMM4_PLAIN;
    if (!s->half || !s->aligned || card->capability < 80 || s->m > most || s->n > most / experts || s->k > most)
        return false;
    if (kernel == BNB_GEMM4_KERNEL_TILE)
        return s->k % 32 == 0 && inner % 8 == 0;
    if (is_wide(kernel) ? card->capability != 90 || !card->tensor_copies
                        : card->capability == 90 && !card->tensor_copies)
        return false;
    if (kernel >= BNB_GEMM4_KERNEL_GRAD128)
        return s->grad && s->k % 32 == 0 && inner % 8 == 0;
    if (s->grad || s->k % 64 != 0)
        return false;
    if (kernel == BNB_GEMM4_KERNEL_MEET128 || kernel == BNB_GEMM4_KERNEL_MEET256)
        return s->experts == 0 && s->k >= 2 * FEWEST_MET * 64;
    if (is_wide(kernel))
        return kernel > BNB_GEMM4_KERNEL_WIDE64 || s->block > 32;
    const struct few *f = &few[kernel - BNB_GEMM4_KERNEL_FEW8];
    struct bnb_gemm4_plan least = {.bands = 1, .slices = 1, .depth = 2};
    return s->experts == 0 && s->m <= 8 * f->tokens && s->n * (s->k / 64) < UINT32_MAX && few_fits(f, s, card, &least);
}

/* ---------------------------------------------------------------- few rows */

/* Bands so that the last wave of blocks is nearly full: a wave costs its bands, and two more to begin and end. */
static int choose_bands(const struct few *f, const struct bnb_gemm4_shape *s, const struct bnb_gemm4_card *card)
{
    struct bnb_gemm4_plan p = {.slices = 1, .depth = 2};
    int64_t best = INT64_MAX;
    int bands = 1;
    for (p.bands = 1; p.bands <= f->warps && few_fits(f, s, card, &p); p.bands++) {
        const int64_t waves = bnb_blocks(bnb_blocks(s->n, 16 * f->tiles * p.bands), card->sms);
        if (waves * (p.bands + 2) < best) {
            best = waves * (p.bands + 2);
            bands = p.bands;
        }
    }
    return bands;
}

/* Then as many warps along K, and steps under way, as there is room for. */
static struct bnb_gemm4_plan plan_few(enum bnb_gemm4_kernel kernel, const struct bnb_gemm4_shape *s,
                                      const struct bnb_gemm4_card *card, const struct bnb_gemm4_wish *wish)
{
    const struct few *f = &few[kernel - BNB_GEMM4_KERNEL_FEW8];
    const int64_t units = bnb_blocks(s->k, f->width);
    struct bnb_gemm4_plan p = {.kernel = kernel, .bands = wish->bands, .slices = 1, .depth = 2};
    if (p.bands < 1 || p.bands > f->warps || !few_fits(f, s, card, &p))
        p.bands = choose_bands(f, s, card);
    p.slices = f->warps / p.bands < units ? f->warps / p.bands : (int)units;
    while (p.slices > 1 && !few_fits(f, s, card, &p))
        p.slices--;
    const int64_t blocks = bnb_blocks(s->n, 16 * f->tiles * p.bands);
    const int64_t all = bnb_blocks(units, p.slices), room = card->sms / blocks, most = all / FEWEST_STEPS;
    p.splits = (int)(room < most ? room : most);
    if (wish->splits > 0)
        p.splits = (int)(wish->splits < all ? wish->splits : all);
    p.splits = p.splits < 1 ? 1 : p.splits > SPLITS_MOST ? SPLITS_MOST : p.splits;
    p.steps = (int)bnb_blocks(all, p.splits);
    p.splits = (int)bnb_blocks(all, p.steps);
    p.depth = wish->depth >= 2 && wish->depth < BNB_GEMM4_FEW_DEEPEST ? wish->depth : BNB_GEMM4_FEW_DEEPEST;
    p.depth = p.depth < p.steps ? p.depth : p.steps;
    while (p.depth > 1 && !few_fits(f, s, card, &p))
        p.depth--;
    few_memory(f, s, &p);
    p.grid = blocks * p.splits;
    return p;
}

/* ---------------------------------------------------------------- many rows */

/* Tiles of a cluster, in splits; experts have one more each, as far as there are rows. */
static int64_t wide_tiles(const struct wide *w, const struct bnb_gemm4_shape *s, int splits)
{
    const int64_t down =
        s->experts > 0 ? s->m / w->tokens + (s->m < s->experts ? s->m : s->experts) : bnb_blocks(s->m, w->tokens);
    return down * bnb_blocks(s->grad ? s->k : s->n, w->columns) * splits;
}

static int64_t all_steps(const struct bnb_gemm4_shape *s) { return bnb_blocks(s->grad ? s->n : s->k, 64); }

/* Steps of a part of a split. */
static int64_t wide_steps(const struct wide *w, const struct bnb_gemm4_shape *s, int splits)
{
    return bnb_blocks(all_steps(s), (int64_t)w->parts * splits);
}

/* So many splits, or fewer if some would be empty; 0 if parts would be. */
static int wide_splits(const struct wide *w, const struct bnb_gemm4_shape *s, int splits)
{
    const int64_t steps = wide_steps(w, s, splits), parts = bnb_blocks(all_steps(s), steps);
    if (w->parts == 1)
        return (int)parts;
    return steps >= FEWEST_MET && parts == (int64_t)w->parts * splits ? splits : 0;
}

static int64_t wide_time(const struct wide *w, const struct bnb_gemm4_shape *s, const struct bnb_gemm4_card *card,
                         int splits)
{
    const int64_t waves = bnb_blocks(wide_tiles(w, s, splits), card->sms / 2);
    const int64_t steps = wide_steps(w, s, splits) + EDGE;
    const int64_t sums = 8 * s->m * (s->grad ? s->k : s->n) * splits;
    return waves * (steps * w->step_ns + (w->parts > 1 ? MEET_NS : 0)) +
           (splits > 1 ? SUM_NS + sums / SUM_BYTES_PER_NS : 0);
}

static struct bnb_gemm4_plan plan_wide(const struct bnb_gemm4_shape *s, const struct bnb_gemm4_card *card,
                                       const struct bnb_gemm4_wish *wish)
{
    struct bnb_gemm4_plan p = {.kernel = BNB_GEMM4_KERNEL_WIDE32, .splits = 1};
    const int64_t steps = all_steps(s), clusters = card->sms / 2;
    const int wanted = s->experts == 0 && wish->splits <= SPLITS_MOST && wish->splits <= steps ? wish->splits : 0;
    int64_t best = INT64_MAX;
    for (int i = BNB_GEMM4_KERNEL_WIDE32; i <= BNB_GEMM4_KERNEL_GRAD256; i++) {
        const struct wide *w = &wide[i - BNB_GEMM4_KERNEL_WIDE32];
        if ((is_wide((enum bnb_gemm4_kernel)wish->kernel) && wish->kernel != i) ||
            !bnb_gemm4_can((enum bnb_gemm4_kernel)i, s, card))
            continue;
        for (int splits = 1; splits <= SPLITS_MOST; splits++) {
            if (wanted > 0 ? splits != wanted : splits > 1 && (s->experts > 0 || steps / splits < FEWEST_STEPS))
                continue;
            const int some = wide_splits(w, s, splits);
            const int64_t time = some > 0 ? wide_time(w, s, card, some) : INT64_MAX;
            if (time < best) {
                best = time;
                p.kernel = (enum bnb_gemm4_kernel)i;
                p.splits = some;
            }
        }
    }
    if (best == INT64_MAX) /* the wish cuts what cannot be cut so */
        return plan_wide(s, card, &(struct bnb_gemm4_wish){.kernel = wish->kernel});
    const struct wide *w = &wide[p.kernel - BNB_GEMM4_KERNEL_WIDE32];
    const int64_t tiles = wide_tiles(w, s, p.splits);
    p.steps = (int)wide_steps(w, s, p.splits);
    p.grid = 2 * (tiles < clusters ? tiles : clusters);
    p.meets = w->parts > 1 ? tiles : 0;
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
    const bool able = wanted > BNB_GEMM4_ANY && wanted < BNB_GEMM4_KERNELS && bnb_gemm4_can(wanted, s, card);
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
