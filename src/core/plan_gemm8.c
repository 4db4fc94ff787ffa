/*
 * plan_gemm8.c - which kernel multiplies by an int8 weight
 *
 * The time of a plan is that of its busiest multiprocessor: what a tile costs there, once and for each step of its sum, and
 * what it costs that blocks add up their parts.  The weight's way from memory takes as long under any plan.  The figures were
 * fitted to a sweep over all plans (bench/bench_gemm8.py --sweep) on an H100, M 1 to 8192, N and K 4096 to 28672: what the
 * plans that they choose take is 0.5 % above the best of each shape, 3 % at the worst.
 */
#include "core/plan_gemm8.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 128, DEPTH = 128, FEW = 8, MAX_SPLIT = 8 };

static int64_t ceil_of(int64_t n, int64_t part) { return n / part + (n % part != 0); }

/* Can the way take the shape on this card? */
static bool can(enum bnb_gemm8_way way, const struct bnb_gemm8_shape *s, const struct bnb_gemm8_card *card)
{
    const int64_t most = (int64_t)1 << 30; /* rows are counted in int, and so are tiles, of 8 tokens or more */
    if (way == BNB_GEMM8_PLAIN)
        return true;
    if (!s->whole || s->k <= 0 || s->k % 16 != 0 || s->m >= most || s->n >= most ||
        ceil_of(s->m, FEW) * ceil_of(s->n, ROWS) >= most / MAX_SPLIT)
        return false;
    return way == BNB_GEMM8_MMA ? card->capability >= 80 : card->capability == 90 && card->bulk;
}

/* ---- what a plan takes */

/* A kind of tile, for so many tokens at most in all.  What it takes, in hundredths of a microsecond; group: rows of tiles of a
 * band. */
struct kind {
    enum bnb_gemm8_way way;
    int tokens, most, tile, step, group;
};

static const struct kind kinds[] = {
    {BNB_GEMM8_NARROW, 8, 8, 0, 20, 1},
    {BNB_GEMM8_NARROW, 16, 16, 0, 20, 1},
    {BNB_GEMM8_NARROW, 32, 32, 0, 23, 1},
    {BNB_GEMM8_NARROW, 64, 128, 160, 20, 1},
    {BNB_GEMM8_NARROW, 128, 512, 0, 44, 1},
    {BNB_GEMM8_WIDE, 128, INT32_MAX, 40, 51, 12},
    {BNB_GEMM8_WIDE, 256, INT32_MAX, 290, 71, 16},
};
enum { KINDS = sizeof kinds / sizeof kinds[0] };

/* To add up the parts of a sum: each block, and for each token. */
static int64_t split_cost(int split, int tokens)
{
    static const int cost[] = {40, 120, 300};
    return split == 1 ? 0 : cost[split == 2 ? 0 : split == 4 ? 1 : 2] + 5 * tokens;
}

static int64_t cost_of(const struct bnb_gemm8_shape *s, const struct bnb_gemm8_card *card, const struct kind *kind,
                       int split)
{
    const int64_t blocks = ceil_of(s->n, ROWS) * ceil_of(s->m, kind->tokens) * split;
    const int64_t steps = ceil_of(ceil_of(s->k, DEPTH), split);
    return ceil_of(blocks, card->sms) * (kind->tile + steps * kind->step + split_cost(split, kind->tokens));
}

static struct bnb_gemm8_plan best_of(const struct bnb_gemm8_shape *s, const struct bnb_gemm8_card *card)
{
    struct bnb_gemm8_plan best = {BNB_GEMM8_PLAIN, 0, 1, 1, 1};
    int64_t least = INT64_MAX;
    for (int i = 0; i < KINDS; i++) {
        const int most = kinds[i].way == BNB_GEMM8_NARROW ? MAX_SPLIT : 1;
        for (int split = 1; split <= most && split <= ceil_of(s->k, DEPTH); split *= 2) {
            const int64_t cost = cost_of(s, card, &kinds[i], split);
            if (s->m > kinds[i].most || cost >= least)
                continue;
            least = cost;
            best = (struct bnb_gemm8_plan){kinds[i].way, kinds[i].tokens, split, 1, kinds[i].group};
        }
    }
    return best;
}

