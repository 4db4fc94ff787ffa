/*
 * optim_subject.h - one parameter with its gradient and state, each between guard bytes and one element off any
 * alignment; and the configurations that the optimizer tests start from
 */
#ifndef BNB_TESTS_OPTIM_SUBJECT_H
#define BNB_TESTS_OPTIM_SUBJECT_H

#include "optim_reference.h"

enum { SUBJECT_BUFFERS = 6 }; /* p, g, state1, state2, absmax1, absmax2 */

struct subject {
    struct guarded buffer[SUBJECT_BUFFERS];
    bnb_optim_tensor t; /* step 1, seed n */
};

/* State as the named row needs it, all zero bytes; p is bell-shaped. */
struct subject subject_make(const char *row, int64_t n, bnb_dtype dtype, int bits);
void subject_copy(const struct subject *to, const struct subject *from); /* of the same shape */

/* Gradients of one step: of `kind`, with blocks of zeros, and single zeros of both signs. */
void subject_gradient(const struct subject *s, enum fill kind, int64_t step);

/* NULL where both have the same bits, else which buffer differs.  NaN in p and in 32-bit state equals any NaN. */
const char *subject_difference(const struct subject *a, const struct subject *b);

/* Frees; false if a byte outside of a buffer was written. */
bool subject_free(struct subject *s);

/* The default maps. */
extern float subject_signed_map[256], subject_unsigned_map[256];

/* A configuration that suits the row: lr and weight decay 0.01, the maps of new state, no schedules. */
bnb_optim_config usual_config(const char *row);

/* One update of t by a table, config->norms being those of t. */
void run_table(const struct bnb_cpu_ops *ops, const bnb_optim_config *config, const bnb_optim_tensor *t);

#endif
