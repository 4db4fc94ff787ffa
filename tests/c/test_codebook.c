/* test_codebook.c - anchors, counts and order of every map, typed from docs/FORMAT.md; a refused map is not written */
#include "bitsandbytes.h"

#include <math.h>
#include <string.h>

#include "check.h"
#include "support.h"

static void check_sorted(const float map[256], const char *what)
{
    for (int k = 0; k + 1 < 256; k++)
        CHECK(map[k] <= map[k + 1], "%s: entry %d is %g, entry %d is %g", what, k, (double)map[k], k + 1,
              (double)map[k + 1]);
}

static int distinct(const float map[256])
{
    int count = 1;
    for (int k = 1; k < 256; k++)
        count += map[k] != map[k - 1];
    return count;
}

static int zeros(const float map[256])
{
    int count = 0;
    for (int k = 0; k < 256; k++)
        count += map[k] == 0.0f;
    return count;
}

static void dynamic_default(void)
{
    float s[256], u[256];
    CHECK(bnb_create_dynamic_map(true, 7, 8, s) == BNB_OK && bnb_create_dynamic_map(false, 7, 8, u) == BNB_OK, "%s",
          bnb_detail());
    check_sorted(s, "signed");
    check_sorted(u, "unsigned");
    CHECK(distinct(s) == 256 && distinct(u) == 256, "%d and %d values", distinct(s), distinct(u));
    CHECK(s[0] == -0.99296874f && s[1] == -0.97890627f && s[127] == 0.0f && s[128] == 0x1.27476ep-21f &&
              s[254] == 0.99296874f && s[255] == 1.0f,
          "signed anchors: %.9g %.9g %.9g %.9g %.9g %.9g", (double)s[0], (double)s[1], (double)s[127], (double)s[128],
          (double)s[254], (double)s[255]);
    CHECK(u[0] == 0.0f && u[1] == 0x1.5cf754p-22f && u[254] == 0.9964844f && u[255] == 1.0f,
          "unsigned anchors: %.9g %.9g %.9g %.9g", (double)u[0], (double)u[1], (double)u[254], (double)u[255]);
    for (int k = 1; k <= 127; k++)
        CHECK(s[127 - k] == -s[127 + k], "signed: entries %d and %d are no pair", 127 - k, 127 + k);
    static const int signed_points[7] = {1, 2, 4, 8, 16, 32, 64};
    for (int i = 0, k = 128, j = 1; i < 7; i++) { /* points between 10^(i - 7) and 10^(i - 6) */
        int in_signed = 0, in_unsigned = 0;
        for (; k < 255 && (double)s[k] < pow(10.0, i - 6); k++)
            in_signed++;
        for (; j < 255 && (double)u[j] < pow(10.0, i - 6); j++)
            in_unsigned++;
        CHECK(in_signed == signed_points[i], "signed decade %d has %d points", i, in_signed);
        CHECK(in_unsigned == 2 * signed_points[i], "unsigned decade %d has %d points", i, in_unsigned);
    }
}

/* Every bit count and exponent: 2^b distinct values or a refusal, as docs/FORMAT.md lists them. */
static void dynamic_all(void)
{
    for (int bits = 1; bits <= 8; bits++) {
        for (int exponent = 1; exponent <= bits; exponent++) {
            for (int is_signed = 0; is_signed <= 1; is_signed++) {
                float map[256], untouched[256];
                memset(map, 0x7b, sizeof map);
                memcpy(untouched, map, sizeof map);
                const bnb_status status = bnb_create_dynamic_map(is_signed, exponent, bits, map);
                const bool refused = !is_signed && exponent > bits - 1;
                CHECK(status == (refused ? BNB_EINVAL : BNB_OK), "signed %d, exponent %d, bits %d: %s", is_signed,
                      exponent, bits, bnb_strerror(status));
                if (status) {
                    CHECK(!memcmp(map, untouched, sizeof map), "a refused map was written");
                    continue;
                }
                check_sorted(map, "dynamic");
                CHECK(distinct(map) == 1 << bits && map[255] == 1.0f && map[0] > -1.0f,
                      "signed %d, exponent %d, bits %d: %d values", is_signed, exponent, bits, distinct(map));
            }
        }
        float a[256], b[256];
        if (bits > 1 && !bnb_create_dynamic_map(true, bits, bits, a) &&
            !bnb_create_dynamic_map(true, bits - 1, bits, b))
            CHECK(!memcmp(a, b, sizeof a), "%d bits: all exponent is not the same as one less", bits);
    }
}

