/*
 * gemm8_grad.cu - the gradient of an int8 layer's input on compute capability 9.0a: x W for f16 and bf16, tiles of 128 columns
 * of the weight and 128 or 256 rows of x
 *
 * A step is 64 rows of the weight.  Its codes come as rows of 128 bytes, one for each column, and the same 64 columns of x;
 * one warp brings the scales of the rows.  The codes are the operand in registers: a transposing load gives a lane two
 * neighbouring columns of rows 2 t and 2 t + 1, and of those 8, 16, 24 on; of a warp's 16 columns, the even ones are rows
 * 0 .. 7 of its operand and the odd ones rows 8 .. 15.  Weights are code * (scale / 127), rounded to the dtype of x, while the
 * products of the step before run.  No more of the weight than this is ever decoded.
 */
#include "cuda/kernels/hopper.cuh"
#include "cuda/kernels/tile8.h"

enum { DEPTH = TILE8_GRAD_DEPTH, STEPS = DEPTH / 16 };

#if BNB_IS_HOPPER

template <int TOKENS> struct grad8 {
    enum {
        STAGES = TOKENS == 256 ? TILE8_GRAD_STAGES_256 : TILE8_GRAD_STAGES_128,
        STAGE = BNB_TILE8_GRAD_STAGE(TOKENS)
    };
    char *stages;
    float *scales; /* [STAGES][DEPTH] */
    uint64_t *full, *empty;
    int at;
    unsigned parity;

    __device__ __forceinline__ grad8(char *dynamic, uint64_t *barriers)
    {
        stages = dynamic + (-(int)shared_address(dynamic) & 1023);
        scales = (float *)(stages + STAGES * STAGE);
        full = barriers, empty = full + STAGES;
        at = 0, parity = 0;
    }

    __device__ __forceinline__ void advance()
    {
        if (++at == STAGES)
            at = 0, parity ^= 1u;
    }
};

/* Tiles of this block: the first column of the weight and the first row of x of the next; false: there is none. */
struct walk8 { int next, steps; };

DEVICE struct walk8 walk8_of(const struct bnb_cuda_product8 &p)
{
    return {(int)blockIdx.x, (int)((p.g.n + DEPTH - 1) / DEPTH)};
}

DEVICE bool next_tile8(const struct bnb_cuda_product8 &p, struct walk8 &w, int tokens, int *column, int *token)
{
    const int columns = (int)((p.g.k + TILE8_ROWS - 1) / TILE8_ROWS), rows = (int)((p.g.m + tokens - 1) / tokens);
    if (w.next >= columns * rows)
        return false;
    bnb_tile8_place(w.next, columns, rows, p.group, column, token);
    *column *= TILE8_ROWS;
    *token *= tokens;
    w.next += (int)gridDim.x;
    return true;
}

/* By one thread: codes and x. */
template <int TOKENS> DEVICE void copy_grad8(const struct bnb_cuda_product8 &p, struct grad8<TOKENS> ring)
{
    typedef struct grad8<TOKENS> Ring;
    struct walk8 walk = walk8_of(p);
    int column, token;
    while (next_tile8(p, walk, TOKENS, &column, &token))
        for (int l = 0; l < walk.steps; l++) {
            char *stage = ring.stages + ring.at * Ring::STAGE;
            barrier_wait(ring.empty + ring.at, ring.parity ^ 1u);
            barrier_expect(ring.full + ring.at, Ring::STAGE);
            bulk_load(stage, &p.tokens, l * DEPTH, token, ring.full + ring.at);
            bulk_load(stage + TOKENS * 2 * DEPTH, &p.weight, column, l * DEPTH, ring.full + ring.at);
            ring.advance();
        }
}

/* By one warp: scales. */
template <int TOKENS> DEVICE void scale_grad8(const struct bnb_cuda_product8 &p, struct grad8<TOKENS> ring)
{
    const int lane = (int)threadIdx.x % 32;
    struct walk8 walk = walk8_of(p);
    int column, token;
    while (next_tile8(p, walk, TOKENS, &column, &token))
        for (int l = 0; l < walk.steps; l++) {
            float *to = ring.scales + ring.at * DEPTH;
            const int64_t row = (int64_t)l * DEPTH + lane;
            const float a = row < p.g.n ? __ldg(p.g.col_stats + row) / 127.0f : 0.0f;
            const float b = row + 32 < p.g.n ? __ldg(p.g.col_stats + row + 32) / 127.0f : 0.0f;
            barrier_wait(ring.empty + ring.at, ring.parity ^ 1u);
            to[lane] = a, to[lane + 32] = b;
            barrier_arrive(ring.full + ring.at);
            ring.advance();
        }
}

/* ---------------------------------------------------------------- the warpgroups that multiply */

/* Four 8 x 8 matrices of 16 bits, transposed; lane l gives the place of row l % 8 of matrix l / 8. */
DEVICE void load_transposed(unsigned r[4], const char *p)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p))
                 : "memory");
}

/* Bytes `low` and `low` + 2 of w, of neighbouring rows, under the scales of these. */
template <typename T> DEVICE unsigned weights8(unsigned w, int low, float2 scale)
{
    return quick_pair((const T *)nullptr, __fmul_rn((float)(int8_t)(w >> 8 * low), scale.x),
                      __fmul_rn((float)(int8_t)(w >> 8 * (low + 2)), scale.y));
}

