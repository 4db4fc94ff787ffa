/*
 * regression.c - runs a fuzz target without a fuzzer: COUNT pseudo-random inputs, then every file of a folder
 *
 * Usage: fuzz_*_regression COUNT FOLDER.  A finding aborts, as it does under the fuzzer.
 */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { LARGEST = 1 << 14 };

static uint64_t next(uint64_t *state)
{
    *state ^= *state << 13; /* xorshift64 */
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* Plain random bits are mostly huge or tiny: half of the inputs get exponents near 1, some repeat a short pattern. */
static void random_input(uint64_t *state)
{
    static uint8_t data[LARGEST];
    const size_t size = next(state) % (next(state) % 4 ? 2000 : LARGEST);
    const unsigned kind = (unsigned)(next(state) % 4);
    for (size_t i = 0; i < size; i++)
        data[i] = kind == 3 && i > 16 ? data[i - 8] : (uint8_t)next(state);
    for (size_t i = 4; kind < 2 && i + 4 < size; i += kind ? 4 : 2)
        data[i + (kind ? 2 : 0)] = (uint8_t)((data[i] & 0x80) | 0x3c | next(state) % 4);
    LLVMFuzzerTestOneInput(data, size);
}

static int run_file(const char *folder, const char *name)
{
    static uint8_t data[1 << 20];
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "rb");
    if (!file)
        return 0;
    const size_t size = fread(data, 1, sizeof data, file);
    fclose(file);
    LLVMFuzzerTestOneInput(data, size);
    return 1;
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: %s COUNT FOLDER\n", argv[0]);
        return EXIT_FAILURE;
    }
    const long count = strtol(argv[1], NULL, 10);
    uint64_t state = 88172645463325252u;
    for (long i = 0; i < count; i++)
        random_input(&state);
    DIR *folder = opendir(argv[2]);
    if (!folder) {
        fprintf(stderr, "no folder %s\n", argv[2]);
        return EXIT_FAILURE;
    }
    int files = 0;
    for (const struct dirent *entry = readdir(folder); entry; entry = readdir(folder))
        if (entry->d_name[0] != '.')
            files += run_file(argv[2], entry->d_name);
    closedir(folder);
    printf("%ld random inputs, %d files\n", count, files);
    return files ? EXIT_SUCCESS : EXIT_FAILURE;
}
