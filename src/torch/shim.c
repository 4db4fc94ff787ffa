/*
 * shim.c - finds libtorch in the process and fills the table of its functions
 *
 * CPython loads torch with RTLD_LOCAL, so the global scope knows nothing of it: RTLD_NOLOAD gives the handle of the
 * library that is already there, by its name or by its path.  A second libtorch is never loaded.
 */
#define _GNU_SOURCE /* RTLD_NOLOAD, RTLD_DEFAULT */
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "shim.h"

struct bnb_shim bnb_shim;
int32_t bnb_torch_dtypes[BNB_TORCH_DTYPE_COUNT];

/* Where a symbol goes: `slot` is the address of a function pointer of any type. */
struct symbol {
    const char *name;
    void *slot;
};

static const struct symbol required[] = {
#define X(member, symbol, result, arguments) {symbol, &bnb_shim.member},
    BNB_SHIM_REQUIRED(X)
#undef X
};

static const struct symbol optional[] = {
#define X(member, symbol, result, arguments) {symbol, &bnb_shim.member},
    BNB_SHIM_OPTIONAL(X)
#undef X
        {"_Znwm", &bnb_shim.operator_new},
    {"_ZdlPv", &bnb_shim.operator_delete},
};

static void *loaded_library(const char *lib_dir, const char *name)
{
    void *handle = dlopen(name, RTLD_NOW | RTLD_NOLOAD);
    char path[4096];
    if (!handle && lib_dir && snprintf(path, sizeof path, "%s/%s", lib_dir, name) < (int)sizeof path)
        handle = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    return handle;
}

/* POSIX lets an object pointer hold a function; ISO C wants it moved as bytes. */
static bool resolve(const struct symbol *symbol, void *library)
{
    void *address = dlsym(library, symbol->name);
    if (address)
        memcpy(symbol->slot, &address, sizeof address);
    return address != NULL;
}

static bnb_status load_dtypes(void *library)
{
    static const char *const names[] = {
#define X(name) "aoti_torch_dtype_" #name,
        BNB_TORCH_DTYPES(X)
#undef X
    };
    for (int i = 0; i < BNB_TORCH_DTYPE_COUNT; i++) {
        int32_t (*get)(void) = NULL;
        const struct symbol symbol = {names[i], &get};
        if (!resolve(&symbol, library))
            return bnb_fail(BNB_EDEVICE, "libtorch_cpu.so has no symbol %s; torch 2.10 or newer is needed", names[i]);
        bnb_torch_dtypes[i] = get();
    }
    return BNB_OK;
}

bnb_status bnb_shim_load(const char *lib_dir)
{
    void *cpu = loaded_library(lib_dir, "libtorch_cpu.so");
    if (!cpu)
        return bnb_fail(BNB_EDEVICE, "libtorch_cpu.so is not loaded in this process; import torch first");
    for (size_t i = 0; i < sizeof required / sizeof *required; i++)
        if (!resolve(&required[i], cpu))
            return bnb_fail(BNB_EDEVICE, "libtorch_cpu.so has no symbol %s; torch 2.10 or newer is needed",
                            required[i].name);

    void *cuda = loaded_library(lib_dir, "libtorch_cuda.so");
    for (size_t i = 0; i < sizeof optional / sizeof *optional; i++) {
        /* The global scope first: a preloaded allocator replaces operator delete there. */
        if (!resolve(&optional[i], RTLD_DEFAULT) && !resolve(&optional[i], cpu) && cuda)
            resolve(&optional[i], cuda);
    }
    if (!bnb_shim.delete_box && !bnb_shim.operator_delete)
        return bnb_fail(BNB_EDEVICE, "neither torch_delete_stable_ivalue nor operator delete (_ZdlPv) was found: "
                                     "optional arguments could not be freed");
    if (!bnb_shim.new_box && !bnb_shim.operator_new)
        return bnb_fail(BNB_EDEVICE, "neither torch_new_stable_ivalue nor operator new (_Znwm) was found: "
                                     "optional results could not be given");
    return load_dtypes(cpu);
}
