/*
 * optim_reference.h - one optimizer step by definition: NUMERICS rules 12 and 20 to 29, element by element
 *
 * f32 arithmetic in the order of the rules gives bits; the same step in double, by the formulas of the papers, says how
 * near they are.  A step is described as to the library; pointers to numbers (step_count, ...) are not looked at.
 */
#ifndef BNB_TESTS_OPTIM_REFERENCE_H
#define BNB_TESTS_OPTIM_REFERENCE_H

#include "support.h"

enum { STATE_BLOCK = 256, AVERAGES = 3, REFERENCE_ROWS = 8 };
enum reference_rule { ADAM, ADEMAMIX, MOMENTUM, LION, RMSPROP, ADAGRAD };

struct reference_row {
    const char *name;
    enum reference_rule rule;
    int states;   /* tensors of state                                     */
    int averages; /* f32 values of state per element; ademamix: m1, m2, v */
    bool decoupled;
};
extern const struct reference_row reference_rows[REFERENCE_ROWS];
const struct reference_row *reference_find(const char *name); /* aborts for a foreign name */

/* One element: p as f32 before its rounding, averages in the order m (or the only one), v, slow m; the direction u. */
struct element { float p, u, s[AVERAGES]; };

/* Rules 20, 21 and 28: norms are {U, P} of the tensor, or NULL. */
struct element reference_update(const bnb_optim_config *c, int64_t step, const double *norms, float gradient,
                                struct element old);

/* The new p and averages by the formula alone, in double.  Update `step`, without trust clipping. */
struct exact { double p, s[AVERAGES]; };
struct exact exact_update(const bnb_optim_config *c, int64_t step, double gradient, struct exact old);

/* The schedules of ademamix at update t. */
double reference_alpha(const bnb_optim_config *c, int64_t t);
double reference_beta3(const bnb_optim_config *c, int64_t t);

/* Rule 28: how much of a step is made. */
double reference_trust(const bnb_optim_config *c, const double norms[2]);

/* Rule 29: 16 bits for x, element i of a parameter at update t. */
uint16_t reference_random(float x, bnb_dtype dtype, uint64_t seed, int64_t t, int64_t i);

/* A whole tensor, in place: update t->step, c->norms being those of this tensor. */
void reference_step(const bnb_optim_config *c, const bnb_optim_tensor *t);

/* Sums of squares {U, P} of the update that would be made. */
void reference_norms(const bnb_optim_config *c, const bnb_optim_tensor *t, long double sums[2]);

#endif
