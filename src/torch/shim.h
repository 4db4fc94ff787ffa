/*
 * shim.h - libtorch's C ABI, re-declared: the only thing this library knows of PyTorch
 *
 * libtorch exports plain C functions (its "stable shim"), but declares them in C++ headers; so the ones in use are
 * declared here again, as members of one table that bnb_shim_load() fills from the libtorch already in the process.
 * Nothing of PyTorch is needed to build, and one binary serves every torch >= 2.10.
 * Source: pytorch, torch/csrc/stable/c/shim.h and torch/csrc/inductor/aoti_torch/c/shim.h.
 */
#ifndef BNB_TORCH_SHIM_H
#define BNB_TORCH_SHIM_H

#include "bitsandbytes.h"

/* Set this thread's status and detail, and return the status (src/core/status.c). */
bnb_status bnb_fail(bnb_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* 0: success, 1: failure; torch_exception_get_what_without_backtrace() then has the reason, where it exists. */
typedef int32_t torch_error;

/* One argument or result of an operator: an int64, the bits of a double, a bool, a dtype, or a handle. */
typedef uint64_t torch_value;

/* Handles own a reference; what each one holds is libtorch's secret. */
typedef struct torch_tensor_opaque *torch_tensor;
typedef struct torch_list_opaque *torch_list;
typedef struct torch_string_opaque *torch_string;
typedef struct torch_library_opaque *torch_library;

/* A boxed operator: takes its arguments from the stack, each once, and leaves its results there. */
typedef void (*torch_kernel)(torch_value *stack, uint64_t inputs, uint64_t outputs);
typedef void (*torch_range_fn)(int64_t begin, int64_t end, void *arg);

/* X(member, symbol, result, arguments).  All of them are in torch 2.10's libtorch_cpu. */
#define BNB_SHIM_REQUIRED(X)                                                                                    \
    X(library_init, "aoti_torch_library_init_impl", torch_error,                                                \
      (const char *space, const char *key, const char *file, uint32_t line, torch_library *library))            \
    X(library_impl, "torch_library_impl", torch_error,                                                          \
      (torch_library library, const char *name, torch_kernel kernel, uint64_t version))                         \
    X(check, "aoti_torch_check", void,                                                                          \
      (bool condition, const char *function, const char *file, uint32_t line, const char *text))                \
    X(is_defined, "aoti_torch_is_defined", torch_error, (torch_tensor tensor, bool *defined))                   \
    X(delete_tensor, "aoti_torch_delete_tensor_object", torch_error, (torch_tensor tensor))                     \
    X(empty, "aoti_torch_empty_strided", torch_error,                                                           \
      (int64_t dim, const int64_t *sizes, const int64_t *strides, int32_t dtype, int32_t device, int32_t index, \
       torch_tensor *tensor))                                                                                   \
    X(copy, "aoti_torch_copy_", torch_error, (torch_tensor to, torch_tensor from, int32_t non_blocking))        \
    X(zero, "aoti_torch_zero_", torch_error, (torch_tensor tensor))                                             \
    X(const_data, "torch_get_const_data_ptr", torch_error, (torch_tensor tensor, const void **data))            \
    X(mutable_data, "torch_get_mutable_data_ptr", torch_error, (torch_tensor tensor, void **data))              \
    X(dim, "aoti_torch_get_dim", torch_error, (torch_tensor tensor, int64_t *dim))                              \
    X(numel, "aoti_torch_get_numel", torch_error, (torch_tensor tensor, int64_t *numel))                        \
    X(sizes, "aoti_torch_get_sizes", torch_error, (torch_tensor tensor, int64_t **borrowed))                    \
    X(strides, "aoti_torch_get_strides", torch_error, (torch_tensor tensor, int64_t **borrowed))                \
    X(dtype, "aoti_torch_get_dtype", torch_error, (torch_tensor tensor, int32_t *dtype))                        \
    X(device, "aoti_torch_get_device_type", torch_error, (torch_tensor tensor, int32_t *device))                \
    X(device_index, "aoti_torch_get_device_index", torch_error, (torch_tensor tensor, int32_t *index))          \
    X(is_contiguous, "aoti_torch_is_contiguous", torch_error, (torch_tensor tensor, bool *contiguous))          \
    X(element_size, "aoti_torch_dtype_element_size", size_t, (int32_t dtype))                                   \
    X(device_cpu, "aoti_torch_device_type_cpu", int32_t, (void))                                                \
    X(device_cuda, "aoti_torch_device_type_cuda", int32_t, (void))                                              \
    X(grad_mode, "aoti_torch_grad_mode_is_enabled", bool, (void))                                               \
    X(set_grad_mode, "aoti_torch_grad_mode_set_enabled", void, (bool enabled))                                  \
    X(list_size, "torch_list_size", torch_error, (torch_list list, size_t *size))                               \
    X(list_item, "torch_list_get_item", torch_error, (torch_list list, size_t i, torch_value *item))            \
    X(delete_list, "torch_delete_list", torch_error, (torch_list list))                                         \
    X(string_text, "torch_string_c_str", torch_error, (torch_string string, const char **borrowed))             \
    X(delete_string, "torch_delete_string", torch_error, (torch_string string))                                 \
    X(parallel_for, "torch_parallel_for", torch_error,                                                          \
      (int64_t begin, int64_t end, int64_t grain, torch_range_fn body, void *arg))

/* NULL where the running torch lacks them: the three of 2.13, the one of libtorch_cuda, and c10::TensorImpl::grad(), whose
 * callers make sure that it answers as Python does. */
#define BNB_SHIM_OPTIONAL(X)                                                                          \
    X(new_box, "torch_new_stable_ivalue", torch_error, (torch_value * *box))                          \
    X(delete_box, "torch_delete_stable_ivalue", torch_error, (torch_value * box))                     \
    X(reason, "torch_exception_get_what_without_backtrace", const char *, (void))                     \
    X(cuda_stream, "aoti_torch_get_current_cuda_stream", torch_error, (int32_t index, void **stream)) \
    X(gradient, "_ZNK3c1010TensorImpl4gradEv", torch_tensor, (const void *impl))

struct bnb_shim {
#define X(member, symbol, result, arguments) result(*member) arguments;
    BNB_SHIM_REQUIRED(X)
    BNB_SHIM_OPTIONAL(X)
#undef X
    /* the C++ runtime's: make and free the boxes of optionals before torch 2.13 */
    void *(*operator_new)(size_t size);
    void (*operator_delete)(void *ptr);
};

/* Filled once, before any operator exists; only read afterwards, from any thread. */
extern struct bnb_shim bnb_shim;

/* X(name): the dtypes that messages can name and operators can ask for. */
#define BNB_TORCH_DTYPES(X) \
    X(float32) X(float16) X(bfloat16) X(uint8) X(int8) X(float64) X(int16) X(int32) X(int64) X(bool)

enum bnb_torch_dtype {
#define X(name) BNB_TORCH_##name,
    BNB_TORCH_DTYPES(X)
#undef X
        BNB_TORCH_DTYPE_COUNT
};

/* What the running torch calls each of them. */
extern int32_t bnb_torch_dtypes[BNB_TORCH_DTYPE_COUNT];

/* Resolve all symbols.  lib_dir: torch's folder of shared libraries, used where the loader knows libtorch_cpu.so only
 * by its path.  BNB_EDEVICE if torch is not in the process, or too old: bnb_detail() names the missing symbol. */
bnb_status bnb_shim_load(const char *lib_dir);

#endif
