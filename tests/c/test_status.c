/* test_status.c - pinned values and texts, sizes, version, and a detail that belongs to its thread */
#include "bitsandbytes.h"

#include <pthread.h>
#include <string.h>

#include "check.h"

static void pinned_list(void)
{
    static const struct {
        bnb_status status;
        int value;
        const char *text;
    } row[] = {
        {BNB_OK, 0, "success"},
        {BNB_EINVAL, 1, "an argument is out of range"},
        {BNB_EDTYPE, 2, "the operation does not support this dtype"},
        {BNB_ECUDA, 3, "the CUDA driver refused a call"},
        {BNB_ENOMEM, 4, "out of memory"},
        {BNB_EDEVICE, 5, "the device is absent or has no such kernel"},
        {BNB_ENOTSUP, 6, "a valid request that is not implemented"},
    };
    for (size_t i = 0; i < sizeof row / sizeof row[0]; i++) {
        CHECK((int)row[i].status == row[i].value, "status %zu is %d", i, (int)row[i].status);
        CHECK(!strcmp(bnb_strerror(row[i].status), row[i].text), "status %zu reads '%s'", i,
              bnb_strerror(row[i].status));
    }
    CHECK(!strcmp(bnb_strerror((bnb_status)7), "unknown status"), "7 reads '%s'", bnb_strerror((bnb_status)7));
    CHECK(!strcmp(bnb_strerror((bnb_status)1000), "unknown status"), "1000 reads '%s'", bnb_strerror((bnb_status)1000));
}

static void pinned_dtypes(void)
{
    static const struct {
        bnb_dtype dtype;
        int value;
        size_t size;
    } row[] = {{BNB_F32, 0, 4}, {BNB_F16, 1, 2}, {BNB_BF16, 2, 2}, {BNB_U8, 3, 1}, {BNB_I8, 4, 1}};
    for (size_t i = 0; i < sizeof row / sizeof row[0]; i++)
        CHECK((int)row[i].dtype == row[i].value && bnb_dtype_size(row[i].dtype) == row[i].size, "dtype %zu", i);
    CHECK(bnb_dtype_size((bnb_dtype)5) == 0, "an unknown dtype has %zu bytes", bnb_dtype_size((bnb_dtype)5));
    CHECK((int)BNB_CPU == 0 && (int)BNB_CUDA == 1, "device values moved");
    CHECK((int)BNB_FP4 == 1 && (int)BNB_NF4 == 2 && (int)BNB_INT4 == 3 && (int)BNB_AF4 == 4, "type values moved");
}

/* A failing call, and what a thread that never failed sees meanwhile. */
static void *other_thread(void *unused)
{
    CHECK(bnb_last_status() == BNB_OK && !strcmp(bnb_detail(), ""), "a fresh thread sees '%s'", bnb_detail());
    CHECK(bnb_create_linear_map(true, 8, true, NULL) == BNB_EINVAL, "a NULL map was accepted");
    CHECK(strstr(bnb_detail(), "create_linear_map"), "detail is '%s'", bnb_detail());
    return unused;
}

static void detail_is_per_thread(void)
{
    float map[256];
    CHECK(bnb_last_status() == BNB_OK, "last status starts as %d", (int)bnb_last_status());
    CHECK(!strcmp(bnb_detail(), ""), "detail starts as '%s'", bnb_detail());
    CHECK(bnb_create_dynamic_map(true, 7, 9, map) == BNB_EINVAL, "9 bits were accepted");
    char before[512];
    strncpy(before, bnb_detail(), sizeof before - 1);
    before[sizeof before - 1] = '\0';
    CHECK(strstr(before, "total_bits") && strstr(before, "9"), "detail is '%s'", before);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, other_thread, NULL) == 0, "no thread");
    pthread_join(thread, NULL);
    CHECK(!strcmp(bnb_detail(), before), "another thread changed it to '%s'", bnb_detail());
    CHECK(bnb_create_dynamic_map(true, 7, 8, map) == BNB_OK, "the default map was refused");
    CHECK(bnb_last_status() == BNB_EINVAL && !strcmp(bnb_detail(), before), "a success forgot the last failure");
}

/* A detail longer than its storage is cut, never overrun; the sanitizers watch. */
static void long_detail(void)
{
    char name[2000];
    memset(name, 'x', sizeof name - 1);
    name[sizeof name - 1] = '\0';
    const bnb_optim_config config = {.size = sizeof config, .name = name, .lr = 1.0, .gnorm_scale = 1.0};
    CHECK(bnb_optim_step(NULL, &config, NULL, 0) == BNB_EINVAL, "an unknown optimizer was accepted");
    CHECK(strstr(bnb_detail(), "xxx") && strlen(bnb_detail()) < sizeof name, "detail has %zu bytes",
          strlen(bnb_detail()));
}

/* Host memory is the CPU's, whether or not there is a driver. */
static void pointer_device(void)
{
    int ordinal = -1, on_stack = 0;
    bnb_device device = BNB_CUDA;
    CHECK(bnb_pointer_device(&on_stack, &device, &ordinal) == BNB_OK && device == BNB_CPU && ordinal == 0, "%d %d",
          (int)device, ordinal);
    CHECK(bnb_pointer_device(NULL, &device, &ordinal) == BNB_EINVAL && strstr(bnb_detail(), "ptr"), "%s", bnb_detail());
    CHECK(bnb_pointer_device(&ordinal, NULL, &ordinal) == BNB_EINVAL && strstr(bnb_detail(), "device is NULL"), "%s",
          bnb_detail());
    CHECK(bnb_pointer_device(&ordinal, &device, NULL) == BNB_EINVAL && strstr(bnb_detail(), "ordinal"), "%s",
          bnb_detail());
}

int main(void)
{
    pinned_list();
    pinned_dtypes();
    detail_is_per_thread();
    long_detail();
    pointer_device();
    CHECK(!strcmp(bnb_version(), BNB_VERSION), "library %s, header %s", bnb_version(), BNB_VERSION);
    return CHECK_RESULT();
}
