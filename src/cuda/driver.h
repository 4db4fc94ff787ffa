/*
 * driver.h - the CUDA driver, libcuda, as it is found at run time
 *
 * Nothing here is linked: the library is opened when CUDA is first asked for, and a machine without it answers with the
 * reason.  Types and constants are re-declared; each symbol is the newest variant that every driver since 11.4 exports.
 */
#ifndef BNB_CUDA_DRIVER_H
#define BNB_CUDA_DRIVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/internal.h"

typedef int cu_result; /* 0 is success */
typedef int cu_device;
typedef unsigned long long cu_address;
typedef struct cu_context_object *cu_context;
typedef struct cu_module_object *cu_module;
typedef struct cu_function_object *cu_function;
typedef struct cu_stream_object *cu_stream;
typedef struct cu_event_object *cu_event;

/* Results that are told apart. */
enum {
    CU_ERROR_OUT_OF_MEMORY = 2,
    CU_ERROR_NO_BINARY = 209,       /* the image holds no code for this card           */
    CU_ERROR_INVALID_PTX = 218,
    CU_ERROR_UNSUPPORTED_PTX = 222  /* the image's PTX is newer than the driver        */
};

/* Device attributes, function attributes, pointer attributes and flags, by their values in cuda.h. */
enum {
    CU_DEVICE_SHARED_OPTIN = 97,
    CU_DEVICE_SM_COUNT = 16,
    CU_DEVICE_CC_MAJOR = 75,
    CU_DEVICE_CC_MINOR = 76,
    CU_DEVICE_L2_BYTES = 38,
    CU_FUNCTION_SHARED_BYTES = 1, /* static ones */
    CU_FUNCTION_LOCAL_BYTES = 3,
    CU_FUNCTION_PTX_VERSION = 5,
    CU_FUNCTION_BINARY_VERSION = 6,
    CU_FUNCTION_SHARED_MAX = 8,
    CU_FUNCTION_SHARED_PERCENT = 9, /* of the memory that it has in common with the first-level cache */
    CU_POINTER_MEMORY_TYPE = 2,
    CU_POINTER_ORDINAL = 9,
    CU_MEMORY_HOST = 1,
    CU_MEMORY_DEVICE = 2,
    CU_HOST_PORTABLE = 1,
    CU_HOST_MAPPED = 2,
    CU_CAPTURE_RELAXED = 2,
    CU_EVENT_NO_TIMING = 2,
    CU_STREAM_NON_BLOCKING = 1,
    CU_LAUNCH_CLUSTER = 4,
    CU_LAUNCH_EARLY = 6, /* "programmatic stream serialization" */
    CU_MAP_UINT8 = 0,
    CU_MAP_UINT16 = 1,
    CU_MAP_SWIZZLE_NONE = 0,
    CU_MAP_SWIZZLE_32 = 1,
    CU_MAP_SWIZZLE_64 = 2,
    CU_MAP_SWIZZLE_128 = 3,
    CU_MAP_PROMOTE_128 = 2,
    CU_MAP_PROMOTE_256 = 3
};

/* CUlaunchAttribute and CUlaunchConfig. */
struct cu_launch_attribute {
    int id;
    union {
        char size[64];
        unsigned cluster[3];
        int early;
    } value __attribute__((aligned(8)));
};

struct cu_launch_config {
    unsigned grid[3], block[3], shared_bytes;
    cu_stream stream;
    struct cu_launch_attribute *attributes;
    unsigned count;
};

