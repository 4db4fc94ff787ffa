/*
 * status.c - statuses, the text of the last failure, version, dtypes, and the choice of the device table
 *
 * The text lives in thread-local storage of fixed size, so failing allocates nothing.
 */
#include <stdarg.h>
#include <stdio.h>

#include "core/internal.h"

static _Thread_local bnb_status last_status;
static _Thread_local char last_detail[512];

bnb_status bnb_fail(bnb_status status, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(last_detail, sizeof last_detail, format, args);
    va_end(args);
    last_status = status;
    return status;
}

const char *bnb_detail(void) { return last_detail; }

bnb_status bnb_last_status(void) { return last_status; }

const char *bnb_strerror(bnb_status status)
{
    switch (status) {
#define X(name, value, text) \
    case BNB_##name:         \
        return text;
        BNB_STATUS_MAP(X)
#undef X
    }
    return "unknown status";
}

const char *bnb_version(void) { return BNB_VERSION; }

size_t bnb_dtype_size(bnb_dtype dtype)
{
    switch (dtype) {
    case BNB_F32:
        return 4;
    case BNB_F16:
    case BNB_BF16:
        return 2;
    case BNB_U8:
    case BNB_I8:
        return 1;
    }
    return 0;
}

const struct bnb_device_ops *bnb_device_of(const bnb_exec *ex, const char *function)
{
    if (!ex)
        return &bnb_cpu_device;
    if (ex->size < sizeof(bnb_exec)) {
        bnb_fail(BNB_EINVAL, "%s: ex->size is %zu, expected at least sizeof(bnb_exec) = %zu", function, ex->size,
                 sizeof(bnb_exec));
        return NULL;
    }
    if (ex->device == BNB_CPU)
        return &bnb_cpu_device;
    if (ex->device == BNB_CUDA)
        return &bnb_cuda_device;
    bnb_fail(BNB_EINVAL, "%s: ex->device is %d, expected BNB_CPU (0) or BNB_CUDA (1)", function, (int)ex->device);
    return NULL;
}

bnb_status bnb_pointer_device(const void *ptr, bnb_device *device, int *ordinal)
{
    if (!ptr || !device || !ordinal)
        return bnb_fail(BNB_EINVAL, "pointer_device: %s is NULL", !ptr ? "ptr" : !device ? "device" : "ordinal");
    *ordinal = 0;
    *device = bnb_cuda_owns(ptr, ordinal) ? BNB_CUDA : BNB_CPU;
    return BNB_OK;
}
