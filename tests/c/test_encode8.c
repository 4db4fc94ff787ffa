/*
 * test_encode8.c - the 8-bit encoders over the fp32 magnitudes of [2^-27, 1], both signs, both default maps
 *
 * Blocks that hold 1.0 have the factor 1, so the kernel's u is the input itself.  The definition is a walk over the
 * 255 fp32 midpoints, which needs no search because u is monotone; ties take the even index.  Without argument: every
 * 61st pattern and all within 4 ulp of a midpoint; --full: all 226 million patterns of the interval.
 */
#include <math.h>
#include <string.h>

#include "check.h"
#include "support.h"

enum { CHUNK = 16384 };

struct walk {
    float midpoint[255];
    int below; /* midpoints strictly below u */
};

static int walk_to(struct walk *w, float u)
{
    while (w->below < 255 && w->midpoint[w->below] < u)
        w->below++;
    while (w->below > 0 && !(w->midpoint[w->below - 1] < u))
        w->below--;
    return w->below + (w->below < 255 && w->midpoint[w->below] == u && w->below % 2 == 1);
}

/* One map prepared for the encoder, in closed form or for the search. */
struct subject {
    const char *name;
    struct bnb_map8 map;
    struct walk walk;
    int64_t count;
};

/* x[0] is 1.0; the kernels' codes of the rest against the walk. */
static void check_chunk(struct subject *s, const float *x, int n)
{
    static uint8_t codes[CHUNK], expected[CHUNK];
    for (int i = 1; i < n; i++)
        expected[i] = (uint8_t)walk_to(&s->walk, x[i]);
    for (int t = 0; t < bnb_cpu_all_count; t++) {
        if (!table_at(t))
            continue;
        float absmax;
        const struct bnb_quant8_args a = {.x = x, .codes = codes, .absmax = &absmax, .n = n, .block = n, .map = s->map};
        bnb_cpu_all[t]->quant8[BNB_F32](&a, 0, 1);
        CHECK(absmax == 1.0f, "%s: absmax is %g", bnb_cpu_all[t]->name, (double)absmax);
        if (!memcmp(codes + 1, expected + 1, (size_t)n - 1))
            continue;
        for (int i = 1; i < n; i++)
            CHECK(codes[i] == expected[i], "%s, %s map: u %.9g (%08x) gives %d, expected %d", bnb_cpu_all[t]->name,
                  s->name, (double)x[i], bits_of(x[i]), codes[i], expected[i]);
    }
    s->count += n - 1;
}

/* Patterns first .. last, every stride-th, with the given sign bit. */
static void sweep(struct subject *s, uint32_t first, uint32_t last, uint32_t stride, uint32_t sign)
{
    static float x[CHUNK];
    uint64_t bits = first;
    while (bits <= last) {
        int n = 0;
        x[n++] = 1.0f;
        for (; n < CHUNK && bits <= last; bits += stride)
            x[n++] = float_of((uint32_t)bits | sign);
        check_chunk(s, x, n);
    }
}

static void near_midpoints(struct subject *s)
{
    static float x[CHUNK];
    int n = 0;
    x[n++] = 1.0f;
    for (int k = 0; k < 255; k++) {
        const uint32_t bits = bits_of(s->walk.midpoint[k]);
        for (uint32_t i = 0; i < 9; i++) {
            const float u = float_of(bits - 4 + i);
            if (bits != 0 && fabsf(u) <= 1.0f)
                x[n++] = u;
        }
    }
    check_chunk(s, x, n);
}

/* The 16-bit kernels: every pattern of a magnitude up to 1. */
static void sixteen_bits(const struct subject *s, bnb_dtype dtype)
{
    static uint16_t x[65536];
    static uint8_t codes[65536];
    int n = 0;
    for (uint32_t h = 0; h < 65536; h++) {
        x[n] = (uint16_t)h;
        n += fabsf(value_at(x, dtype, n)) <= 1.0f;
    }
    for (int t = 0; t < bnb_cpu_all_count; t++) {
        float absmax;
        const struct bnb_quant8_args a = {.x = x, .codes = codes, .absmax = &absmax, .n = n, .block = n, .map = s->map};
        if (!table_at(t))
            continue;
        bnb_cpu_all[t]->quant8[dtype](&a, 0, 1);
        for (int i = 0; i < n; i++)
            CHECK(codes[i] == define_code8(value_at(x, dtype, i), s->walk.midpoint), "%s, %s map: %s %04x gives %d",
                  bnb_cpu_all[t]->name, s->name, dtype_name[dtype], x[i], codes[i]);
    }
}

static struct subject subject_of(const char *name, struct bnb_map8 map, bool search)
{
    struct subject s = {name, map, {{0}, 0}, 0};
    define_midpoints(map.code, s.walk.midpoint);
    if (search)
        s.map.form = NULL;
    return s;
}

int main(int argc, char **argv)
{
    const bool full = argc > 1 && !strcmp(argv[1], "--full");
    const uint32_t low = bits_of(0x1p-27f), one = bits_of(1.0f);
    struct subject subject[4] = {
        subject_of("signed", bnb_map_signed, false),
        subject_of("unsigned", bnb_map_unsigned, false),
        subject_of("signed, searched", bnb_map_signed, true),
        subject_of("unsigned, searched", bnb_map_unsigned, true),
    };
    CHECK(bnb_map_signed.form && bnb_map_unsigned.form, "a default map has no closed form");
    for (int i = 0; i < 4; i++) {
        struct subject *s = &subject[i];
        near_midpoints(s);
        for (uint32_t sign = 0; sign <= 1; sign++) {
            sweep(s, 0, low, 1009, sign << 31);
            sweep(s, low, one, full ? 1 : 61, sign << 31);
        }
        sixteen_bits(s, BNB_F16);
        sixteen_bits(s, BNB_BF16);
        printf("%s: %lld values\n", s->name, (long long)s->count);
    }
    return CHECK_RESULT();
}
