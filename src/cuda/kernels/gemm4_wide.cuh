/*
 * gemm4_wide.cuh - a 4-bit weight times many rows of activations on 9.0: wgmma with weights decoded in registers
 *
 * A cluster of two blocks multiplies 256 rows of the weight by TOKENS rows of activations; each block has 128 rows, its
 * two warpgroups 64 each.  One thread brings codes and activations by tensor copies, RING steps of 64 along K ahead; each
 * block brings half of the activations, to both.  A weight is a value of the f16 table times its scale in f32, rounded to
 * T: within 2^-13 the number that dequantising gives.  The operand of a step is decoded while the step before multiplies.
 *
 * full[s]: the copies of slot s have landed.  empty[s]: all warps of both blocks are done with slot s.  Both ends walk
 * over the same tiles and steps, so that slots and phases agree; peers leave together, for they signal each other.
 */
#ifndef BNB_CUDA_GEMM4_WIDE_CUH
#define BNB_CUDA_GEMM4_WIDE_CUH

#include "cuda/kernels/gemm4_decode.cuh"
#include "cuda/kernels/gemm4_walk.cuh"
#include "cuda/kernels/gemm_hopper.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int COUNT> struct wide_shape {
    enum {
        TOKENS = COUNT,
        SUMS = COUNT / 2, /* of a thread */
        X_BYTES = COUNT * 128,
        CODES = 128 * 32,
        RING = COUNT == 256 ? 4
        : COUNT == 128      ? 6
                            : 8,
        X_AT = PAIRS,
        CODES_AT = X_AT + RING * X_BYTES,
        STAGING_AT = CODES_AT + RING * CODES,
        MAP2_AT = STAGING_AT + 2 * 8192, /* 64 rows of activations and 64 of the weight for each warpgroup */
        BARRIERS_AT = MAP2_AT + 1024
    };
};

/* ---------------------------------------------------------------- tiles */

struct wide_tile {
    struct walk_tile at;
    int64_t row; /* of the expert's weight, this block's first */
    int step, steps;
};

DEVICE struct walk wide_start()
{
    struct walk w = {(int)blockIdx.x / 2, 0, 0};
    return w;
}

/* This cluster's next tile; false after its last. */
template <int TOKENS> DEVICE bool wide_next(const struct bnb_cuda_gemm4_fast &p, struct walk *w, struct wide_tile *t)
{
    if (!walk_next(p, TOKENS, (int)((p.g.n + 255) / 256), (int)gridDim.x / 2, w, &t->at))
        return false;
    const int all = (int)(p.g.k / 64), left = all - t->at.split * p.steps;
    t->row = (int64_t)t->at.column * 256 + cluster_rank() * 128;
    t->step = t->at.split * p.steps;
    t->steps = left < p.steps ? left : p.steps;
    return true;
}

/* ---------------------------------------------------------------- copies */

template <class S>
DEVICE void wide_bring(const struct bnb_cuda_gemm4_wide &p, unsigned char *memory, uint64_t *full, uint64_t *empty)
{
    struct walk walk = wide_start();
    struct wide_tile t;
    const int half = S::TOKENS / 2, rank = (int)cluster_rank();
    int slot = 0;
    unsigned parity = 1;
    while (wide_next<S::TOKENS>(p.fast, &walk, &t))
        for (int i = 0; i < t.steps; i++) {
            const int k = (t.step + i) * 64;
            barrier_wait(empty + slot, parity);
            barrier_expect(full + slot, S::X_BYTES + S::CODES);
            copy_box(memory + S::CODES_AT + slot * S::CODES, &p.codes, k / 2, (int)(t.at.expert * p.fast.g.n + t.row),
                     full + slot);
            copy_box_to(memory + S::X_AT + slot * S::X_BYTES + rank * (S::X_BYTES / 2), &p.x, k,
                        (int)t.at.token + rank * half, full + slot, 3);
            if (++slot == S::RING)
                slot = 0, parity ^= 1;
        }
}

/* ---------------------------------------------------------------- products */

/* The four scales of a thread: of rows r and r + 8, of the first and second 32 of a step. */
struct wide_scales { struct scale4 top[2], low[2]; };

DEVICE void wide_scales_load(const struct bnb_cuda_gemm4_fast &p, int64_t top, int64_t low, int k,
                             struct wide_scales *s)
{
    s->top[0] = scale4_load(p, top + k);
    s->low[0] = scale4_load(p, low + k);
    if (p.shift == 5) {
        s->top[1] = scale4_load(p, top + k + 32);
        s->low[1] = scale4_load(p, low + k + 32);
    }
}

template <typename T>
DEVICE unsigned wide_pair(const T *tag, const unsigned char *pairs, unsigned codes, unsigned lane, unsigned selector,
                          float scale)
{
    float low, high;
    f16_pair_values(pair_at(pairs, codes, lane, selector), &low, &high);
    return quick_pair(tag, low * scale, high * scale);
}

