/*
 * quantile.tmpl.cuh - the kernels of exact quantiles (template: included by quantile.cu once per dtype)
 *
 * In: T, NAME, and WIDE where keys have 32 bits and take a third pass.
 */

extern "C" __global__ void __launch_bounds__(1024) NAME(bnb_k_quantile_count1)(const struct bnb_cuda_quantile q)
{
    count_pass<T, 1>(q);
}

extern "C" __global__ void __launch_bounds__(RANKS) NAME(bnb_k_quantile_locate1)(const struct bnb_cuda_ranks r)
{
    locate<T, 1>(r.q, (uint64_t)r.rank[blockIdx.x], 0u);
}

extern "C" __global__ void __launch_bounds__(1024) NAME(bnb_k_quantile_count2)(const struct bnb_cuda_quantile q)
{
    count_pass<T, 2>(q);
}

extern "C" __global__ void __launch_bounds__(RANKS) NAME(bnb_k_quantile_locate2)(const struct bnb_cuda_quantile q)
{
    locate<T, 2>(q, (uint64_t)q.targets[0][blockIdx.x].rank, q.targets[0][blockIdx.x].key);
}

#ifdef WIDE
extern "C" __global__ void __launch_bounds__(1024) NAME(bnb_k_quantile_count3)(const struct bnb_cuda_quantile q)
{
    count_pass<T, 3>(q);
}

extern "C" __global__ void __launch_bounds__(RANKS) NAME(bnb_k_quantile_locate3)(const struct bnb_cuda_quantile q)
{
    locate<T, 3>(q, (uint64_t)q.targets[1][blockIdx.x].rank, q.targets[1][blockIdx.x].key);
}
#endif
