/*
 * optim_reference.h - one optimizer step by definition: NUMERICS rules 12 and 20 to 25, element by element
 *
 * f32 arithmetic in the order of the rules gives bits; the same step in double says how near they are to the formula.
 */
#ifndef BNB_TESTS_OPTIM_REFERENCE_H
#define BNB_TESTS_OPTIM_REFERENCE_H

#include "support.h"

enum { STATE_BLOCK = 256 };

struct hyper {
    double lr, beta1, beta2, eps, weight_decay, gnorm_scale;
    bool skip_zeros;
    int64_t step;
    const float *map1, *map2; /* of 8-bit state */
};

/* One element: p as f32 before its rounding. */
struct element { float p, m, v; };

/* Rules 20 and 21. */
struct element reference_adam(const struct hyper *h, float gradient, struct element old);

/* The new p by the formula alone, in double. */
double exact_adam_p(const struct hyper *h, double gradient, double p, double m, double v);

/* A whole tensor, in place. */
void reference_step32(const struct hyper *h, bnb_dtype dtype, int64_t n, void *p, const void *g, float *m, float *v);
void reference_step8(const struct hyper *h, bnb_dtype dtype, bnb_optim_tensor *t);

#endif
