/*
 * test_plan_gemm8.c - the kernel of an int8 product from shape and card: no card is needed
 *
 * What every plan must keep, over a grid of shapes and cards; and the plans of shapes that matter, so that a change shows.
 */
#include <string.h>

#include "check.h"
#include "core/plan_gemm8.h"

static const struct bnb_gemm8_card h100 = {90, 132, true};

static int64_t ceil_of(int64_t n, int64_t part) { return (n + part - 1) / part; }

static void check_plan(const struct bnb_gemm8_shape *s, const struct bnb_gemm8_card *card, struct bnb_gemm8_plan p)
{
    char text[128];
    const bool units = s->whole && s->k > 0 && s->k % 16 == 0;
    snprintf(text, sizeof text, "%lld x %lld x %lld, whole %d, capability %d: way %d, tokens %d, split %d, share %d",
             (long long)s->m, (long long)s->n, (long long)s->k, s->whole, card->capability, (int)p.way, p.tokens,
             p.split, p.share);
    CHECK(units || p.way == BNB_GEMM8_PLAIN, "%s", text);
    CHECK(p.way != BNB_GEMM8_MMA || card->capability >= 80, "%s", text);
    CHECK(p.way < BNB_GEMM8_NARROW || (card->capability == 90 && card->bulk), "%s", text);
    CHECK(p.split == 1 || (p.way == BNB_GEMM8_NARROW && p.split <= ceil_of(s->k, 128)), "%s", text);
    CHECK(p.share == 1 || p.way == BNB_GEMM8_WIDE, "%s", text);
    CHECK(p.group >= 1 && p.split >= 1 && p.split <= 8 && (p.split & (p.split - 1)) == 0, "%s", text);
    CHECK(p.way != BNB_GEMM8_WIDE || p.tokens == 128 || p.tokens == 256, "%s", text);
    CHECK(p.way != BNB_GEMM8_NARROW || (p.tokens >= 8 && p.tokens <= 128 && (p.tokens & (p.tokens - 1)) == 0), "%s",
          text);
    CHECK(p.way == BNB_GEMM8_PLAIN || ceil_of(s->m, p.tokens) * ceil_of(s->n, 128) * p.split < (int64_t)1 << 31, "%s",
          text);
    CHECK(p.way != BNB_GEMM8_NARROW || p.tokens >= s->m || p.tokens >= 64, "%s", text);
    /* Of a card without matrix units of its own, or bulk copies, nothing is asked that it has not; else they are used. */
    if (units && card->capability == 90 && card->bulk && s->m < 1000000 && s->n < 1000000)
        CHECK(p.way >= BNB_GEMM8_NARROW, "%s", text);
    if (units && card->capability >= 80 && s->m > 8 && s->m < 1000000 && s->n < 1000000)
        CHECK(p.way >= BNB_GEMM8_MMA, "%s", text);
}

static void every_plan(void)
{
    static const int64_t size[] = {1,   2,    7,    8,    9,    16,    31,    64,     100,     128,       129,
                                   512, 1000, 2048, 4096, 8192, 14336, 28672, 131056, 1000000, 2147483648};
    static const struct bnb_gemm8_card cards[] = {{90, 132, true}, {90, 132, false}, {90, 1, true},  {80, 108, true},
                                                  {89, 128, true}, {120, 170, true}, {75, 40, true}, {50, 5, false}};
    enum { SIZES = sizeof size / sizeof size[0], CARDS = sizeof cards / sizeof cards[0] };
    for (int c = 0; c < CARDS; c++)
        for (int m = 0; m < SIZES; m++)
            for (int n = 0; n < SIZES; n++)
                for (int k = 0; k < SIZES; k++)
                    for (int whole = 0; whole < 2; whole++) {
                        const struct bnb_gemm8_shape s = {size[m], size[n], size[k], whole};
                        check_plan(&s, &cards[c], bnb_plan_gemm8(&s, &cards[c]));
                    }
    const struct bnb_gemm8_shape none = {5, 7, 0, true};
    CHECK(bnb_plan_gemm8(&none, &h100).way == BNB_GEMM8_PLAIN, "no inner size");
}

