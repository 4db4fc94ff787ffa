/*
 * plan_gemm4.h - which kernel multiplies by a 4-bit weight on CUDA, and how it cuts the work: a function of shape and card
 *
 * Pure: no card is asked, so it is tested on machines without one.  The numbers of the kernels that the choice depends on
 * are written here, and the kernels are made from them.
 */
#ifndef BNB_CORE_PLAN_GEMM4_H
#define BNB_CORE_PLAN_GEMM4_H

/* Kernels for few rows of activations: tiles of 16 rows of the weight in a band, tiles of 8 rows of activations, elements of
 * K in a run, warps that multiply, and warps that bring; registers of a thread that multiplies, where it may choose. */
#define BNB_GEMM4_FEW8 1, 1, 256, 16, 4, 112
#define BNB_GEMM4_FEW16 2, 2, 128, 12, 4, 152
#define BNB_GEMM4_FEW32 2, 4, 128, 8, 4, 208
#define BNB_GEMM4_FEW64 2, 8, 64, 6, 2, 0

/* Steps under way at most, and shared memory before the steps: the table of pairs, a map, barriers. */
#define BNB_GEMM4_FEW_DEEPEST 8
#define BNB_GEMM4_FEW_FIXED (65536 + 2048)

/* Of a tile of sums when warps meet, in floats. */
#define BNB_GEMM4_FEW_SUMS 160

/* Kernels for many rows, by the rows of activations in a tile; grad: those of the gradient.  Slots for activations, and for
 * codes with their scales; tokens that are stored at a time, and bytes of a warpgroup for that or for sums that two ways
 * exchange; shared memory: the table of pairs, all slots, what is stored, a map, barriers. */
#define BNB_GEMM4_WIDE_RING(tokens) ((tokens) == 256 ? 4 : (tokens) == 128 ? 6 : 8)
#define BNB_GEMM4_WIDE_LINE(tokens, grad) ((tokens) < 256 ? 8 : (grad) ? 5 : 6)
#define BNB_GEMM4_WIDE_CODES 4096
#define BNB_GEMM4_WIDE_SCALES(grad) ((grad) ? 1024 : 0)
#define BNB_GEMM4_WIDE_PIECE(tokens, grad) ((grad) || (tokens) == 256 ? 32 : (tokens) < 64 ? (tokens) : 64)
#define BNB_GEMM4_WIDE_STAGING(tokens, grad) ((tokens) < 128 ? 8192 : BNB_GEMM4_WIDE_PIECE(tokens, grad) * 128)
#define BNB_GEMM4_WIDE_SHARED(tokens, grad)                                                          \
    (65536 + BNB_GEMM4_WIDE_RING(tokens) * ((tokens) * 128 + 16) +                                   \
     BNB_GEMM4_WIDE_LINE(tokens, grad) * (BNB_GEMM4_WIDE_CODES + BNB_GEMM4_WIDE_SCALES(grad) + 16) + \
     2 * BNB_GEMM4_WIDE_STAGING(tokens, grad) + 1024 + 8)

/* Shared memory of the tile kernels: the table of pairs for each eighth lane, a map and its offset, two steps of activations and
 * of decoded weights, and two of codes. */
#define BNB_GEMM4_TILE_SHARED (8192 + 1024 + 128 + 4 * 128 * 64 * 2 + 2 * 128 * 64 / 2)

#if !defined(__CUDACC__)
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum bnb_gemm4_kernel {
    BNB_GEMM4_ANY,   /* of a wish: whatever is chosen */
    BNB_GEMM4_PLAIN, /* any shape, any card: f32 arithmetic */
    BNB_GEMM4_KERNEL_FEW8,
    BNB_GEMM4_KERNEL_FEW16,
    BNB_GEMM4_KERNEL_FEW32,
    BNB_GEMM4_KERNEL_FEW64,
    BNB_GEMM4_KERNEL_WIDE32, /* from here to tile 9.0 alone */
    BNB_GEMM4_KERNEL_WIDE64, /* up to here scales multiply sums, and blocks of 32 are too short for wide ones */
    BNB_GEMM4_KERNEL_WIDE128,
    BNB_GEMM4_KERNEL_WIDE256,
    BNB_GEMM4_KERNEL_MEET128, /* as wide, but blocks of a cluster share a tile's steps, not its rows of activations */
    BNB_GEMM4_KERNEL_MEET256,
    BNB_GEMM4_KERNEL_GRAD128,
    BNB_GEMM4_KERNEL_GRAD256,
    BNB_GEMM4_KERNEL_TILE, /* and its gradient */
    BNB_GEMM4_KERNELS
};

extern const char *const bnb_gemm4_kernel_name[BNB_GEMM4_KERNELS];

struct bnb_gemm4_card {
    int capability, sms, shared_bytes;
    bool tensor_copies; /* the driver can make tensor maps */
};

/* aligned: x, codes and out begin at multiples of 16 bytes.  half: a 16-bit dtype, no `exact`, values of a known type, and
 * nested scales, if any, in blocks of a power of two. */
struct bnb_gemm4_shape {
    int64_t m, n, k;
    int experts; /* 0: one weight; else m is the sum over them */
    int block;
    bool grad, half, aligned;
};

/* What somebody wants instead, for measuring; zeros leave the choice. */
struct bnb_gemm4_wish { int kernel, splits, bands, depth; };

struct bnb_gemm4_plan {
    enum bnb_gemm4_kernel kernel;
    int bands, slices, splits, steps, depth, stage; /* as struct bnb_cuda_gemm4_fast has them */
    int rows, shared;                               /* few: of the weight, bytes of shared memory, of a block */
    int64_t grid;                                   /* blocks */
    int64_t meets;                                  /* tiles whose sums two blocks exchange */
};

/* Rows of activations in a tile of a wide kernel. */
int bnb_gemm4_tokens(enum bnb_gemm4_kernel kernel);

/* Elements of K in a run of a kernel for few rows. */
int bnb_gemm4_width(enum bnb_gemm4_kernel kernel);

/* Can this kernel multiply this shape on this card? */
bool bnb_gemm4_can(enum bnb_gemm4_kernel kernel, const struct bnb_gemm4_shape *s, const struct bnb_gemm4_card *card);

/* A wish that cannot be fulfilled is passed over.  m, n, k > 0; wish may be NULL. */
struct bnb_gemm4_plan bnb_gemm4_plan_of(const struct bnb_gemm4_shape *s, const struct bnb_gemm4_card *card,
                                        const struct bnb_gemm4_wish *wish);

/* What bnb_gemm4_plan() is to tell. */
void bnb_gemm4_note(const struct bnb_gemm4_plan *plan);
#endif

#endif
