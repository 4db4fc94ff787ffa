/*
 * jit.c - compiling device code at run time: one image, one dtype, one card
 *
 * For cards and drivers that the embedded binaries do not serve.  The result is machine code, so the driver's own
 * compiler is not asked, and it is kept on disk: a kernel is compiled once per user, card model and compiler.  The key
 * is a hash of everything that the compiler reads.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/cache.h"
#include "cuda/image.h"
#include "cuda/nvrtc.h"

enum { MAX_OPTIONS = 8, OPTION_SIZE = 48, LOG_LINES = 4, LOG_SIZE = 320 };

struct options {
    char text[MAX_OPTIONS][OPTION_SIZE];
    const char *list[MAX_OPTIONS];
    int count;
};

/* One compilation. */
struct job {
    const struct bnb_cuda_nvrtc *nvrtc;
    const struct bnb_cuda_image *image;
    struct bnb_cuda_target target;
    struct options options;
    const char *function;
};

const char *bnb_cuda_compiler(void)
{
    static _Thread_local char text[512];
    const struct bnb_cuda_nvrtc *nvrtc = bnb_cuda_nvrtc_open(text, sizeof text);
    if (nvrtc)
        snprintf(text, sizeof text, "NVRTC %d.%d", nvrtc->major, nvrtc->minor);
    return text;
}

/* ---------------------------------------------------------------- options and key */

static void add_option(struct options *o, const char *option, const char *value)
{
    snprintf(o->text[o->count], OPTION_SIZE, "%s%s", option, value);
    o->list[o->count] = o->text[o->count];
    o->count++;
}

/* Those of cmake/DeviceImages.cmake: no contraction but in matrix products (NUMERICS rule 1). */
static void set_options(struct job *j, int dtype)
{
    char number[12];
    const bool contracts = strncmp(j->image->name, "gemm", 4) == 0;
    snprintf(number, sizeof number, "%d", dtype);
    add_option(&j->options, "--gpu-architecture=", j->target.name);
    add_option(&j->options, "--std=", "c++17");
    add_option(&j->options, "--fmad=", contracts ? "true" : "false");
    add_option(&j->options, "--ftz=", "false");
    add_option(&j->options, "--prec-div=", "true");
    add_option(&j->options, "--prec-sqrt=", "true");
    if (dtype >= 0)
        add_option(&j->options, "-DBNB_ONLY_DTYPE=", number);
}

/* The length goes first: two texts cannot be mistaken for two others that read the same together. */
static void hash_bytes(struct bnb_cuda_hash *hash, const void *data, size_t size)
{
    *hash = bnb_cuda_hash_more(*hash, &size, sizeof size);
    *hash = bnb_cuda_hash_more(*hash, data, size);
}

static struct bnb_cuda_hash key_of(const struct job *j)
{
    struct bnb_cuda_hash key = bnb_cuda_hash_start();
    hash_bytes(&key, &j->nvrtc->major, sizeof j->nvrtc->major);
    hash_bytes(&key, &j->nvrtc->minor, sizeof j->nvrtc->minor);
    for (int i = 0; i < j->options.count; i++)
        hash_bytes(&key, j->options.list[i], strlen(j->options.list[i]));
    hash_bytes(&key, j->image->name, strlen(j->image->name));
    hash_bytes(&key, j->image->source.data, j->image->source.size);
    for (int i = 0; i < bnb_cuda_header_count; i++) {
        hash_bytes(&key, bnb_cuda_headers[i].name, strlen(bnb_cuda_headers[i].name));
        hash_bytes(&key, bnb_cuda_headers[i].source.data, bnb_cuda_headers[i].source.size);
    }
    return key;
}

/* ---------------------------------------------------------------- the compiler */

/* What the compiler said: from its first error on, some lines. */
static void first_errors(const struct job *j, nvrtc_program program, char text[LOG_SIZE])
{
    size_t size = 0;
    char *log = NULL;
    text[0] = '\0';
    if (j->nvrtc->log_size(program, &size) == 0 && size > 1)
        log = calloc(size + 1, 1);
    if (log && j->nvrtc->log(program, log) == 0) {
        const char *error = strstr(log, "error"), *begin = error ? error : log;
        while (begin > log && begin[-1] != '\n')
            begin--;
        const char *end = begin;
        for (int line = 0; line < LOG_LINES && *end; line++) {
            end += strcspn(end, "\n");
            end += *end == '\n';
        }
        end -= end > begin && end[-1] == '\n';
        snprintf(text, LOG_SIZE, "%.*s", (int)(end - begin), begin);
    }
    free(log);
}

