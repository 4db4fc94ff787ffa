/*
 * plan_gemm8.c - which kernel multiplies by an int8 weight
 *
 * Few tokens: the weight's way from memory counts, so enough blocks that all of them together keep memory busy.  More: the
 * time of a plan is that of its busiest multiprocessor, in products of a step, with what a tile costs beside them.  Figures
 * are estimates from the shapes of the tiles until measurements replace them.
 */
#include "core/plan_gemm8.h"

#include <stdio.h>
#include <string.h>

enum { ROWS = 128, DEPTH = 128, FEW = 8, MIN_STEPS = 4, MAX_SPLIT = 8 };

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

/* ---- few tokens */

static int tokens_of(int64_t m)
{
    int tokens = FEW;
    while (tokens < m && tokens < ROWS)
        tokens *= 2;
    return tokens;
}

static int64_t tiles_of(const struct bnb_gemm8_shape *s, int tokens)
{
    return ceil_of(s->n, ROWS) * ceil_of(s->m, tokens);
}

/* As many blocks to a sum as the card holds at once, two on a multiprocessor (one of 64 tokens or more), some steps for each. */
static int split_of(const struct bnb_gemm8_shape *s, const struct bnb_gemm8_card *card, int tokens)
{
    const int64_t room = (int64_t)card->sms * (2 * tokens < ROWS ? 2 : 1), tiles = tiles_of(s, tokens);
    int split = 1;
    while (2 * split <= MAX_SPLIT && tiles * 2 * split <= room &&
           ceil_of(s->k, DEPTH) >= (int64_t)MIN_STEPS * 2 * split)
        split *= 2;
    return split;
}

/* ---- many tokens */

/* What a plan takes, in products of 128 rows, 128 deep, with one token, in hundredths. */
static int64_t cost_of(const struct bnb_gemm8_shape *s, const struct bnb_gemm8_card *card,
                       const struct bnb_gemm8_plan *plan)
{
    const int64_t blocks = tiles_of(s, plan->tokens) * plan->split, steps = ceil_of(s->k, DEPTH);
    const int64_t each = ceil_of(steps, plan->split) * plan->tokens * (plan->tokens > 128 ? 100 : 115);
    const int64_t beside = (int64_t)plan->tokens * (plan->split > 1 ? 800 : 400);
    return ceil_of(blocks, card->sms) * (each + beside);
}

static struct bnb_gemm8_plan many_of(const struct bnb_gemm8_shape *s, const struct bnb_gemm8_card *card)
{
    const struct bnb_gemm8_plan plans[] = {{BNB_GEMM8_WIDE, 256, 1, 1, 16},
                                           {BNB_GEMM8_WIDE, 128, 1, 1, 12},
                                           {BNB_GEMM8_NARROW, 128, split_of(s, card, 128), 1, 1}};
    struct bnb_gemm8_plan best = plans[0];
    for (int i = 1; i < 3; i++)
        if (cost_of(s, card, &plans[i]) < cost_of(s, card, &best) &&
            (plans[i].way == BNB_GEMM8_WIDE || plans[i].split > 1))
            best = plans[i];
    return best;
}

struct bnb_gemm8_plan bnb_plan_gemm8(const struct bnb_gemm8_shape *s, const struct bnb_gemm8_card *card)
{
    const struct bnb_gemm8_plan plain = {BNB_GEMM8_PLAIN, 0, 1, 1, 1}, mma = {BNB_GEMM8_MMA, ROWS, 1, 1, 8};
    if (can(BNB_GEMM8_WIDE, s, card)) {
        const int tokens = tokens_of(s->m);
        if (s->m > tokens)
            return many_of(s, card);
        return (struct bnb_gemm8_plan){BNB_GEMM8_NARROW, tokens, split_of(s, card, tokens), 1, 1};
    }
    return s->m > FEW && can(BNB_GEMM8_MMA, s, card) ? mma : plain;
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

bool bnb_plan_gemm8_named(const char *text, const struct bnb_gemm8_shape *s, const struct bnb_gemm8_card *card,
                          struct bnb_gemm8_plan *plan)
{
    static const char *const names[] = {"plain", "mma", "narrow", "wide"};
    struct bnb_gemm8_plan p = {BNB_GEMM8_PLAIN, ROWS, 1, 1, 8};
    char name[8] = "";
    if (!text || sscanf(text, "%7s %d %d %d %d", name, &p.tokens, &p.split, &p.share, &p.group) < 1)
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
