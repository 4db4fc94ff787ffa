/*
 * early.cuh - launches of compute capability 9.0 that come to the card before the launch before them is done
 *
 * Only a launch that was asked to come early does, and not before every block of the one before it has let it.  All of a
 * layer's kernels let the next one come, and wait before they read or write what others write or read.
 */
#ifndef BNB_CUDA_EARLY_CUH
#define BNB_CUDA_EARLY_CUH

#include "cuda/kernels/device.cuh"

/* The next launch may come: it waits for the end of this one itself. */
DEVICE void let_next_launch_come()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* Until what was launched before on the stream is done, where this launch did not wait for it. */
DEVICE void wait_for_launch_before()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#endif
