/*
 * image.h - device code as this library carries it: compiled, and as text for the run-time compiler
 *
 * The build writes one entry per file of cuda/kernels/.  Without nvcc the binaries are empty and the text is compiled
 * when a kernel is first needed (jit.c).
 */
#ifndef BNB_CUDA_IMAGE_H
#define BNB_CUDA_IMAGE_H

#include "cuda/driver.h"

struct bnb_cuda_blob {
    const unsigned char *data;
    size_t size;
};

struct bnb_cuda_image {
    const char *name;
    struct bnb_cuda_blob binary; /* a fat binary: code for several cards, and PTX; size 0 without nvcc */
    struct bnb_cuda_blob source; /* text, closed by a zero byte that size does not count               */
};

extern const struct bnb_cuda_image bnb_cuda_images[];
extern const int bnb_cuda_image_count;

/* What the sources include, by the name they include it by. */
extern const struct bnb_cuda_image bnb_cuda_headers[];
extern const int bnb_cuda_header_count;

const struct bnb_cuda_image *bnb_cuda_image_find(const char *name);

/* Compile an image's text for a card with the NVRTC that torch brought, or take the result of an earlier process from the
 * cache on disk.  dtype: one variant alone, or -1.  *cubin is freed with free().  BNB_EDEVICE with the reason. */
bnb_status bnb_cuda_compile(const struct bnb_cuda_image *image, int dtype, int capability, const char *function,
                            void **cubin);

/* "NVRTC 13.0" or why there is none. */
const char *bnb_cuda_compiler(void);

#endif
