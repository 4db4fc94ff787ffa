/*
 * gemm4_walk.cuh - which tile of which expert comes next
 *
 * Tiles are numbered expert by expert, as far as experts have rows; who takes every so-many-th of them needs no count of
 * all.  Within an expert, WALK_GROUP tiles of rows share a column of the result, so that what neighbours in time read
 * stays in the second-level cache.
 */
#ifndef BNB_CUDA_GEMM4_WALK_CUH
#define BNB_CUDA_GEMM4_WALK_CUH

#include "cuda/kernels/device.cuh"

enum { WALK_GROUP = 8 };

/* N: int where sizes fit, as core/plan_gemm4.c sees to for the fast kernels; registers are dear there. */
template <typename N> struct walk {
    N next, before; /* the number of the next tile, of the first of this expert */
    int expert;
};

template <typename N> struct walk_tile {
    N token, end,
        column; /* the first row of activations, the one after the expert's last; the number of a tile across */
    int expert, split;
};

/* What there is to walk over: struct bnb_gemm4_block and struct bnb_cuda_gemm4_fast say what the members mean. */
struct walk_work {
    const int64_t *first;
    int64_t m;
    int experts, splits;
};

/* The next tile of `tokens` rows, of an expert that has `columns` tiles across in `splits` parts; then the tile `stride`
 * further is next.  False after the last. */
template <typename N>
DEVICE bool walk_next(const struct walk_work &work, int tokens, N columns, int stride, struct walk<N> *w,
                      struct walk_tile<N> *t)
{
    N first = 0, end = (N)work.m, down = 0;
    for (;; w->expert++) {
        if (w->expert >= work.experts)
            return false;
        if (work.first)
            first = (N)__ldg(work.first + w->expert), end = (N)__ldg(work.first + w->expert + 1);
        down = (end - first + tokens - 1) / tokens;
        const N all = down * columns * work.splits;
        if (w->next < w->before + all)
            break;
        w->before += all;
    }
    N u = w->next - w->before;
    w->next += stride;
    t->split = (int)(u % work.splits);
    u /= work.splits;
    const N from = u / (WALK_GROUP * columns) * WALK_GROUP, left = down - from;
    const N size = left < WALK_GROUP ? left : (N)WALK_GROUP;
    u %= WALK_GROUP * columns;
    t->token = first + (from + u % size) * tokens;
    t->end = end;
    t->column = u / size;
    t->expert = w->expert;
    return true;
}

#endif
