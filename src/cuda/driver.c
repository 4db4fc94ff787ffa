/*
 * driver.c - opening libcuda once, and turning its results into statuses
 */
#include "cuda/driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

static struct bnb_driver driver;
static char reason[256]; /* why there is no driver; "" when there is one */
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* A data pointer as a function pointer: POSIX guarantees the bits, ISO C has no cast for them. */
static bool resolve(void *library, const char *symbol, void *member, size_t size)
{
    void *address = dlsym(library, symbol);
    if (!address)
        snprintf(reason, sizeof reason, "the CUDA driver has no %s; CUDA 11.4 or newer is needed", symbol);
    else
        memcpy(member, &address, size);
    return address != NULL;
}

static void resolve_optional(void *library, const char *symbol, void *member, size_t size)
{
    void *address = dlsym(library, symbol);
    memcpy(member, &address, size);
}

static void open_driver(void)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        snprintf(reason, sizeof reason, "the CUDA driver cannot be opened: %s", dlerror());
        return;
    }
#define X(member, symbol, parameters)                                     \
    if (!resolve(library, #symbol, &driver.member, sizeof driver.member)) \
        return;
    BNB_DRIVER_MAP(X)
#undef X
#define X(member, symbol, parameters) resolve_optional(library, #symbol, &driver.member, sizeof driver.member);
    BNB_DRIVER_OPTIONAL_MAP(X)
#undef X
    const cu_result result = driver.init(0);
    if (result) {
        const char *name = NULL, *text = NULL;
        driver.error_name(result, &name);
        driver.error_text(result, &text);
        snprintf(reason, sizeof reason, "cuInit: %s: %s", name ? name : "unknown error", text ? text : "");
    }
}

const struct bnb_driver *bnb_cuda_driver(const char *function)
{
    pthread_once(&once, open_driver);
    if (reason[0] == '\0')
        return &driver;
    bnb_fail(BNB_EDEVICE, "%s: %s", function, reason);
    return NULL;
}

bnb_status bnb_cuda_check(const struct bnb_driver *cu, cu_result result, const char *function, const char *call)
{
    if (result == 0)
        return BNB_OK;
    const char *name = NULL, *text = NULL;
    cu->error_name(result, &name);
    cu->error_text(result, &text);
    if (result == CU_ERROR_OUT_OF_MEMORY)
        return bnb_fail(BNB_ENOMEM, "%s: CUDA out of memory. %s", function, call);
    return bnb_fail(BNB_ECUDA, "%s: %s: %s: %s", function, call, name ? name : "unknown error", text ? text : "");
}

bool bnb_cuda_owns(const void *ptr, int *ordinal)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD); /* nobody's memory before somebody loads it */
    unsigned type = 0;
    if (!library)
        return false;
    dlclose(library);
    pthread_once(&once, open_driver);
    const cu_address address = (cu_address)(uintptr_t)ptr;
    return reason[0] == '\0' && driver.pointer_attribute(&type, CU_POINTER_MEMORY_TYPE, address) == 0 &&
           type == CU_MEMORY_DEVICE && driver.pointer_attribute(ordinal, CU_POINTER_ORDINAL, address) == 0;
}
