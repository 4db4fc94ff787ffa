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
DEVICE void wide_scales_load(const struct bnb_cuda_gemm4_fast &p, const struct wide_tile &t, int i, struct wide_rows *r)
{
    const int mine = i + (int)threadIdx.x % 4, k = (t.step + (mine < t.steps ? mine : i)) * 64;
    r->raw.top[0] = scale4_load(p, r->top + k);
    r->raw.low[0] = scale4_load(p, r->low + k);
    if (p.shift == 5) {
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
        if (S::MODE == WIDE_WEIGHTS && p.shift == 5) {
            r->scale[2] = scale4_value(p, r->raw.top[1], map2, w.offset) * p.shrink;
            r->scale[3] = scale4_value(p, r->raw.low[1], map2, w.offset) * p.shrink;
        }
        if (i + 4 < t.steps)
            wide_scales_load(p, t, i + 4, r);
    }
    const int from = (w.lane & ~3) | (i & 3);
    scale[0] = scale[2] = __shfl_sync(0xffffffffu, r->scale[0], from);
    scale[1] = scale[3] = __shfl_sync(0xffffffffu, r->scale[1], from);
    if (S::MODE == WIDE_WEIGHTS && p.shift == 5) {
        scale[2] = __shfl_sync(0xffffffffu, r->scale[2], from);
        scale[3] = __shfl_sync(0xffffffffu, r->scale[3], from);
    }
}

/* ---------------------------------------------------------------- a decoder for wide_steps */

struct wide_forward {
    struct wide_rows rows;
    const unsigned char *from; /* this thread's first row in the slot */
    uint4 top, low;            /* codes of half a step */
    unsigned pair[4];
    float scale[4];
};

template <class S> DEVICE void wide_meet(const struct wide_thread &w, struct wide_forward *d)
{
    barrier_wait(w.full + w.slot, w.parity);
    d->from = w.memory + S::CODES_AT + w.slot * S::CODES + w.first * 32;
}

DEVICE void wide_codes(int h, struct wide_forward *d)
{
    d->top = *(const uint4 *)(d->from + 16 * h), d->low = *(const uint4 *)(d->from + 256 + 16 * h);
}

DEVICE void wide_look(const struct wide_thread &w, int q, struct wide_forward *d)
{
    const uint4 u = d->top, v = d->low;
    const unsigned word[4] = {q % 2 ? u.z : u.x, q % 2 ? v.z : v.x, q % 2 ? u.w : u.y, q % 2 ? v.w : v.y};
#pragma unroll
    for (int i = 0; i < 4; i++)
        d->pair[i] = pair_at(w.memory, word[i], w.at, w.selector);
}

template <class S>
DEVICE void wide_scales_at(const struct bnb_cuda_gemm4_fast &p, const struct wide_tile &t, const struct wide_thread &w,
                           int i, struct wide_forward *d)
{
    wide_scales_of<S>(p, t, w, i, &d->rows, d->scale);
}

template <typename T> DEVICE void wide_round(const struct wide_forward &d, int q, unsigned a[4])
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float s = d.scale[q / 2 * 2 + i % 2];
        a[i] = scale_pair((const T *)nullptr, d.pair[i], s, s);
    }
}

/* ---------------------------------------------------------------- scales that multiply sums */

/* Rows r and r + 8 of 32 bytes of codes, decoded for four steps of 16. */
DEVICE void wide_decode(const unsigned char *pairs, const unsigned char *codes, const struct wide_thread &w,
                        unsigned a[4][4])
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const uint4 u = *(const uint4 *)(codes + 16 * h), v = *(const uint4 *)(codes + 256 + 16 * h);
        const unsigned word[8] = {u.x, v.x, u.y, v.y, u.z, v.z, u.w, v.w};
#pragma unroll
        for (int i = 0; i < 8; i++)
            a[2 * h + i / 4][i % 4] = pair_at(pairs, word[i], w.at, w.selector);
    }
}

