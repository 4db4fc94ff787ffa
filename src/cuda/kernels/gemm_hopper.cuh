/*
 * gemm_hopper.cuh - the instructions of compute capability 9.0: barriers in shared memory, tensor copies, wgmma
 *
 * Only for images of 9.0a.  Peers are the blocks of a cluster; a copy to all of them lands at the same place in each.
 */
#ifndef BNB_CUDA_GEMM_HOPPER_CUH
#define BNB_CUDA_GEMM_HOPPER_CUH

#include "cuda/kernels/gemm_ptx.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* ---------------------------------------------------------------- clusters and barriers */

DEVICE unsigned cluster_rank()
{
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/* All threads of all peers meet.  Nobody has written what others read: no wait for all memory of the card. */
DEVICE void cluster_barrier()
{
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
}

/* After all inits, by who made them. */
DEVICE void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

/* Arrive, and let the phase last until so many bytes have been copied. */
DEVICE void barrier_expect(uint64_t *barrier, unsigned bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

/* A warp arrives after it has used what it read, so nothing needs to be made visible: with the scope of a cluster, each
 * arrival would wait for all memory of the card. */
DEVICE void barrier_arrive_at(uint64_t *barrier, unsigned rank)
{
    asm volatile("{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t}" ::"r"(shared_address(barrier)),
                 "r"(rank)
                 : "memory");
}

/* Arrive at a peer's barrier: what this warp has written, and fenced, is there for who waits. */
DEVICE void barrier_give_to(uint64_t *barrier, unsigned rank)
{
    asm volatile("{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
                 "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n\t}" ::"r"(shared_address(barrier)),
                 "r"(rank)
                 : "memory");
}

DEVICE void barrier_take(uint64_t *barrier, unsigned parity)
{
    asm volatile("{\n\t.reg .pred done;\n\tAGAIN_%=:\n\t"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t"
                 "@!done bra AGAIN_%=;\n\t}" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

/* ---------------------------------------------------------------- tensor copies */

/* The box of a tensor map at column x and row y; the barrier of each block it lands in counts its bytes. */
DEVICE void copy_box(void *to, const struct bnb_cuda_map *map, int x, int y, uint64_t *barrier)
{
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
        "[%4];" ::"r"(shared_address(to)),
        "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier))
        : "memory");
}

/* The same of a tensor of three dimensions. */
DEVICE void copy_box3(void *to, const struct bnb_cuda_map *map, int x, int y, int z, uint64_t *barrier)
{
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
        "[%5];" ::"r"(shared_address(to)),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier))
        : "memory");
}

/* To the blocks of the cluster whose bits are set. */
DEVICE void copy_box_to(void *to, const struct bnb_cuda_map *map, int x, int y, uint64_t *barrier, int blocks)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
                 "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier)), "h"((short)blocks)
                 : "memory");
}

/* ---------------------------------------------------------------- wgmma: four warps, A in registers */

template <int COUNT> DEVICE void registers_to() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT> DEVICE void registers_down_to()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

/* Rows of 128 bytes that the copies swizzled, 1024 bytes apart from eight rows to the next: B as K runs along the rows. */
DEVICE uint64_t wgmma_operand(const void *p)
{
    return (uint64_t)(shared_address(p) & 0x3ffffu) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

DEVICE void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

#define SUMS4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS16(i) SUMS4(i), SUMS4(i + 4), SUMS4(i + 8), SUMS4(i + 12)
#define SUMS64(i) SUMS16(i), SUMS16(i + 16), SUMS16(i + 32), SUMS16(i + 48)
#define OPERANDS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more)

/* d (+)= a b, of 64 rows and two columns for each sum of a thread; what was in d counts where `more`. */
#define REGISTERS_32 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "

#define REGISTERS_64                                                                                   \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
    "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "

#define REGISTERS_128                                                                                  \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
    "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "  \
    "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "  \
    "%59, %60, %61, %62, %63}, "

#define REGISTERS_256                                                                                     \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "    \
    "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "     \
    "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "     \
    "%59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, "     \
    "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, "     \
    "%97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, " \
    "%114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "

DEVICE void wgmma(const bf16 *, float (&d)[16], const unsigned a[4], uint64_t b, int more)
{
    asm volatile("{\n\t.reg .pred more;\n\tsetp.ne.b32 more, %21, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 " REGISTERS_32
                 "{%16, %17, %18, %19}, %20, more, 1, 1, 0;\n\t}"
                 : SUMS16(0)
                 : OPERANDS);
}

DEVICE void wgmma(const f16 *, float (&d)[16], const unsigned a[4], uint64_t b, int more)
{
    asm volatile("{\n\t.reg .pred more;\n\tsetp.ne.b32 more, %21, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 " REGISTERS_32
                 "{%16, %17, %18, %19}, %20, more, 1, 1, 0;\n\t}"
                 : SUMS16(0)
                 : OPERANDS);
}

DEVICE void wgmma(const bf16 *, float (&d)[32], const unsigned a[4], uint64_t b, int more)
{
    asm volatile("{\n\t.reg .pred more;\n\tsetp.ne.b32 more, %37, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " REGISTERS_64
                 "{%32, %33, %34, %35}, %36, more, 1, 1, 0;\n\t}"
                 : SUMS16(0), SUMS16(16)
                 : OPERANDS);
}

DEVICE void wgmma(const f16 *, float (&d)[32], const unsigned a[4], uint64_t b, int more)
{
    asm volatile("{\n\t.reg .pred more;\n\tsetp.ne.b32 more, %37, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " REGISTERS_64
                 "{%32, %33, %34, %35}, %36, more, 1, 1, 0;\n\t}"
                 : SUMS16(0), SUMS16(16)
                 : OPERANDS);
}

DEVICE void wgmma(const bf16 *, float (&d)[64], const unsigned a[4], uint64_t b, int more)
{
    asm volatile("{\n\t.reg .pred more;\n\tsetp.ne.b32 more, %69, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " REGISTERS_128
                 "{%64, %65, %66, %67}, %68, more, 1, 1, 0;\n\t}"
                 : SUMS64(0)
                 : OPERANDS);
}

DEVICE void wgmma(const f16 *, float (&d)[64], const unsigned a[4], uint64_t b, int more)
{
    asm volatile("{\n\t.reg .pred more;\n\tsetp.ne.b32 more, %69, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " REGISTERS_128
                 "{%64, %65, %66, %67}, %68, more, 1, 1, 0;\n\t}"
                 : SUMS64(0)
                 : OPERANDS);
}

DEVICE void wgmma(const bf16 *, float (&d)[128], const unsigned a[4], uint64_t b, int more)
{
    asm volatile("{\n\t.reg .pred more;\n\tsetp.ne.b32 more, %133, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " REGISTERS_256
                 "{%128, %129, %130, %131}, %132, more, 1, 1, 0;\n\t}"
                 : SUMS64(0), SUMS64(64)
                 : OPERANDS);
}

DEVICE void wgmma(const f16 *, float (&d)[128], const unsigned a[4], uint64_t b, int more)
{
    asm volatile("{\n\t.reg .pred more;\n\tsetp.ne.b32 more, %133, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 " REGISTERS_256
                 "{%128, %129, %130, %131}, %132, more, 1, 1, 0;\n\t}"
                 : SUMS64(0), SUMS64(64)
                 : OPERANDS);
}

#undef SUMS4
#undef SUMS16
#undef SUMS64
#undef OPERANDS

/* Four 8 x 8 matrices of 16-bit elements, transposed, to the rows whose addresses the lanes bring: load_matrices back. */
DEVICE void store_matrices_transposed(void *row, const unsigned r[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

#endif

#endif
