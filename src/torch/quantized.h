/*
 * quantized.h - arguments that the operators on quantised tensors share: maps, packed codes, scales, rows of a matrix
 *
 * Like everything in call.h: after a failure they do nothing, but what stands on the stack is still taken.
 */
#ifndef BNB_TORCH_QUANTIZED_H
#define BNB_TORCH_QUANTIZED_H

#include "call.h"

/* The scales of blocks, as tensors: plain, or nested with their own map, scales and offset. */
struct bnb_scale_tensors {
    struct bnb_tensor absmax, code, absmax2, offset;
    int64_t block2;
};

/* The shape of a vector. */
static inline struct bnb_ints bnb_one_size(const int64_t *n) { return (struct bnb_ints){n, 1}; }

/* A [256] f32 map; made row-major. */
void bnb_check_map_tensor(struct bnb_call *c, struct bnb_tensor *code);

/* A vector of n floats of any float dtype; made row-major.  An optional that is None passes. */
void bnb_check_bias(struct bnb_call *c, struct bnb_tensor *bias, int64_t n);

/* Takes "nf4" or "fp4". */
bnb_type4 bnb_take_type_4bit(struct bnb_call *c);

/* A power of two from 32 to 4096. */
void bnb_check_block_4bit(struct bnb_call *c, int64_t block);

/* How many elements of a storage dtype hold n 4-bit codes: whole elements, so the last may be padded. */
int64_t bnb_packed_count(int64_t n, int64_t element_size);

/* The packed codes of n values, in a tensor of any shape and dtype; made row-major.  `longer`: more bytes may follow. */
void bnb_check_packed(struct bnb_call *c, struct bnb_tensor *a, int64_t n, bool longer);

/* The dtypes and lengths of scales that fit together; made row-major. */
void bnb_check_scale_tensors(struct bnb_call *c, struct bnb_scale_tensors *s, bool nested);
bnb_scales bnb_scale_pointers(struct bnb_call *c, const struct bnb_scale_tensors *s, bool nested);

/* x [..., width], at least one dimension; made row-major.  Returns the number of rows, 0 on failure. */
int64_t bnb_check_rows(struct bnb_call *c, struct bnb_tensor *x, int64_t width);

/* A new tensor with the leading dimensions of x, and `width` as the last. */
struct bnb_tensor bnb_new_rows(struct bnb_call *c, const char *name, const struct bnb_tensor *x, int64_t width,
                               int32_t dtype);

/* The shape of that tensor; borrowed until the end of the call. */
struct bnb_ints bnb_rows_shape(struct bnb_call *c, const struct bnb_tensor *x, int64_t width);

/* The width of x [..., width]; 0 on failure, which a tensor without dimensions is. */
int64_t bnb_row_width(struct bnb_call *c, const struct bnb_tensor *x);

/* A matrix: two dimensions, or a refusal. */
void bnb_check_matrix(struct bnb_call *c, const struct bnb_tensor *t);

#endif