/* Rows r and r + 8 of 32 bytes of codes, decoded for four steps of 16. */
template <typename T>
DEVICE void wide_decode(const unsigned char *pairs, const unsigned char *codes, const float top[2], const float low[2],
                        unsigned a[4][4])
{
    const unsigned lane = threadIdx.x % 32 * 4, selector = pair_selector((int)threadIdx.x % 4);
    const T *tag = nullptr;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const uint4 u = *(const uint4 *)(codes + 16 * h), v = *(const uint4 *)(codes + 256 + 16 * h);
        a[2 * h][0] = wide_pair(tag, pairs, u.x, lane, selector, top[h]);
        a[2 * h][1] = wide_pair(tag, pairs, v.x, lane, selector, low[h]);
        a[2 * h][2] = wide_pair(tag, pairs, u.y, lane, selector, top[h]);
        a[2 * h][3] = wide_pair(tag, pairs, v.y, lane, selector, low[h]);
        a[2 * h + 1][0] = wide_pair(tag, pairs, u.z, lane, selector, top[h]);
        a[2 * h + 1][1] = wide_pair(tag, pairs, v.z, lane, selector, low[h]);
        a[2 * h + 1][2] = wide_pair(tag, pairs, u.w, lane, selector, top[h]);
        a[2 * h + 1][3] = wide_pair(tag, pairs, v.w, lane, selector, low[h]);
    }
}

/* What a warp of the consumers keeps between steps. */
struct wide_state {
    struct wide_scales raw;
    int64_t top, low; /* elements of the weight where its thread's two rows begin */
    int slot, previous;
    unsigned parity;
};

DEVICE void wide_release(uint64_t *empty, int slot)
{
    if (threadIdx.x % 32 < 2)
        barrier_arrive_at(empty + slot, threadIdx.x % 32);
}

/* Decode step `i` of the tile into `a`, start its products, and free the slot of the step before. */
template <typename T, class S>
DEVICE void wide_step(const struct bnb_cuda_gemm4_fast &p, unsigned char *memory, uint64_t *full, uint64_t *empty,
                      const struct wide_tile &t, int i, float offset, struct wide_state *s, unsigned a[4][4],
                      float (&sums)[S::SUMS])
{
    const float *map2 = (const float *)(memory + S::MAP2_AT);
    const int row = (int)threadIdx.x / 32 * 16 + (int)threadIdx.x % 32 / 4 - 64;
    float top[2], low[2];
    top[0] = top[1] = scale4_value(p, s->raw.top[0], map2, offset) * p.shrink;
    low[0] = low[1] = scale4_value(p, s->raw.low[0], map2, offset) * p.shrink;
    if (p.shift == 5) {
        top[1] = scale4_value(p, s->raw.top[1], map2, offset) * p.shrink;
        low[1] = scale4_value(p, s->raw.low[1], map2, offset) * p.shrink;
    }
    if (i + 1 < t.steps)
        wide_scales_load(p, s->top, s->low, (t.step + i + 1) * 64, &s->raw);
    barrier_wait(full + s->slot, s->parity);
    wide_decode<T>(memory, memory + S::CODES_AT + s->slot * S::CODES + row * 32, top, low, a);
    const uint64_t b = wgmma_operand(memory + S::X_AT + s->slot * S::X_BYTES);
    wgmma_begin();
#pragma unroll
    for (int q = 0; q < 4; q++)
        wgmma((const T *)nullptr, sums, a[q], b + 2 * q, i > 0 || q > 0);
    wgmma_commit();
    if (i > 0) {
        wgmma_wait<1>();
        wide_release(empty, s->previous);
    }
    s->previous = s->slot;
    if (++s->slot == S::RING)
        s->slot = 0, s->parity ^= 1;
}

/* ---------------------------------------------------------------- results */

/* Sums as they are, of a split. */
template <class S>
DEVICE void wide_store_split(const struct bnb_cuda_gemm4_fast &p, const struct wide_tile &t, int64_t row,
                             const float (&sums)[S::SUMS])
{
    float *to = p.partial + (int64_t)t.at.split * p.g.m * p.g.n + row;
    const int64_t first = t.at.token + (int)threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < S::SUMS; i++) {
        const int64_t token = first + i / 4 * 8 + i % 2, r = row + (i % 4 / 2) * 8;
        if (token < t.at.end && r < p.g.n)
            to[token * p.g.n + i % 4 / 2 * 8] = sums[i];
    }
}