/* X(member, symbol, parameters) */
#define BNB_DRIVER_MAP(X)                                                                                           \
    X(init, cuInit, (unsigned flags))                                                                               \
    X(driver_version, cuDriverGetVersion, (int *version))                                                           \
    X(device_count, cuDeviceGetCount, (int *count))                                                                 \
    X(device_get, cuDeviceGet, (cu_device * device, int ordinal))                                                   \
    X(device_name, cuDeviceGetName, (char *name, int size, cu_device device))                                       \
    X(device_attribute, cuDeviceGetAttribute, (int *value, int attribute, cu_device device))                        \
    X(primary_retain, cuDevicePrimaryCtxRetain, (cu_context * context, cu_device device))                           \
    X(context_current, cuCtxGetCurrent, (cu_context * context))                                                     \
    X(context_push, cuCtxPushCurrent_v2, (cu_context context))                                                      \
    X(context_pop, cuCtxPopCurrent_v2, (cu_context * context))                                                      \
    X(context_synchronize, cuCtxSynchronize, (void))                                                                \
    X(module_load, cuModuleLoadData, (cu_module * module, const void *image))                                       \
    X(module_unload, cuModuleUnload, (cu_module module))                                                            \
    X(module_function, cuModuleGetFunction, (cu_function * function, cu_module module, const char *name))           \
    X(function_attribute, cuFuncGetAttribute, (int *value, int attribute, cu_function function))                    \
    X(function_set, cuFuncSetAttribute, (cu_function function, int attribute, int value))                           \
    X(occupancy, cuOccupancyMaxActiveBlocksPerMultiprocessor,                                                       \
      (int *blocks, cu_function function, int threads, size_t shared_bytes))                                        \
    X(launch, cuLaunchKernel,                                                                                       \
      (cu_function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y, \
       unsigned block_z, unsigned shared_bytes, cu_stream stream, void **parameters, void **extra))                 \
    X(copy_to_device, cuMemcpyHtoDAsync_v2, (cu_address to, const void *from, size_t bytes, cu_stream stream))      \
    X(copy_to_host, cuMemcpyDtoHAsync_v2, (void *to, cu_address from, size_t bytes, cu_stream stream))              \
    X(copy_on_device, cuMemcpyDtoDAsync_v2, (cu_address to, cu_address from, size_t bytes, cu_stream stream))       \
    X(set_bytes, cuMemsetD8Async, (cu_address to, unsigned char value, size_t count, cu_stream stream))             \
    X(host_alloc, cuMemHostAlloc, (void **memory, size_t bytes, unsigned flags))                                    \
    X(host_free, cuMemFreeHost, (void *memory))                                                                     \
    X(pointer_attribute, cuPointerGetAttribute, (void *value, int attribute, cu_address pointer))                   \
    X(stream_capturing, cuStreamIsCapturing, (cu_stream stream, int *status))                                       \
    X(capture_mode, cuThreadExchangeStreamCaptureMode, (int *mode))                                                 \
    X(event_create, cuEventCreate, (cu_event * event, unsigned flags))                                              \
    X(event_destroy, cuEventDestroy_v2, (cu_event event))                                                           \
    X(event_record, cuEventRecord, (cu_event event, cu_stream stream))                                              \
    X(event_wait, cuStreamWaitEvent, (cu_stream stream, cu_event event, unsigned flags))                            \
    X(event_query, cuEventQuery, (cu_event event))                                                                  \
    X(stream_create, cuStreamCreate, (cu_stream * stream, unsigned flags))                                          \
    X(stream_synchronize, cuStreamSynchronize, (cu_stream stream))                                                  \
    X(error_name, cuGetErrorName, (cu_result error, const char **name))                                             \
    X(error_text, cuGetErrorString, (cu_result error, const char **text))

/* The same for symbols that older drivers lack: the member is NULL there. */
#define BNB_DRIVER_OPTIONAL_MAP(X)                                                                        \
    X(launch_as, cuLaunchKernelEx,                                                                        \
      (const struct cu_launch_config *config, cu_function function, void **parameters, void **extra))     \
    X(tensor_map, cuTensorMapEncodeTiled,                                                                 \
      (void *map, int type, unsigned rank, void *address, const uint64_t *sizes, const uint64_t *strides, \
       const unsigned *box, const unsigned *element_strides, int interleave, int swizzle, int promotion, int fill))

struct bnb_driver {
#define X(member, symbol, parameters) cu_result(*member) parameters;
    BNB_DRIVER_MAP(X)
    BNB_DRIVER_OPTIONAL_MAP(X)
#undef X
};

/* The driver, opened and initialised; NULL after bnb_fail(): no library, a symbol missing, no card. */
const struct bnb_driver *bnb_cuda_driver(const char *function);

/* BNB_OK for result 0; else fails with the driver's name and text: "quantize4: cuLaunchKernel: CUDA_ERROR_...". */
bnb_status bnb_cuda_check(const struct bnb_driver *cu, cu_result result, const char *function, const char *call);

#endif
