/*
 * images.c - finding an image by its name
 *
 * The tables are written by the build, in assembler (images.S.in): five words a row, in the order of the members.
 */
#include "cuda/image.h"

#include <stddef.h>
#include <string.h>

_Static_assert(sizeof(struct bnb_cuda_image) == 40 && offsetof(struct bnb_cuda_image, binary.data) == 8 &&
                   offsetof(struct bnb_cuda_image, binary.size) == 16 &&
                   offsetof(struct bnb_cuda_image, source.data) == 24 &&
                   offsetof(struct bnb_cuda_image, source.size) == 32 && sizeof(int) == 4,
               "images.S.in has another layout");

const struct bnb_cuda_image *bnb_cuda_image_find(const char *name)
{
    for (int i = 0; i < bnb_cuda_image_count; i++)
        if (!strcmp(bnb_cuda_images[i].name, name))
            return &bnb_cuda_images[i];
    return NULL;
}
