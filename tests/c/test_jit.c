/*
 * test_jit.c - every image and variant through a real NVRTC, for every architecture that it knows; no card is needed
 *
 * BNB_NVRTC=/path/to/libnvrtc.so.13 names the compiler; without one the test is skipped.  Arguments name the images to
 * compile, else all.  `--full` compiles each variant alone for each architecture, as a card would ask; else all variants
 * at once, and alone for the oldest and the newest; an image without variants is the same for every dtype.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <elf.h>

#include "bitsandbytes.h"
#include "check.h"
#include "cuda/image.h"
#include "cuda/nvrtc.h"
#include "jit_folder.h"

enum { SKIPPED = 77, MACHINE_CUDA = 190, ALONE = 3 };

/* bfloat16, which every image with variants has. */
enum { ONE = BNB_BF16 };

static const char *const ending[ALONE] = {"_f32", "_f16", "_bf16"};
static char folder[JIT_PATH];

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Where the last of the two header tables ends: the whole file. */
static size_t elf_size(const void *cubin)
{
    const Elf64_Ehdr *h = cubin;
    const size_t sections = h->e_shoff + (size_t)h->e_shentsize * h->e_shnum;
    const size_t segments = h->e_phoff + (size_t)h->e_phentsize * h->e_phnum;
    return sections > segments ? sections : segments;
}

/* Kernels in it: each has a section for its code.  Those whose names end in `end`. */
static int kernels_in(const void *cubin, const char *end)
{
    static const char prefix[] = ".text.bnb_k_";
    const char *base = cubin;
    Elf64_Ehdr h;
    Elf64_Shdr names, section; /* copied: their table is not aligned */
    int count = 0;
    memcpy(&h, base, sizeof h);
    memcpy(&names, base + h.e_shoff + h.e_shstrndx * sizeof names, sizeof names);
    for (int i = 0; i < h.e_shnum; i++) {
        memcpy(&section, base + h.e_shoff + (size_t)i * sizeof section, sizeof section);
        const char *name = base + names.sh_offset + section.sh_name;
        const size_t length = strlen(name);
        count += strncmp(name, prefix, sizeof prefix - 1) == 0 && length >= strlen(end) &&
                 !strcmp(name + length - strlen(end), end);
    }
    return count;
}

/* Compile, and look at what came.  Returns the number of kernels; *varies: a bit for each dtype that has a variant. */
static int compiled(const struct bnb_cuda_image *image, int dtype, int capability, unsigned *varies)
{
    void *cubin = NULL;
    *varies = 0;
    const bnb_status status = bnb_cuda_compile(image, dtype, capability, "test", &cubin);
    CHECK(status == BNB_OK, "%s, dtype %d, sm_%d: %s", image->name, dtype, capability, bnb_detail());
    if (status)
        return 0;
    Elf64_Ehdr h;
    memcpy(&h, cubin, sizeof h);
    CHECK(!memcmp(h.e_ident, ELFMAG, SELFMAG) && h.e_machine == MACHINE_CUDA, "%s, sm_%d: no machine code", image->name,
          capability);
    const int kernels = kernels_in(cubin, "");
    CHECK(kernels > 0, "%s, dtype %d, sm_%d: no kernel", image->name, dtype, capability);
    for (int other = 0; dtype >= 0 && other < ALONE; other++)
        CHECK(other == dtype || kernels_in(cubin, ending[other]) == 0, "%s: variant %d holds kernels%s", image->name,
              dtype, ending[other]);
    for (int other = 0; other < ALONE; other++)
        *varies |= (unsigned)(kernels_in(cubin, ending[other]) > 0) << other;
    free(cubin);
    return kernels;
}

static void every_architecture(const struct bnb_cuda_nvrtc *nvrtc, const struct bnb_cuda_image *image, bool full)
{
    double all = 0.0, alone = 0.0;
    int kernels = 0, times = 0;
    for (int a = 0; a < nvrtc->known_count; a++) {
        if (nvrtc->known[a] < 50)
            continue;
        double start = seconds();
        unsigned varies, ignored;
        kernels = compiled(image, -1, nvrtc->known[a], &varies);
        all += seconds() - start;
        const bool oldest = times++ == 0, newest = a == nvrtc->known_count - 1;
        start = seconds();
        for (int dtype = 0; dtype < ALONE && (full || oldest || newest); dtype++)
            if (varies >> dtype & 1)
                compiled(image, dtype, nvrtc->known[a], &ignored);
        if (newest && varies)
            alone = (seconds() - start) / __builtin_popcount(varies);
    }
    printf("%-14s %2d kernels, %2d architectures, %5.0f ms each", image->name, kernels, times,
           1e3 * all / (times > 0 ? times : 1));
    printf(alone > 0.0 ? ", one variant for the newest %4.0f ms\n" : "\n", 1e3 * alone);
}

