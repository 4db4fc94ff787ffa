/*
 * gemm4_wide_kernel.cuh - the kernel of gemm4_wide.cuh: 384 threads, of which one brings and 256 multiply
 */
#ifndef BNB_CUDA_GEMM4_WIDE_KERNEL_CUH
#define BNB_CUDA_GEMM4_WIDE_KERNEL_CUH

#include "cuda/kernels/gemm4_wide_forward.cuh"
#include "cuda/kernels/gemm4_wide_grad.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <class S>
DEVICE struct wide_thread wide_thread_of(const struct bnb_cuda_gemm4_fast &p, int warp, unsigned char *memory)
{
    struct wide_thread w = {};
    w.memory = memory;
    w.full = (uint64_t *)(memory + S::BARRIERS_AT), w.empty = w.full + S::RING;
    w.offset = p.g.scale.absmax2 ? __ldg(p.g.scale.offset) : 0.0f;
    w.group = warp / 4 - 1, w.warp = warp % 4, w.lane = (int)threadIdx.x % 32;
    const int g = w.lane / 4;
    w.first = w.group * 64 + (S::GRAD ? w.warp / 2 * 32 + g * 4 + w.warp % 2 * 2 : w.warp * 16 + g);
    w.second = w.first + (S::GRAD ? 1 : 8);
    return w;
}

template <typename T, class S>
DEVICE void wide_multiply(const struct bnb_cuda_gemm4_wide &p, int warp, unsigned char *memory)
{
    struct walk<int> walk = wide_start();
    struct wide_tile t;
    struct wide_thread w = wide_thread_of<S>(p.fast, warp, memory);
    if (w.group == 1)
        wide_turn_pass(w); /* the first turn is that of group 0 */
    while (wide_next_of_warp<S>(p.fast, &walk, &t)) {
        float sums[S::SUMS];
        if constexpr (S::GRAD)
            wide_tile_grad<T, S>(p.fast, t, &w, sums);
        else
            wide_tile_forward<T, S>(p.fast, t, &w, sums);
        if (p.fast.partial)
            wide_store_split<S>(p.fast, t, w, sums);
        else
            wide_store<T, S>(p, t, w, sums);
    }
    if (w.group == 0)
        wide_turn_wait(w);
}

/* Values of the table: scaled ones are rounded to T only then. */
template <typename T, class S> DEVICE void wide_table(const struct bnb_cuda_gemm4_fast &p, unsigned char *pairs)
{
    if (S::MODE == WIDE_SUMS)
        pairs_fill((const T *)nullptr, p, pairs, threadIdx.x, 384);
    else
        pairs_fill((const f16 *)nullptr, p, pairs, threadIdx.x, 384);
}

template <typename T, class S> DEVICE void wide_product(const struct bnb_cuda_gemm4_wide &p)
{
    SHARED_MEMORY(memory);
    uint64_t *full = (uint64_t *)(memory + S::BARRIERS_AT), *empty = full + S::RING;
    const int warp = warp_number();
    let_next_launch_come();
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::RING; i++) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, 16); /* eight warps of each block */
        }
        barriers_ready();
    }
    wide_table<T, S>(p.fast, memory);
    wait_for_launch_before();
    map2_fill(p.fast, (float *)(memory + S::MAP2_AT), threadIdx.x, 384);
    __syncthreads();
    cluster_barrier();
    if (warp < 4) {
        registers_down_to<40>();
        if (threadIdx.x == 0)
            wide_bring<S>(p, memory, full, empty);
        __syncwarp();
    } else {
        registers_to<232>();
        wide_multiply<T, S>(p, warp, memory);
    }
    cluster_barrier();
}

#endif

#endif
