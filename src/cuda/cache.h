/*
 * cache.h - compiled kernels on disk, so that a card without an embedded image compiles each of them once
 *
 * Nothing here fails: where there is no folder, or none that is safe to use, reading finds nothing and writing does
 * nothing.  The folder is BNB_CACHE_DIR (empty: no cache), else $XDG_CACHE_HOME/bitsandbytes, else
 * ~/.cache/bitsandbytes.
 */
#ifndef BNB_CUDA_CACHE_H
#define BNB_CUDA_CACHE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * FNV-1a with 128 bits.  It tells texts apart and finds damage; it does not withstand somebody who wants a collision,
 * and need not: only the user may write to the folder.
 */
struct bnb_cuda_hash { uint64_t high, low; };
struct bnb_cuda_hash bnb_cuda_hash_start(void);
struct bnb_cuda_hash bnb_cuda_hash_more(struct bnb_cuda_hash hash, const void *data, size_t size);

/* What a file begins with; its content follows.  In the machine's byte order: the folder is of one machine or of several
 * alike, and another's file has the wrong size. */
struct bnb_cuda_cache_header {
    char magic[8];
    struct bnb_cuda_hash key;
    uint64_t size; /* of the content */
    struct bnb_cuda_hash content;
};
#define BNB_CUDA_CACHE_MAGIC "bnbjit1"

/* The content that was written under `key`, closed by a zero byte that *size does not count; freed with free(). */
bool bnb_cuda_cache_read(struct bnb_cuda_hash key, void **data, size_t *size);
void bnb_cuda_cache_write(struct bnb_cuda_hash key, const void *data, size_t size);

#endif
