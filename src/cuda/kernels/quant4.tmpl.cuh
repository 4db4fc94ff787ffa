/*
 * quant4.tmpl.cuh - block-wise 4-bit quantisation, NF4 and FP4 (template: included by quant4.cu once per dtype)
 *
 * A thread holds eight consecutive elements, so a block is a group of 4 to 512 threads and every access is coalesced; the
 * next eight are loaded before these are worked on.
 * In: T, NAME.  Source: Dettmers et al. 2023, "QLoRA", section 3.
 */

/* The eight elements of each thread from `at` on, `rounds` times, `step` apart.  FULL: all of them are there, and aligned. */
template <int TYPE, bool FULL>
DEVICE void NAME(quant4_rounds)(const struct bnb_cuda_quant4 &q, int64_t at, int64_t rounds, int64_t step,
                                const struct bnb_bin4 *bins, unsigned (*partial)[16])
{
    const int lanes = 1 << (q.shift - 3);
    const T *x = (const T *)q.a.x;
    struct raw8<T> next;
    if (rounds > 0)
        next = raw8_load(x + at, FULL ? 8 : count8(q.a.n, at), FULL);
    for (int64_t round = 0; round < rounds; round++, at += step) {
        const int count = FULL ? 8 : count8(q.a.n, at);
        float v[8];
        raw8_values(next, v);
        if (round + 1 < rounds)
            next = raw8_load(x + at + step, FULL ? 8 : count8(q.a.n, at + step), FULL);
        bool special;
        const float absmax = block_absmax<1>(&v, lanes, partial[round & 1], &special), r = 1.0f / absmax;
        unsigned word = TYPE == TYPE_NF4 ? 0x77777777u : 0u;
        if (r <= FLOAT_MAX)
            word = encode4_word<TYPE>(v, r, special, bins);
        if (FULL)
            __stcs((unsigned *)(q.a.codes + at / 2), word);
        else
            for (int i = 0; i < (count + 1) / 2; i++)
                q.a.codes[at / 2 + i] = (uint8_t)(word >> 8 * i);
        if ((threadIdx.x & (lanes - 1)) == 0 && count > 0)
            q.a.absmax[at >> q.shift] = absmax;
    }
}

/* Blocks of threads take turns; what is left at the end, and memory that is not aligned, goes the careful way. */
template <int TYPE>
DEVICE void NAME(quant4_tiles)(const struct bnb_cuda_quant4 &q, const struct bnb_bin4 *bins, unsigned (*partial)[16])
{
    const int64_t n = q.a.n, tile = (int64_t)blockDim.x * 8, step = gridDim.x * tile, first = blockIdx.x * tile;
    const int64_t rounds = first < n ? (n - first + step - 1) / step : 0;
    const int64_t whole = q.vector && first + tile <= n ? (n - first - tile) / step + 1 : 0;
    NAME(quant4_rounds)<TYPE, true>(q, first + threadIdx.x * 8, whole, step, bins, partial);
    __syncthreads();
    NAME(quant4_rounds)<TYPE, false>(q, first + whole * step + threadIdx.x * 8, rounds - whole, step, bins, partial);
}