static void linear(void)
{
    float map[256];
    CHECK(bnb_create_linear_map(true, 8, true, map) == BNB_OK, "%s", bnb_detail());
    check_sorted(map, "linear");
    CHECK(map[127] == 0.0f && map[128] == 0.0f && zeros(map) == 2 && map[0] == -1.0f && map[255] == 1.0f, "%d zeros",
          zeros(map));
    CHECK(bnb_create_linear_map(true, 8, false, map) == BNB_OK, "%s", bnb_detail());
    CHECK(zeros(map) == 0 && distinct(map) == 256 && fabs((double)map[128] - 0.0039215) < 1e-6 && map[127] == -map[128],
          "closest to zero: %g", (double)map[128]);
    CHECK(bnb_create_linear_map(false, 8, true, map) == BNB_OK, "%s", bnb_detail());
    CHECK(zeros(map) == 1 && map[0] == 0.0f && map[255] == 1.0f && distinct(map) == 256, "%d zeros", zeros(map));
    for (int bits = 2; bits < 8; bits++) {
        const int points = (1 << bits) - 1;
        CHECK(bnb_create_linear_map(true, bits, false, map) == BNB_OK, "%s", bnb_detail());
        check_sorted(map, "linear");
        CHECK(distinct(map) == points && zeros(map) == 256 - points + 1, "%d bits: %d values, %d zeros", bits,
              distinct(map), zeros(map));
        CHECK(bnb_create_linear_map(false, bits, false, map) == BNB_OK, "%s", bnb_detail());
        check_sorted(map, "linear");
        CHECK(distinct(map) == 1 << bits, "unsigned, %d bits: %d values", bits, distinct(map));
    }
}

static void small_floats(void)
{
    static const struct {
        int is_signed, exponent, precision, bits, values;
        double smallest;
    } row[] = {
        {1, 5, 2, 8, 255, 3.8147e-06 / 114688},
        {1, 4, 3, 8, 255, 4.8828e-04 / 480},
        {0, 4, 4, 8, 256, 0.0},
        {1, 2, 1, 4, 15, 1.0 / 48},
    };
    for (size_t i = 0; i < sizeof row / sizeof row[0]; i++) {
        float map[256];
        CHECK(bnb_create_fp8_map(row[i].is_signed, row[i].exponent, row[i].precision, row[i].bits, map) == BNB_OK,
              "row %zu: %s", i, bnb_detail());
        check_sorted(map, "fp8");
        CHECK(distinct(map) == row[i].values && map[255] == 1.0f, "row %zu: %d values", i, distinct(map));
        int k = 0;
        while (k < 255 && map[k] <= 0.0f)
            k++;
        CHECK(row[i].smallest == 0.0 || fabs((double)map[k] / row[i].smallest - 1.0) < 1e-4, "row %zu: smallest is %g",
              i, (double)map[k]);
        for (int z = 0; z < 256; z++)
            CHECK(map[z] != 0.0f || !signbit(map[z]), "row %zu: entry %d is -0", i, z);
    }
    float map[256];
    bnb_create_fp8_map(true, 2, 1, 4, map);
    static const double positive[7] = {1.0 / 48, 1.0 / 6, 1.0 / 4, 1.0 / 3, 1.0 / 2, 2.0 / 3, 1.0};
    for (int k = 0; k < 7; k++)
        CHECK(fabs((double)map[249 + k] - positive[k]) < 1e-7 && map[6 - k] == -map[249 + k], "fp8 2,1: %g",
              (double)map[249 + k]);
}

static void normal(void)
{
    float map[256], seven[256];
    CHECK(bnb_create_normal_map(0.9677083, true, map) == BNB_OK, "%s", bnb_detail());
    check_sorted(map, "normal");
    for (int k = 0; k < 8; k++) {
        CHECK(map[k] == define_nf4_values[k], "entry %d is %.9g, NF4 has %.9g", k, (double)map[k],
              (double)define_nf4_values[k]);
        CHECK(map[248 + k] == define_nf4_values[8 + k], "entry %d is %.9g, NF4 has %.9g", 248 + k, (double)map[248 + k],
              (double)define_nf4_values[8 + k]);
    }
    CHECK(bnb_create_normal_map(0.9677083, false, seven) == BNB_OK, "%s", bnb_detail());
    check_sorted(seven, "normal");
    CHECK(distinct(seven) == 15, "%d values", distinct(seven));
    for (int k = 0; k < 7; k++)
        CHECK(seven[k] == -seven[255 - k], "entry %d has no partner", k);
}