/* This warpgroup's turn to multiply has come; it is the other's. */
enum { WIDE_TURN = 3 };
DEVICE void wide_turn_wait(const struct wide_thread &w) { some_barrier(WIDE_TURN + w.group, 256); }
DEVICE void wide_turn_pass(const struct wide_thread &w) { some_arrive(WIDE_TURN + 1 - w.group, 256); }

/* sums += scale * part */
template <int COUNT> DEVICE void wide_fold(float (&sums)[COUNT], const float (&part)[COUNT], const float scale[2])
{
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        sums[i] = __fmaf_rn(scale[i % 4 / 2], part[i], sums[i]);
}

/* Start the products of step `i` alone, into `part`; scale: its top and low. */
template <typename T, class S>
DEVICE void wide_start_part(const struct bnb_cuda_gemm4_fast &p, const struct wide_tile &t, int i,
                            struct wide_thread *w, struct wide_rows *r, unsigned a[4][4], float (&part)[S::SUMS],
                            float scale[4])
{
    wide_scales_of<S>(p, t, *w, i, r, scale);
    barrier_wait(w->full + w->slot, w->parity);
    wide_decode(w->memory, w->memory + S::CODES_AT + w->slot * S::CODES + w->first * 32, *w, a);
    const uint64_t b = wgmma_operand(w->memory + S::X_AT + w->slot * S::X_BYTES);
    wide_turn_wait(*w);
    wgmma_begin();
#pragma unroll
    for (int q = 0; q < 4; q++)
        wgmma((const T *)nullptr, part, a[q], b + 2 * q, q > 0);
    wgmma_commit();
    wide_turn_pass(*w);
    w->now = w->slot;
    wide_turn(w, S::RING);
}

/* The same, and the end of the step before, whose products and scale are `last` and `before`. */
template <typename T, class S>
DEVICE void wide_step_sums(const struct bnb_cuda_gemm4_fast &p, const struct wide_tile &t, int i, struct wide_thread *w,
                           struct wide_rows *r, unsigned a[4][4], float (&sums)[S::SUMS], float (&part)[S::SUMS],
                           float scale[4], float (&last)[S::SUMS], const float before[4])
{
    wide_start_part<T, S>(p, t, i, w, r, a, part, scale);
    wgmma_wait<1>();
    wide_fold(sums, last, before);
    wide_release<S>(*w);
    w->previous = w->now;
}

/* All steps of a tile, two under way: the compiler must see without a doubt which of them has ended. */
template <typename T, class S>
DEVICE void wide_tile_sums(const struct bnb_cuda_gemm4_fast &p, const struct wide_tile &t, struct wide_thread *w,
                           struct wide_rows *r, float (&sums)[S::SUMS])
{
    unsigned even[4][4], odd[4][4];
    float first[S::SUMS], second[S::SUMS], scale[4], other[4];
#pragma unroll
    for (int i = 0; i < S::SUMS; i++)
        sums[i] = 0.0f;
    wide_start_part<T, S>(p, t, 0, w, r, even, first, scale);
    w->previous = w->now;
    int i = 1;
    for (; i + 1 < t.steps; i += 2) {
        wide_step_sums<T, S>(p, t, i, w, r, odd, sums, second, other, first, scale);
        wide_step_sums<T, S>(p, t, i + 1, w, r, even, sums, first, scale, second, other);
    }
    if (i < t.steps) {
        wide_step_sums<T, S>(p, t, i, w, r, odd, sums, second, other, first, scale);
        wgmma_wait<0>();
        wide_fold(sums, second, other);
    } else {
        wgmma_wait<0>();
        wide_fold(sums, first, scale);
    }
}

/* Where the thread's rows of a tile begin; loads of the first scales are under way then. */
DEVICE void wide_rows_begin(const struct bnb_cuda_gemm4_fast &p, const struct wide_tile &t, const struct wide_thread &w,
                            struct wide_rows *r)
{
    const int last = (int)p.g.n - 1, top = t.column + w.first, low = t.column + w.second;
    const int64_t base = t.at.expert * p.g.n;
    r->top = (base + (top < last ? top : last)) * p.g.k;
    r->low = (base + (low < last ? low : last)) * p.g.k;
    wide_scales_load(p, t, 0, r);
}

#endif

#endif
