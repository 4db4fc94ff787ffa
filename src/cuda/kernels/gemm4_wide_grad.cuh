/*
 * gemm4_wide_grad.cuh - the steps of x W on 9.0: pairs of codes down a column of the weight
 *
 * A step is 64 rows of the weight.  Its codes come as rows of 64 bytes; a transposing load gives a lane the same four
 * columns of two neighbouring rows, of which its warp takes two: the warps with an even number the first two, the others
 * the last two.  Their nibbles change places, and are indices of the table of pairs like those along a row.
 *
 * Each row has a scale, in a sector of memory of its own: eight warps that looked for them would ask the first-level
 * cache for more sectors than there are cycles in a step.  So two warps look, one for each warpgroup, and put them into
 * the slot.
 */
#ifndef BNB_CUDA_GEMM4_WIDE_GRAD_CUH
#define BNB_CUDA_GEMM4_WIDE_GRAD_CUH

#include "cuda/kernels/gemm4_wide.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* ---------------------------------------------------------------- the warps that bring scales */

/* May a row's first and last 32 columns have different scales? */
DEVICE bool wide_grad_halves(const struct bnb_cuda_gemm4_fast &p) { return p.shift == 5 || p.g.k % 64 != 0; }

/* Where a lane's scales begin: of rows `lane` and `lane + 32` of a step, of its warpgroup's first columns, or, where these
 * differ, of the first and last 32 in turn. */
struct wide_grad_rows {
    int64_t at, other; /* elements of the weight, in row `lane` of the step that is loaded next */
    int left;          /* rows of the weight from that row on */
    int each;          /* scales of a row and step, 1 or 2 */
};

/* GRAD_AHEAD steps, or half as many of two scales, are loaded together while those before them are put into slots: loads one
 * by one would be waited for one by one. */
enum { GRAD_AHEAD = 4 };

DEVICE void wide_grad_load(const struct bnb_cuda_gemm4_fast &p, struct wide_grad_rows *s,
                           struct scale4 raw[GRAD_AHEAD][2])
{
#pragma unroll
    for (int u = 0; u < GRAD_AHEAD; u++) {
        const bool last = s->each == 2 && u % 2 == 1;
        const int64_t at = last ? s->other : s->at;
        if (s->left > 0) {
            raw[u][0] = scale4_load(p, at);
            raw[u][1] = scale4_load(p, at + (s->left > 32 ? 32 * p.g.k : 0));
        }
        if (s->each == 1 || last)
            s->at += 64 * p.g.k, s->other += 64 * p.g.k, s->left -= 64;
    }
}

/* By a warp, for the 64 columns of warpgroup `group`. */
template <class S> DEVICE void wide_bring_scales(const struct bnb_cuda_gemm4_fast &p, int group, unsigned char *memory)
{
    struct walk<int> walk = wide_start();
    struct wide_tile t;
    const int lane = (int)threadIdx.x % 32, end = (int)p.g.k;
    const float *map2 = (const float *)(memory + S::MAP2_AT);
    const float offset = p.g.scale.absmax2 ? __ldg(p.g.scale.offset) : 0.0f;
    uint64_t *full = wide_codes_full<S>(memory), *empty = wide_codes_empty<S>(memory);
    struct wide_place line = {};
    while (wide_next_of_warp<S>(p, &walk, &t)) {
        const int row = t.step * 64 + lane, column = t.column + group * 64;
        const int64_t start = (t.at.expert * p.g.n + row) * p.g.k;
        struct wide_grad_rows s = {start + (column < end ? column : 0), start + (column + 32 < end ? column + 32 : 0),
                                   (int)p.g.n - row, wide_grad_halves(p) ? 2 : 1};
        struct scale4 now[GRAD_AHEAD][2] = {}, next[GRAD_AHEAD][2] = {};
        int left = s.left;
        wide_grad_load(p, &s, now);
        for (int i = 0; i < t.steps * s.each; i += GRAD_AHEAD) {
            wide_grad_load(p, &s, next);
#pragma unroll
            for (int u = 0; u < GRAD_AHEAD; u++) {
                const bool first = s.each == 1 || u % 2 == 0, last = s.each == 1 || u % 2 == 1;
                if (i + u >= t.steps * s.each)
                    break;
                if (first)
                    barrier_wait(empty + line.at, line.parity ^ 1);
                float *to = (float *)(memory + S::SCALES_AT + line.at * S::SCALES) + group * 128 + !first * 64 + lane;
                to[0] = left > 0 ? scale4_value(p, now[u][0], map2, offset) * p.shrink : 0.0f;
                to[32] = left > 32 ? scale4_value(p, now[u][1], map2, offset) * p.shrink : 0.0f;
                if (!last)
                    continue;
                left -= 64;
                __syncwarp();
                if (lane == 0)
                    barrier_arrive(full + line.at);
                wide_advance<S::LINE>(&line, 1);
            }
#pragma unroll
            for (int u = 0; u < GRAD_AHEAD; u++)
                now[u][0] = next[u][0], now[u][1] = next[u][1];
        }
    }
}

/* ---------------------------------------------------------------- a decoder for wide_steps */

struct wide_grad {
    const unsigned char *from; /* codes of the slot, as far as they are the same for all fragments */
    const float *scale; /* of its rows, this lane's first two of a fragment */
    unsigned codes[4], pair[4], a[4][4];
    float2 near, far; /* scales of the pairs: of rows 2j and 2j + 1, and of those eight on */
};

template <class S> DEVICE void wide_meet(const struct wide_thread &w, struct wide_grad *d)
{
    barrier_wait(wide_codes_full<S>(w.memory) + w.line.at, w.line.parity);
    d->from = w.memory + S::CODES_AT + w.line.at * S::CODES + w.grad_codes;
    d->scale = (const float *)(w.memory + S::SCALES_AT + w.line.at * S::SCALES + w.grad_scales);
}

/* Two fragments at a time. */
DEVICE void wide_codes(int q, struct wide_grad *d)
{
    if (q % 2 == 0)
        load_matrices_transposed(d->codes, d->from + q * 1024);
}

DEVICE void wide_look(const struct wide_thread &w, int q, struct wide_grad *d)
{ /* bytes: of rows 2j and 2j + 1, then of those eight on */
    const unsigned both = __byte_perm(d->codes[q % 2 * 2], d->codes[q % 2 * 2 + 1], w.selector);
    const unsigned index = (both & 0x0ff00ff0u) | (both >> 12 & 0x000f000fu) | (both << 12 & 0xf000f000u);
#pragma unroll
    for (int i = 0; i < 4; i++)
        d->pair[i] = pair_at(w.memory, index, w.at, pair_selector(i));
    d->near = *(const float2 *)(d->scale + q * 16), d->far = *(const float2 *)(d->scale + q * 16 + 8);
}

/* They lie in the slot. */
template <class S>
DEVICE void wide_scales_at(const struct bnb_cuda_gemm4_fast &, const struct wide_tile &, const struct wide_thread &,
                           int, struct wide_grad *)
{
}

template <typename T, class S> DEVICE void wide_round(int q, struct wide_grad *d)
{
    const T *tag = nullptr;
    d->a[q][0] = scale_pair(tag, d->pair[0], d->near.x, d->near.y);
    d->a[q][1] = scale_pair(tag, d->pair[1], d->near.x, d->near.y);
    d->a[q][2] = scale_pair(tag, d->pair[2], d->far.x, d->far.y);
    d->a[q][3] = scale_pair(tag, d->pair[3], d->far.x, d->far.y);
}

#endif

#endif
