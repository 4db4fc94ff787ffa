/*
 * hopper.cuh - what compute capability 9.0a adds: tiles copied to shared memory in bulk, barriers that count their bytes,
 * products of a warpgroup on operands in shared memory, clusters of blocks
 *
 * An operand tile lies in rows of 128 bytes, row after row, whose 16-byte pieces are swapped by their number XOR the row's
 * number modulo 8: so a bulk copy writes it, and so a product reads it.  Tiles begin at multiples of 1024 bytes.
 * Source: the PTX ISA, "Asynchronous warpgroup level matrix instructions" and "Tensor map".
 */
#ifndef BNB_CUDA_HOPPER_CUH
#define BNB_CUDA_HOPPER_CUH

#include "cuda/kernels/early.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define BNB_IS_HOPPER 1
#else
#define BNB_IS_HOPPER 0
#endif

#if BNB_IS_HOPPER

DEVICE unsigned shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }

/* ---------------------------------------------------------------- barriers in shared memory */

DEVICE void barrier_init(uint64_t *b, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}

/* After all of them, and before a barrier of the threads that use them. */
DEVICE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

/* One arrival, and so many bytes to wait for in this phase. */
DEVICE void barrier_expect(uint64_t *b, unsigned bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
                 : "memory");
}

DEVICE void barrier_arrive(uint64_t *b)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}

/* At the same barrier of block `rank` of the cluster. */
DEVICE void barrier_arrive_at(uint64_t *b, unsigned rank)
{
    asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;"
                 " mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(shared_address(b)),
                 "r"(rank)
                 : "memory");
}

/* Until the phase of this parity is over.  The phase before the first has parity 1. */
DEVICE void barrier_wait(uint64_t *b, unsigned parity)
{
    unsigned over;
    do {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
                     : "=r"(over)
                     : "r"(shared_address(b)), "r"(parity)
                     : "memory");
    } while (!over);
}

/* Threads `count` of a block, by a number from 1 to 15. */
DEVICE void named_barrier(int number, int count)
{
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(count) : "memory");
}

/* ---------------------------------------------------------------- bulk copies */

/* The box of the map at column x and row y; beyond the matrix, zeros. */
DEVICE void bulk_load(void *to, const struct bnb_cuda_map *map, int x, int y, uint64_t *barrier)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(to)),
                 "l"((uint64_t)map), "r"(x), "r"(y), "r"(shared_address(barrier))
                 : "memory");
}

/* So many bytes of memory, a multiple of 16 as both places are. */
DEVICE void bulk_copy(void *to, const void *from, unsigned bytes, uint64_t *barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"((uint64_t)from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

/* The same into every block of the cluster whose bit is set, at the same place, at its own barrier. */
DEVICE void bulk_load_many(void *to, const struct bnb_cuda_map *map, int x, int y, uint64_t *barrier, unsigned blocks)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
                 "l"((uint64_t)map), "r"(x), "r"(y), "r"(shared_address(barrier)), "h"((unsigned short)blocks)
                 : "memory");
}

DEVICE void prefetch_map(const struct bnb_cuda_map *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"((uint64_t)map) : "memory");
}

/* ---------------------------------------------------------------- clusters */

DEVICE unsigned cluster_rank()
{
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/* Every thread of the cluster arrives and waits, in turn.  By whole warps: a warp that waits waits with all its threads, so
 * that a thread of it which is still at work elsewhere never goes on. */
DEVICE void cluster_arrive()
{
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

/* The same of a warp that has written nothing that others read. */
DEVICE void cluster_arrive_empty()
{
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

DEVICE void cluster_wait()
{
    __syncwarp();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/* Sixteen bytes of the shared memory of block `rank`, at the address that they would have here. */
DEVICE int4 cluster_load(const void *p, unsigned rank)
{
    int4 v;
    asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %4, %5;"
                 " ld.shared::cluster.v4.s32 {%0, %1, %2, %3}, [there]; }"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(shared_address(p)), "r"(rank)
                 : "memory");
    return v;
}

/* A byte to there. */
DEVICE void cluster_store(void *p, unsigned rank, unsigned byte)
{
    asm volatile(
        "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; st.shared::cluster.u8 [there], %2; }" ::"r"(
            shared_address(p)),
        "r"(rank), "r"(byte)
        : "memory");
}

/* ---------------------------------------------------------------- registers of a warpgroup */

template <int COUNT> DEVICE void registers_shrink()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT> DEVICE void registers_grow() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }

/* ---------------------------------------------------------------- products of a warpgroup */

/* An operand in rows of 128 bytes: 1024 bytes from one group of eight rows to the next.  32 bytes further: plus 2. */
DEVICE uint64_t operand_at(const void *p)
{
    return (uint64_t)(shared_address(p) >> 4 & 0x3fffu) | (uint64_t)1 << 16 | (uint64_t)64 << 32 | (uint64_t)1 << 62;
}

DEVICE void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/* Until no more than this many commits are under way. */
template <int COUNT> DEVICE void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(COUNT) : "memory");
}

/* Nothing that is made of d comes before what stands before this. */
template <int R> DEVICE void settle(int (&d)[R])
{
#pragma unroll
    for (int i = 0; i < R; i++)
        asm volatile("" : "+r"(d[i])::"memory");
}