static bnb_status refuse(const struct job *j, nvrtc_result result, nvrtc_program program)
{
    char log[LOG_SIZE] = "";
    if (program)
        first_errors(j, program, log);
    return bnb_fail(BNB_EDEVICE, "%s: NVRTC %d.%d cannot compile %s for %s: %s%s%s", j->function, j->nvrtc->major,
                    j->nvrtc->minor, j->image->name, j->target.name, j->nvrtc->error_text(result), log[0] ? "\n" : "",
                    log);
}

static bnb_status create(const struct job *j, nvrtc_program *program)
{
    char name[64];
    const size_t count = (size_t)bnb_cuda_header_count;
    const char **lists = calloc(2 * count + 1, sizeof *lists);
    if (!lists)
        return bnb_fail(BNB_ENOMEM, "%s: out of memory", j->function);
    for (size_t i = 0; i < count; i++) {
        lists[i] = (const char *)bnb_cuda_headers[i].source.data;
        lists[count + i] = bnb_cuda_headers[i].name;
    }
    snprintf(name, sizeof name, "%s.cu", j->image->name);
    const nvrtc_result result = j->nvrtc->create(program, (const char *)j->image->source.data, name,
                                                 bnb_cuda_header_count, lists, lists + count);
    free((void *)lists);
    return result ? refuse(j, result, NULL) : BNB_OK;
}

/* The result of a program that compiled, closed by a zero byte that *size does not count. */
static bnb_status take_result(const struct job *j, nvrtc_program program, void **data, size_t *size)
{
    const bool ptx = j->target.ptx;
    nvrtc_result result = ptx ? j->nvrtc->ptx_size(program, size) : j->nvrtc->cubin_size(program, size);
    char *content = result || *size == 0 ? NULL : calloc(*size + 1, 1);
    if (!result && *size > 0 && !content)
        return bnb_fail(BNB_ENOMEM, "%s: out of memory", j->function);
    if (content)
        result = ptx ? j->nvrtc->ptx(program, content) : j->nvrtc->cubin(program, content);
    if (result || !content) {
        free(content);
        return refuse(j, result, program);
    }
    *data = content;
    return BNB_OK;
}

static bnb_status compile(const struct job *j, void **data, size_t *size)
{
    nvrtc_program program = NULL;
    bnb_status status = create(j, &program);
    if (status)
        return status;
    const nvrtc_result result = j->nvrtc->compile(program, j->options.count, j->options.list);
    status = result ? refuse(j, result, program) : take_result(j, program, data, size);
    j->nvrtc->destroy(&program);
    return status;
}

bnb_status bnb_cuda_compile(const struct bnb_cuda_image *image, int dtype, int capability, const char *function,
                            void **cubin)
{
    char reason[384];
    struct job j = {.nvrtc = bnb_cuda_nvrtc_open(reason, sizeof reason), .image = image, .function = function};
    size_t size = 0;
    *cubin = NULL;
    if (!j.nvrtc)
        return bnb_fail(BNB_EDEVICE, "%s: no compiled code for compute capability %d.%d: %s", function, capability / 10,
                        capability % 10, reason);
    if (!bnb_cuda_target_of(j.nvrtc, capability, &j.target))
        return bnb_fail(
            BNB_EDEVICE,
            "%s: NVRTC %d.%d knows no card as old as compute capability %d.%d; BNB_NVRTC=/path/to/libnvrtc.so "
            "of an older CUDA names one that does",
            function, j.nvrtc->major, j.nvrtc->minor, capability / 10, capability % 10);
    set_options(&j, dtype);
    const struct bnb_cuda_hash key = key_of(&j);
    if (bnb_cuda_cache_read(key, cubin, &size))
        return BNB_OK;
    const bnb_status status = compile(&j, cubin, &size);
    if (!status)
        bnb_cuda_cache_write(key, *cubin, size);
    return status;
}