struct bnb_gemm8_plan bnb_plan_gemm8(const struct bnb_gemm8_shape *s, const struct bnb_gemm8_card *card)
{
    const struct bnb_gemm8_plan plain = {BNB_GEMM8_PLAIN, 0, 1, 1, 1}, mma = {BNB_GEMM8_MMA, ROWS, 1, 1, 8};
    if (can(BNB_GEMM8_WIDE, s, card))
        return best_of(s, card);
    return s->m > FEW && can(BNB_GEMM8_MMA, s, card) ? mma : plain;
}

/* ---- a layer's activations */

bool bnb_plan_linear8_twice(int64_t bytes) { return bytes <= (int64_t)6 << 20; }

/* A launch more takes as long as tiles of a few tokens do for a few columns; and there are more columns where k is large. */
bool bnb_plan_linear8_lists(const struct bnb_gemm8_plan *p, int64_t k)
{
    return p->way == BNB_GEMM8_WIDE || (p->way == BNB_GEMM8_NARROW && p->tokens == 128 && k > 4096);
}

/* ---- the gradient */

int bnb_plan_gemm8_grad(const struct bnb_gemm8_shape *s, const struct bnb_gemm8_card *card)
{
    const int64_t most = (int64_t)1 << 30, columns = ceil_of(s->k, ROWS);
    if (!s->whole || card->capability != 90 || !card->bulk || s->n <= 0 || s->n % 8 != 0 || s->k % 16 != 0 ||
        s->m >= most || s->n >= most || columns * ceil_of(s->m, ROWS) >= most)
        return 0;
    const int64_t narrow = ceil_of(columns * ceil_of(s->m, 128), card->sms) * 115 * 128;
    const int64_t wide = ceil_of(columns * ceil_of(s->m, 256), card->sms) * 100 * 256;
    return wide < narrow ? 256 : 128;
}

/* ---- a plan by name */

/* A word of up to seven letters, and up to `most` numbers behind it; those that are not there stay as they are. */
static bool read_plan(const char *text, char word[8], int *const number[], int most)
{
    const size_t letters = text ? strcspn(text, " ") : 0;
    if (letters < 1 || letters > 7)
        return false;
    memcpy(word, text, letters);
    word[letters] = '\0';
    text += letters;
    for (int i = 0; i < most; i++) {
        char *end = NULL;
        const long value = strtol(text, &end, 10);
        if (end == text)
            break;
        *number[i] = value < 0 || value > INT_MAX ? 0 : (int)value;
        text = end;
    }
    return true;
}

bool bnb_plan_gemm8_named(const char *text, const struct bnb_gemm8_shape *s, const struct bnb_gemm8_card *card,
                          struct bnb_gemm8_plan *plan)
{
    static const char *const names[] = {"plain", "mma", "narrow", "wide"};
    struct bnb_gemm8_plan p = {BNB_GEMM8_PLAIN, ROWS, 1, 1, 8};
    char name[8] = "";
    if (!read_plan(text, name, (int *const[]){&p.tokens, &p.split, &p.share, &p.group}, 4))
        return false;
    int way = 0;
    while (way < 4 && strcmp(name, names[way]) != 0)
        way++;
    p.way = (enum bnb_gemm8_way)way;
    const bool is_power = p.tokens > 0 && (p.tokens & (p.tokens - 1)) == 0;
    const bool tokens = is_power && (p.way == BNB_GEMM8_NARROW ? p.tokens >= FEW && p.tokens <= 128
                                     : p.way == BNB_GEMM8_WIDE ? p.tokens == 128 || p.tokens == 256
                                                               : p.tokens == ROWS);
    const bool split = p.split == 1 || (p.way == BNB_GEMM8_NARROW && (p.split == 2 || p.split == 4 || p.split == 8) &&
                                        p.split <= ceil_of(s->k, DEPTH));
    const bool share = p.share == 1 || (p.way == BNB_GEMM8_WIDE && p.share == 2);
    if (way == 4 || !can(p.way, s, card) || !tokens || !split || !share || p.group < 1)
        return false;
    *plan = p;
    return true;
}
