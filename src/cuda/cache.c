/*
 * cache.c - the cache's folder and files
 *
 * The folder must be the user's and closed to others' writing; all is checked on what was opened, not on a path.  A file
 * is written under another name and renamed, so that it is there whole or not at all, and is believed only if its
 * header, its size and the hash of its content agree; else it is compiled and replaced like a missing one.
 */
#include "cuda/cache.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PATH_SIZE = 4096, NAME_SIZE = 80, MAX_CONTENT = 1 << 28 };

/* ---------------------------------------------------------------- hash */

__extension__ typedef unsigned __int128 wide;

static const uint64_t prime_high = (uint64_t)1 << 24, prime_low = 0x13b; /* 2^88 + 0x13b */

struct bnb_cuda_hash bnb_cuda_hash_start(void)
{
    return (struct bnb_cuda_hash){0x6c62272e07bb0142u, 0x62b821756295c58du};
}

struct bnb_cuda_hash bnb_cuda_hash_more(struct bnb_cuda_hash hash, const void *data, size_t size)
{
    const unsigned char *byte = data;
    const wide prime = (wide)prime_high << 64 | prime_low;
    wide h = (wide)hash.high << 64 | hash.low;
    for (size_t i = 0; i < size; i++)
        h = (h ^ byte[i]) * prime;
    return (struct bnb_cuda_hash){(uint64_t)(h >> 64), (uint64_t)h};
}

static bool same(struct bnb_cuda_hash a, struct bnb_cuda_hash b) { return a.high == b.high && a.low == b.low; }

static void file_name(struct bnb_cuda_hash key, char name[NAME_SIZE])
{
    snprintf(name, NAME_SIZE, "%016" PRIx64 "%016" PRIx64 ".cubin", key.high, key.low);
}

/* ---------------------------------------------------------------- folder */

static bool folder_path(char path[PATH_SIZE])
{
    const char *own = getenv("BNB_CACHE_DIR"), *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    int length = 0;
    if (own)
        length = snprintf(path, PATH_SIZE, "%s", own);
    else if (cache && cache[0] == '/') /* a relative one is to be ignored, says its specification */
        length = snprintf(path, PATH_SIZE, "%s/bitsandbytes", cache);
    else if (home && home[0])
        length = snprintf(path, PATH_SIZE, "%s/.cache/bitsandbytes", home);
    return length > 0 && length < PATH_SIZE;
}

/* Every folder of the path that is missing, for the user alone. */
static void make_folders(char *path)
{
    for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        mkdir(path, 0700);
        *slash = '/';
    }
    mkdir(path, 0700);
}

/* Of this user and closed to others' writing. */
static bool is_private(const struct stat *s) { return s->st_uid == geteuid() && !(s->st_mode & (S_IWGRP | S_IWOTH)); }

/* A descriptor, or -1: no folder, or one that others may write to. */
static int open_folder(bool make)
{
    char path[PATH_SIZE];
    struct stat s;
    if (!folder_path(path))
        return -1;
    if (make)
        make_folders(path);
    const int folder = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder >= 0 && (fstat(folder, &s) || !is_private(&s))) {
        close(folder);
        return -1;
    }
    return folder;
}

/* ---------------------------------------------------------------- files */

static bool read_all(int file, void *data, size_t size)
{
    for (size_t done = 0; done < size;) {
        const ssize_t got = read(file, (char *)data + done, size - done);
        if (got == 0 || (got < 0 && errno != EINTR))
            return false;
        done += got > 0 ? (size_t)got : 0;
    }
    return true;
}

static bool write_all(int file, const void *data, size_t size)
{
    for (size_t done = 0; done < size;) {
        const ssize_t put = write(file, (const char *)data + done, size - done);
        if (put == 0 || (put < 0 && errno != EINTR))
            return false;
        done += put > 0 ? (size_t)put : 0;
    }
    return true;
}

/* The content of an open file that is what it says, or NULL. */
static void *read_file(int file, struct bnb_cuda_hash key, size_t *size)
{
    struct bnb_cuda_cache_header header;
    struct stat s;
    if (fstat(file, &s) || !S_ISREG(s.st_mode) || !is_private(&s) || !read_all(file, &header, sizeof header) ||
        memcmp(header.magic, BNB_CUDA_CACHE_MAGIC, sizeof header.magic) != 0 || !same(header.key, key) ||
        header.size == 0 || header.size > MAX_CONTENT || (uint64_t)s.st_size != sizeof header + header.size)
        return NULL;
    char *content = malloc(header.size + 1);
    if (content && read_all(file, content, header.size) &&
        same(bnb_cuda_hash_more(bnb_cuda_hash_start(), content, header.size), header.content)) {
        content[header.size] = '\0';
        *size = header.size;
        return content;
    }
    free(content);
    return NULL;
}

bool bnb_cuda_cache_read(struct bnb_cuda_hash key, void **data, size_t *size)
{
    char name[NAME_SIZE];
    const int folder = open_folder(false);
    if (folder < 0)
        return false;
    file_name(key, name);
    const int file = openat(folder, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    *data = file >= 0 ? read_file(file, key, size) : NULL;
    if (file >= 0)
        close(file);
    close(folder);
    return *data != NULL;
}

void bnb_cuda_cache_write(struct bnb_cuda_hash key, const void *data, size_t size)
{
    static _Atomic(unsigned) counter;
    struct bnb_cuda_cache_header header = {
        .magic = BNB_CUDA_CACHE_MAGIC,
        .key = key,
        .size = size,
        .content = bnb_cuda_hash_more(bnb_cuda_hash_start(), data, size),
    };
    char name[NAME_SIZE], other[NAME_SIZE + 40];
    const int folder = size > 0 && size <= MAX_CONTENT ? open_folder(true) : -1;
    if (folder < 0)
        return;
    file_name(key, name);
    snprintf(other, sizeof other, ".%s.%ld.%u", name, (long)getpid(), atomic_fetch_add(&counter, 1));
    unlinkat(folder, other, 0); /* of a process that had this number and was killed */
    const int file = openat(folder, other, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (file >= 0) {
        bool whole = write_all(file, &header, sizeof header) && write_all(file, data, size) && fsync(file) == 0;
        whole = close(file) == 0 && whole;
        if (!whole || renameat(folder, other, folder, name) != 0)
            unlinkat(folder, other, 0);
    }
    close(folder);
}
