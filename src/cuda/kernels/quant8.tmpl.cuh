/*
 * quant8.tmpl.cuh - block-wise 8-bit quantisation (template: included by quant8.cu once per dtype)
 *
 * As quant4: eight consecutive elements per thread, a block is a group of threads.  Blocks that are no power of two from
 * 32 to 4096 take a slower way: a group of 32 or 256 threads walks over the block twice.
 * In: T, NAME.  Source: Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization", section 2.
 */

/* The eight elements of each thread from `at` on, `rounds` times, `step` apart.  FULL: all of them are there, and aligned. */
template <int KIND, bool FULL>
DEVICE void NAME(quant8_rounds)(const struct bnb_cuda_quant8 &q, int64_t at, int64_t rounds, int64_t step,
                                const struct map8<BNB_CELLS_UNSIGNED> *map, unsigned (*partial)[16])
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
        const unsigned zeros = (unsigned)map->zero * 0x01010101u;
        unsigned word[2] = {zeros, zeros};
        if (r <= FLOAT_MAX) {
            word[0] = encode8_word<KIND>(v, r, special, map);
            word[1] = encode8_word<KIND>(v + 4, r, special, map);
        }
        if (FULL)
            __stcs((uint2 *)(q.a.codes + at), make_uint2(word[0], word[1]));
        else
            store_codes8(q.a.codes + at, count, word);
        if ((threadIdx.x & (lanes - 1)) == 0 && count > 0)
            q.a.absmax[at >> q.shift] = absmax;
    }
}

/* Blocks of threads take turns; what is left at the end, and memory that is not aligned, goes the careful way. */
template <int KIND>
DEVICE void NAME(quant8_tiles)(const struct bnb_cuda_quant8 &q, const struct map8<BNB_CELLS_UNSIGNED> *map,
                               unsigned (*partial)[16])
{
    const int64_t n = q.a.n, tile = (int64_t)blockDim.x * 8, step = gridDim.x * tile, first = blockIdx.x * tile;
    const int64_t rounds = first < n ? (n - first + step - 1) / step : 0;
    const int64_t whole = q.vector && first + tile <= n ? (n - first - tile) / step + 1 : 0;
    NAME(quant8_rounds)<KIND, true>(q, first + threadIdx.x * 8, whole, step, map, partial);
    __syncthreads();
    NAME(quant8_rounds)<KIND, false>(q, first + whole * step + threadIdx.x * 8, rounds - whole, step, map, partial);
}

/* Whole, aligned blocks of 512 to 4096: a thread holds four times eight elements, so that few warps have to meet. */
template <int KIND>
DEVICE void NAME(quant8_wide)(const struct bnb_cuda_quant8 &q, const struct map8<BNB_CELLS_UNSIGNED> *map,
                              unsigned (*partial)[16])
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
        const unsigned zeros = (unsigned)map->zero * 0x01010101u;
        if (!there)
            continue;
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            unsigned word[2] = {zeros, zeros};
            if (r <= FLOAT_MAX) {
                word[0] = encode8_word<KIND>(v[p], r, special, map);
                word[1] = encode8_word<KIND>(v[p] + 4, r, special, map);
            }
            __stcs((uint2 *)(q.a.codes + at + p * lanes * 8), make_uint2(word[0], word[1]));
        }
        if (lane == 0)
            q.a.absmax[block] = absmax;
    }
}

extern "C" __global__ void __launch_bounds__(512, 3) NAME(bnb_k_quant8)(const struct bnb_cuda_quant8 q)
{
    __shared__ struct map8<BNB_CELLS_UNSIGNED> map;
    __shared__ unsigned partial[2][16];
    map8_load(&map, q.a.map.code, -1);
    if (map.kind == ENCODE_SIGNED)
        NAME(quant8_tiles)<ENCODE_SIGNED>(q, &map, partial);
    else if (map.kind == ENCODE_UNSIGNED)
        NAME(quant8_tiles)<ENCODE_UNSIGNED>(q, &map, partial);
    else
        NAME(quant8_tiles)<ENCODE_SORTED>(q, &map, partial);
}

/* The whole blocks of 512 to 4096 of aligned memory. */
extern "C" __global__ void __launch_bounds__(256, 4) NAME(bnb_k_quant8_wide)(const struct bnb_cuda_quant8 q)
{
    __shared__ struct map8<BNB_CELLS_UNSIGNED> map;
    __shared__ unsigned partial[2][16];
    map8_load(&map, q.a.map.code, -1);
    if (map.kind == ENCODE_SIGNED)
        NAME(quant8_wide)<ENCODE_SIGNED>(q, &map, partial);
    else if (map.kind == ENCODE_UNSIGNED)
        NAME(quant8_wide)<ENCODE_UNSIGNED>(q, &map, partial);
    else
        NAME(quant8_wide)<ENCODE_SORTED>(q, &map, partial);
}

