/*
 * nvrtc.h - NVRTC, the CUDA compiler as a library, as it is found at run time
 *
 * Sources: NVIDIA's NVRTC manual; the functions are those of CUDA 11.2 and later.  Types are re-declared.
 */
#ifndef BNB_CUDA_NVRTC_H
#define BNB_CUDA_NVRTC_H

#include <stdbool.h>
#include <stddef.h>

typedef int nvrtc_result; /* 0 is success */
typedef struct nvrtc_program_object *nvrtc_program;

/* X(member, symbol, parameters) */
#define BNB_NVRTC_MAP(X)                                                                                     \
    X(version, nvrtcVersion, (int *major, int *minor))                                                       \
    X(arch_count, nvrtcGetNumSupportedArchs, (int *count))                                                   \
    X(archs, nvrtcGetSupportedArchs, (int *archs))                                                           \
    X(create, nvrtcCreateProgram,                                                                            \
      (nvrtc_program * program, const char *source, const char *name, int headers, const char *const *texts, \
       const char *const *names))                                                                            \
    X(compile, nvrtcCompileProgram, (nvrtc_program program, int count, const char *const *options))          \
    X(destroy, nvrtcDestroyProgram, (nvrtc_program * program))                                               \
    X(log_size, nvrtcGetProgramLogSize, (nvrtc_program program, size_t *size))                               \
    X(log, nvrtcGetProgramLog, (nvrtc_program program, char *log))                                           \
    X(cubin_size, nvrtcGetCUBINSize, (nvrtc_program program, size_t *size))                                  \
    X(cubin, nvrtcGetCUBIN, (nvrtc_program program, char *cubin))                                            \
    X(ptx_size, nvrtcGetPTXSize, (nvrtc_program program, size_t *size))                                      \
    X(ptx, nvrtcGetPTX, (nvrtc_program program, char *ptx))

enum { BNB_NVRTC_ARCHS = 64 };

struct bnb_cuda_nvrtc {
#define X(member, symbol, parameters) nvrtc_result(*member) parameters;
    BNB_NVRTC_MAP(X)
#undef X
    const char *(*error_text)(nvrtc_result result);
    int major, minor;
    int known[BNB_NVRTC_ARCHS]; /* 90 for compute capability 9.0, ascending */
    int known_count;
};

/* The one that this process uses from its first success on, or NULL with the reason in `reason` [size].  Looked for as
 * BNB_NVRTC; among loaded libraries; where the CUDA libraries that torch loaded lie; on the system. */
const struct bnb_cuda_nvrtc *bnb_cuda_nvrtc_open(char *reason, size_t size);

/* What to compile to for a card. */
struct bnb_cuda_target {
    char name[24]; /* "sm_90a", or "compute_120" */
    bool ptx;      /* a card newer than the compiler: the driver finishes the work */
};

/* False where every architecture that the compiler knows is newer than the card. */
bool bnb_cuda_target_of(const struct bnb_cuda_nvrtc *nvrtc, int capability, struct bnb_cuda_target *target);

#endif
