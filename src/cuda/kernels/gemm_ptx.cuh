/*
 * gemm_ptx.cuh - the instructions of matrix products that CUDA C has no word for: one small function each
 *
 * For compute capability 8.0 and newer.  Names follow what an instruction does; PTX ISA has the layouts of fragments.
 */
#ifndef BNB_CUDA_GEMM_PTX_CUH
#define BNB_CUDA_GEMM_PTX_CUH

#include "cuda/kernels/early.cuh"

/* The dynamic shared memory of a block. */
#define SHARED_MEMORY(name) extern __shared__ __align__(1024) unsigned char name[]

DEVICE unsigned shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }

DEVICE void f16_pair_values(unsigned pair, float *low, float *high)
{
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(*low), "=f"(*high)
        : "r"(pair));
}

/* A number that is the same in all lanes, in a form that the compiler knows to be so: addresses that depend on nothing else
 * then stay in uniform registers. */
DEVICE int same_in_warp(int number) { return __shfl_sync(0xffffffffu, number, 0); }

/* This warp's number. */
DEVICE int warp_number() { return same_in_warp((int)threadIdx.x / 32); }

#if __CUDA_ARCH__ >= 800

/* ---------------------------------------------------------------- asynchronous copies of 16 bytes */

/* Zeros where not `there`; `from` is not read then. */
DEVICE void copy16(void *to, const void *from, bool there)
{
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(there ? 16 : 0)
                 : "memory");
}

DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/* Until at most N groups of this thread are under way. */
template <int N> DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

/* ---------------------------------------------------------------- barriers */

/* `count` threads of the block, all of whole warps, meet at barrier `id`, 1 to 15. */
DEVICE void some_barrier(int id, int count) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory"); }

/* Count as one of them, and go on. */
DEVICE void some_arrive(int id, int count) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory"); }

/* Eight bytes of shared memory with a phase, which `count` arrivals end. */
DEVICE void barrier_init(uint64_t *barrier, int count)
{
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

DEVICE void barrier_arrive(uint64_t *barrier)
{
    asm volatile("{\n\t.reg .b64 state;\n\tmbarrier.arrive.shared.b64 state, [%0];\n\t}" ::"r"(shared_address(barrier))
                 : "memory");
}

/* Arrive when all copies so far of this thread have landed. */
DEVICE void copies_arrive(uint64_t *barrier)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

/* Until the phase of this parity, 0 for the first, has ended.  Of the scope of a block, also where others of a cluster
 * arrive: a wider one would invalidate the first-level cache at each wait. */
DEVICE void barrier_wait(uint64_t *barrier, unsigned parity)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n\t.reg .pred done;\n\tAGAIN_%=:\n\t"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
                 "@!done bra AGAIN_%=;\n\t}" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
#else
    asm volatile("{\n\t.reg .pred done;\n\tAGAIN_%=:\n\tmbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n\t"
                 "@!done bra AGAIN_%=;\n\t}" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
#endif
}

/* ---------------------------------------------------------------- m16n8k16, f32 sums */

/* Four 8 x 8 matrices of 16-bit elements; lane l brings the address of row l % 8 of matrix l / 8. */
DEVICE void load_matrices(unsigned r[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/* The same, each of them transposed. */
DEVICE void load_matrices_transposed(unsigned r[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/* d = a b + c; d and c may be the same. */
DEVICE void multiply16(const bf16 *, float d[4], const unsigned a[4], unsigned b0, unsigned b1, const float c[4])
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

DEVICE void multiply16(const f16 *, float d[4], const unsigned a[4], unsigned b0, unsigned b1, const float c[4])
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

#endif

#endif
