/*
 * gemm4_walk.cuh - which tile of which expert comes next
 *
 * Tiles are numbered expert by expert, as far as experts have rows; who takes every so-many-th of them needs no count of
 * all.  Within an expert, WALK_GROUP tiles of rows share a column of the result, so that what neighbours in time read
 * stays in the second-level cache.
 */
#ifndef BNB_CUDA_GEMM4_WALK_CUH
#define BNB_CUDA_GEMM4_WALK_CUH

#include "cuda/kernels/gemm_ptx.cuh"

enum { WALK_GROUP = 8 };

/* Sizes fit into int: core/plan_gemm4.c sees to it. */
struct walk {
    int next, before; /* the number of the next tile, of the first of this expert */
    int expert;
};

struct walk_tile {
    int token, end; /* the first row of activations, and the one after the expert's last */
    int expert, column, split;
};

/* The next tile of `tokens` rows, of an expert that has `columns` tiles across in `splits` parts; then the tile `stride`
 * further is next.  False after the last. */
DEVICE bool walk_next(const struct bnb_cuda_gemm4_fast &p, int tokens, int columns, int stride, struct walk *w,
                      struct walk_tile *t)
{
    int first = 0, end = (int)p.g.m, down = 0;
    for (;; w->expert++) {
        if (w->expert >= p.experts)
            return false;
        if (p.first)
            first = (int)__ldg(p.first + w->expert), end = (int)__ldg(p.first + w->expert + 1);
        down = (end - first + tokens - 1) / tokens;
        const int all = down * columns * p.splits;
        if (w->next < w->before + all)
            break;
        w->before += all;
    }
    int u = w->next - w->before;
    w->next += stride;
    t->split = u % p.splits;
    u /= p.splits;
    const int from = u / (WALK_GROUP * columns) * WALK_GROUP, left = down - from;
    const int size = left < WALK_GROUP ? left : (int)WALK_GROUP;
    u %= WALK_GROUP * columns;
    t->token = first + (from + u % size) * tokens;
    t->end = end;
    t->column = u / size;
    t->expert = w->expert;
    return true;
}

#endif
