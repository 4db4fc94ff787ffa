/*
 * gemm4_wide_grad.cuh - the steps of x W on 9.0: pairs of codes down a column of the weight
 *
 * A step is 64 rows of the weight.  Its codes come as rows of 64 bytes; a transposing load gives a lane the same four
 * columns of two neighbouring rows, of which its warp takes two: the warps with an even number the first two, the others
 * the last two.  Their nibbles change places, and are indices of the table of pairs like those along a row.
 * Each row has a scale; a warp finds those of a step itself and keeps them in shared memory, where results will lie.
 */
#ifndef BNB_CUDA_GEMM4_WIDE_GRAD_CUH
#define BNB_CUDA_GEMM4_WIDE_GRAD_CUH

#include "cuda/kernels/gemm4_wide.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* The 16 bytes of a row of codes that a warp works on. */
DEVICE int wide_grad_chunk(const struct wide_thread &w) { return w.group * 2 + w.warp / 2; }

/* Of rows `lane` and `lane + 32` of a step, at the columns of this warp. */
struct wide_grad_scales {
    int64_t at;           /* element of the weight, of row `lane` of the next step */
    struct scale4 raw[2]; /* of the next step */
    int left;             /* rows of the weight from that row on */
};

DEVICE void wide_grad_load(const struct bnb_cuda_gemm4_fast &p, struct wide_grad_scales *s)
{
#pragma unroll
    for (int i = 0; i < 2; i++)
        s->raw[i] = scale4_load(p, s->left > i * 32 ? s->at + i * 32 * p.g.k : 0);
}

/* Those of the step into shared memory, and on to the next; rows beyond the weight get zeros. */
template <class S>
DEVICE void wide_grad_put(const struct bnb_cuda_gemm4_fast &p, const struct wide_thread &w, struct wide_grad_scales *s,
                          float *scales)
{
    const float *map2 = (const float *)(w.memory + S::MAP2_AT);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; i++)
        scales[w.lane + i * 32] = s->left > i * 32 ? scale4_value(p, s->raw[i], map2, w.offset) * p.shrink : 0.0f;
    __syncwarp();
    s->at += 64 * p.g.k;
    s->left -= 64;
    wide_grad_load(p, s);
}

/* 64 rows of codes, `chunk` of each, decoded for four steps of 16. */
template <typename T>
DEVICE void wide_grad_decode(const unsigned char *pairs, const unsigned char *codes, int chunk, int odd,
                             const float *scales, unsigned a[4][4])
{
    const unsigned lane = threadIdx.x % 32, at = lane * 4, pick = odd ? 0x7531u : 0x6420u;
    const T *tag = nullptr;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        unsigned r[4];
        const int row = 32 * h + (int)lane;
        load_matrices_transposed(r, codes + row * 64 + (chunk ^ row / 2 % 4) * 16);
#pragma unroll
        for (int i = 0; i < 2; i++) { /* bytes: of rows 2j and 2j + 1, then of those eight on */
            const unsigned w = __byte_perm(r[2 * i], r[2 * i + 1], pick);
            const unsigned index = (w & 0x0ff00ff0u) | (w >> 12 & 0x000f000fu) | (w << 12 & 0xf000f000u);
            const float *s = scales + 32 * h + 16 * i + lane % 4 * 2;
            const float2 near = *(const float2 *)s, far = *(const float2 *)(s + 8);
            unsigned *to = a[2 * h + i];
            to[0] = scale_pair(tag, pair_at(pairs, index, at, pair_selector(0)), near.x, near.y);
            to[1] = scale_pair(tag, pair_at(pairs, index, at, pair_selector(1)), near.x, near.y);
            to[2] = scale_pair(tag, pair_at(pairs, index, at, pair_selector(2)), far.x, far.y);
            to[3] = scale_pair(tag, pair_at(pairs, index, at, pair_selector(3)), far.x, far.y);
        }
    }
}

template <typename T, class S>
DEVICE void wide_step_grad(const struct bnb_cuda_gemm4_fast &p, int i, struct wide_thread *w,
                           struct wide_grad_scales *s, float *scales, unsigned a[4][4], float (&sums)[S::SUMS])
{
    wide_grad_put<S>(p, *w, s, scales);
    barrier_wait(w->full + w->slot, w->parity);
    wide_grad_decode<T>(w->memory, w->memory + S::CODES_AT + w->slot * S::CODES, wide_grad_chunk(*w), w->warp % 2,
                        scales, a);
    wide_products<T, S>(w, a, i > 0, sums);
    if (i > 0) {
        wgmma_wait<1>();
        wide_release<S>(*w);
    }
    wide_turn(w, S::RING);
}

/* All steps of a tile. */
template <typename T, class S>
DEVICE void wide_tile_grad(const struct bnb_cuda_gemm4_fast &p, const struct wide_tile &t, struct wide_thread *w,
                           float (&sums)[S::SUMS])
{
    unsigned even[4][4], odd[4][4];
    float *scales = (float *)(w->memory + S::STAGING_AT + w->group * 8192) + w->warp * 64;
    const int row = t.step * 64 + w->lane, column = t.column + wide_grad_chunk(*w) * 32;
    struct wide_grad_scales s;
    s.left = (int)p.g.n - row;
    s.at = (t.at.expert * p.g.n + row) * p.g.k + (column < p.g.k ? column : 0);
    wide_grad_load(p, &s);
    some_barrier(1 + w->group, 128); /* the results of the tile before have left shared memory */
    for (int i = 0; i < t.steps; i += 2) {
        wide_step_grad<T, S>(p, i, w, &s, scales, even, sums);
        if (i + 1 < t.steps)
            wide_step_grad<T, S>(p, i + 1, w, &s, scales, odd, sums);
    }
    wgmma_wait<0>();
    wide_release<S>(*w);
}

#endif

#endif
