/*
 * check.h - argument checks that several API files share (check.c): each fails with the argument, its value, the expectation
 */
#ifndef BNB_CORE_CHECK_H
#define BNB_CORE_CHECK_H

#include "core/internal.h"

/* Return from the caller with the status of a failed check. */
#define BNB_CHECK(expression)                \
    do {                                     \
        const bnb_status check = expression; \
        if (check)                           \
            return check;                    \
    } while (0)

/* Does the device of the call have the operation? */
bnb_status bnb_core_check_member(const char *function, bool present);

bnb_status bnb_core_check_float(const char *function, bnb_dtype dtype);
bnb_status bnb_core_check_n(const char *function, int64_t n);
bnb_status bnb_core_check_block(const char *function, int64_t block);
bnb_status bnb_core_check_block4(const char *function, int64_t block);
bnb_status bnb_core_check_type4(const char *function, bnb_type4 type);
/* Sizes of a product, each two of which must fit into memory with elements of eight bytes. */
bnb_status bnb_core_check_product(const char *function, int64_t m, int64_t n, int64_t k);
bnb_status bnb_core_check_ptr(const char *function, const char *name, const void *ptr);

/* Plain or nested, complete either way; fills the argument block. */
bnb_status bnb_core_check_scales(const char *function, const bnb_scales *scales, struct bnb_scale_args *args);

#endif
