/*
 * register.c - hands every operator of ops.h to torch's dispatcher, for the CPU and, where torch has it, for CUDA
 *
 * Python calls bnb_torch_register() once, after it has defined the schemas.  The registrations live as long as the
 * process: the library must never be unloaded.
 */
#include "ops.h"

/* The oldest torch whose encoding of arguments this file's kernels understand: 2.10, as libtorch writes versions. */
#define SHIM_VERSION ((uint64_t)2 << 56 | (uint64_t)10 << 48)

BNB_API int bnb_torch_register(const char *torch_lib_dir);

static bnb_status register_for(const char *key)
{
    static const struct {
        const char *name;
        torch_kernel kernel;
    } ops[] = {
#define X(name, function) {name, function},
        BNB_TORCH_OPS(X)
#undef X
    };
    torch_library library = NULL;
    if (bnb_shim.library_init("bitsandbytes", key, __FILE__, __LINE__, &library))
        return bnb_fail(BNB_EDEVICE, "torch refused a library of %s operators", key);
    for (size_t i = 0; i < sizeof ops / sizeof *ops; i++)
        if (bnb_shim.library_impl(library, ops[i].name, ops[i].kernel, SHIM_VERSION))
            return bnb_fail(BNB_EDEVICE, "torch refused operator %s for %s", ops[i].name, key);
    return BNB_OK;
}

/* Register all operators; torch_lib_dir is torch's folder of shared libraries, or NULL.  Call it under a lock (Python
 * imports it under one).  A second call does nothing.  0, or a bnb_status with the reason in bnb_detail(). */
int bnb_torch_register(const char *torch_lib_dir)
{
    static bool registered;
    if (registered)
        return BNB_OK;
    bnb_status status = bnb_shim_load(torch_lib_dir);
    if (!status)
        status = register_for("CPU");
    if (!status && bnb_shim.cuda_stream)
        status = register_for("CUDA");
    registered = !status;
    return (int)status;
}
