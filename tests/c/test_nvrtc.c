/*
 * test_nvrtc.c - how the run-time compiler is found, what it is given, and the cache, with stand-ins for CUDA's libraries
 *
 * STUBS is the folder of the stand-ins, laid out as wheels do.
 */
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "cuda/cache.h"
#include "cuda/image.h"
#include "cuda/nvrtc.h"
#include "jit_folder.h"

static char folder[JIT_PATH];
static int *compilations;

static struct bnb_cuda_image image_of(const char *name, const char *source)
{
    return (struct bnb_cuda_image){.name = name, .source = {(const unsigned char *)source, strlen(source)}};
}

/* The text that the stand-in made of a source, or "" after a failure. */
static const char *compile(const char *name, const char *source, int dtype, int capability)
{
    static char text[16384];
    const struct bnb_cuda_image image = image_of(name, source);
    void *cubin = NULL;
    const bnb_status status = bnb_cuda_compile(&image, dtype, capability, "quantize4", &cubin);
    snprintf(text, sizeof text, "%s", status ? "" : (const char *)cubin);
    CHECK((status == BNB_OK) == (cubin != NULL), "status %d", (int)status);
    free(cubin);
    return text;
}

/* ---------------------------------------------------------------- pure functions */

static void hashes(void)
{
    static const struct {
        const char *text;
        uint64_t high, low;
    } row[] = {/* of the algorithm's authors */
               {"", 0x6c62272e07bb0142u, 0x62b821756295c58du},
               {"a", 0xd228cb696f1a8cafu, 0x78912b704e4a8964u},
               {"foobar", 0x343e1662793c64bfu, 0x6f0d3597ba446f18u}};
    for (size_t i = 0; i < sizeof row / sizeof row[0]; i++)
        for (size_t cut = 0; cut <= strlen(row[i].text); cut++) {
            const struct bnb_cuda_hash first = bnb_cuda_hash_more(bnb_cuda_hash_start(), row[i].text, cut);
            const struct bnb_cuda_hash h = bnb_cuda_hash_more(first, row[i].text + cut, strlen(row[i].text) - cut);
            CHECK(h.high == row[i].high && h.low == row[i].low, "'%s' cut at %zu", row[i].text, cut);
        }
}

static void targets(void)
{
    static const struct {
        int capability, major;
        const char *name;
        bool ptx;
    } row[] = {{75, 13, "sm_75", false},     {86, 13, "sm_86", false},       {90, 13, "sm_90a", false},
               {90, 11, "sm_90", false},     {100, 13, "sm_100a", false},    {120, 12, "sm_120a", false},
               {87, 13, "compute_86", true}, {103, 13, "compute_100", true}, {999, 13, "compute_120", true}};
    struct bnb_cuda_nvrtc n = {.known = {75, 86, 90, 100, 120}, .known_count = 5};
    struct bnb_cuda_target t;
    for (size_t i = 0; i < sizeof row / sizeof row[0]; i++) {
        n.major = row[i].major;
        CHECK(bnb_cuda_target_of(&n, row[i].capability, &t) && !strcmp(t.name, row[i].name) && t.ptx == row[i].ptx,
              "%d: %s, expected %s", row[i].capability, t.name, row[i].name);
    }
    CHECK(!bnb_cuda_target_of(&n, 74, &t), "a card older than the compiler got %s", t.name);
}

/* ---------------------------------------------------------------- finding it */

static void nonsense(const char *path)
{
    setenv("BNB_NVRTC", path, 1);
    compile("quant4", "text", 0, 80);
    CHECK(bnb_last_status() == BNB_EDEVICE && strstr(bnb_detail(), path) && strstr(bnb_detail(), "quantize4") &&
              strstr(bnb_detail(), "8.0"),
          "detail is '%s'", bnb_detail());
    CHECK(strstr(bnb_cuda_compiler(), path), "the compiler is '%s'", bnb_cuda_compiler());
    unsetenv("BNB_NVRTC");
}

static void load(const char *path) { CHECK(dlopen(path, RTLD_NOW), "%s", dlerror()); }

/* In a process of its own: the compiler that is found beside these two libraries. */
static void found_by(const char *first, const char *second, const char *expected)
{
    int status = 0;
    const pid_t child = fork();
    if (child == 0) {
        load(first);
        load(second);
        if (strcmp(bnb_cuda_compiler(), expected) != 0)
            fprintf(stderr, "the compiler is '%s'\n", bnb_cuda_compiler());
        _exit(strcmp(bnb_cuda_compiler(), expected) != 0);
    }
    CHECK(waitpid(child, &status, 0) == child && status == 0, "%s, %s: expected %s", first, second, expected);
}

