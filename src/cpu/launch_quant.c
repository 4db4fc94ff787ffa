/*
 * launch_quant.c - quantisers on the CPU: split the blocks among threads, call the table's kernel
 */
#include "cpu/cpu.h"

/* Blocks per task, so that a task has about BNB_GRAIN values. */
static int64_t grain_of(int64_t block) { return block >= BNB_GRAIN ? 1 : (BNB_GRAIN + block - 1) / block; }

/* What a task needs: a kernel of the table and its arguments. */
struct quant8_task {
    void (*kernel)(const struct bnb_quant8_args *, int64_t, int64_t);
    struct bnb_quant8_args args;
};

static void run_quant8(void *arg, int64_t begin, int64_t end)
{
    const struct quant8_task *t = arg;
    t->kernel(&t->args, begin, end);
}

bnb_status bnb_cpu_quantize8(const bnb_exec *ex, const struct bnb_quant8_args *a, bnb_dtype dtype)
{
    float midpoint[256];
    struct quant8_task t = {bnb_cpu_ops_in_use()->quant8[dtype], *a};
    t.args.map = bnb_prepare_map(a->map.code, midpoint);
    bnb_cpu_parallel(ex, bnb_blocks(a->n, a->block), grain_of(a->block), run_quant8, &t);
    return BNB_OK;
}

struct dequant8_task {
    void (*kernel)(const struct bnb_dequant8_args *, int64_t, int64_t);
    const struct bnb_dequant8_args *args;
};

static void run_dequant8(void *arg, int64_t begin, int64_t end)
{
    const struct dequant8_task *t = arg;
    t->kernel(t->args, begin, end);
}

bnb_status bnb_cpu_dequantize8(const bnb_exec *ex, const struct bnb_dequant8_args *a, bnb_dtype dtype)
{
    struct dequant8_task t = {bnb_cpu_ops_in_use()->dequant8[dtype], a};
    bnb_cpu_parallel(ex, bnb_blocks(a->n, a->block), grain_of(a->block), run_dequant8, &t);
    return BNB_OK;
}

struct quant4_task {
    void (*kernel)(const struct bnb_quant4_args *, int64_t, int64_t);
    struct bnb_quant4_args args;
};

static void run_quant4(void *arg, int64_t begin, int64_t end)
{
    const struct quant4_task *t = arg;
    t->kernel(&t->args, begin, end);
}

bnb_status bnb_cpu_quantize4(const bnb_exec *ex, const struct bnb_quant4_args *a, bnb_dtype dtype)
{
    struct quant4_task t = {bnb_cpu_ops_in_use()->quant4[dtype], *a};
    t.args.thresholds = a->type == BNB_NF4 ? &bnb_tree_nf4 : &bnb_tree_fp4;
    bnb_cpu_parallel(ex, bnb_blocks(a->n, a->block), grain_of(a->block), run_quant4, &t);
    return BNB_OK;
}

struct dequant4_task {
    void (*kernel)(const struct bnb_dequant4_args *, int64_t, int64_t);
    const struct bnb_dequant4_args *args;
};

static void run_dequant4(void *arg, int64_t begin, int64_t end)
{
    const struct dequant4_task *t = arg;
    t->kernel(t->args, begin, end);
}

bnb_status bnb_cpu_dequantize4(const bnb_exec *ex, const struct bnb_dequant4_args *a, bnb_dtype dtype)
{
    struct dequant4_task t = {bnb_cpu_ops_in_use()->dequant4[dtype], a};
    bnb_cpu_parallel(ex, bnb_blocks(a->n, a->block), grain_of(a->block), run_dequant4, &t);
    return BNB_OK;
}