/* Any block: `lanes` threads, 32 or 256, share one. */
extern "C" __global__ void __launch_bounds__(256) NAME(bnb_k_quant8_any)(const struct bnb_cuda_quant8 q)
{
    __shared__ struct map8<BNB_CELLS_UNSIGNED> map;
    __shared__ unsigned partial[8];
    map8_load(&map, q.a.map.code, -1);
    const int lane = (int)threadIdx.x % q.lanes, groups = 256 / q.lanes;
    const int64_t n = q.a.n, blocks = n / q.a.block + (n % q.a.block != 0);
    for (int64_t first = (int64_t)blockIdx.x * groups; first < blocks; first += (int64_t)gridDim.x * groups) {
        const int64_t b = first + (int)threadIdx.x / q.lanes, low = b * q.a.block;
        const int64_t size = b >= blocks ? 0 : n - low < q.a.block ? n - low : q.a.block;
        const T *x = (const T *)q.a.x + low;
        float absmax = 0.0f;
        for (int64_t i = lane; i < size; i += q.lanes)
            absmax = fmaxf(absmax, fabsf(value_of(x + i)));
        unsigned m = warp_max(__float_as_uint(absmax));
        if (q.lanes > 32)
            m = warps_max(m, q.lanes, partial);
        absmax = __uint_as_float(m);
        const float r = 1.0f / absmax;
        for (int64_t i = lane; i < size; i += q.lanes) {
            const float u = value_of(x + i) * r;
            int code = map.zero;
            if (r <= FLOAT_MAX)
                code = !(u == u)                     ? 0
                       : map.kind == ENCODE_SIGNED   ? encode8<ENCODE_SIGNED>(u, &map)
                       : map.kind == ENCODE_UNSIGNED ? encode8<ENCODE_UNSIGNED>(u, &map)
                                                     : encode8<ENCODE_SORTED>(u, &map);
            q.a.codes[low + i] = (uint8_t)code;
        }
        if (lane == 0 && size > 0)
            q.a.absmax[b] = absmax;
        __syncthreads(); /* partial is free again */
    }
}

/* A thread writes 16 bytes at a time; several are under way at once.  block is a power of two, 8 or more. */
extern "C" __global__ void __launch_bounds__(256) NAME(bnb_k_dequant8)(const struct bnb_cuda_dequant8 q)
{
    enum { AHEAD = 4, WHOLE = 16 / sizeof(T), PARTS = 8 / WHOLE };
    __shared__ float values[256];
    values[threadIdx.x] = q.a.code[threadIdx.x];
    __syncthreads();
    const int64_t n = q.a.n, tile = 256 * 8 * AHEAD;
    for (int64_t base = blockIdx.x * tile; base < n; base += gridDim.x * tile) {
        uint2 word[AHEAD * PARTS];
        float scale[AHEAD * PARTS];
#pragma unroll
        for (int u = 0; u < AHEAD * PARTS; u++) {
            const int64_t at = base + (u * 256 + (int)threadIdx.x) * WHOLE;
            word[u] = load_codes8(q.a.codes + at, WHOLE, count_of<WHOLE>(n, at), q.vector);
            scale[u] = at < n ? bnb_block_scale(&q.a.scale, at >> q.shift) : 0.0f;
        }
#pragma unroll
        for (int u = 0; u < AHEAD * PARTS; u++) {
            const int64_t at = base + (u * 256 + (int)threadIdx.x) * WHOLE;
            float v[WHOLE];
#pragma unroll
            for (int i = 0; i < WHOLE; i++)
                v[i] = values[(i < 4 ? word[u].x : word[u].y) >> 8 * (i % 4) & 255u] * scale[u];
            store16_some((T *)q.a.out + at, count_of<WHOLE>(n, at), q.vector, v);
        }
    }
}

/* Any block. */
extern "C" __global__ void __launch_bounds__(256) NAME(bnb_k_dequant8_any)(const struct bnb_cuda_dequant8 q)
{
    for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < q.a.n; i += (int64_t)gridDim.x * 256)
        set_value((T *)q.a.out + i, q.a.code[q.a.codes[i]] * bnb_block_scale(&q.a.scale, i / q.a.block));
}