/* The neighbour of the runtime's own version, though one of another version lies there too. */
static void found_beside(void)
{
    static const char torch[] = STUBS "/torch/lib/libtorch_cuda.so";
    found_by(torch, STUBS "/nvidia/cuda_runtime/lib/libcudart.so.12", "NVRTC 12.9");
    found_by(torch, STUBS "/nvidia/cu13/lib/libcudart.so.13", "NVRTC 13.0");
    found_by(STUBS "/both/lib/libcudart.so.12", torch, "NVRTC 12.9");
    load(STUBS "/nvidia/cuda_runtime/lib/libcudart.so.12");
    setenv("BNB_NVRTC", "", 1);
    CHECK(!strcmp(bnb_cuda_compiler(), "NVRTC 12.9"), "the compiler is '%s'", bnb_cuda_compiler());
    void *library = dlopen(STUBS "/nvidia/cuda_nvrtc/lib/libnvrtc.so.12", RTLD_NOW | RTLD_LOCAL);
    compilations = library ? dlsym(library, "stub_compilations") : NULL;
    if (!compilations)
        exit(EXIT_FAILURE);
    setenv("BNB_NVRTC", "/nonsense", 1);
    CHECK(!strcmp(bnb_cuda_compiler(), "NVRTC 12.9"), "an open compiler was forgotten: '%s'", bnb_cuda_compiler());
}

/* ---------------------------------------------------------------- using it */

static void what_is_given(void)
{
    char header[128];
    const char *text = compile("quant4", "a source", 1, 90);
    CHECK(!strncmp(text, "\177ELF quant4.cu\nsource a source\n", 31), "compiled '%s'", text);
    CHECK(strstr(text, "option --gpu-architecture=sm_90a\n") && strstr(text, "option --fmad=false\n") &&
              strstr(text, "option --ftz=false\n") && strstr(text, "option -DBNB_ONLY_DTYPE=1\n"),
          "compiled '%s'", text);
    for (int i = 0; i < bnb_cuda_header_count; i++) {
        snprintf(header, sizeof header, "\nheader %s\n", bnb_cuda_headers[i].name);
        CHECK(strstr(text, header), "%s was not given", bnb_cuda_headers[i].name);
    }
    text = compile("gemm4", "a source", -1, 80);
    CHECK(strstr(text, "=sm_80\n") && strstr(text, "option --fmad=true\n") && !strstr(text, "ONLY_DTYPE"), "'%s'",
          text);
    text = compile("quant4", "a source", 0, 130);
    CHECK(!strncmp(text, "ptx\n", 4) && strstr(text, "=compute_120\n"), "compiled '%s'", text);
    compile("quant4", "a source", 0, 61);
    CHECK(bnb_last_status() == BNB_EDEVICE && strstr(bnb_detail(), "6.1") && strstr(bnb_detail(), "NVRTC 12.9"), "%s",
          bnb_detail());
    compile("quant4", "a mistake", 0, 80);
    CHECK(bnb_last_status() == BNB_EDEVICE && strstr(bnb_detail(), "quant4") &&
              strstr(bnb_detail(), "COMPILATION\nan error\nline two\nline three\nline four") &&
              !strstr(bnb_detail(), "line five"),
          "detail is '%s'", bnb_detail());
}

/* Whether a compilation of the usual source asked the compiler. */
static bool asks(void)
{
    const int before = *compilations;
    const char *text = compile("quant4", "usual", 0, 80);
    CHECK(strstr(text, "source usual\n"), "compiled '%s'", text);
    return *compilations != before;
}

static void keys_differ(void)
{
    jit_folder_empty(folder);
    CHECK(asks() && !asks() && jit_folder_count(folder, NULL) == 1, "%d files", jit_folder_count(folder, NULL));
    const int before = *compilations;
    compile("quant4", "usual", 1, 80);
    compile("quant4", "usual", -1, 80);
    compile("quant4", "usual", 0, 70);
    compile("quant4", "usual ", 0, 80);
    compile("quant8", "usual", 0, 80);
    CHECK(*compilations == before + 5 && jit_folder_count(folder, NULL) == 6, "%d compiled, %d files",
          *compilations - before, jit_folder_count(folder, NULL));
    compile("quant4", "a mistake", 0, 80);
    compile("quant4", "a mistake", 0, 80);
    CHECK(*compilations == before + 7 && jit_folder_count(folder, NULL) == 6, "a failure was kept");
}