/* This warp's operand of a step: `piece` is that of its 16 columns in rows of 128 bytes. */
template <typename T>
DEVICE void decode_grad8(const char *codes, const float *scales, int piece, unsigned (&a)[STEPS][4])
{
    const int lane = (int)threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < STEPS / 2; h++) {
        unsigned r[4];
        load_transposed(r, codes + bnb_tile8_grad_row(32 * h + lane, piece));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 scale = *(const float2 *)(scales + 32 * h + 8 * i + lane % 4 * 2);
            a[2 * h + i / 2][i % 2 * 2] = weights8<T>(r[i], 0, scale);
            a[2 * h + i / 2][i % 2 * 2 + 1] = weights8<T>(r[i], 1, scale);
        }
    }
}

/* One step, into a; the step before has read its own operand when this returns. */
template <typename T, int TOKENS, int R>
DEVICE void step_grad8(struct grad8<TOKENS> &ring, int piece, bool first, unsigned (&a)[STEPS][4], float (&d)[R])
{
    typedef struct grad8<TOKENS> Ring;
    const char *stage = ring.stages + ring.at * Ring::STAGE;
    const uint64_t b = operand_at(stage);
    const int before = ring.at == 0 ? Ring::STAGES - 1 : ring.at - 1;
    barrier_wait(ring.full + ring.at, ring.parity);
    decode_grad8<T>(stage + TOKENS * 2 * DEPTH, ring.scales + ring.at * DEPTH, piece, a);
    wgmma_begin();
#pragma unroll
    for (int q = 0; q < STEPS; q++)
        wgmma16((const T *)nullptr, d, a[q], b + 2 * q, !first || q > 0);
    wgmma_commit();
    if (!first) {
        wgmma_wait<1>();
        if (threadIdx.x % 32 == 0)
            barrier_arrive(ring.empty + before);
    }
    ring.advance();
}

/* Two columns of one row of x in each word: eight lanes have 16 neighbours. */
template <typename T, int R>
DEVICE void store_grad8(const struct bnb_cuda_product8 &p, int64_t column, int64_t token, const float (&d)[R])
{
    const int t = (int)threadIdx.x % 4;
    T *out = (T *)p.g.out + column + (int)threadIdx.x % 32 / 4 * 2;
    if (column >= p.g.k) /* k is a multiple of 16 */
        return;
#pragma unroll
    for (int j = 0; j < R / 4; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int64_t row = token + 8 * j + 2 * t + i;
            if (row < p.g.m)
                *(unsigned *)(out + row * p.g.k) = quick_pair((const T *)nullptr, d[4 * j + i], d[4 * j + i + 2]);
        }
}

template <typename T, int TOKENS>
DEVICE void multiply_grad8(const struct bnb_cuda_product8 &p, struct grad8<TOKENS> ring)
{
    typedef struct grad8<TOKENS> Ring;
    struct walk8 walk = walk8_of(p);
    const int piece = __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0) - 4;
    unsigned even[STEPS][4], odd[STEPS][4];
    int column, token;
    while (next_tile8(p, walk, TOKENS, &column, &token)) {
        float d[TOKENS / 2];
        for (int l = 0; l < walk.steps; l += 2) {
            step_grad8<T>(ring, piece, l == 0, even, d);
            if (l + 1 < walk.steps)
                step_grad8<T>(ring, piece, false, odd, d);
        }
        wgmma_wait<0>();
        settle(d);
        if (threadIdx.x % 32 == 0)
            barrier_arrive(ring.empty + (ring.at == 0 ? Ring::STAGES - 1 : ring.at - 1));
        store_grad8<T>(p, column + piece * 16, token, d);
    }
}

template <typename T, int TOKENS> DEVICE void grad8_product(const struct bnb_cuda_product8 &p)
{
    typedef struct grad8<TOKENS> Ring;
    extern __shared__ char dynamic[];
    __shared__ uint64_t barriers[2 * Ring::STAGES];
    const Ring ring(dynamic, barriers);
    if (threadIdx.x == 0) {
        prefetch_map(&p.weight);
        prefetch_map(&p.tokens);
        for (int i = 0; i < Ring::STAGES; i++) {
            barrier_init(ring.full + i, 1 + 32);
            barrier_init(ring.empty + i, TILE8_WORKERS / 32);
        }
        barrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        registers_shrink<40>();
        if (threadIdx.x == 0)
            copy_grad8<TOKENS>(p, ring);
        else if (threadIdx.x >= 32 && threadIdx.x < 64)
            scale_grad8<TOKENS>(p, ring);
    } else {
        registers_grow<232>();
        multiply_grad8<T, TOKENS>(p, ring);
    }
}

#endif

#if BNB_HAS_DTYPE(BNB_CUDA_F16)

extern "C" __global__ void __launch_bounds__(TILE8_THREADS, 1)
    bnb_k_gemm8_grad128_f16(const IN_PLACE struct bnb_cuda_product8 p)
{
#if BNB_IS_HOPPER
    grad8_product<f16, 128>(p);
#endif
}

extern "C" __global__ void __launch_bounds__(TILE8_THREADS, 1)
    bnb_k_gemm8_grad256_f16(const IN_PLACE struct bnb_cuda_product8 p)
{
#if BNB_IS_HOPPER
    grad8_product<f16, 256>(p);
#endif
}

#endif
#if BNB_HAS_DTYPE(BNB_CUDA_BF16)

extern "C" __global__ void __launch_bounds__(TILE8_THREADS, 1)
    bnb_k_gemm8_grad128_bf16(const IN_PLACE struct bnb_cuda_product8 p)
{
#if BNB_IS_HOPPER
    grad8_product<bf16, 128>(p);
#endif
}

extern "C" __global__ void __launch_bounds__(TILE8_THREADS, 1)
    bnb_k_gemm8_grad256_bf16(const IN_PLACE struct bnb_cuda_product8 p)
{
#if BNB_IS_HOPPER
    grad8_product<bf16, 256>(p);
#endif
}

#endif
