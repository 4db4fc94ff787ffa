/*
 * gemm4_wide.cuh - a 4-bit weight times many rows of activations on 9.0: wgmma with weights decoded in registers
 *
 * Both ways: x W^T and, for the gradient, x W.  Columns of the result are rows of the operand A, out is transposed.  A
 * cluster of two blocks makes 256 columns by TOKENS rows; each block has 128 columns, its two warpgroups 64 each.
 *
 * Activations and codes come by tensor copies, in rings of steps of 64 along the sum; each block brings half of the
 * activations, to both.  Codes have a ring of their own, for they are needed a step before the activations: in one ring
 * with them a slot would be held too long for those under way to cover the latency of memory.
 *
 * Up to 64 tokens, two pairs of warpgroups take steps in turn, and add up in the end: four warps of a scheduler cover each
 * other's latencies, two do not.
 *
 * full: the copies of a slot have landed.  empty: all warps that read the slot are done with it, of both blocks where it
 * holds activations.  All walk over the same tiles and steps, so that slots and phases agree; peers leave together, for
 * they signal each other.
 */
#ifndef BNB_CUDA_GEMM4_WIDE_CUH
#define BNB_CUDA_GEMM4_WIDE_CUH

#include "core/plan_gemm4.h"
#include "cuda/kernels/gemm4_decode.cuh"
#include "cuda/kernels/gemm4_walk.cuh"
#include "cuda/kernels/gemm_hopper.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* What scales multiply, in f32: sums of 64 products, for few tokens; or weights, which are then rounded to T, so that
 * they are within 2^-13 the numbers that dequantising gives. */
enum { WIDE_SUMS, WIDE_WEIGHTS, WIDE_GRAD };

/* MEET: the two blocks of a cluster have the same 128 columns, and each half of the steps; else all steps, of 128 columns each. */
template <int COUNT, int HOW, bool MEET = false> struct wide_shape {
    enum {
        TOKENS = COUNT,
        MODE = HOW,
        MEETS = MEET,
        ACROSS = MEET ? 128 : 256, /* columns of a cluster */
        GRAD = HOW == WIDE_GRAD,
        WAYS = COUNT < 128 ? 2 : 1,
        SHORT = HOW == WIDE_WEIGHTS && WAYS == 1, /* blocks may be of 32; registers are too few elsewhere */
        WORKERS = WAYS * 256, /* threads that multiply; those that bring come after them */
        THREADS = WORKERS + 128,
        WORKER_REGISTERS = WAYS == 1 ? 216 : 112,
        BRINGER_REGISTERS = WAYS == 1 ? 72 : 32,
        SUMS = COUNT / 2, /* of a thread */
        PIECE = BNB_GEMM4_WIDE_PIECE(COUNT, GRAD),
        X_BYTES = COUNT * 128,
        CODES = BNB_GEMM4_WIDE_CODES,
        SCALES = BNB_GEMM4_WIDE_SCALES(GRAD), /* [warpgroup][32 columns][row] of a step */
        RING = BNB_GEMM4_WIDE_RING(COUNT),
        LINE = BNB_GEMM4_WIDE_LINE(COUNT, GRAD),
        STAGING =
            BNB_GEMM4_WIDE_STAGING(COUNT, GRAD), /* a piece of 64 columns; 16 sums of each thread of a warpgroup */
        X_AT = PAIRS,
        CODES_AT = X_AT + RING * X_BYTES,
        SCALES_AT = CODES_AT + LINE * CODES,
        STAGING_AT = SCALES_AT + LINE * SCALES,
        MAP2_AT = STAGING_AT + 2 * STAGING,
        BARRIERS_AT = MAP2_AT + 1024, /* full and empty of the ring, then of the line; that of sums that meet */
        END = BARRIERS_AT + 8 * (2 * RING + 2 * LINE + 1)
    };
    static_assert((int)END == BNB_GEMM4_WIDE_SHARED(COUNT, GRAD), "what the launch asks for");
};