/* The content comes from the file: another one, rightly hashed, is believed. */
static void file_is_used(void)
{
    char path[JIT_PATH];
    size_t size = 0;
    struct stat s;
    jit_folder_empty(folder);
    asks();
    jit_folder_count(folder, path);
    CHECK(stat(path, &s) == 0 && (s.st_mode & 07777) == 0600, "mode %o", (unsigned)s.st_mode);
    unsigned char *data = jit_file_load(path, &size);
    struct bnb_cuda_cache_header header;
    memcpy(&header, data, sizeof header);
    data[size - 1] = '!';
    header.content = bnb_cuda_hash_more(bnb_cuda_hash_start(), data + sizeof header, size - sizeof header);
    memcpy(data, &header, sizeof header);
    jit_file_store(path, data, size);
    free(data);
    const char *text = compile("quant4", "usual", 0, 80);
    CHECK(text[0] && text[strlen(text) - 1] == '!', "the file was not used: '%s'", text);
}

static void expect_replaced(const char *path, const unsigned char *good, size_t size, const char *what, size_t at)
{
    size_t now = 0;
    struct stat s;
    CHECK(asks(), "%s at %zu was believed", what, at);
    CHECK(lstat(path, &s) == 0 && S_ISREG(s.st_mode), "%s at %zu was not replaced", what, at);
    unsigned char *data = jit_file_load(path, &now);
    CHECK(now == size && !memcmp(data, good, size), "%s at %zu was replaced by something else", what, at);
    free(data);
    CHECK(!asks() && jit_folder_count(folder, NULL) == 1, "%s at %zu: the new file is not used", what, at);
}

static void damaged_files(void)
{
    char path[JIT_PATH], elsewhere[JIT_PATH + 8];
    size_t size = 0;
    jit_folder_empty(folder);
    asks();
    jit_folder_count(folder, path);
    unsigned char *good = jit_file_load(path, &size), *bad = malloc(size + 1);
    if (!bad)
        exit(EXIT_FAILURE);
    for (size_t at = 0; at < size; at += at < sizeof(struct bnb_cuda_cache_header) ? 1 : 37) {
        memcpy(bad, good, size);
        bad[at] ^= 0x10;
        jit_file_store(path, bad, size);
        expect_replaced(path, good, size, "a changed byte", at);
    }
    memcpy(bad, good, size);
    bad[size] = 0;
    static const size_t lengths[] = {0, 1, 47, 48, 49};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        jit_file_store(path, bad, lengths[i]);
        expect_replaced(path, good, size, "a short file", lengths[i]);
    }
    for (int more = -1; more <= 1; more += 2) {
        jit_file_store(path, bad, more < 0 ? size - 1 : size + 1);
        expect_replaced(path, good, size, "a wrong length", size);
    }
    snprintf(elsewhere, sizeof elsewhere, "%s.else", folder);
    jit_file_store(elsewhere, good, size);
    CHECK(remove(path) == 0 && symlink(elsewhere, path) == 0, "no link");
    expect_replaced(path, good, size, "a link to a good file", 0);
    remove(elsewhere);
    CHECK(remove(path) == 0 && mkfifo(path, 0600) == 0, "no pipe");
    expect_replaced(path, good, size, "a pipe", 0);
    CHECK(chmod(path, 0620) == 0, "no mode");
    expect_replaced(path, good, size, "a file that others may write", 0);
    if (geteuid() == 0) {
        CHECK(chown(path, 12345, (gid_t)-1) == 0, "no owner");
        expect_replaced(path, good, size, "somebody else's file", 0);
    }
    CHECK(remove(path) == 0 && mkdir(path, 0700) == 0 && asks(), "a folder was believed");
    CHECK(asks() && jit_folder_count(folder, NULL) == 1, "what could not be renamed was left");
    free(good);
    free(bad);
}

/* ---------------------------------------------------------------- folders */

/* No file is read or written, and compiling goes on. */
static void expect_unused(const char *where, const char *what)
{
    const int before = jit_folder_count(where, NULL);
    CHECK(asks() && asks(), "%s is read", what);
    CHECK(jit_folder_count(where, NULL) == before, "%s is written to", what);
}

static void unsafe_folders(void)
{
    jit_folder_empty(folder);
    CHECK(asks() && !asks(), "the folder does not work");
    static const unsigned modes[] = {0720, 0702, 0777, 01777};
    for (size_t i = 0; i < sizeof modes / sizeof modes[0]; i++) {
        CHECK(chmod(folder, modes[i]) == 0, "no mode");
        expect_unused(folder, "a folder that others may write to");
    }
    CHECK(chmod(folder, 0700) == 0 && !asks(), "the folder does not work again");
    setenv("BNB_CACHE_DIR", "", 1);
    expect_unused(folder, "no folder");
    setenv("BNB_CACHE_DIR", "/dev/null/x", 1);
    expect_unused(folder, "a folder below a file");
    setenv("BNB_CACHE_DIR", "/dev/null", 1);
    expect_unused(folder, "a file");
    setenv("BNB_CACHE_DIR", folder, 1);
}

