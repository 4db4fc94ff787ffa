/*
 * gemm4_wide_steps.cuh - all steps of a tile: products of fragments, and decoding in their shadow
 *
 * A warp that starts products of operands in its registers stands still until the matrix units take them.  So a step is
 * cut into four fragments of 16 along the sum, and behind the start of each a warp decodes a little of those that follow:
 * one is rounded, for one pairs are looked up, for one codes are loaded.  No latency of these is then waited for.
 *
 * D is a decoder, of gemm4_wide_forward.cuh or gemm4_wide_grad.cuh.  wide_meet: the codes of the step in w.line have come.
 * wide_codes loads those of fragment q of it.  wide_look looks up the pairs of fragment q, whose codes were loaded
 * last.  wide_scales_at has the scales of step i.  wide_round makes a fragment of the pairs that were looked up last.
 */
#ifndef BNB_CUDA_GEMM4_WIDE_STEPS_CUH
#define BNB_CUDA_GEMM4_WIDE_STEPS_CUH

#include "cuda/kernels/gemm4_wide_forward.cuh"
#include "cuda/kernels/gemm4_wide_grad.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* sums += scale * part */
template <int COUNT> DEVICE void wide_fold(float (&sums)[COUNT], const float (&part)[COUNT], const float scale[2])
{
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        sums[i] = __fmaf_rn(scale[i % 4 / 2], part[i], sums[i]);
}

/* All codes of a step have been loaded; on to those of the next. */
template <class S> DEVICE void wide_read(struct wide_thread *w)
{
    w->last_line = w->line.at;
    wide_advance<S::LINE>(&w->line, S::WAYS);
}

/* The products of step i, and in their shadow the rest of its own fragments and, unless it is the LAST, the first ones of
 * the next.  They are added to `to`; where scales multiply sums, they alone are in it. */
template <typename T, class S, bool LAST, class D>
DEVICE void wide_step(const struct bnb_cuda_gemm4_fast &p, const struct wide_tile &t, int i, struct wide_thread *w,
                      D *d, float (&to)[S::SUMS])
{
    const uint64_t b = wgmma_operand(w->memory + S::X_AT + w->x.at * S::X_BYTES);
    barrier_wait(wide_full<S>(w->memory) + w->x.at, w->x.parity);
#pragma unroll
    for (int q = 0; q < 4; q++) {
        wgmma_begin();
        wgmma((const T *)nullptr, to, d->a[q], b + 2 * q, q > 0 || (S::MODE != WIDE_SUMS && i > 0));
        wgmma_commit();
        wgmma_wait<1>();
        if (S::MODE != WIDE_SUMS && q == 0 && i > 0)
            wide_release<S>(*w);
        if (LAST && q >= 2)
            continue;
        if (q == 2)
            wide_scales_at<S>(p, t, *w, i + 1, d);
        wide_round<T, S>((q + 2) % 4, d);
        if (LAST && q >= 1)
            continue;
        wide_look(*w, (q + 3) % 4, d);
        if (q == 0)
            wide_release_codes<S>(*w);
        if (!LAST && q == 0)
            wide_meet<S>(*w, d);
        if (!LAST)
            wide_codes(q, d);
    }
    w->last_x = w->x.at;
    wide_advance<S::RING>(&w->x, S::WAYS);
    if (!LAST)
        wide_read<S>(w);
}

/* What must be decoded before the first step. */
template <typename T, class S, class D>
DEVICE void wide_first(const struct bnb_cuda_gemm4_fast &p, const struct wide_tile &t, struct wide_thread *w, D *d)
{
    wide_meet<S>(*w, d);
    wide_scales_at<S>(p, t, *w, 0, d);
#pragma unroll
    for (int q = 0; q < 4; q++) {
        wide_codes(q, d);
        if (q < 3)
            wide_look(*w, q, d);
        if (q < 2)
            wide_round<T, S>(q, d);
    }
    wide_read<S>(w);
}

template <int COUNT> DEVICE void wide_nothing(float (&sums)[COUNT])
{
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        sums[i] = 0.0f;
}

/* All steps of a tile, or of one way. */
template <typename T, class S, class D>
DEVICE void wide_steps(const struct bnb_cuda_gemm4_fast &p, const struct wide_tile &t, struct wide_thread *w, D *d,
                       float (&sums)[S::SUMS])
{
    int i = 0;
    if (S::WAYS == 2 && t.steps == 0) {
        wide_nothing(sums);
        return;
    }
    wide_first<T, S>(p, t, w, d);
    for (; i + 1 < t.steps; i++)
        wide_step<T, S, false>(p, t, i, w, d, sums);
    wide_step<T, S, true>(p, t, i, w, d, sums);
    wgmma_wait<0>();
    wide_release<S>(*w);
}

/* The same where scales multiply sums: other warpgroups multiply while this one waits for the products of a step. */
template <typename T, class S>
DEVICE void wide_steps_sums(const struct bnb_cuda_gemm4_fast &p, const struct wide_tile &t, struct wide_thread *w,
                            struct wide_forward *d, float (&sums)[S::SUMS])
{
    float part[S::SUMS];
    wide_nothing(sums);
    if (t.steps == 0)
        return;
    wide_first<T, S>(p, t, w, d);
    for (int i = 0; i + 1 < t.steps; i++) {
        wide_step<T, S, false>(p, t, i, w, d, part);
        wgmma_wait<0>();
        wide_release<S>(*w);
        wide_fold(sums, part, d->before);
    }
    wide_step<T, S, true>(p, t, t.steps - 1, w, d, part);
    wgmma_wait<0>();
    wide_release<S>(*w);
    wide_fold(sums, part, d->scale);
}

#endif

#endif
