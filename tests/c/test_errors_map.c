/* test_errors_map.c - bad arguments of the functions that build maps: status, detail, and a map left alone */
#include <math.h>
#include <string.h>

#include "check.h"
#include "support.h"

static float map[256];
static int cases;

/* `map` was filled with a pattern before the call. */
static void expect(bnb_status status, bnb_status wanted, const char *name, const char *shown)
{
    cases++;
    CHECK(status == wanted, "case %d: status %d, expected %d", cases, (int)status, (int)wanted);
    CHECK(strstr(bnb_detail(), name) && strstr(bnb_detail(), shown), "case %d: '%s' lacks '%s' or '%s'", cases,
          bnb_detail(), name, shown);
    for (int k = 0; k < 256; k++)
        CHECK(map[k] == -77.0f, "case %d: entry %d was written", cases, k);
}

static void dynamic_and_linear(void)
{
    expect(bnb_create_dynamic_map(true, 7, 8, NULL), BNB_EINVAL, "map", "NULL");
    expect(bnb_create_dynamic_map(true, 7, 9, map), BNB_EINVAL, "total_bits", "9");
    expect(bnb_create_dynamic_map(true, 7, 0, map), BNB_EINVAL, "total_bits", "0");
    expect(bnb_create_dynamic_map(true, 7, -8, map), BNB_EINVAL, "total_bits", "-8");
    expect(bnb_create_dynamic_map(true, 0, 8, map), BNB_EINVAL, "max_exponent_bits", "0");
    expect(bnb_create_dynamic_map(true, 9, 8, map), BNB_EINVAL, "max_exponent_bits", "9");
    expect(bnb_create_dynamic_map(false, 8, 8, map), BNB_EINVAL, "max_exponent_bits", "8");
    expect(bnb_create_dynamic_map(false, 1, 1, map), BNB_EINVAL, "total_bits", "1");
    expect(bnb_create_linear_map(true, 8, true, NULL), BNB_EINVAL, "map", "NULL");
    expect(bnb_create_linear_map(true, 9, true, map), BNB_EINVAL, "total_bits", "9");
    expect(bnb_create_linear_map(false, 0, true, map), BNB_EINVAL, "total_bits", "0");
}

static void floats_and_normal(void)
{
    expect(bnb_create_fp8_map(true, 5, 2, 8, NULL), BNB_EINVAL, "map", "NULL");
    expect(bnb_create_fp8_map(true, 5, 2, 9, map), BNB_EINVAL, "total_bits", "9");
    expect(bnb_create_fp8_map(true, 0, 7, 8, map), BNB_EINVAL, "exponent_bits", "0");
    expect(bnb_create_fp8_map(true, 5, 3, 8, map), BNB_EINVAL, "precision_bits", "3");
    expect(bnb_create_fp8_map(false, 5, 2, 8, map), BNB_EINVAL, "precision_bits", "2");
    expect(bnb_create_fp8_map(true, 8, -1, 8, map), BNB_EINVAL, "precision_bits", "-1");
    expect(bnb_create_normal_map(0.9, true, NULL), BNB_EINVAL, "map", "NULL");
    expect(bnb_create_normal_map(0.5, true, map), BNB_EINVAL, "offset", "0.5");
    expect(bnb_create_normal_map(1.0, true, map), BNB_EINVAL, "offset", "1");
    expect(bnb_create_normal_map((double)NAN, true, map), BNB_EINVAL, "offset", "nan");
    expect(bnb_create_normal_map(-3.0, true, map), BNB_EINVAL, "offset", "-3");
}

static void quantiles_and_types(void)
{
    static const float good[2] = {1.0f, 2.0f}, bad[3] = {1.0f, NAN, 2.0f}, worse[2] = {1.0f, -INFINITY};
    expect(bnb_create_quantile_map(NULL, 2, map), BNB_EINVAL, "quantiles", "NULL");
    expect(bnb_create_quantile_map(good, 2, NULL), BNB_EINVAL, "map", "NULL");
    expect(bnb_create_quantile_map(good, 0, map), BNB_EINVAL, "count", "0");
    expect(bnb_create_quantile_map(good, 256, map), BNB_EINVAL, "count", "256");
    expect(bnb_create_quantile_map(bad, 3, map), BNB_EINVAL, "quantiles[1]", "nan");
    expect(bnb_create_quantile_map(worse, 2, map), BNB_EINVAL, "quantiles[1]", "-inf");
    expect(bnb_get_4bit_map(BNB_NF4, NULL), BNB_EINVAL, "map", "NULL");
    expect(bnb_get_4bit_map((bnb_type4)0, map), BNB_EINVAL, "type", "0");
    expect(bnb_get_4bit_map((bnb_type4)5, map), BNB_EINVAL, "type", "5");
}

int main(void)
{
    for (int k = 0; k < 256; k++)
        map[k] = -77.0f;
    dynamic_and_linear();
    floats_and_normal();
    quantiles_and_types();
    printf("%d cases\n", cases);
    return CHECK_RESULT();
}
