/* jit_folder.h - the cache folder of the tests of run-time compilation: made, counted, emptied */
#ifndef BNB_TESTS_JIT_FOLDER_H
#define BNB_TESTS_JIT_FOLDER_H

#include <stddef.h>

enum { JIT_PATH = 512 };

/* A new private folder below TMPDIR. */
void jit_folder_make(char path[JIT_PATH]);

/* The files in it; `name` (may be NULL) gets the path of the last one. */
int jit_folder_count(const char *folder, char name[JIT_PATH]);

/* Every file in it. */
void jit_folder_empty(const char *folder);

/* A whole file, freed with free(); and back. */
unsigned char *jit_file_load(const char *path, size_t *size);
void jit_file_store(const char *path, const void *data, size_t size);

#endif