/* ---------------------------------------------------------------- tiles */

struct wide_tile {
    struct walk_tile<int> at;
    int column;      /* of the expert's result, this block's first */
    int step, steps; /* of 64 along the sum; of one way, where two take them in turn */
    int all;         /* steps of both */
};

template <class S> DEVICE int wide_inner(const struct bnb_cuda_gemm4_fast &p) { return (int)(S::GRAD ? p.g.n : p.g.k); }
template <class S> DEVICE int wide_outer(const struct bnb_cuda_gemm4_fast &p) { return (int)(S::GRAD ? p.g.k : p.g.n); }

DEVICE struct walk<int> wide_start()
{
    struct walk<int> w = {(int)blockIdx.x / 2, 0, 0};
    return w;
}

/* This cluster's next tile; false after its last. */
template <class S> DEVICE bool wide_next(const struct bnb_cuda_gemm4_fast &p, struct walk<int> *w, struct wide_tile *t)
{
    const struct walk_work work = {p.first, p.g.m, p.experts, p.splits};
    if (!walk_next(work, S::TOKENS, (wide_outer<S>(p) + S::ACROSS - 1) / S::ACROSS, (int)gridDim.x / 2, w, &t->at))
        return false;
    const int rank = (int)cluster_rank(), part = S::MEETS ? t->at.split * 2 + rank : t->at.split;
    const int left = (wide_inner<S>(p) + 63) / 64 - part * p.steps;
    t->column = S::MEETS ? t->at.column * 128 : t->at.column * 256 + rank * 128;
    t->step = part * p.steps;
    t->steps = left < p.steps ? left : p.steps;
    return true;
}

/* The same for a whole warp, in numbers that the compiler knows to be the same for all of it. */
template <class S>
DEVICE bool wide_next_of_warp(const struct bnb_cuda_gemm4_fast &p, struct walk<int> *w, struct wide_tile *t)
{
    const bool there = same_in_warp(wide_next<S>(p, w, t));
    t->at.token = same_in_warp(t->at.token), t->at.end = same_in_warp(t->at.end);
    t->at.expert = same_in_warp(t->at.expert), t->at.split = same_in_warp(t->at.split);
    t->column = same_in_warp(t->column), t->step = same_in_warp(t->step), t->steps = same_in_warp(t->steps);
    return there;
}

/* ---------------------------------------------------------------- copies */

/* A slot of a ring, and the parity of the phase in which it becomes full. */
struct wide_place {
    int at;
    unsigned parity;
};

/* By `count` slots, which may be -1. */
template <int LENGTH> DEVICE void wide_advance(struct wide_place *p, int count)
{
    p->at += count;
    if (p->at >= LENGTH)
        p->at -= LENGTH, p->parity ^= 1;
    if (count < 0 && p->at < 0)
        p->at += LENGTH, p->parity ^= 1;
}

template <class S> DEVICE uint64_t *wide_full(unsigned char *memory) { return (uint64_t *)(memory + S::BARRIERS_AT); }
template <class S> DEVICE uint64_t *wide_empty(unsigned char *memory) { return wide_full<S>(memory) + S::RING; }
template <class S> DEVICE uint64_t *wide_codes_full(unsigned char *memory) { return wide_empty<S>(memory) + S::RING; }
template <class S> DEVICE uint64_t *wide_codes_empty(unsigned char *memory)
{
    return wide_codes_full<S>(memory) + S::LINE;
}
template <class S> DEVICE uint64_t *wide_met(unsigned char *memory) { return wide_codes_empty<S>(memory) + S::LINE; }

