/*
 * device.c - cards, contexts, modules and launches
 */
#include "cuda/device.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/image.h"
#include "cuda/nvrtc.h"

/* Dtypes of variants, and one more for images without. */
enum { VARIANTS = 4, IMAGES = 32 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct bnb_cuda_card cards[BNB_CUDA_CARDS];
static atomic_bool opened[BNB_CUDA_CARDS];
/* Under the lock.  The first module of an image that has a binary serves all variants. */
static cu_module modules[BNB_CUDA_CARDS][IMAGES][VARIANTS];

/* ---------------------------------------------------------------- cards */

static bnb_status open_card(struct bnb_cuda_card *card, int ordinal, const char *f)
{
    const struct bnb_driver *cu = bnb_cuda_driver(f);
    cu_device device = 0;
    int count = 0, major = 0, minor = 0, version = 0;
    if (!cu)
        return BNB_EDEVICE;
    bnb_status status = bnb_cuda_check(cu, cu->device_count(&count), f, "cuDeviceGetCount");
    if (!status && ordinal >= count)
        return bnb_fail(BNB_EINVAL, "%s: ex->ordinal is %d, expected 0..%d", f, ordinal, count - 1);
    if (!status)
        status = bnb_cuda_check(cu, cu->device_get(&device, ordinal), f, "cuDeviceGet");
    if (!status)
        status =
            bnb_cuda_check(cu, cu->device_attribute(&major, CU_DEVICE_CC_MAJOR, device), f, "cuDeviceGetAttribute");
    if (!status)
        status =
            bnb_cuda_check(cu, cu->device_attribute(&minor, CU_DEVICE_CC_MINOR, device), f, "cuDeviceGetAttribute");
    if (!status)
        status =
            bnb_cuda_check(cu, cu->device_attribute(&card->sms, CU_DEVICE_SM_COUNT, device), f, "cuDeviceGetAttribute");
    if (!status)
        status = bnb_cuda_check(cu, cu->device_attribute(&card->shared_bytes, CU_DEVICE_SHARED_OPTIN, device), f,
                                "cuDeviceGetAttribute");
    if (!status)
        status = bnb_cuda_check(cu, cu->primary_retain(&card->context, device), f, "cuDevicePrimaryCtxRetain");
    if (!status)
        status = bnb_cuda_check(cu, cu->driver_version(&version), f, "cuDriverGetVersion");
    card->early = cu->launch_as && version >= 12030 && major >= 9;
    card->cu = cu;
    card->ordinal = ordinal;
    card->capability = 10 * major + minor;
    return status;
}

static const struct bnb_cuda_card *card_of(int ordinal, const char *f)
{
    if (ordinal < 0 || ordinal >= BNB_CUDA_CARDS) {
        bnb_fail(BNB_EINVAL, "%s: ex->ordinal is %d, expected 0..%d", f, ordinal, BNB_CUDA_CARDS - 1);
        return NULL;
    }
    if (atomic_load_explicit(&opened[ordinal], memory_order_acquire))
        return &cards[ordinal];
    struct bnb_cuda_card card = {0};
    pthread_mutex_lock(&lock);
    const bnb_status status = open_card(&card, ordinal, f);
    if (!status && !atomic_load_explicit(&opened[ordinal], memory_order_relaxed)) {
        cards[ordinal] = card;
        atomic_store_explicit(&opened[ordinal], true, memory_order_release);
    }
    pthread_mutex_unlock(&lock);
    return status ? NULL : &cards[ordinal];
}

int bnb_cuda_count(void)
{
    const struct bnb_driver *cu = bnb_cuda_driver("device_count");
    int count = 0;
    return cu && !bnb_cuda_check(cu, cu->device_count(&count), "device_count", "cuDeviceGetCount") ? count : 0;
}

/* ---------------------------------------------------------------- calls */

bnb_status bnb_cuda_begin(struct bnb_cuda_call *c, const bnb_exec *ex, const char *function)
{
    cu_context current = NULL;
    *c = (struct bnb_cuda_call){card_of(ex->ordinal, function), ex, function, (cu_stream)ex->stream, false};
    const struct bnb_driver *cu = c->card ? c->card->cu : NULL;
    if (!cu)
        return bnb_last_status();
    bnb_status status = bnb_cuda_check(cu, cu->context_current(&current), function, "cuCtxGetCurrent");
    if (!status && current != c->card->context) {
        status = bnb_cuda_check(cu, cu->context_push(c->card->context), function, "cuCtxPushCurrent");
        c->pushed = !status;
    }
    return status;
}

void bnb_cuda_end(const struct bnb_cuda_call *c)
{
    cu_context popped;
    if (c->pushed)
        c->card->cu->context_pop(&popped);
}

bnb_status bnb_cuda_alloc(const struct bnb_cuda_call *c, size_t bytes, void **memory)
{
    *memory = c->ex->alloc ? c->ex->alloc(c->ex->context, bytes) : NULL;
    if (*memory)
        return BNB_OK;
    return bnb_fail(BNB_ENOMEM, "%s: CUDA out of memory. %zu bytes of workspace%s", c->function, bytes,
                    c->ex->alloc ? "" : "; ex->alloc is NULL");
}

void bnb_cuda_free(const struct bnb_cuda_call *c, void *memory, size_t bytes)
{
    if (memory && c->ex->free)
        c->ex->free(c->ex->context, memory, bytes);
}

/* ---------------------------------------------------------------- kernels */

static bnb_status compile_module(const struct bnb_cuda_call *c, const struct bnb_cuda_image *image, int dtype,
                                 cu_module *module)
{
    void *cubin = NULL;
    bnb_status status = bnb_cuda_compile(image, dtype, c->card->capability, c->function, &cubin);
    if (!status)
        status = bnb_cuda_check(c->card->cu, c->card->cu->module_load(module, cubin), c->function, "cuModuleLoadData");
    free(cubin);
    return status;
}

static bool jit_wanted(void)
{
    const char *jit = getenv("BNB_CUDA_JIT");
    return jit && jit[0] == '1' && jit[1] == '\0';
}

/* The image's binary, or, where it has nothing for this card and driver, its text. */
static bnb_status load_module(const struct bnb_cuda_call *c, const struct bnb_cuda_image *image, int dtype,
                              cu_module loaded[VARIANTS])
{
    if (image->binary.size > 0 && !jit_wanted()) {
        const cu_result result = c->card->cu->module_load(&loaded[0], image->binary.data);
        for (int v = 1; v < VARIANTS && result == 0; v++)
            loaded[v] = loaded[0];
        if (result != CU_ERROR_NO_BINARY && result != CU_ERROR_UNSUPPORTED_PTX && result != CU_ERROR_INVALID_PTX)
            return bnb_cuda_check(c->card->cu, result, c->function, "cuModuleLoadData");
    }
    return compile_module(c, image, dtype, &loaded[dtype + 1]);
}

static int most_shared(const struct bnb_cuda_call *c, const struct bnb_cuda_kernel *kernel)
{
    return kernel->shared == BNB_CUDA_ALL_SHARED ? c->card->shared_bytes : kernel->shared;
}

/* The kernel of a module; not one made from PTX that is too old to hold its body: then from its text, for this card. */
static bnb_status find_kernel(const struct bnb_cuda_call *c, const struct bnb_cuda_kernel *kernel,
                              const struct bnb_cuda_image *image, cu_module *module, cu_function *function)
{
    const struct bnb_driver *cu = c->card->cu;
    int version = kernel->least;
    bnb_status status =
        bnb_cuda_check(cu, cu->module_function(function, *module, kernel->name), c->function, kernel->name);
    if (!status && kernel->least > 0)
        status = bnb_cuda_check(cu, cu->function_attribute(&version, CU_FUNCTION_PTX_VERSION, *function), c->function,
                                "cuFuncGetAttribute");
    if (status || version >= kernel->least)
        return status;
    status = compile_module(c, image, kernel->dtype, module);
    return status ? status
                  : bnb_cuda_check(cu, cu->module_function(function, *module, kernel->name), c->function, kernel->name);
}

static bnb_status load_kernel(const struct bnb_cuda_call *c, struct bnb_cuda_kernel *kernel, cu_function *function)
{
    const struct bnb_driver *cu = c->card->cu;
    const struct bnb_cuda_image *image = bnb_cuda_image_find(kernel->image);
    int ignored = 0, mode = CU_CAPTURE_RELAXED; /* loading is no work of the stream: allow it while that is captured */
    if (!image)
        return bnb_fail(BNB_EDEVICE, "%s: this build has no device code %s", c->function, kernel->image);
    cu_module *slot = modules[c->card->ordinal][image - bnb_cuda_images];
    cu->capture_mode(&mode);
    bnb_status status = slot[kernel->dtype + 1] ? BNB_OK : load_module(c, image, kernel->dtype, slot);
    if (!status)
        status = find_kernel(c, kernel, image, &slot[kernel->dtype + 1], function);
    if (!status) /* the driver may load lazily: now, not at a launch that is captured */
        status = bnb_cuda_check(cu, cu->function_attribute(&ignored, CU_FUNCTION_LOCAL_BYTES, *function), c->function,
                                "cuFuncGetAttribute");
    if (!status && kernel->shared != 0) /* beyond 48 KB with what the kernel declares, it has to be asked for */
        status = bnb_cuda_check(cu, cu->function_set(*function, CU_FUNCTION_SHARED_MAX, most_shared(c, kernel)),
                                c->function, "cuFuncSetAttribute");
    if (!status && kernel->special && kernel->shared != 0)
        status = bnb_cuda_check(cu, cu->function_set(*function, CU_FUNCTION_SHARED_PERCENT, 100), c->function,
                                "cuFuncSetAttribute");
    cu->capture_mode(&mode);
    return status;
}

static bnb_status kernel_on(const struct bnb_cuda_call *c, struct bnb_cuda_kernel *kernel, cu_function *function)
{
    atomic_uintptr_t *loaded = &kernel->on[c->card->ordinal].function;
    *function = (cu_function)atomic_load_explicit(loaded, memory_order_acquire);
    if (*function)
        return BNB_OK;
    int per_sm = 0, own = 1;
    pthread_mutex_lock(&lock);
    bnb_status status = load_kernel(c, kernel, function);
    if (!status)
        status = bnb_cuda_check(
            c->card->cu, c->card->cu->occupancy(&per_sm, *function, kernel->threads, (size_t)most_shared(c, kernel)),
            c->function, "cuOccupancyMaxActiveBlocksPerMultiprocessor");
    if (!status && kernel->special)
        status = bnb_cuda_check(c->card->cu, c->card->cu->function_attribute(&own, CU_FUNCTION_SHARED_BYTES, *function),
                                c->function, "cuFuncGetAttribute");
    if (!status) {
        kernel->on[c->card->ordinal].resident = own == 0 ? 0 : per_sm > 0 ? per_sm * c->card->sms : c->card->sms;
        atomic_store_explicit(loaded, (uintptr_t)*function, memory_order_release);
    }
    pthread_mutex_unlock(&lock);
    return status;
}

static bnb_status launch(const struct bnb_cuda_call *c, struct bnb_cuda_kernel *kernel, int64_t grid, bool over,
                         int shared, const void *arguments)
{
    cu_function function = NULL;
    const bnb_status status = kernel_on(c, kernel, &function);
    if (status)
        return status;
    const int64_t resident = kernel->on[c->card->ordinal].resident;
    void *parameters[] = {(void *)(uintptr_t)arguments};
    return bnb_cuda_check(c->card->cu,
                          c->card->cu->launch(function, (unsigned)(over && grid > resident ? resident : grid), 1, 1,
                                              (unsigned)kernel->threads, 1, 1, (unsigned)shared, c->stream, parameters,
                                              NULL),
                          c->function, kernel->name);
}

bnb_status bnb_cuda_launch(const struct bnb_cuda_call *c, struct bnb_cuda_kernel *kernel, int64_t grid,
                           const void *arguments)
{
    return launch(c, kernel, grid, false, kernel->shared, arguments);
}

bnb_status bnb_cuda_launch_over(const struct bnb_cuda_call *c, struct bnb_cuda_kernel *kernel, int64_t work,
                                const void *arguments)
{
    return launch(c, kernel, work, true, kernel->shared, arguments);
}

bnb_status bnb_cuda_launch_as(const struct bnb_cuda_call *c, struct bnb_cuda_kernel *kernel, int64_t grid,
                              struct bnb_cuda_manner manner, const void *arguments)
{
    const struct bnb_driver *cu = c->card->cu;
    const int shared = manner.shared ? manner.shared : kernel->shared;
    struct cu_launch_attribute attribute[2];
    cu_function function = NULL;
    unsigned count = 0;
    manner.early = manner.early && c->card->early;
    if (!cu->launch_as || (manner.cluster <= 1 && !manner.early))
        return launch(c, kernel, grid, false, shared, arguments);
    const bnb_status status = kernel_on(c, kernel, &function);
    if (status)
        return status;
    if (manner.cluster > 1)
        attribute[count++] =
            (struct cu_launch_attribute){CU_LAUNCH_CLUSTER, {.cluster = {(unsigned)manner.cluster, 1, 1}}};
    if (manner.early)
        attribute[count++] = (struct cu_launch_attribute){CU_LAUNCH_EARLY, {.early = 1}};
    const struct cu_launch_config config = {.grid = {(unsigned)grid, 1, 1},
                                            .block = {(unsigned)kernel->threads, 1, 1},
                                            .shared_bytes = (unsigned)shared,
                                            .stream = c->stream,
                                            .attributes = attribute,
                                            .count = count};
    void *parameters[] = {(void *)(uintptr_t)arguments};
    return bnb_cuda_check(cu, cu->launch_as(&config, function, parameters, NULL), c->function, kernel->name);
}

bnb_status bnb_cuda_resident(const struct bnb_cuda_call *c, struct bnb_cuda_kernel *kernel, int *blocks)
{
    cu_function function = NULL;
    const bnb_status status = kernel_on(c, kernel, &function);
    *blocks = status ? 0 : kernel->on[c->card->ordinal].resident;
    return status;
}

bnb_status bnb_cuda_run(const bnb_exec *ex, const char *function, struct bnb_cuda_kernel *kernel, int64_t work,
                        const void *arguments)
{
    struct bnb_cuda_call c;
    bnb_status status = bnb_cuda_begin(&c, ex, function);
    if (status || !c.card)
        return status;
    status = bnb_cuda_launch_over(&c, kernel, work, arguments);
    bnb_cuda_end(&c);
    return status;
}

/* ---------------------------------------------------------------- in words */

/* What the driver takes from an image: machine code of one capability, or PTX of another that it compiles itself. */
static bool describe_binary(const struct bnb_cuda_call *c, const struct bnb_cuda_image *image, char *text, size_t size)
{
    const struct bnb_driver *cu = c->card->cu;
    cu_module module = NULL;
    cu_function function = NULL;
    int binary = 0, ptx = 0;
    if (image->binary.size == 0 || jit_wanted() || cu->module_load(&module, image->binary.data) != 0)
        return false;
    const bool known = cu->module_function(&function, module, "bnb_k_sum") == 0 &&
                       cu->function_attribute(&binary, CU_FUNCTION_BINARY_VERSION, function) == 0 &&
                       cu->function_attribute(&ptx, CU_FUNCTION_PTX_VERSION, function) == 0;
    cu->module_unload(module);
    if (known && binary != ptx)
        snprintf(text, size, "PTX of %d.%d, compiled by the driver", ptx / 10, ptx % 10);
    else if (known)
        snprintf(text, size, "machine code of %d.%d", binary / 10, binary % 10);
    return known;
}

static void describe_source(const struct bnb_cuda_call *c, const char *why, char *text, size_t size)
{
    char reason[384];
    struct bnb_cuda_target target;
    const struct bnb_cuda_nvrtc *nvrtc = bnb_cuda_nvrtc_open(reason, sizeof reason);
    if (!nvrtc)
        snprintf(text, size, "no code (%s), and none can be compiled: %s", why, reason);
    else if (!bnb_cuda_target_of(nvrtc, c->card->capability, &target))
        snprintf(text, size, "no code (%s), and NVRTC %d.%d knows no card as old as this one", why, nvrtc->major,
                 nvrtc->minor);
    else
        snprintf(text, size, "source, compiled on first use by NVRTC %d.%d for %s (%s)", nvrtc->major, nvrtc->minor,
                 target.name, why);
}

bnb_status bnb_cuda_card_text(int ordinal, char *text, size_t size)
{
    const char *f = "cuda_card_text";
    const struct bnb_cuda_image *image =
        bnb_cuda_image_find("scales"); /* the smallest; all have code for the same cards */
    const bnb_exec ex = {.size = sizeof ex, .device = BNB_CUDA, .ordinal = ordinal};
    struct bnb_cuda_call c;
    if (!text || size == 0)
        return bnb_fail(BNB_EINVAL, "%s: %s, expected a buffer", f, text ? "size is 0" : "text is NULL");
    const bnb_status status = bnb_cuda_begin(&c, &ex, f);
    if (status || !c.card)
        return status;
    if (!image)
        snprintf(text, size, "no code: this build has none for CUDA");
    else if (!describe_binary(&c, image, text, size))
        describe_source(&c,
                        jit_wanted()              ? "BNB_CUDA_JIT is 1"
                        : image->binary.size == 0 ? "this build has source alone"
                                                  : "this build has no machine code or PTX for this card and driver",
                        text, size);
    bnb_cuda_end(&c);
    return BNB_OK;
}
