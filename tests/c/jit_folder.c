/* jit_folder.c - files and folders; every failure here is the machine's and ends the test */
#include "jit_folder.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static void must(int condition, const char *path)
{
    if (!condition) {
        perror(path);
        exit(EXIT_FAILURE);
    }
}

void jit_folder_make(char path[JIT_PATH])
{
    const char *base = getenv("TMPDIR");
    snprintf(path, JIT_PATH, "%s/test_jit.XXXXXX", base && base[0] ? base : P_tmpdir);
    must(mkdtemp(path) != NULL, path);
}

int jit_folder_count(const char *folder, char name[JIT_PATH])
{
    int count = 0;
    DIR *d = opendir(folder);
    for (const struct dirent *e = d ? readdir(d) : NULL; e; e = readdir(d)) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, ".."))
            continue;
        count++;
        if (name)
            snprintf(name, JIT_PATH, "%s/%s", folder, e->d_name);
    }
    if (d)
        closedir(d);
    return count;
}

void jit_folder_empty(const char *folder)
{
    char path[JIT_PATH];
    while (jit_folder_count(folder, path) > 0)
        must(remove(path) == 0, path);
}

unsigned char *jit_file_load(const char *path, size_t *size)
{
    struct stat s;
    FILE *file = fopen(path, "rb");
    must(file && fstat(fileno(file), &s) == 0, path);
    unsigned char *data = malloc((size_t)s.st_size + 1);
    must(data && fread(data, 1, (size_t)s.st_size, file) == (size_t)s.st_size, path);
    fclose(file);
    *size = (size_t)s.st_size;
    return data;
}

void jit_file_store(const char *path, const void *data, size_t size)
{
    FILE *file = fopen(path, "wb");
    must(file && fwrite(data, 1, size, file) == size && fclose(file) == 0, path);
    must(chmod(path, 0600) == 0, path);
}