template <class S> DEVICE void wide_bring(const struct bnb_cuda_gemm4_wide &p, unsigned char *memory)
{
    struct walk<int> walk = wide_start();
    struct wide_tile t;
    struct wide_place x = {};
    const int half = S::TOKENS / 2, rank = (int)cluster_rank();
    uint64_t *full = wide_full<S>(memory), *empty = wide_empty<S>(memory);
    while (wide_next<S>(p.fast, &walk, &t)) {
        for (int i = 0; i < t.steps; i++) {
            barrier_wait(empty + x.at, x.parity ^ 1);
            barrier_expect(full + x.at, S::X_BYTES);
            unsigned char *to = memory + S::X_AT + x.at * S::X_BYTES;
            if (S::MEETS) {
                copy_box(to, &p.x, (t.step + i) * 64, t.at.token, full + x.at);
                copy_box(to + S::X_BYTES / 2, &p.x, (t.step + i) * 64, t.at.token + half, full + x.at);
            } else {
                copy_box_to(to + rank * (S::X_BYTES / 2), &p.x, (t.step + i) * 64, t.at.token + rank * half,
                            full + x.at, 3);
            }
            wide_advance<S::RING>(&x, 1);
        }
    }
    for (int i = 0; i < S::RING; i++) { /* until nobody signals this block any more */
        barrier_wait(empty + x.at, x.parity ^ 1);
        wide_advance<S::RING>(&x, 1);
    }
}

template <class S> DEVICE void wide_bring_codes(const struct bnb_cuda_gemm4_wide &p, unsigned char *memory)
{
    struct walk<int> walk = wide_start();
    struct wide_tile t;
    struct wide_place line = {};
    uint64_t *full = wide_codes_full<S>(memory), *empty = wide_codes_empty<S>(memory);
    while (wide_next<S>(p.fast, &walk, &t)) {
        const int base = t.at.expert * (int)p.fast.g.n;
        for (int i = 0; i < t.steps; i++) {
            const int l = (t.step + i) * 64;
            barrier_wait(empty + line.at, line.parity ^ 1);
            barrier_expect(full + line.at, S::CODES);
            copy_box(memory + S::CODES_AT + line.at * S::CODES, &p.codes, (S::GRAD ? t.column : l) / 2,
                     base + (S::GRAD ? l : t.column), full + line.at);
            wide_advance<S::LINE>(&line, 1);
        }
    }
}

/* ---------------------------------------------------------------- what a thread that multiplies keeps */

struct wide_thread {
    unsigned char *memory;
    float offset;                /* of nested scales */
    int way, group, warp, lane;  /* which steps; which of its two warpgroups; which of its four warps */
    int first, second; /* its two columns among the 128 of the block: rows g and g + 8 of its warp's operand */
    unsigned at, selector; /* of this lane: its byte of the table's addresses; what picks its bytes of codes */
    int grad_codes, grad_scales; /* GRAD: where in a slot this lane's begin */
    struct wide_place x, line; /* of the step that is multiplied; of the step that is decoded */
    int last_x, last_line; /* slots of the steps before these */
};

/* The activations of the step before have been multiplied. */
template <class S> DEVICE void wide_release(const struct wide_thread &w)
{
    uint64_t *empty = wide_empty<S>(w.memory) + w.last_x;
    if (S::MEETS && w.lane == 0)
        barrier_arrive(empty);
    else if (!S::MEETS && w.lane < 2)
        barrier_arrive_at(empty, (unsigned)w.lane);
}

/* The codes of the step before have been read. */
template <class S> DEVICE void wide_release_codes(const struct wide_thread &w)
{
    __syncwarp();
    if (w.lane == 0)
        barrier_arrive(wide_codes_empty<S>(w.memory) + w.last_line);
}

/* Numbers of barriers: from 1, of a warpgroup that stores; from 3, of both ways of a group. */
enum { WIDE_STORE = 1, WIDE_WAYS = 3 };

/* ---------------------------------------------------------------- results */

/* Of the sums of a thread, does this block store number i of `count`? */
template <class S> DEVICE bool wide_is_own(int i, int count)
{
    return !S::MEETS || i / (count / 2) == (int)cluster_rank();
}