static void known_plans(void)
{
    static const struct {
        int64_t m, n, k;
        enum bnb_gemm8_way way;
        int tokens, split;
    } known[] = {{1, 4096, 4096, BNB_GEMM8_NARROW, 8, 4},      {8, 14336, 4096, BNB_GEMM8_NARROW, 8, 1},
                 {1, 4096, 14336, BNB_GEMM8_NARROW, 8, 4},     {8, 28672, 8192, BNB_GEMM8_NARROW, 8, 1},
                 {32, 4096, 4096, BNB_GEMM8_NARROW, 32, 4},    {32, 14336, 4096, BNB_GEMM8_NARROW, 32, 1},
                 {128, 4096, 4096, BNB_GEMM8_NARROW, 64, 1},   {128, 4096, 14336, BNB_GEMM8_NARROW, 64, 2},
                 {128, 14336, 4096, BNB_GEMM8_NARROW, 128, 1}, {512, 4096, 4096, BNB_GEMM8_NARROW, 128, 1},
                 {512, 14336, 4096, BNB_GEMM8_WIDE, 256, 1},   {512, 4096, 14336, BNB_GEMM8_NARROW, 128, 1},
                 {512, 28672, 8192, BNB_GEMM8_WIDE, 256, 1},   {2048, 4096, 14336, BNB_GEMM8_WIDE, 256, 1},
                 {8192, 28672, 8192, BNB_GEMM8_WIDE, 256, 1}};
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        const struct bnb_gemm8_shape s = {known[i].m, known[i].n, known[i].k, true};
        const struct bnb_gemm8_plan p = bnb_plan_gemm8(&s, &h100);
        CHECK(p.way == known[i].way && p.tokens == known[i].tokens && p.split == known[i].split,
              "%lld x %lld x %lld: way %d, tokens %d, split %d", (long long)s.m, (long long)s.n, (long long)s.k,
              (int)p.way, p.tokens, p.split);
    }
}

static void gradients(void)
{
    const struct bnb_gemm8_shape s = {2048, 14336, 4096, true}, few = {3, 64, 128, true};
    const struct bnb_gemm8_shape odd[] = {
        {5, 60, 128, true}, {5, 64, 120, true}, {5, 64, 128, false}, {5, 0, 128, true}};
    const struct bnb_gemm8_card other = {80, 108, false};
    CHECK(bnb_plan_gemm8_grad(&s, &h100) == 256 && bnb_plan_gemm8_grad(&few, &h100) == 128, "whole tiles");
    CHECK(bnb_plan_gemm8_grad(&s, &other) == 0, "another card");
    for (size_t i = 0; i < sizeof odd / sizeof odd[0]; i++)
        CHECK(bnb_plan_gemm8_grad(&odd[i], &h100) == 0, "shape %zu", i);
}

static void named_plans(void)
{
    const struct bnb_gemm8_shape s = {100, 300, 1024, true}, odd = {100, 300, 1000, true};
    const struct bnb_gemm8_plan before = bnb_plan_gemm8(&s, &h100);
    struct bnb_gemm8_plan p = before;
    CHECK(bnb_plan_gemm8_named("wide 256 1 2 5", &s, &h100, &p) && p.way == BNB_GEMM8_WIDE && p.tokens == 256 &&
              p.share == 2 && p.group == 5,
          "wide");
    CHECK(bnb_plan_gemm8_named("narrow 16 8", &s, &h100, &p) && p.way == BNB_GEMM8_NARROW && p.split == 8 &&
              p.share == 1,
          "narrow");
    CHECK(bnb_plan_gemm8_named("plain", &odd, &h100, &p) && p.way == BNB_GEMM8_PLAIN, "plain");
    static const char *const bad[] = {
        NULL,          "",           "fast",         "wide 64", "narrow 256",    "narrow 12", "narrow 8 3",
        "narrow 8 16", "wide 128 2", "wide 128 1 4", "mma 64",  "wide 256 1 1 0"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        p = before;
        CHECK(!bnb_plan_gemm8_named(bad[i], &s, &h100, &p) && !memcmp(&p, &before, sizeof p), "\"%s\" is a plan",
              bad[i] ? bad[i] : "NULL");
    }
    CHECK(!bnb_plan_gemm8_named("mma", &odd, &h100, &p), "rows that begin between pieces");
}

int main(void)
{
    every_plan();
    known_plans();
    gradients();
    named_plans();
    return CHECK_RESULT();
}
