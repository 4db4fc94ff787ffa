/*
 * test_optim.c - Adam with 8-bit and 32-bit state: every table against the definition, bit for bit, over several steps
 *
 * Each tensor lies between guard bytes, one element off any alignment.  NUMERICS rules 20 to 26.
 */
#include <math.h>
#include <string.h>

#include "check.h"
#include "optim_reference.h"

enum { LONGEST = 1000003 };

static float signed_map[256], unsigned_map[256], linear_map[256], small_map[256];

/* One tensor with everything that belongs to it. */
struct subject {
    struct guarded p, g, state1, state2, absmax1, absmax2;
    bnb_optim_tensor t;
};

static struct subject make_subject(int64_t n, bnb_dtype dtype, int bits)
{
    const size_t size = bnb_dtype_size(dtype), state = bits == 8 ? 1 : 4;
    const size_t blocks = (size_t)((n + STATE_BLOCK - 1) / STATE_BLOCK);
    struct subject s = {
        .p = guarded_make((size_t)n * size, size),
        .g = guarded_make((size_t)n * size, size),
        .state1 = guarded_make((size_t)n * state, state),
        .state2 = guarded_make((size_t)n * state, state),
        .absmax1 = guarded_make(blocks * 4, 4),
        .absmax2 = guarded_make(blocks * 4, 4),
    };
    memset(s.state1.data, 0, (size_t)n * state); /* new state is all zero bytes */
    memset(s.state2.data, 0, (size_t)n * state);
    memset(s.absmax1.data, 0, blocks * 4);
    memset(s.absmax2.data, 0, blocks * 4);
    fill_values(s.p.data, dtype, n, FILL_BELL, (uint64_t)n);
    s.t = (bnb_optim_tensor){s.p.data,
                             s.g.data,
                             s.state1.data,
                             s.state2.data,
                             bits == 8 ? s.absmax1.data : NULL,
                             bits == 8 ? s.absmax2.data : NULL,
                             n,
                             1,
                             dtype,
                             bits};
    return s;
}

static void free_subject(struct subject *s)
{
    struct guarded *g[] = {&s->p, &s->g, &s->state1, &s->state2, &s->absmax1, &s->absmax2};
    for (size_t i = 0; i < sizeof g / sizeof g[0]; i++) {
        CHECK(guarded_intact(g[i]), "n %lld: guards of buffer %zu written", (long long)s->t.n, i);
        guarded_free(g[i]);
    }
}

static struct bnb_optim_args args_of(const struct hyper *h, const bnb_optim_tensor *t, float midpoint[2][256])
{
    const bnb_optim_config config = {.size = sizeof config,
                                     .name = "adam",
                                     .lr = h->lr,
                                     .beta1 = h->beta1,
                                     .beta2 = h->beta2,
                                     .eps = h->eps,
                                     .weight_decay = h->weight_decay,
                                     .gnorm_scale = h->gnorm_scale,
                                     .skip_zeros = h->skip_zeros};
    return (struct bnb_optim_args){.p = t->p,
                                   .g = t->g,
                                   .state1 = t->state1,
                                   .state2 = t->state2,
                                   .absmax1 = t->absmax1,
                                   .absmax2 = t->absmax2,
                                   .n = t->n,
                                   .map1 = bnb_prepare_map(h->map1, midpoint[0]),
                                   .map2 = bnb_prepare_map(h->map2, midpoint[1]),
                                   .s = bnb_optim_scalars_of(&config, h->step)};
}

static void run_table(const struct bnb_cpu_ops *ops, const struct hyper *h, const bnb_optim_tensor *t)
{
    float midpoint[2][256];
    const struct bnb_optim_args a = args_of(h, t, midpoint);
    const int64_t blocks = (t->n + STATE_BLOCK - 1) / STATE_BLOCK;
    (t->bits == 8 ? ops->optim8 : ops->optim32)[BNB_RULE_ADAM][t->dtype](&a, 0, blocks);
}

/* NaN anywhere must be NaN in both; everything else bit for bit. */
static bool same_floats(const void *a, const void *b, bnb_dtype dtype, int64_t n)
{
    if (!memcmp(a, b, (size_t)n * bnb_dtype_size(dtype)))
        return true;
    for (int64_t i = 0; i < n; i++) {
        const float x = value_at(a, dtype, i), y = value_at(b, dtype, i);
        if (bits_of(x) != bits_of(y) && !(isnan(x) && isnan(y)))
            return false;
    }
    return true;
}