/* Whole, aligned blocks of 512 to 4096: a thread holds four times eight elements, so that few warps have to meet. */
template <int TYPE>
DEVICE void NAME(quant4_wide)(const struct bnb_cuda_quant4 &q, const struct bnb_bin4 *bins, unsigned (*partial)[16])
{
    enum { PARTS = 4 };
    const int lanes = 1 << (q.shift - 5), lane = (int)threadIdx.x & (lanes - 1);
    const int64_t blocks = q.a.n >> q.shift, step = (int64_t)gridDim.x * (blockDim.x / lanes);
    int64_t block = (int64_t)blockIdx.x * (blockDim.x / lanes) + (int)threadIdx.x / lanes;
    const int64_t rounds = (blocks + step - 1) / step;
    for (int64_t round = 0; round < rounds; round++, block += step) {
        const bool there = block < blocks;
        const int64_t at = ((there ? block : 0) << q.shift) + lane * 8;
        struct raw8<T> raw[PARTS];
        float v[PARTS][8];
#pragma unroll
        for (int p = 0; p < PARTS; p++)
            raw[p] = raw8_load((const T *)q.a.x + at + p * lanes * 8, 8, 1);
#pragma unroll
        for (int p = 0; p < PARTS; p++)
            raw8_values(raw[p], v[p]);
        bool special;
        const float absmax = block_absmax<PARTS>(v, lanes, partial[round & 1], &special), r = 1.0f / absmax;
        if (!there)
            continue;
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            unsigned word = TYPE == TYPE_NF4 ? 0x77777777u : 0u;
            if (r <= FLOAT_MAX)
                word = encode4_word<TYPE>(v[p], r, special, bins);
            __stcs((unsigned *)(q.a.codes + (at + p * lanes * 8) / 2), word);
        }
        if (lane == 0)
            q.a.absmax[block] = absmax;
    }
}

extern "C" __global__ void __launch_bounds__(512, 3) NAME(bnb_k_quant4)(const struct bnb_cuda_quant4 q)
{
    __shared__ unsigned partial[2][16];
    __shared__ struct bnb_bin4 bins[33];
    if (threadIdx.x < 33)
        bins[threadIdx.x] = bnb_bins[q.a.type - 1][threadIdx.x];
    __syncthreads();
    if (q.a.type == TYPE_NF4)
        NAME(quant4_tiles)<TYPE_NF4>(q, bins, partial);
    else
        NAME(quant4_tiles)<TYPE_FP4>(q, bins, partial);
}

/* The whole blocks of 512 to 4096 of aligned memory. */
extern "C" __global__ void __launch_bounds__(256, 4) NAME(bnb_k_quant4_wide)(const struct bnb_cuda_quant4 q)
{
    __shared__ unsigned partial[2][16];
    __shared__ struct bnb_bin4 bins[33];
    if (threadIdx.x < 33)
        bins[threadIdx.x] = bnb_bins[q.a.type - 1][threadIdx.x];
    __syncthreads();
    if (q.a.type == TYPE_NF4)
        NAME(quant4_wide)<TYPE_NF4>(q, bins, partial);
    else
        NAME(quant4_wide)<TYPE_FP4>(q, bins, partial);
}

/* A thread writes 16 bytes at a time: eight elements, or twice four; several are under way at once. */
extern "C" __global__ void __launch_bounds__(256) NAME(bnb_k_dequant4)(const struct bnb_cuda_dequant4 q)
{
    enum { AHEAD = 4, WHOLE = 16 / sizeof(T), PARTS = 8 / WHOLE };
    __shared__ float values[16];
    if (threadIdx.x < 16)
        values[threadIdx.x] = bnb_values4[q.type - 1][threadIdx.x];
    __syncthreads();
    const int64_t n = q.a.n, tile = 256 * 8 * AHEAD;
    for (int64_t base = blockIdx.x * tile; base < n; base += gridDim.x * tile) {
        unsigned word[AHEAD * PARTS];
        float scale[AHEAD * PARTS];
#pragma unroll
        for (int u = 0; u < AHEAD * PARTS; u++) {
            const int64_t at = base + (u * 256 + (int)threadIdx.x) * WHOLE;
            word[u] = load_codes4(q.a.codes + at / 2, WHOLE, count_of<WHOLE>(n, at), q.vector);
            scale[u] = at < n ? bnb_block_scale(&q.a.scale, at >> q.shift) : 0.0f;
        }
#pragma unroll
        for (int u = 0; u < AHEAD * PARTS; u++) {
            const int64_t at = base + (u * 256 + (int)threadIdx.x) * WHOLE;
            float v[WHOLE];
#pragma unroll
            for (int i = 0; i < WHOLE; i++)
                v[i] = values[word[u] >> (8 * (i / 2) + (i % 2 ? 0 : 4)) & 15u] * scale[u];
            store16_some((T *)q.a.out + at, count_of<WHOLE>(n, at), q.vector, v);
        }
    }
}