/* The same code again, from a file that is not touched, and sooner. */
static void second_time(const struct bnb_cuda_image *image, int capability)
{
    char path[JIT_PATH];
    struct stat before, after;
    void *first = NULL, *second = NULL;
    jit_folder_empty(folder);
    const double start = seconds();
    CHECK(bnb_cuda_compile(image, ONE, capability, "test", &first) == BNB_OK, "%s", bnb_detail());
    const double between = seconds();
    CHECK(jit_folder_count(folder, path) == 1 && stat(path, &before) == 0, "no file");
    CHECK(bnb_cuda_compile(image, ONE, capability, "test", &second) == BNB_OK, "%s", bnb_detail());
    const double end = seconds();
    CHECK(jit_folder_count(folder, path) == 1 && stat(path, &after) == 0 && before.st_ino == after.st_ino,
          "the file was written again");
    CHECK(first && second && !memcmp(first, second, elf_size(first)), "another result");
    CHECK(end - between < (between - start) / 2, "%.1f ms, then %.1f ms", 1e3 * (between - start),
          1e3 * (end - between));
    printf("%s from the cache in %.1f ms instead of %.0f ms\n", image->name, 1e3 * (end - between),
           1e3 * (between - start));
    free(first);
    free(second);
}

static void newer_and_older_cards(const struct bnb_cuda_nvrtc *nvrtc, const struct bnb_cuda_image *image)
{
    void *ptx = NULL;
    char target[32];
    snprintf(target, sizeof target, ".target sm_%d\n", nvrtc->known[nvrtc->known_count - 1]);
    CHECK(bnb_cuda_compile(image, ONE, 990, "test", &ptx) == BNB_OK, "%s", bnb_detail());
    CHECK(ptx && strstr(ptx, target) && strstr(ptx, "bnb_k_"), "no PTX for a card to come");
    free(ptx);
    CHECK(bnb_cuda_compile(image, ONE, 20, "test", &ptx) == BNB_EDEVICE && !ptx && strstr(bnb_detail(), "2.0"), "%s",
          bnb_detail());
}

/* Only the embedded texts are read, whatever lies in the current folder; and a mistake is quoted. */
static void texts_only(const struct bnb_cuda_image *image, int capability)
{
    static const char wrong[] = "#error the file was read\n", mistake[] = "__global__ void k() { nonsense; }";
    char path[JIT_PATH + 64];
    jit_folder_empty(folder);
    setenv("BNB_CACHE_DIR", "", 1);
    CHECK(chdir(folder) == 0, "no folder");
    static const char *const below[] = {"core", "cuda", "cuda/kernels"};
    for (size_t i = 0; i < sizeof below / sizeof below[0]; i++)
        CHECK(mkdir(below[i], 0700) == 0, "no folder %s", below[i]);
    for (int i = 0; i < bnb_cuda_header_count; i++)
        jit_file_store(bnb_cuda_headers[i].name, wrong, sizeof wrong - 1);
    unsigned ignored;
    compiled(image, ONE, capability, &ignored);
    for (int i = 0; i < bnb_cuda_header_count; i++)
        remove(bnb_cuda_headers[i].name);
    for (size_t i = sizeof below / sizeof below[0]; i > 0; i--)
        rmdir(below[i - 1]);
    snprintf(path, sizeof path, "%s/..", folder);
    CHECK(chdir(path) == 0, "no way back");

    const struct bnb_cuda_image bad = {.name = "wrong", .source = {(const unsigned char *)mistake, strlen(mistake)}};
    void *cubin = NULL;
    CHECK(bnb_cuda_compile(&bad, -1, capability, "test", &cubin) == BNB_EDEVICE && !cubin &&
              strstr(bnb_detail(), "wrong.cu(1)") && strstr(bnb_detail(), "nonsense"),
          "detail is '%s'", bnb_detail());
}

int main(int argc, char **argv)
{
    char reason[512];
    const struct bnb_cuda_nvrtc *nvrtc = bnb_cuda_nvrtc_open(reason, sizeof reason);
    if (!nvrtc) {
        fprintf(stderr, "%s\n", reason);
        return getenv("BNB_NVRTC") ? EXIT_FAILURE : SKIPPED;
    }
    const bool full = argc > 1 && !strcmp(argv[1], "--full");
    const int newest = nvrtc->known[nvrtc->known_count - 1], named = argc - 1 - full;
    if (bnb_cuda_image_count == 0) {
        fprintf(stderr, "no device code is embedded\n");
        return EXIT_FAILURE;
    }
    jit_folder_make(folder);
    setenv("BNB_CACHE_DIR", folder, 1);
    printf("%s\n", bnb_cuda_compiler());
    for (int i = 0; i < (named ? named : bnb_cuda_image_count); i++) {
        const char *name = named ? argv[1 + full + i] : bnb_cuda_images[i].name;
        const struct bnb_cuda_image *image = bnb_cuda_image_find(name);
        CHECK(image && !strcmp(image->name, name), "there is no image %s", name);
        if (image)
            every_architecture(nvrtc, image, full);
    }
    const struct bnb_cuda_image *one = named ? bnb_cuda_image_find(argv[1 + full]) : &bnb_cuda_images[0];
    if (one) {
        second_time(one, newest);
        newer_and_older_cards(nvrtc, one);
        texts_only(one, newest);
    }
    jit_folder_empty(folder);
    rmdir(folder);
    return CHECK_RESULT();
}