/* Sums as they are, of a split. */
template <class S>
DEVICE void wide_store_split(const struct bnb_cuda_gemm4_fast &p, const struct wide_tile &t,
                             const struct wide_thread &w, const float (&sums)[S::SUMS])
{
    const int outer = wide_outer<S>(p), first = t.at.token + w.lane % 4 * 2;
    float *to = p.partial + (int64_t)t.at.split * p.g.m * outer;
#pragma unroll
    for (int i = 0; i < S::SUMS; i++) {
        const int token = first + i / 4 * 8 + i % 2, column = t.column + (i % 4 / 2 ? w.second : w.first);
        if (wide_is_own<S>(i, S::SUMS) && token < t.at.end && column < outer)
            to[(int64_t)token * outer + column] = sums[i];
    }
}

/* The results of 16 tokens in T, rows of 64 columns as they will lie in memory, swizzled by 16 bytes. */
template <typename T, class S>
DEVICE void wide_stage(unsigned char *staging, const struct wide_thread &w, int token, const float v[8], float top,
                       float low)
{
    const T *tag = nullptr;
    if (S::GRAD) { /* its columns are neighbours */
        const int at = (w.first - w.group * 64) * 2;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = token + i / 2 * 8 + w.lane % 4 * 2 + i % 2;
            *(unsigned *)(staging + row * 128 + (at / 16 ^ row % 8) * 16 + at % 16) =
                quick_pair(tag, v[i / 2 * 4 + i % 2], v[i / 2 * 4 + i % 2 + 2]);
        }
        return;
    }
    const unsigned r[4] = {quick_pair(tag, v[0] + top, v[1] + top), quick_pair(tag, v[2] + low, v[3] + low),
                           quick_pair(tag, v[4] + top, v[5] + top), quick_pair(tag, v[6] + low, v[7] + low)};
    const int row = token + w.lane / 16 * 8 + w.lane % 8, chunk = w.warp * 2 + w.lane / 8 % 2;
    store_matrices_transposed(staging + row * 128 + (chunk ^ row % 8) * 16, r);
}

/* Sums with bias to T, some tokens at a time through the warpgroup's part of shared memory. */
template <typename T, class S>
DEVICE void wide_store(const struct bnb_cuda_gemm4_wide &p, const struct wide_tile &t, const struct wide_thread &w,
                       const float (&sums)[S::SUMS])
{
    const struct bnb_gemm4_block &g = p.fast.g;
    const int outer = wide_outer<S>(p.fast), thread = w.warp * 32 + w.lane, start = t.column + w.group * 64;
    const T *bias = (const T *)g.bias + (int64_t)t.at.expert * outer + t.column;
    const float top = g.bias && t.column + w.first < outer ? value_of(bias + w.first) : 0.0f;
    const float low = g.bias && t.column + w.second < outer ? value_of(bias + w.second) : 0.0f;
    unsigned char *staging = w.memory + S::STAGING_AT + w.group * S::STAGING;
#pragma unroll
    for (int c = 0; c < S::TOKENS / S::PIECE; c++) {
        if (!wide_is_own<S>(c, S::TOKENS / S::PIECE))
            continue;
        some_barrier(WIDE_STORE + w.group, 128);
#pragma unroll
        for (int i = 0; i < S::PIECE / 16; i++)
            wide_stage<T, S>(staging, w, i * 16, sums + c * (S::PIECE / 2) + i * 8, top, low);
        some_barrier(WIDE_STORE + w.group, 128);
#pragma unroll
        for (int i = 0; i < S::PIECE / 16; i++) {
            const int row = i * 16 + thread / 8, chunk = thread % 8, column = start + chunk * 8;
            const unsigned char *from = staging + row * 128 + (chunk ^ row % 8) * 16;
            const int token = t.at.token + c * S::PIECE + row;
            if (token >= t.at.end || column >= outer)
                continue;
            T *to = (T *)g.out + (int64_t)token * outer + column;
            if (p.fast.store) {
                *(uint4 *)to = *(const uint4 *)from;
            } else {
                for (int e = 0; e < 8 && column + e < outer; e++)
                    to[e] = ((const T *)from)[e];
            }
        }
    }
}

#endif

#endif
