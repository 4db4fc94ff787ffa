/*
 * gemm4_wide_forward.cuh - the steps of x W^T on 9.0: scales of rows of the weight, decoding, products
 *
 * A thread's two rows have one scale each in a step of 64 (two where blocks are of 32).  The four lanes that share rows
 * load those of four steps, one each, four steps ahead, and pass them on.
 */
#ifndef BNB_CUDA_GEMM4_WIDE_FORWARD_CUH
#define BNB_CUDA_GEMM4_WIDE_FORWARD_CUH

#include "cuda/kernels/gemm4_wide.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* Of rows r and r + 8, of the first and second half of a step. */
struct wide_scales { struct scale4 top[2], low[2]; };

struct wide_rows {
    int64_t top, low; /* elements of the weight where the thread's two rows begin */
    struct wide_scales raw; /* of the next four steps */
    float scale[4];         /* of these four: top, low, then of the second half */
};

/* This lane's of the four steps from step `i` of the tile on; there is one at least. */
template <class S>
DEVICE void wide_scales_load(const struct bnb_cuda_gemm4_fast &p, const struct wide_tile &t, int i, struct wide_rows *r)
{
    const int mine = i + (int)threadIdx.x % 4, k = (t.step + (mine < t.steps ? mine : i) * S::WAYS) * 64;
    r->raw.top[0] = scale4_load(p, r->top + k);
    r->raw.low[0] = scale4_load(p, r->low + k);
    if (S::SHORT && p.shift == 5) {
        r->raw.top[1] = scale4_load(p, r->top + k + 32);
        r->raw.low[1] = scale4_load(p, r->low + k + 32);
    }
}

/* Top and low of step `i`, of both halves; every lane of the warp calls. */
template <class S>
DEVICE void wide_scales_of(const struct bnb_cuda_gemm4_fast &p, const struct wide_tile &t, const struct wide_thread &w,
                           int i, struct wide_rows *r, float scale[4])
{
    const float *map2 = (const float *)(w.memory + S::MAP2_AT);
    if (i % 4 == 0) {
        r->scale[0] = scale4_value(p, r->raw.top[0], map2, w.offset) * p.shrink;
        r->scale[1] = scale4_value(p, r->raw.low[0], map2, w.offset) * p.shrink;
        if (S::SHORT && p.shift == 5) {
            r->scale[2] = scale4_value(p, r->raw.top[1], map2, w.offset) * p.shrink;
            r->scale[3] = scale4_value(p, r->raw.low[1], map2, w.offset) * p.shrink;
        }
        if (i + 4 < t.steps)
            wide_scales_load<S>(p, t, i + 4, r);
    }
    const int from = (w.lane & ~3) | (i & 3);
    scale[0] = scale[2] = __shfl_sync(0xffffffffu, r->scale[0], from);
    scale[1] = scale[3] = __shfl_sync(0xffffffffu, r->scale[1], from);
    if (S::SHORT && p.shift == 5) {
        scale[2] = __shfl_sync(0xffffffffu, r->scale[2], from);
        scale[3] = __shfl_sync(0xffffffffu, r->scale[3], from);
    }
}

/* ---------------------------------------------------------------- a decoder for wide_steps */

struct wide_forward {
    struct wide_rows rows;
    const unsigned char *from; /* this thread's first row in the slot */
    uint2 top, low;            /* codes of a fragment */
    unsigned pair[4], a[4][4];
    float scale[4], before[2]; /* SUMS: of the step before */
};

template <class S> DEVICE void wide_meet(const struct wide_thread &w, struct wide_forward *d)
{
    barrier_wait(wide_codes_full<S>(w.memory) + w.line.at, w.line.parity);
    d->from = w.memory + S::CODES_AT + w.line.at * S::CODES + w.first * 32;
}

DEVICE void wide_codes(int q, struct wide_forward *d)
{
    d->top = *(const uint2 *)(d->from + 8 * q), d->low = *(const uint2 *)(d->from + 256 + 8 * q);
}

DEVICE void wide_look(const struct wide_thread &w, int, struct wide_forward *d)
{
    const unsigned word[4] = {d->top.x, d->low.x, d->top.y, d->low.y};
#pragma unroll
    for (int i = 0; i < 4; i++)
        d->pair[i] = pair_at(w.memory, word[i], w.at, w.selector);
}

template <class S>
DEVICE void wide_scales_at(const struct bnb_cuda_gemm4_fast &p, const struct wide_tile &t, const struct wide_thread &w,
                           int i, struct wide_forward *d)
{
    d->before[0] = d->scale[0], d->before[1] = d->scale[1];
    wide_scales_of<S>(p, t, w, i, &d->rows, d->scale);
}

template <typename T, class S> DEVICE void wide_round(int q, struct wide_forward *d)
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float s = d->scale[q / 2 * 2 + i % 2];
        d->a[q][i] = S::MODE == WIDE_SUMS ? d->pair[i] : scale_pair((const T *)nullptr, d->pair[i], s, s);
    }
}

/* Where the thread's rows of a tile begin; loads of the first scales are under way then. */
template <class S>
DEVICE void wide_rows_begin(const struct bnb_cuda_gemm4_fast &p, const struct wide_tile &t, const struct wide_thread &w,
                            struct wide_rows *r)
{
    const int last = (int)p.g.n - 1, top = t.column + w.first, low = t.column + w.second;
    const int64_t base = t.at.expert * p.g.n;
    r->top = (base + (top < last ? top : last)) * p.g.k;
    r->low = (base + (low < last ? low : last)) * p.g.k;
    if (t.steps > 0)
        wide_scales_load<S>(p, t, 0, r);
}

#endif

#endif