static void compare(const struct subject *got, const struct subject *want, const char *table, int64_t step)
{
    const bnb_optim_tensor *a = &got->t, *b = &want->t;
    const int64_t n = a->n, blocks = (n + STATE_BLOCK - 1) / STATE_BLOCK;
    CHECK(same_floats(a->p, b->p, a->dtype, n), "%s %s %d bits n %lld step %lld: p differs", table,
          dtype_name[a->dtype], a->bits, (long long)n, (long long)step);
    if (a->bits == 32) {
        CHECK(same_floats(a->state1, b->state1, BNB_F32, n) && same_floats(a->state2, b->state2, BNB_F32, n),
              "%s %s n %lld step %lld: 32-bit state differs", table, dtype_name[a->dtype], (long long)n,
              (long long)step);
        return;
    }
    CHECK(!memcmp(a->absmax1, b->absmax1, (size_t)blocks * 4) && !memcmp(a->absmax2, b->absmax2, (size_t)blocks * 4),
          "%s %s n %lld step %lld: absmax differs", table, dtype_name[a->dtype], (long long)n, (long long)step);
    CHECK(!memcmp(a->state1, b->state1, (size_t)n) && !memcmp(a->state2, b->state2, (size_t)n),
          "%s %s n %lld step %lld: codes differ", table, dtype_name[a->dtype], (long long)n, (long long)step);
}

/* Gradients of one step: mostly small, with zero blocks, and with NaN and Inf where `kind` says so. */
static void make_gradient(struct subject *s, enum fill kind, int64_t step)
{
    fill_values(s->g.data, s->t.dtype, s->t.n, kind, (uint64_t)(s->t.n + step * 7));
    for (int64_t i = 0; i < s->t.n; i++)
        if (i / STATE_BLOCK % 5 == 3 || (i + step) % 11 == 0)
            store_at(s->g.data, s->t.dtype, i, i % 2 ? 0.0f : -0.0f);
}

struct shape {
    int64_t n;
    bnb_dtype dtype;
    int bits;
    enum fill kind;
    int steps;
};

static void check_tables(const struct shape *shape, struct hyper h)
{
    for (int t = 0; t < bnb_cpu_all_count; t++) {
        if (!table_at(t))
            continue;
        struct subject got = make_subject(shape->n, shape->dtype, shape->bits);
        struct subject want = make_subject(shape->n, shape->dtype, shape->bits);
        for (h.step = 1; h.step <= shape->steps; h.step++) {
            make_gradient(&got, shape->kind, h.step);
            make_gradient(&want, shape->kind, h.step);
            run_table(bnb_cpu_all[t], &h, &got.t);
            if (shape->bits == 8)
                reference_step8(&h, shape->dtype, &want.t);
            else
                reference_step32(&h, shape->dtype, shape->n, want.t.p, want.t.g, want.t.state1, want.t.state2);
            compare(&got, &want, bnb_cpu_all[t]->name, h.step);
        }
        free_subject(&got);
        free_subject(&want);
    }
}

static struct hyper usual(void)
{
    return (struct hyper){.lr = 1e-2,
                          .beta1 = 0.9,
                          .beta2 = 0.999,
                          .eps = 1e-8,
                          .weight_decay = 0.01,
                          .gnorm_scale = 1.0,
                          .map1 = signed_map,
                          .map2 = unsigned_map};
}

static void every_shape(bnb_dtype dtype, int bits)
{
    static const int64_t special_length[] = {1023, 1024, 4095, 4096, 4097, LONGEST};
    struct hyper h = usual();
    for (int64_t n = 0; n <= 600; n++) {
        h.skip_zeros = n % 2;
        check_tables(&(struct shape){n, dtype, bits, n % 3 ? FILL_HEAVY : FILL_MIXED, 2}, h);
    }
    for (size_t i = 0; i < sizeof special_length / sizeof special_length[0]; i++)
        check_tables(&(struct shape){special_length[i], dtype, bits, FILL_BELL, i == 5 ? 2 : 20}, h);
    for (int kind = 0; kind < FILL_COUNT; kind++)
        check_tables(&(struct shape){2000, dtype, bits, (enum fill)kind, 5}, h);
}

static void every_option(bnb_dtype dtype, int bits)
{
    const struct shape shape = {1500, dtype, bits, FILL_HEAVY, 4};
    struct hyper h[9];
    for (int i = 0; i < 9; i++)
        h[i] = usual();
    h[0].lr = 0.0;
    h[1].beta1 = 0.0;
    h[2].beta2 = 0.0;
    h[3].weight_decay = 0.0;
    h[4].gnorm_scale = 0.125;
    h[5].eps = 1e-3;
    h[6].map1 = linear_map;   /* searched, with two zeros */
    h[7].map2 = small_map;    /* searched, mostly zeros: one map alone is no default */
    h[8].gnorm_scale = 1e30;  /* overflows v: the new state is not finite */
    for (int i = 0; i < 9; i++)
        for (int skip = 0; skip <= 1; skip++) {
            h[i].skip_zeros = skip;
            check_tables(&shape, h[i]);
        }
}

int main(void)
{
    bnb_create_dynamic_map(true, 7, 8, signed_map);
    bnb_create_dynamic_map(false, 7, 8, unsigned_map);
    bnb_create_linear_map(true, 8, true, linear_map);
    bnb_create_dynamic_map(false, 3, 4, small_map);
    for (int dtype = 0; dtype < BNB_FLOATS; dtype++)
        for (int bits = 8; bits <= 32; bits += 24) {
            every_shape((bnb_dtype)dtype, bits);
            every_option((bnb_dtype)dtype, bits);
        }
    return CHECK_RESULT();
}