static void four_bits(void)
{
    static const float int4[16] = {7, 6, 5, 4, 3, 2, 1, 0, 0, -1, -2, -3, -4, -5, -6, -7};
    static const float af4[16] = {1.0f,        0.72424863f,  0.55496234f,  0.42563882f,  0.31675666f,  0.21961274f,
                                  0.12934483f, 0.04273164f,  0.0f,         -0.04934812f, -0.14982478f, -0.25607552f,
                                  -0.3736951f, -0.51243739f, -0.69441008f, -1.0f};
    float map[16];
    CHECK(bnb_get_4bit_map(BNB_NF4, map) == BNB_OK && !memcmp(map, define_nf4_values, sizeof map), "NF4 differs");
    CHECK(bnb_get_4bit_map(BNB_FP4, map) == BNB_OK, "%s", bnb_detail());
    for (int k = 0; k < 16; k++)
        CHECK(map[k] == define_fp4_values[k], "FP4 code %d is %.9g", k, (double)map[k]);
    CHECK(bnb_get_4bit_map(BNB_INT4, map) == BNB_OK, "%s", bnb_detail());
    for (int k = 0; k < 16; k++)
        CHECK(map[k] == int4[k] / 7.0f, "INT4 code %d is %.9g", k, (double)map[k]);
    CHECK(bnb_get_4bit_map(BNB_AF4, map) == BNB_OK && !memcmp(map, af4, sizeof map), "AF4 differs");
}

static void quantile_map(void)
{
    static const float few[5] = {-3.0f, 0.5f, 0.25f, 6.0f, -1.5f};
    float map[256];
    CHECK(bnb_create_quantile_map(few, 5, map) == BNB_OK, "%s", bnb_detail());
    check_sorted(map, "quantile");
    CHECK(map[0] == -0.5f && map[1] == -0.25f && map[255] == 1.0f && zeros(map) == 251, "%g %g %g, %d zeros",
          (double)map[0], (double)map[1], (double)map[255], zeros(map));
    float many[255];
    for (int k = 0; k < 255; k++)
        many[k] = (float)(k - 200);
    CHECK(bnb_create_quantile_map(many, 255, map) == BNB_OK && map[0] == -1.0f && zeros(map) == 2, "%d zeros",
          zeros(map));
    memset(many, 0, sizeof many);
    CHECK(bnb_create_quantile_map(many, 255, map) == BNB_OK && zeros(map) == 256, "all zero: %d zeros", zeros(map));
}

/* From values back to the type; one bit of one value decides. */
static void find_type(void)
{
    float map[16];
    bnb_type4 type = BNB_INT4;
    CHECK(bnb_find_4bit_map(define_nf4_values, &type) == BNB_OK && type == BNB_NF4, "NF4: %d", (int)type);
    bnb_get_4bit_map(BNB_FP4, map);
    CHECK(bnb_find_4bit_map(map, &type) == BNB_OK && type == BNB_FP4, "FP4: %d", (int)type);
    map[5] = nextafterf(map[5], 1.0f);
    CHECK(bnb_find_4bit_map(map, &type) == BNB_ENOTSUP && type == BNB_FP4, "an edited map was found: %d", (int)type);
    bnb_get_4bit_map(BNB_AF4, map);
    CHECK(bnb_find_4bit_map(map, &type) == BNB_ENOTSUP, "AF4 has no quantiser");
    map[0] = NAN;
    CHECK(bnb_find_4bit_map(map, &type) == BNB_ENOTSUP, "NaN was found");
    CHECK(bnb_find_4bit_map(NULL, &type) == BNB_EINVAL && bnb_find_4bit_map(map, NULL) == BNB_EINVAL, "NULL");
}

int main(void)
{
    dynamic_default();
    dynamic_all();
    linear();
    small_floats();
    normal();
    four_bits();
    find_type();
    quantile_map();
    return CHECK_RESULT();
}
