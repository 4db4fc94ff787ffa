/*
 * test_optim_rules.c - what the optimizer promises beyond its formula: accuracy, signs, non-finite values, many tensors
 *
 * NUMERICS rules 21 to 26.
 */
#include <math.h>
#include <string.h>

#include "check.h"
#include "optim_reference.h"

enum { N = 1000, BLOCKS = (N + 255) / 256 };

static float signed_map[256], unsigned_map[256];

struct state8 {
    float p[N], g[N], absmax1[BLOCKS], absmax2[BLOCKS];
    uint8_t codes1[N], codes2[N];
};

static bnb_optim_config config_of(const struct hyper *h)
{
    return (bnb_optim_config){.size = sizeof(bnb_optim_config),
                              .name = "adam",
                              .lr = h->lr,
                              .beta1 = h->beta1,
                              .beta2 = h->beta2,
                              .eps = h->eps,
                              .weight_decay = h->weight_decay,
                              .gnorm_scale = h->gnorm_scale,
                              .skip_zeros = h->skip_zeros,
                              .qmap1 = h->map1,
                              .qmap2 = h->map2};
}

static bnb_optim_tensor tensor8(struct state8 *s, int64_t n, int64_t step)
{
    return (bnb_optim_tensor){s->p, s->g, s->codes1, s->codes2, s->absmax1, s->absmax2, n, step, BNB_F32, 8};
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

/* 1000 steps with 32-bit state stay within the roundings of the formula in double: three a step for v (beta2, product,
 * sum), which decays slowly; a sum over 0.9^k for m; two a step for p, whose magnitude is below 2. */
static void near_the_formula(void)
{
    enum { COUNT = 64, STEPS = 1000 };
    float p[COUNT], g[COUNT], m[COUNT] = {0}, v[COUNT] = {0};
    double p64[COUNT], m64[COUNT] = {0}, v64[COUNT] = {0};
    struct hyper h = usual();
    const bnb_optim_config config = config_of(&h);
    fill_values(p, BNB_F32, COUNT, FILL_BELL, 2);
    for (int i = 0; i < COUNT; i++)
        p64[i] = (double)p[i];
    for (h.step = 1; h.step <= STEPS; h.step++) {
        fill_values(g, BNB_F32, COUNT, FILL_BELL, (uint64_t)h.step + 100);
        const bnb_optim_tensor t = {p, g, m, v, NULL, NULL, COUNT, h.step, BNB_F32, 32};
        CHECK(bnb_optim_step(NULL, &config, &t, 1) == BNB_OK, "%s", bnb_detail());
        for (int i = 0; i < COUNT; i++) {
            const double grad = (double)g[i];
            p64[i] = exact_adam_p(&h, grad, p64[i], m64[i], v64[i]);
            m64[i] = h.beta1 * m64[i] + (1.0 - h.beta1) * grad;
            v64[i] = h.beta2 * v64[i] + (1.0 - h.beta2) * grad * grad;
            const double drift = fabs((double)p[i] - p64[i]);
            CHECK(drift <= 2e-7 * (double)h.step, "step %lld element %d: %.9g, expected %.9g", (long long)h.step, i,
                  (double)p[i], p64[i]);
            CHECK(fabs((double)v[i] - v64[i]) <= (3.0 * (double)h.step + 4.0) * 0x1p-24 * v64[i] &&
                      fabs((double)m[i] - m64[i]) <= 2e-6,
                  "step %lld element %d: state %g %g", (long long)h.step, i, (double)m[i], (double)v[i]);
        }
    }
}

/* After a step, decoded m and v lie within half a gap of the exact ones, relative to their block. */
static void state_error(void)
{
    static struct state8 s;
    struct hyper h = usual();
    const bnb_optim_config config = config_of(&h);
    memset(&s, 0, sizeof s);
    fill_values(s.g, BNB_F32, N, FILL_BELL, 8);
    const bnb_optim_tensor t = tensor8(&s, N, 1);
    CHECK(bnb_optim_step(NULL, &config, &t, 1) == BNB_OK, "%s", bnb_detail());
    for (int i = 0; i < N; i++) {
        const double m = 0.1 * (double)s.g[i], v = 0.001 * (double)s.g[i] * (double)s.g[i];
        const double a1 = (double)s.absmax1[i / 256], a2 = (double)s.absmax2[i / 256];
        const double m_error = fabs((double)signed_map[s.codes1[i]] * a1 - m);
        const double v_error = fabs((double)unsigned_map[s.codes2[i]] * a2 - v);
        /* half gaps of the top decade, 0.9 / 128 and 0.9 / 256, reach to the edge of the decade below */
        CHECK(m_error <= a1 * 0.00704 && v_error <= a2 * 0.00353, "element %d: errors %g and %g of absmax", i,
              m_error / a1, v_error / a2);
    }
}

/* NaN, Inf, and finite gradients whose square overflows: that element's states become 0, its p stays. */
static void non_finite(void)
{
    static const float bad[] = {NAN, INFINITY, -INFINITY, 3e38f, -1e25f};
    static struct state8 s;
    struct hyper h = usual();
    const bnb_optim_config config = config_of(&h);
    memset(&s, 0, sizeof s);
    fill_values(s.p, BNB_F32, N, FILL_BELL, 4);
    for (int step = 1; step <= 4; step++) {
        float before[N];
        fill_values(s.g, BNB_F32, N, FILL_BELL, (uint64_t)step);
        for (int i = 3; i < N; i += 101)
            s.g[i] = bad[(i / 101 + step) % 5];
        memcpy(before, s.p, sizeof before);
        const bnb_optim_tensor t = tensor8(&s, N, step);
        CHECK(bnb_optim_step(NULL, &config, &t, 1) == BNB_OK, "%s", bnb_detail());
        for (int i = 0; i < N; i++) {
            const bool spoilt = i % 101 == 3;
            CHECK(!spoilt || (s.codes1[i] == 127 && s.codes2[i] == 0 && bits_of(s.p[i]) == bits_of(before[i])),
                  "step %d gradient %g: codes %d %d, p moved %g", step, (double)s.g[i], s.codes1[i], s.codes2[i],
                  (double)(s.p[i] - before[i]));
            CHECK(spoilt || s.p[i] != before[i], "step %d: neighbour %d did not move", step, i);
        }
        for (int b = 0; b < BLOCKS; b++)
            CHECK(isfinite(s.absmax1[b]) && isfinite(s.absmax2[b]), "step %d block %d: absmax %g %g", step, b,
                  (double)s.absmax1[b], (double)s.absmax2[b]);
    }
}

/* A negative m never gets the code of 0 or above, a positive one never a negative code. */
static void signs(void)
{
    static struct state8 s;
    struct hyper h = usual();
    const bnb_optim_config config = config_of(&h);
    memset(&s, 0, sizeof s);
    for (int i = 0; i < N; i++)
        s.g[i] = (i % 2 ? 1.0f : -1.0f) * (float)pow(10.0, -(double)(i % 256) / 20.0);
    const bnb_optim_tensor t = tensor8(&s, N, 1);
    CHECK(bnb_optim_step(NULL, &config, &t, 1) == BNB_OK, "%s", bnb_detail());
    for (int i = 0; i < N; i++)
        CHECK(i % 2 ? s.codes1[i] >= 127 : s.codes1[i] <= 126, "gradient %g: code %d", (double)s.g[i], s.codes1[i]);
}

/* Blocks without gradient: new state stays zero and is written as the codes of zero; p only decays. */
static void zero_blocks(void)
{
    static struct state8 s;
    struct hyper h = usual();
    const bnb_optim_config config = config_of(&h);
    memset(&s, 0, sizeof s);
    for (int i = 0; i < N; i++)
        s.p[i] = 1.0f;
    const bnb_optim_tensor t = tensor8(&s, N, 1);
    CHECK(bnb_optim_step(NULL, &config, &t, 1) == BNB_OK, "%s", bnb_detail());
    for (int i = 0; i < N; i++)
        CHECK(s.codes1[i] == 127 && s.codes2[i] == 0 && s.p[i] == (float)(1.0 - 0.01 * 0.01),
              "element %d: codes %d %d, p %.9g", i, s.codes1[i], s.codes2[i], (double)s.p[i]);
    for (int b = 0; b < BLOCKS; b++)
        CHECK(bits_of(s.absmax1[b]) == 0 && bits_of(s.absmax2[b]) == 0, "block %d: absmax %g %g", b,
              (double)s.absmax1[b], (double)s.absmax2[b]);
}

/* The search gives what the closed form gives for the same maps. */
static void searched_maps(void)
{
    for (int t = 0; t < bnb_cpu_all_count; t++) {
        static struct state8 a, b;
        if (!table_at(t))
            continue;
        memset(&a, 0, sizeof a);
        memset(&b, 0, sizeof b);
        for (int step = 1; step <= 6; step++) {
            struct hyper h = usual();
            const bnb_optim_config config = config_of(&h);
            fill_values(a.g, BNB_F32, N, step % 2 ? FILL_HEAVY : FILL_MIXED, (uint64_t)step);
            memcpy(b.g, a.g, sizeof b.g);
            struct bnb_optim_args args = {.p = a.p,
                                          .g = a.g,
                                          .state1 = a.codes1,
                                          .state2 = a.codes2,
                                          .absmax1 = a.absmax1,
                                          .absmax2 = a.absmax2,
                                          .n = N,
                                          .map1 = bnb_map_signed,
                                          .map2 = bnb_map_unsigned,
                                          .s = bnb_optim_scalars_of(&config, step)};
            bnb_cpu_all[t]->optim8[BNB_RULE_ADAM][BNB_F32](&args, 0, BLOCKS);
            args.map1.form = args.map2.form = NULL;
            args.p = b.p, args.g = b.g, args.state1 = b.codes1, args.state2 = b.codes2;
            args.absmax1 = b.absmax1, args.absmax2 = b.absmax2;
            bnb_cpu_all[t]->optim8[BNB_RULE_ADAM][BNB_F32](&args, 0, BLOCKS);
            CHECK(!memcmp(&a, &b, sizeof a), "%s step %d: search and closed form differ", bnb_cpu_all[t]->name, step);
        }
    }
}

/* A map with one entry changed is searched; with the entry restored it is the default again: same as never changed. */
static void restored_map(void)
{
    static struct state8 s[3];
    float map[256];
    memcpy(map, signed_map, sizeof map);
    memset(s, 0, sizeof s);
    for (int step = 1; step <= 5; step++) {
        for (int k = 0; k < 3; k++) { /* 0: default, 1: entry changed and restored, 2: changed */
            struct hyper h = usual();
            fill_values(s[k].g, BNB_F32, N, FILL_HEAVY, (uint64_t)step);
            map[200] = nextafterf(signed_map[200], k == 2 ? 1.0f : signed_map[200]);
            h.map1 = k == 0 ? signed_map : map;
            const bnb_optim_config config = config_of(&h);
            const bnb_optim_tensor t = tensor8(&s[k], N, step);
            CHECK(bnb_optim_step(NULL, &config, &t, 1) == BNB_OK, "%s", bnb_detail());
        }
        CHECK(!memcmp(&s[0], &s[1], sizeof s[0]), "step %d: a restored map differs from the default", step);
    }
    int moved = 0;
    for (int i = 0; i < N; i++)
        moved += s[0].codes1[i] != s[2].codes1[i];
    CHECK(moved <= 2, "one entry moved by one ulp changed %d codes", moved);
}

/* Many tensors of mixed dtype and state in one call; some without gradient or elements. */
static void many_tensors(const bnb_exec *ex)
{
    enum { COUNT = 40 };
    static struct state8 one[COUNT], all[COUNT];
    bnb_optim_tensor tensor[COUNT];
    struct hyper h = usual();
    const bnb_optim_config config = config_of(&h);
    memset(one, 0, sizeof one);
    memset(all, 0, sizeof all);
    for (int step = 1; step <= 3; step++) {
        for (int k = 0; k < COUNT; k++) {
            fill_values(one[k].g, BNB_F32, N, FILL_HEAVY, (uint64_t)(k + step));
            memcpy(all[k].g, one[k].g, sizeof one[k].g);
            for (int both = 0; both < 2; both++) {
                struct state8 *s = both ? &all[k] : &one[k];
                tensor[k] = tensor8(s, k * 26 % 1001, step + k % 3);
                tensor[k].dtype = (bnb_dtype)(k % 4 == 3 ? 0 : k % 4);
                if (k % 4 == 3) { /* 32-bit state, in memory that serves as well: codes and g are not enough */
                    static float m[2][COUNT][N], v[2][COUNT][N];
                    tensor[k] = (bnb_optim_tensor){s->p, s->g,          m[both][k],   v[both][k], NULL,
                                                   NULL, k * 26 % 1001, step + k % 3, BNB_F32,    32};
                }
                if (k % 7 == 6)
                    tensor[k].g = NULL;
                if (!both)
                    CHECK(bnb_optim_step(NULL, &config, &tensor[k], 1) == BNB_OK, "%s", bnb_detail());
            }
        }
        CHECK(bnb_optim_step(ex, &config, tensor, COUNT) == BNB_OK, "%s", bnb_detail());
        CHECK(!memcmp(one, all, sizeof one), "step %d: many tensors differ from one at a time", step);
    }
    CHECK(bnb_optim_step(ex, &config, NULL, 0) == BNB_OK, "no tensor at all: %s", bnb_detail());
}

int main(void)
{
    bnb_create_dynamic_map(true, 7, 8, signed_map);
    bnb_create_dynamic_map(false, 7, 8, unsigned_map);
    near_the_formula();
    state_error();
    non_finite();
    signs();
    zero_blocks();
    searched_maps();
    restored_map();
    const bnb_exec backwards = {.size = sizeof backwards, .parallel_for = loop_backwards};
    many_tensors(NULL);
    many_tensors(&backwards);
    return CHECK_RESULT();
}