/* Sums with bias to T, by 64 rows of activations through the warpgroup's 8 KB: rows of 128 bytes, swizzled. */
template <typename T, class S>
DEVICE void wide_store(const struct bnb_cuda_gemm4_wide &p, const struct wide_tile &t, int64_t row,
                       unsigned char *staging, const float (&sums)[S::SUMS])
{
    const struct bnb_gemm4_block &g = p.fast.g;
    const int thread = (int)threadIdx.x % 128, lane = thread % 32, id = (int)threadIdx.x / 128;
    const int64_t start = t.row + (id - 1) * 64;
    const T *bias = (const T *)g.bias + t.at.expert * g.n, *tag = nullptr;
    const float top = g.bias && row < g.n ? value_of(bias + row) : 0.0f;
    const float low = g.bias && row + 8 < g.n ? value_of(bias + row + 8) : 0.0f;
#pragma unroll
    for (int c = 0; c < S::TOKENS / 64; c++) {
        some_barrier(id, 128);
#pragma unroll
        for (int i = 0; i < 4; i++) { /* 16 tokens: two tiles of 8, of which each has rows r and r + 8 */
            const float *v = sums + c * 32 + i * 8;
            const unsigned r[4] = {quick_pair(tag, v[0] + top, v[1] + top), quick_pair(tag, v[2] + low, v[3] + low),
                                   quick_pair(tag, v[4] + top, v[5] + top), quick_pair(tag, v[6] + low, v[7] + low)};
            const int token = i * 16 + lane / 16 * 8 + lane % 8, chunk = thread / 32 * 2 + lane / 8 % 2;
            store_matrices_transposed(staging + token * 128 + (chunk ^ token % 8) * 16, r);
        }
        some_barrier(id, 128);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = i * 16 + thread / 8, chunk = thread % 8;
            const unsigned char *from = staging + token * 128 + (chunk ^ token % 8) * 16;
            const int64_t at = t.at.token + c * 64 + token, n = start + chunk * 8;
            if (at >= t.at.end || n >= g.n)
                continue;
            T *to = (T *)g.out + at * g.n + n;
            if (p.fast.store) {
                *(uint4 *)to = *(const uint4 *)from;
            } else {
                for (int e = 0; e < 8 && n + e < g.n; e++)
                    to[e] = ((const T *)from)[e];
            }
        }
    }
}

template <typename T, class S>
DEVICE void wide_multiply(const struct bnb_cuda_gemm4_wide &p, unsigned char *memory, uint64_t *full, uint64_t *empty)
{
    struct walk walk = wide_start();
    struct wide_tile t;
    struct wide_state s = {};
    const float offset = p.fast.g.scale.absmax2 ? __ldg(p.fast.g.scale.offset) : 0.0f;
    const int within = (int)threadIdx.x / 32 * 16 + (int)threadIdx.x % 32 / 4 - 64;
    unsigned char *staging = memory + S::STAGING_AT + (threadIdx.x / 128 - 1) * 8192;
    while (wide_next<S::TOKENS>(p.fast, &walk, &t)) {
        float sums[S::SUMS];
        unsigned even[4][4], odd[4][4];
        const int64_t row = t.row + within, last = p.fast.g.n - 1, base = t.at.expert * p.fast.g.n;
        s.top = (base + (row < last ? row : last)) * p.fast.g.k;
        s.low = (base + (row + 8 < last ? row + 8 : last)) * p.fast.g.k;
        wide_scales_load(p.fast, s.top, s.low, t.step * 64, &s.raw);
        for (int i = 0; i < t.steps; i += 2) {
            wide_step<T, S>(p.fast, memory, full, empty, t, i, offset, &s, even, sums);
            if (i + 1 < t.steps)
                wide_step<T, S>(p.fast, memory, full, empty, t, i + 1, offset, &s, odd, sums);
        }
        wgmma_wait<0>();
        wide_release(empty, s.previous);
        if (p.fast.partial)
            wide_store_split<S>(p.fast, t, row, sums);
        else
            wide_store<T, S>(p, t, row, staging, sums);
    }
}

/* ---------------------------------------------------------------- the kernel: 384 threads */

template <typename T, class S> DEVICE void wide_product(const struct bnb_cuda_gemm4_wide &p)
{
    SHARED_MEMORY(memory);
    uint64_t *full = (uint64_t *)(memory + S::BARRIERS_AT), *empty = full + S::RING;
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::RING; i++) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, 16); /* eight warps of each block */
        }
        barriers_ready();
    }
    pairs_fill((const f16 *)nullptr, p.fast, memory, threadIdx.x, 384);
    map2_fill(p.fast, (float *)(memory + S::MAP2_AT), threadIdx.x, 384);
    __syncthreads();
    cluster_barrier();
    if (threadIdx.x < 128) {
        registers_down_to<40>();
        if (threadIdx.x == 0)
            wide_bring<S>(p, memory, full, empty);
        __syncwarp();
    } else {
        registers_to<232>();
        wide_multiply<T, S>(p, memory, full, empty);
    }
    cluster_barrier();
}

#endif

#endif