template <int R> DEVICE void settle(float (&d)[R])
{
#pragma unroll
    for (int i = 0; i < R; i++)
        asm volatile("" : "+f"(d[i])::"memory");
}

#define BNB_ACC4(c, i) "+" c(d[i]), "+" c(d[i + 1]), "+" c(d[i + 2]), "+" c(d[i + 3])
#define BNB_ACC8(c, i) BNB_ACC4(c, i), BNB_ACC4(c, i + 4)
#define BNB_ACC16(c, i) BNB_ACC8(c, i), BNB_ACC8(c, i + 8)
#define BNB_ACC32(c, i) BNB_ACC16(c, i), BNB_ACC16(c, i + 16)
#define BNB_ACC64(c, i) BNB_ACC32(c, i), BNB_ACC32(c, i + 32)
#define BNB_REG8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define BNB_REG16 BNB_REG8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define BNB_REG32 BNB_REG16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define BNB_REG64                                                                                  \
    BNB_REG32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
              "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define BNB_REG128                                                                                     \
    BNB_REG64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "     \
              "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "       \
              "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, " \
              "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "   \
              "%125, %126, %127"

/* d [64 rows of a, 8 to 256 rows of b] (+)= the products over 32 codes of each.  Of the 64 rows, 16 belong to each warp;
 * of them, and of the 8 rows of block j of b, lane 4 g + t has d[4 j ..] = (g, 2 t), (g, 2 t + 1), (g + 8, 2 t),
 * (g + 8, 2 t + 1).  more 0: d is not read. */
DEVICE void wgmma8(int (&d)[4], uint64_t a, uint64_t b, int more)
{
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %6, 0; wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 {"
                 "%0, %1, %2, %3"
                 "},"
                 " %4, %5, p; }"
                 : BNB_ACC4("r", 0)
                 : "l"(a), "l"(b), "r"(more));
}

DEVICE void wgmma8(int (&d)[8], uint64_t a, uint64_t b, int more)
{
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %10, 0; wgmma.mma_async.sync.aligned.m64n16k32.s32.s8.s8 {" BNB_REG8
                 "},"
                 " %8, %9, p; }"
                 : BNB_ACC8("r", 0)
                 : "l"(a), "l"(b), "r"(more));
}

DEVICE void wgmma8(int (&d)[16], uint64_t a, uint64_t b, int more)
{
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %18, 0; wgmma.mma_async.sync.aligned.m64n32k32.s32.s8.s8 {" BNB_REG16
                 "},"
                 " %16, %17, p; }"
                 : BNB_ACC16("r", 0)
                 : "l"(a), "l"(b), "r"(more));
}

DEVICE void wgmma8(int (&d)[32], uint64_t a, uint64_t b, int more)
{
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {" BNB_REG32
                 "},"
                 " %32, %33, p; }"
                 : BNB_ACC32("r", 0)
                 : "l"(a), "l"(b), "r"(more));
}

DEVICE void wgmma8(int (&d)[64], uint64_t a, uint64_t b, int more)
{
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" BNB_REG64
                 "},"
                 " %64, %65, p; }"
                 : BNB_ACC64("r", 0)
                 : "l"(a), "l"(b), "r"(more));
}

DEVICE void wgmma8(int (&d)[128], uint64_t a, uint64_t b, int more)
{
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %130, 0; wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {" BNB_REG128 "},"
        " %128, %129, p; }"
        : BNB_ACC64("r", 0), BNB_ACC64("r", 64)
        : "l"(a), "l"(b), "r"(more));
}

/* The same over 16 elements of 16 bits; a is in registers: (g, 2 t), (g, 2 t + 1); (g + 8, ..); (g, 2 t + 8), ..; (g + 8, ..). */
DEVICE void wgmma16(const bf16 *, float (&d)[64], const unsigned a[4], uint64_t b, int more)
{
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" BNB_REG64 "},"
        " {%64, %65, %66, %67}, %68, p, 1, 1, 0; }"
        : BNB_ACC64("f", 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more));
}

DEVICE void wgmma16(const bf16 *, float (&d)[128], const unsigned a[4], uint64_t b, int more)
{
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %133, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" BNB_REG128
        "},"
        " {%128, %129, %130, %131}, %132, p, 1, 1, 0; }"
        : BNB_ACC64("f", 0), BNB_ACC64("f", 64)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more));
}

DEVICE void wgmma16(const f16 *, float (&d)[64], const unsigned a[4], uint64_t b, int more)
{
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" BNB_REG64 "},"
        " {%64, %65, %66, %67}, %68, p, 1, 1, 0; }"
        : BNB_ACC64("f", 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more));
}

DEVICE void wgmma16(const f16 *, float (&d)[128], const unsigned a[4], uint64_t b, int more)
{
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %133, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {" BNB_REG128 "},"
        " {%128, %129, %130, %131}, %132, p, 1, 1, 0; }"
        : BNB_ACC64("f", 0), BNB_ACC64("f", 64)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more));
}

#undef BNB_ACC4
#undef BNB_ACC8
#undef BNB_ACC16
#undef BNB_ACC32
#undef BNB_ACC64
#undef BNB_REG8
#undef BNB_REG16
#undef BNB_REG32
#undef BNB_REG64
#undef BNB_REG128

#endif
#endif
