/*
 * nvrtc.c - finding NVRTC, and what to ask it for
 *
 * The compiler should be of the CUDA version that torch brought: what another version makes, the driver may refuse.
 * Hence libraries beside torch's go before those of the system, and torch's own version before others.
 */
#define _GNU_SOURCE /* RTLD_NOLOAD, dl_iterate_phdr */
#include "cuda/nvrtc.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PATH_SIZE = 4096, FOLDERS = 8 };

/* CUDA 11 never changed this name after 11.2. */
static const char *const sonames[] = {"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11.2"};
enum { SONAMES = sizeof sonames / sizeof sonames[0], NEWEST = 13 };

/* Under the lock; `opened` is set once and for all. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct bnb_cuda_nvrtc opened;
static bool is_open;

/* ---------------------------------------------------------------- one library */

static int ascending(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }

static bool resolve(void *library, const char *symbol, void *member, size_t size)
{
    void *address = dlsym(library, symbol);
    if (address)
        memcpy(member, &address, size);
    return address != NULL;
}

/* Everything that is needed of an open library, or false. */
static bool fill(struct bnb_cuda_nvrtc *n, void *library)
{
    bool found = resolve(library, "nvrtcGetErrorString", &n->error_text, sizeof n->error_text);
#define X(member, symbol, parameters) found = found && resolve(library, #symbol, &n->member, sizeof n->member);
    BNB_NVRTC_MAP(X)
#undef X
    if (!found || n->version(&n->major, &n->minor) || n->arch_count(&n->known_count) || n->known_count < 1 ||
        n->known_count > BNB_NVRTC_ARCHS || n->archs(n->known))
        return false;
    qsort(n->known, (size_t)n->known_count, sizeof n->known[0], ascending);
    return true;
}

/* flags besides RTLD_NOW: RTLD_NOLOAD, or 0. */
static bool try_open(const char *path, int flags)
{
    struct bnb_cuda_nvrtc n = {0};
    /* A path from the environment is the user's wish, as LD_LIBRARY_PATH is. */
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL | flags); /* NOLINT(clang-analyzer-optin.taint.GenericTaint) */
    if (!library)
        return false;
    if (!fill(&n, library)) {
        dlclose(library);
        return false;
    }
    opened = n;
    is_open = true;
    return true;
}

/* ---------------------------------------------------------------- places */

/* Folders of the CUDA libraries in this process, and the version of the first that tells: 12 for libcudart.so.12. */
struct places {
    char folder[FOLDERS][PATH_SIZE];
    int count;
    int version;
};

static void add_folder(struct places *p, const char *path, size_t length)
{
    if (length == 0 || length >= PATH_SIZE || p->count == FOLDERS)
        return;
    for (int i = 0; i < p->count; i++)
        if (strlen(p->folder[i]) == length && memcmp(p->folder[i], path, length) == 0)
            return;
    memcpy(p->folder[p->count], path, length);
    p->folder[p->count++][length] = '\0';
}

static int look_at(struct dl_phdr_info *info, size_t size, void *context)
{
    static const char *const prefixes[] = {"libcudart", "libcublas", "libnvrtc", "libtorch_cuda"};
    struct places *p = context;
    const char *slash = info->dlpi_name ? strrchr(info->dlpi_name, '/') : NULL;
    (void)size;
    for (size_t i = 0; slash && i < sizeof prefixes / sizeof prefixes[0]; i++) {
        if (strncmp(slash + 1, prefixes[i], strlen(prefixes[i])) != 0)
            continue;
        const char *suffix = strstr(slash, ".so.");
        if (suffix && p->version == 0)
            p->version = (int)strtol(suffix + 4, NULL, 10);
        add_folder(p, info->dlpi_name, (size_t)(slash - info->dlpi_name));
    }
    return 0;
}

/* Every name in one folder, the version that the process uses first. */
static bool try_folder(const char *folder, const char *below, int version)
{
    const int first = version > 10 && version <= NEWEST ? NEWEST - version : 0;
    char path[PATH_SIZE];
    for (int i = -1; i < SONAMES; i++) {
        const int length = snprintf(path, sizeof path, "%s%s/%s", folder, below, sonames[i < 0 ? first : i]);
        if (length > 0 && length < PATH_SIZE && i != first && try_open(path, 0))
            return true;
    }
    return false;
}

/* Beside a loaded library, then where wheels put it: .../nvidia/cuda_runtime/lib and .../torch/lib are the neighbours. */
static bool try_beside(const struct places *p)
{
    static const char *const below[] = {"", "/../../cuda_nvrtc/lib", "/../../cu13/lib", "/../../nvidia/cuda_nvrtc/lib",
                                        "/../../nvidia/cu13/lib"};
    for (int own = 1; own >= 0; own--) /* a wheel of another version may lie there too: in the second round */
        for (int i = 0; i < p->count; i++)
            for (size_t b = 0; b < sizeof below / sizeof below[0]; b++) {
                const bool is_cu13 = strstr(below[b], "cu13") != NULL, is_cu12 = strstr(below[b], "cuda_nvrtc") != NULL;
                const bool matches = !p->version || (!is_cu13 && !is_cu12) || is_cu13 == (p->version == 13);
                if (matches == own && try_folder(p->folder[i], below[b], p->version))
                    return true;
            }
    return false;
}

static bool search(void)
{
    static struct places p; /* under the lock: too large for a small thread's stack */
    for (int i = 0; i < SONAMES; i++)
        if (try_open(sonames[i], RTLD_NOLOAD))
            return true;
    p = (struct places){0};
    dl_iterate_phdr(look_at, &p);
    if (try_beside(&p))
        return true;
    for (int i = 0; i < SONAMES; i++)
        if (try_open(sonames[i], 0))
            return true;
    return try_folder("/usr/local/cuda/lib64", "", p.version);
}

const struct bnb_cuda_nvrtc *bnb_cuda_nvrtc_open(char *reason, size_t size)
{
    const char *own = getenv("BNB_NVRTC");
    pthread_mutex_lock(&lock);
    if (!is_open && own && own[0]) {
        if (!try_open(own, 0)) {
            const char *error = dlerror();
            snprintf(reason, size, "BNB_NVRTC=%s is not a usable NVRTC: %s", own,
                     error ? error : "functions are missing");
        }
    } else if (!is_open && !search())
        snprintf(
            reason, size,
            "no NVRTC (%s, %s or %s) was found: none is loaded, lies beside torch's CUDA libraries or is installed; "
            "BNB_NVRTC=/path/to/one names it",
            sonames[0], sonames[1], sonames[2]);
    const bool found = is_open;
    pthread_mutex_unlock(&lock);
    return found ? &opened : NULL;
}

/* ---------------------------------------------------------------- targets */

bool bnb_cuda_target_of(const struct bnb_cuda_nvrtc *nvrtc, int capability, struct bnb_cuda_target *target)
{
    int best = 0;
    for (int i = 0; i < nvrtc->known_count && nvrtc->known[i] <= capability; i++)
        best = nvrtc->known[i];
    target->ptx = best != capability;
    /* From Hopper on, "a" opens what only this very architecture has. */
    snprintf(target->name, sizeof target->name, "%s_%d%s", target->ptx ? "compute" : "sm", best,
             !target->ptx && best >= 90 && nvrtc->major >= 12 ? "a" : "");
    return best > 0;
}
