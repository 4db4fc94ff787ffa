/*
 * gemm4_wide_together.cuh - the sums of splits that are one cluster
 *
 * Each block leaves its sums where the ring was: its cluster makes one tile, so nothing comes after the last step.  Then
 * each adds up a part of the tokens, over all splits in their order, from the shared memory of those that have them.
 */
#ifndef BNB_CUDA_GEMM4_WIDE_TOGETHER_CUH
#define BNB_CUDA_GEMM4_WIDE_TOGETHER_CUH

#include "cuda/kernels/gemm4_wide.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* Floats from one token to the next: the lanes of a warp, which hold eight columns of four tokens two apart, meet in no
 * bank. */
enum { TOGETHER_ROW = 132 };

template <class S> DEVICE void wide_leave(const struct wide_thread &w, const float (&sums)[S::SUMS])
{
    static_assert(S::TOKENS * TOGETHER_ROW * 4 <= S::STAGING_AT - S::X_AT, "sums lie where the ring was");
    float *to = (float *)(w.memory + S::X_AT) + w.lane % 4 * 2 * TOGETHER_ROW;
    some_barrier(WIDE_ALL, 256); /* the products of all warpgroups have been read from the ring */
#pragma unroll
    for (int i = 0; i < S::SUMS; i++)
        to[(i / 4 * 8 + i % 2) * TOGETHER_ROW + (i % 4 / 2 ? w.second : w.first)] = sums[i];
}

/* Four columns of a token, from `rank`'s column of blocks, of all splits. */
DEVICE float4 wide_total(const float *from, int splits, int rank)
{
    float4 sum = peer_values(from, (unsigned)rank);
    for (int i = 1; i < splits; i++) {
        const float4 v = peer_values(from, (unsigned)(2 * i + rank));
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    return sum;
}

template <typename T>
DEVICE void wide_store_four(const struct bnb_cuda_gemm4_fast &p, int outer, int token, int column, float4 sum)
{
    T *to = (T *)p.g.out + (int64_t)token * outer + column;
    const T *bias = (const T *)p.g.bias + column;
    float v[4] = {sum.x, sum.y, sum.z, sum.w};
    if (p.g.bias)
        for (int e = 0; e < 4 && column + e < outer; e++)
            v[e] += value_of(bias + e);
    if (p.store && column < outer) { /* outer is a multiple of eight */
        const T *tag = nullptr;
        *(uint2 *)to = make_uint2(quick_pair(tag, v[0], v[1]), quick_pair(tag, v[2], v[3]));
        return;
    }
    for (int e = 0; e < 4 && column + e < outer; e++)
        set_value(to + e, v[e]);
}

template <typename T, class S>
DEVICE void wide_store_together(const struct bnb_cuda_gemm4_fast &p, const struct wide_tile &t,
                                const struct wide_thread &w, const float (&sums)[S::SUMS])
{
    const int part = (S::TOKENS + p.splits - 1) / p.splits, rank = (int)cluster_rank(),
              thread = w.group * 128 + w.warp * 32 + w.lane;
    const int first = rank / 2 * part, column = thread % 32 * 4;
    const float *from = (const float *)(w.memory + S::X_AT) + column;
    wide_leave<S>(w, sums);
    cluster_barrier();
#pragma unroll 4
    for (int i = thread / 32; i < part; i += 8)
        if (first + i < S::TOKENS && t.at.token + first + i < t.at.end)
            wide_store_four<T>(p, wide_outer<S>(p), t.at.token + first + i, t.column + column,
                               wide_total(from + (first + i) * TOGETHER_ROW, p.splits, rank % 2));
}

#endif

#endif
