/*
 * test_plan_gemm4.c - the choice of a kernel for 4-bit products, for many shapes and cards, without a card
 *
 * Whatever is chosen must be able to do it: fit into the card, and cover all of the weight and of K exactly once.
 */
#include <string.h>

#include "check.h"
#include "core/internal.h"
#include "core/plan_gemm4.h"

static const struct bnb_gemm4_card cards[] = {
    {90, 132, 232448, true},  {90, 132, 232448, false}, {90, 78, 232448, true},
    {80, 108, 166912, true},  {86, 84, 101376, true},   {89, 128, 101376, true},
    {120, 170, 101376, true}, {75, 40, 65536, true},    {100, 148, 232448, true}};
static const int64_t rows[] = {1, 2, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 200, 512, 4096, 1000000};
static const int64_t sides[] = {1, 8, 16, 31, 63, 64, 96, 100, 256, 1000, 1024, 4096, 5120, 14336, 28672, 128256};

/* The numbers of the kernels, typed from src/core/plan_gemm4.h's description of them, not taken from its code. */
static const struct few {
    int rows, tokens, width, warps;
} few[] = {{16, 8, 256, 16}, {32, 16, 128, 12}, {32, 32, 128, 8}, {32, 64, 64, 6}};

static int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

static void check_few(const struct bnb_gemm4_shape *s, const struct bnb_gemm4_card *card,
                      const struct bnb_gemm4_plan *p, const char *what)
{
    const struct few *f = &few[p->kernel - BNB_GEMM4_KERNEL_FEW8];
    const int64_t units = ceil_of(s->k, f->width);
    const int64_t codes = (int64_t)p->bands * f->rows * f->width / 2, x = s->m * f->width * 2;
    const int64_t stage = p->slices * (codes + x), fixed = 65536 + 2048;
    const int64_t sums = p->bands * p->slices * (f->rows / 16) * (f->tokens / 8) * 160 * 4;
    CHECK(s->m <= f->tokens && s->k % 64 == 0, "%s", what);
    CHECK(p->bands >= 1 && p->slices >= 1 && p->bands * p->slices <= f->warps, "%s: %d bands, %d slices", what,
          p->bands, p->slices);
    CHECK(p->depth >= 1 && p->depth <= 8 && p->depth <= p->steps, "%s: depth %d", what, p->depth);
    CHECK(p->stage >= stage && p->stage % 1024 == 0, "%s: stage %d, expected %lld", what, p->stage, (long long)stage);
    CHECK(p->shared >= fixed + p->depth * stage && p->shared >= fixed + sums, "%s: shared %d", what, p->shared);
    CHECK(p->shared <= card->shared_bytes, "%s: shared %d", what, p->shared);
    CHECK(p->rows == p->bands * f->rows && p->rows <= 256, "%s: %d rows", what, p->rows);
    CHECK(p->slices * f->width / 64 <= 256 && s->n * s->k / 64 < UINT32_MAX, "%s: %d slices", what, p->slices);
    CHECK(p->splits >= 1 && (int64_t)p->splits * p->steps * p->slices >= units, "%s: K is not covered", what);
    CHECK((int64_t)(p->splits - 1) * p->steps * p->slices < units, "%s: an empty split", what);
    CHECK(p->grid == p->splits * ceil_of(ceil_of(s->n, f->rows), p->bands), "%s: grid %lld", what, (long long)p->grid);
}

static void check_wide(const struct bnb_gemm4_shape *s, const struct bnb_gemm4_card *card,
                       const struct bnb_gemm4_plan *p, const char *what)
{
    const bool meets = p->kernel == BNB_GEMM4_KERNEL_MEET128 || p->kernel == BNB_GEMM4_KERNEL_MEET256;
    const int64_t inner = s->grad ? s->n : s->k, steps = ceil_of(inner, 64), parts = p->splits * (meets ? 2 : 1);
    CHECK(card->capability == 90 && card->tensor_copies, "%s", what);
    CHECK(s->grad ? s->k % 32 == 0 && s->n % 8 == 0 : s->k % 64 == 0, "%s", what);
    CHECK(s->grad == (p->kernel >= BNB_GEMM4_KERNEL_GRAD128), "%s", what);
    CHECK(s->block > 32 || p->kernel > BNB_GEMM4_KERNEL_WIDE64, "%s", what);
    CHECK(p->grid >= 2 && p->grid % 2 == 0 && p->grid <= card->sms, "%s: grid %lld", what, (long long)p->grid);
    CHECK(p->splits >= 1 && parts * p->steps >= steps, "%s: the sum is not covered", what);
    CHECK((parts - 1) * p->steps < steps, "%s: an empty split", what);
    CHECK(!meets || (p->steps >= 8 && p->meets > 0 && s->experts == 0), "%s: %d steps of a part", what, p->steps);
    CHECK(meets || p->meets == 0, "%s: room for %lld", what, (long long)p->meets);
    CHECK(s->experts == 0 || p->splits == 1, "%s: experts in splits", what);
}

