/*
 * launch_quant.c - quantisers on CUDA: pick the kernel for the dtype and the block, and the size of the grid
 *
 * A thread holds eight elements.  The grid holds as many blocks of threads as run at once and walks over the rest, so
 * that tables are loaded once.
 */
#include "cuda/cuda.h"

/* Elements of a thread, and where it has more; groups of them under way in a dequantiser (the kernels' AHEAD); threads of its blocks, and of a
 * quantiser's, which are as many as the largest block of values needs. */
enum { EACH = 8, WIDE = 32, AHEAD = 4, THREADS = 256, QUANT_THREADS = 512 };

/* log2 of a power of two from `least` to `most`, else -1. */
static int shift_of(int64_t block, int64_t least, int64_t most)
{
    return (block & (block - 1)) == 0 && block >= least && block <= most ? __builtin_ctzll((unsigned long long)block)
                                                                         : -1;
}

bool bnb_cuda_aligned(const void *address, size_t bytes) { return (uintptr_t)address % bytes == 0; }

/* How many of n elements the kernels with 32 of them to a thread take: f32 fills the memory's ways without them. */
static int64_t wide_elements(bnb_dtype dtype, int shift, int vector, int64_t n)
{
    return dtype != BNB_F32 && vector && shift >= 9 ? n >> shift << shift : 0;
}

bnb_status bnb_cuda_quantize8(const bnb_exec *ex, const struct bnb_quant8_args *a, bnb_dtype dtype)
{
    static struct bnb_cuda_kernel tiles[] = BNB_CUDA_VARIANTS("quant8", "bnb_k_quant8", QUANT_THREADS);
    static struct bnb_cuda_kernel wide[] = BNB_CUDA_VARIANTS("quant8", "bnb_k_quant8_wide", THREADS);
    static struct bnb_cuda_kernel any[] = BNB_CUDA_VARIANTS("quant8", "bnb_k_quant8_any", THREADS);
    struct bnb_cuda_quant8 q = {*a, shift_of(a->block, 32, 4096), 0, a->block <= 4096 ? 32 : THREADS};
    if (q.shift < 0)
        return bnb_cuda_run(ex, "quantize8", &any[dtype], bnb_blocks(bnb_blocks(a->n, a->block), THREADS / q.lanes),
                            &q);
    q.vector = bnb_cuda_aligned(a->x, 16) && bnb_cuda_aligned(a->codes, 8);
    const int64_t done = wide_elements(dtype, q.shift, q.vector, a->n);
    if (done > 0) {
        const bnb_status status = bnb_cuda_run(ex, "quantize8", &wide[dtype], bnb_blocks(done, WIDE * THREADS), &q);
        if (status || done == a->n)
            return status;
        q.a.x = (const char *)a->x + done * (int64_t)bnb_dtype_size(dtype);
        q.a.codes += done;
        q.a.absmax += done / a->block;
        q.a.n -= done;
    }
    return bnb_cuda_run(ex, "quantize8", &tiles[dtype], bnb_blocks(q.a.n, EACH * QUANT_THREADS), &q);
}

bnb_status bnb_cuda_dequantize8(const bnb_exec *ex, const struct bnb_dequant8_args *a, bnb_dtype dtype)
{
    static struct bnb_cuda_kernel tiles[] = BNB_CUDA_VARIANTS("quant8", "bnb_k_dequant8", THREADS);
    static struct bnb_cuda_kernel any[] = BNB_CUDA_VARIANTS("quant8", "bnb_k_dequant8_any", THREADS);
    struct bnb_cuda_dequant8 q = {*a, shift_of(a->block, EACH, INT64_MAX), 0};
    if (q.shift < 0)
        return bnb_cuda_run(ex, "dequantize8", &any[dtype], bnb_blocks(a->n, THREADS), &q);
    q.vector = bnb_cuda_aligned(a->out, 16) && bnb_cuda_aligned(a->codes, 8);
    return bnb_cuda_run(ex, "dequantize8", &tiles[dtype], bnb_blocks(a->n, EACH * THREADS * AHEAD), &q);
}

bnb_status bnb_cuda_quantize4(const bnb_exec *ex, const struct bnb_quant4_args *a, bnb_dtype dtype)
{
    static struct bnb_cuda_kernel kernels[] = BNB_CUDA_VARIANTS("quant4", "bnb_k_quant4", QUANT_THREADS);
    static struct bnb_cuda_kernel wide[] = BNB_CUDA_VARIANTS("quant4", "bnb_k_quant4_wide", THREADS);
    struct bnb_cuda_quant4 q = {*a, shift_of(a->block, 32, 4096), 0};
    q.vector = bnb_cuda_aligned(a->x, 16) && bnb_cuda_aligned(a->codes, 4);
    const int64_t done = wide_elements(dtype, q.shift, q.vector, a->n);
    if (done > 0) {
        const bnb_status status = bnb_cuda_run(ex, "quantize4", &wide[dtype], bnb_blocks(done, WIDE * THREADS), &q);
        if (status || done == a->n)
            return status;
        q.a.x = (const char *)a->x + done * (int64_t)bnb_dtype_size(dtype);
        q.a.codes += done / 2;
        q.a.absmax += done / a->block;
        q.a.n -= done;
    }
    return bnb_cuda_run(ex, "quantize4", &kernels[dtype], bnb_blocks(q.a.n, EACH * QUANT_THREADS), &q);
}

bnb_status bnb_cuda_dequantize4(const bnb_exec *ex, const struct bnb_dequant4_args *a, bnb_dtype dtype)
{
    static struct bnb_cuda_kernel kernels[] = BNB_CUDA_VARIANTS("quant4", "bnb_k_dequant4", THREADS);
    struct bnb_cuda_dequant4 q = {*a, a->code == bnb_map4(BNB_NF4) ? BNB_NF4 : BNB_FP4, shift_of(a->block, 32, 4096),
                                  0};
    q.vector = bnb_cuda_aligned(a->out, 16) && bnb_cuda_aligned(a->codes, 4);
    return bnb_cuda_run(ex, "dequantize4", &kernels[dtype], bnb_blocks(a->n, EACH * THREADS * AHEAD), &q);
}