/* As another user where this one may do everything. */
static void other_users(void)
{
    const bool root = geteuid() == 0;
    jit_folder_empty(folder);
    CHECK(chmod(folder, 0755) == 0 && asks() && !asks(), "the folder does not work");
    if (root) {
        CHECK(seteuid(12345) == 0, "no other user");
        expect_unused(folder, "somebody else's folder");
        CHECK(seteuid(0) == 0, "no way back");
    }
    jit_folder_empty(folder);
    CHECK(chmod(folder, 0555) == 0 && (!root || (chown(folder, 12345, (gid_t)-1) == 0 && seteuid(12345) == 0)),
          "setup");
    expect_unused(folder, "a read-only folder");
    CHECK((!root || (seteuid(0) == 0 && chown(folder, 0, (gid_t)-1) == 0)) && chmod(folder, 0700) == 0, "setup");
}

/* XDG_CACHE_HOME, HOME, neither. */
static void places(void)
{
    char inner[JIT_PATH + 32];
    struct stat s;
    jit_folder_empty(folder);
    unsetenv("BNB_CACHE_DIR");
    setenv("XDG_CACHE_HOME", "relative", 1);
    setenv("HOME", folder, 1);
    snprintf(inner, sizeof inner, "%s/.cache/bitsandbytes", folder);
    CHECK(asks() && !asks() && jit_folder_count(inner, NULL) == 1, "nothing in %s", inner);
    CHECK(stat(inner, &s) == 0 && (s.st_mode & 07777) == 0700, "mode %o", (unsigned)s.st_mode);
    CHECK(access("relative", F_OK) != 0, "a relative XDG_CACHE_HOME was used");
    jit_folder_empty(inner);
    rmdir(inner);
    snprintf(inner, sizeof inner, "%s/.cache", folder);
    rmdir(inner);
    setenv("XDG_CACHE_HOME", folder, 1);
    snprintf(inner, sizeof inner, "%s/bitsandbytes", folder);
    CHECK(asks() && !asks() && jit_folder_count(inner, NULL) == 1, "nothing in %s", inner);
    jit_folder_empty(inner);
    rmdir(inner);
    unsetenv("XDG_CACHE_HOME");
    unsetenv("HOME");
    expect_unused(folder, "nowhere");
    setenv("BNB_CACHE_DIR", folder, 1);
}

/* Processes and threads at once: all get the right text, and one file is left. */
static void *compile_often(void *unused)
{
    const struct bnb_cuda_image image = image_of("quant4", "usual");
    for (int i = 0; i < 20; i++) {
        void *cubin = NULL;
        if (bnb_cuda_compile(&image, i % 3, 80, "quantize4", &cubin) || !strstr(cubin, "source usual\n"))
            exit(EXIT_FAILURE);
        free(cubin);
    }
    return unused;
}

static void many_at_once(void)
{
    int status = 0, bad = 0;
    pthread_t thread[2];
    jit_folder_empty(folder);
    for (int i = 0; i < 6; i++)
        if (fork() == 0) {
            for (int t = 0; t < 2; t++)
                if (pthread_create(&thread[t], NULL, compile_often, NULL))
                    _exit(EXIT_FAILURE);
            for (int t = 0; t < 2; t++)
                pthread_join(thread[t], NULL);
            _exit(EXIT_SUCCESS);
        }
    while (wait(&status) > 0)
        bad += status != 0;
    CHECK(bad == 0 && jit_folder_count(folder, NULL) == 3 && !asks(), "%d processes failed, %d files", bad,
          jit_folder_count(folder, NULL));
}

int main(void)
{
    jit_folder_make(folder);
    setenv("BNB_CACHE_DIR", folder, 1);
    hashes();
    targets();
    nonsense("/no/such/libnvrtc.so.12");
    nonsense(STUBS "/nvidia/cuda_runtime/lib/libcudart.so.12");
    found_beside();
    what_is_given();
    keys_differ();
    file_is_used();
    damaged_files();
    unsafe_folders();
    other_users();
    places();
    many_at_once();
    jit_folder_empty(folder);
    rmdir(folder);
    return CHECK_RESULT();
}
