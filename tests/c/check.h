/* check.h - the whole test framework: a check that names its place, counts, and goes on */
#ifndef BNB_TESTS_CHECK_H
#define BNB_TESTS_CHECK_H

#include <stdio.h>
#include <stdlib.h>

static int check_failures;

/* CHECK(condition, "format", ...): the text says which input failed. */
#define CHECK(condition, ...)                                               \
    do {                                                                    \
        if (!(condition)) {                                                 \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            fprintf(stderr, __VA_ARGS__);                                   \
            fputc('\n', stderr);                                            \
            if (++check_failures >= 20)                                     \
                exit(EXIT_FAILURE); /* enough to see the pattern */         \
        }                                                                   \
    } while (0)

#define CHECK_RESULT() (check_failures ? EXIT_FAILURE : EXIT_SUCCESS)

#endif