static void check_plan(const struct bnb_gemm4_shape *s, const struct bnb_gemm4_card *card,
                       const struct bnb_gemm4_wish *wish)
{
    char what[200];
    const struct bnb_gemm4_plan p = bnb_gemm4_plan_of(s, card, wish);
    snprintf(what, sizeof what, "m %lld n %lld k %lld grad %d experts %d on %d: %s", (long long)s->m, (long long)s->n,
             (long long)s->k, s->grad, s->experts, card->capability, bnb_gemm4_kernel_name[p.kernel]);
    CHECK(bnb_gemm4_can(p.kernel, s, card), "%s", what);
    if (p.kernel >= BNB_GEMM4_KERNEL_FEW8 && p.kernel <= BNB_GEMM4_KERNEL_FEW64)
        check_few(s, card, &p, what);
    else if (p.kernel >= BNB_GEMM4_KERNEL_WIDE32 && p.kernel <= BNB_GEMM4_KERNEL_GRAD256)
        check_wide(s, card, &p, what);
    else
        CHECK(p.grid >= 1 && p.splits == 1, "%s: grid %lld", what, (long long)p.grid);
    if (!s->half || !s->aligned || card->capability < 80)
        CHECK(p.kernel == BNB_GEMM4_PLAIN, "%s", what);
    if (wish && bnb_gemm4_can((enum bnb_gemm4_kernel)wish->kernel, s, card) && wish->kernel > 0)
        CHECK((int)p.kernel == wish->kernel, "%s: asked for %s", what, bnb_gemm4_kernel_name[wish->kernel]);
}

/* Every shape with every wish. */
static void check_all(const struct bnb_gemm4_card *card)
{
    enum { COUNT = sizeof sides / sizeof *sides, ROWS = sizeof rows / sizeof *rows };
    for (int i = 0; i < ROWS * COUNT * COUNT; i++) {
        struct bnb_gemm4_shape s = {.m = rows[i % ROWS],
                                    .n = sides[i / ROWS % COUNT],
                                    .k = sides[i / ROWS / COUNT],
                                    .half = true,
                                    .aligned = true};
        for (int form = 0; form < 6; form++) {
            s.grad = form % 2 == 1;
            s.experts = form / 2 == 1 ? 8 : 0;
            s.half = form != 4;
            s.aligned = form != 5;
            s.block = 32 << (i + form) % 8;
            check_plan(&s, card, NULL);
            for (int kernel = 0; kernel < BNB_GEMM4_KERNELS; kernel++) {
                const struct bnb_gemm4_wish wish = {kernel, i % 4, i % 3, i % 6};
                check_plan(&s, card, &wish);
            }
        }
    }
}

static enum bnb_gemm4_kernel kernel_for(int64_t m, int64_t n, int64_t k, int capability, bool grad)
{
    const struct bnb_gemm4_card card = {capability, 132, capability == 90 ? 232448 : 166912, true};
    const struct bnb_gemm4_shape s = {.m = m, .n = n, .k = k, .block = 64, .half = true, .aligned = true, .grad = grad};
    return bnb_gemm4_plan_of(&s, &card, NULL).kernel;
}

static void check_examples(void)
{
    CHECK(kernel_for(1, 4096, 4096, 90, false) == BNB_GEMM4_KERNEL_FEW8, "one row");
    CHECK(kernel_for(4096, 4096, 4096, 90, false) == BNB_GEMM4_KERNEL_WIDE256, "prefill");
    CHECK(kernel_for(40, 4096, 4096, 80, false) == BNB_GEMM4_KERNEL_FEW64, "8.0, 40 rows");
    CHECK(kernel_for(65, 4096, 4096, 80, false) == BNB_GEMM4_KERNEL_TILE, "8.0, 65 rows");
    CHECK(kernel_for(2048, 4096, 4096, 90, true) == BNB_GEMM4_KERNEL_GRAD256, "gradient");
    CHECK(kernel_for(2048, 4096, 4096, 80, true) == BNB_GEMM4_KERNEL_TILE, "8.0, gradient");
    CHECK(kernel_for(1, 4096, 4096, 75, false) == BNB_GEMM4_PLAIN, "7.5");
    CHECK(kernel_for(3, 67, 67, 90, false) == BNB_GEMM4_PLAIN, "odd");
    CHECK(kernel_for(24, 14336, 4096, 90, false) == BNB_GEMM4_KERNEL_WIDE32, "24 rows");
    CHECK(kernel_for(100, 67, 96, 90, false) == BNB_GEMM4_KERNEL_TILE, "K of whole 32");
}

int main(void)
{
    for (size_t i = 0; i < sizeof cards / sizeof *cards; i++)
        check_all(&cards[i]);
    check_examples();
    return CHECK_RESULT();
}
