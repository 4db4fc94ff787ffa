/*
 * rows8_list.cuh - the first outlier columns, as numbers, from bits
 */
#ifndef BNB_CUDA_ROWS8_LIST_CUH
#define BNB_CUDA_ROWS8_LIST_CUH

#include "cuda/kernels/device.cuh"

/* Columns whose bits a thread looks at. */
enum { LISTED = 256 };

/* The threads of a block meet. */
struct whole_block {
    static __device__ __forceinline__ void meet() { __syncthreads(); }
};

/* The columns of this thread's bits, from number `at` of the list on. */
DEVICE void list_bits8(int *list, int room, int at, int column, const unsigned (&bits)[LISTED / 32])
{
#pragma unroll
    for (int i = 0; i < LISTED / 32; i++)
        for (unsigned b = bits[i]; b && at < room; b &= b - 1)
            list[at++] = column + 32 * i + __ffs((int)b) - 1;
}

/* By COUNT threads, which Threads::meet() brings together, this one the `thread`-th: the first `room` of k columns with a bit
 * in `mask` (BNB_CUDA_MASK_WORDS), in ascending order, to list [room] in shared memory; how many there are in all.
 * sums [COUNT / 32]. */
template <int COUNT, class Threads>
DEVICE int list_mask8(const unsigned *mask, int64_t k, int *list, int *sums, int room, int thread)
{
    int total = 0;
    for (int64_t first = 0; first < k; first += COUNT * LISTED) {
        const int64_t column = first + thread * LISTED;
        unsigned bits[LISTED / 32] = {};
        int count = 0;
        if (column < k) {
            const uint4 *from = (const uint4 *)(mask + column / 32);
            const uint4 a = __ldcg(from), b = __ldcg(from + 1);
            bits[0] = a.x, bits[1] = a.y, bits[2] = a.z, bits[3] = a.w;
            bits[4] = b.x, bits[5] = b.y, bits[6] = b.z, bits[7] = b.w;
        }
#pragma unroll
        for (int i = 0; i < LISTED / 32; i++)
            count += __popc(bits[i]);
        int end = count;
#pragma unroll
        for (int o = 1; o < 32; o *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, end, (unsigned)o);
            end += thread % 32 >= o ? other : 0;
        }
        Threads::meet(); /* sums were read for the columns before */
        if (thread % 32 == 31)
            sums[thread / 32] = end;
        Threads::meet();
        int at = total + end - count;
#pragma unroll
        for (int w = 0; w < COUNT / 32; w++) {
            at += w < thread / 32 ? sums[w] : 0;
            total += sums[w];
        }
        list_bits8(list, room, at, (int)column, bits);
    }
    Threads::meet();
    return total;
}

#endif
