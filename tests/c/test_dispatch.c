/*
 * test_dispatch.c - every feature mask picks a table it can run; the environment variable can only lower the choice
 *
 * Argument: what ctest put into BNB_CPU_ISA.  A table of that name must be in use if this machine can run it, else the
 * best.
 */
#include <string.h>

#include "check.h"
#include "cpu/cpu.h"

static bool complete(const struct bnb_cpu_ops *ops)
{
    for (int d = 0; d < BNB_FLOATS; d++) {
        if (!ops->quant8[d] || !ops->dequant8[d] || !ops->quant4[d] || !ops->dequant4[d])
            return false;
        if (!ops->widen[d] || !ops->quant_rows[d] || !ops->dequant_rows[d])
            return false;
        for (int rule = 0; rule < BNB_RULE_COUNT; rule++)
            if (!ops->optim8[rule] || !ops->optim32[rule] || !ops->optim_norms[rule])
                return false;
    }
    if (!ops->gemm4_dot || !ops->gemm4_axpy || !ops->pack_pairs || !ops->gemv4 || !ops->pack8 || !ops->gemm8_dot ||
        !ops->gemm8_axpy)
        return false;
    return !ops->int16_rows || (ops->pack16 && ops->gemv4_int16);
}

static void table_list(void)
{
    CHECK(bnb_cpu_all_count >= 1, "no table at all");
    const struct bnb_cpu_ops *last = bnb_cpu_all[bnb_cpu_all_count - 1];
    CHECK(!strcmp(last->name, "scalar") && last->needs == 0, "the last table is %s, needs %x", last->name, last->needs);
    for (int i = 0; i < bnb_cpu_all_count; i++) {
        CHECK(complete(bnb_cpu_all[i]), "table %s has a hole", bnb_cpu_all[i]->name);
        for (int k = 0; k < i; k++) {
            CHECK(strcmp(bnb_cpu_all[i]->name, bnb_cpu_all[k]->name), "two tables named %s", bnb_cpu_all[i]->name);
            CHECK(bnb_cpu_all[k]->needs & ~bnb_cpu_all[i]->needs, "table %s hides %s", bnb_cpu_all[k]->name,
                  bnb_cpu_all[i]->name);
        }
    }
}

/* The first table of the list whose needs are all met. */
static void check_mask(unsigned mask)
{
    const struct bnb_cpu_ops *picked = bnb_cpu_pick(mask);
    CHECK(!(picked->needs & ~mask), "mask %x picked %s", mask, picked->name);
    for (int i = 0; i < bnb_cpu_all_count && bnb_cpu_all[i] != picked; i++)
        CHECK(bnb_cpu_all[i]->needs & ~mask, "mask %x picked %s, %s is better", mask, picked->name,
              bnb_cpu_all[i]->name);
}

static void every_mask(void)
{
    for (unsigned mask = 0; mask < 0x10000u; mask++) { /* known and unknown bits */
        check_mask(mask);
        check_mask(mask << 16);
    }
    check_mask(~0u);
    CHECK(!strcmp(bnb_cpu_pick(0)->name, "scalar"), "no feature picks %s", bnb_cpu_pick(0)->name);
    CHECK(!strcmp(bnb_cpu_pick(~(unsigned)BNB_CPU_AVX2)->name, "scalar"), "unknown bits pick %s",
          bnb_cpu_pick(~(unsigned)BNB_CPU_AVX2)->name);
#if defined(__x86_64__)
    CHECK(!strcmp(bnb_cpu_pick(BNB_CPU_AVX2)->name, "avx2"), "AVX2 picks %s", bnb_cpu_pick(BNB_CPU_AVX2)->name);
#endif
}

static bool runs_here(const char *name)
{
    for (int i = 0; i < bnb_cpu_all_count; i++)
        if (!strcmp(bnb_cpu_all[i]->name, name))
            return !(bnb_cpu_all[i]->needs & ~bnb_cpu_features());
    return false;
}

int main(int argc, char **argv)
{
    const char *wanted = argc > 1 ? argv[1] : "";
    table_list();
    every_mask();
    if (!runs_here(wanted))
        wanted = bnb_cpu_pick(bnb_cpu_features())->name;
    CHECK(!strcmp(bnb_cpu_isa(), wanted), "in use is %s, expected %s", bnb_cpu_isa(), wanted);
    CHECK(bnb_cpu_ops_in_use()->name == bnb_cpu_isa(), "the table in use is %s, bnb_cpu_isa() says %s",
          bnb_cpu_ops_in_use()->name, bnb_cpu_isa());
    return CHECK_RESULT();
}
