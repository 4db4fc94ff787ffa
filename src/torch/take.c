/*
 * take.c - arguments off the stack
 *
 * The stack owns what it holds: tensors, lists, strings and the boxes of optionals are taken over, each exactly once.
 */
#include <stdio.h>
#include <string.h>

#include "call.h"

/* The first tensor of a call says where the call runs. */
static void set_device(struct bnb_call *c, const struct bnb_tensor *t)
{
    c->first = *t;
    if (t->device == bnb_shim.device_cuda()) {
        c->exec.device = BNB_CUDA;
        c->exec.ordinal = t->device_index;
        if (bnb_shim.cuda_stream && bnb_shim.cuda_stream(t->device_index, &c->exec.stream))
            bnb_call_fail(c, BNB_EDEVICE, "%s: torch gives no stream for cuda:%d. %s", c->op, t->device_index,
                          bnb_torch_reason());
    } else if (t->device != bnb_shim.device_cpu()) {
        bnb_call_fail(c, BNB_EDEVICE, "%s: %s is on device type %d, expected the CPU or a CUDA device", c->op, t->name,
                      t->device);
    }
}

static struct bnb_label device_label(const struct bnb_tensor *t)
{
    struct bnb_label label;
    if (t->device == bnb_shim.device_cpu())
        snprintf(label.text, sizeof label.text, "cpu");
    else if (t->device == bnb_shim.device_cuda())
        snprintf(label.text, sizeof label.text, "cuda:%d", t->device_index);
    else
        snprintf(label.text, sizeof label.text, "device type %d", t->device);
    return label;
}

static torch_value take(struct bnb_call *c) { return c->taken < c->inputs ? c->stack[c->taken++] : 0; }

static struct bnb_tensor tensor_of(struct bnb_call *c, torch_value value, const char *name, int64_t index)
{
    struct bnb_tensor t = {.name = name, .index = index, .handle = (torch_tensor)(uintptr_t)value};
    if (!t.handle)
        return t;
    bnb_call_own(c, t.handle);
    if (!bnb_call_ok(c))
        return t;
    bnb_call_describe(c, &t);
    if (!t.present)
        return t;
    if (!c->first.present)
        set_device(c, &t);
    else if ((t.device != c->first.device || t.device_index != c->first.device_index) &&
             !(c->host_too && t.device == bnb_shim.device_cpu()))
        bnb_call_fail(c, BNB_EINVAL, "%s: %s is on %s, expected %s, where %s is", c->op, bnb_label(&t).text,
                      device_label(&t).text, device_label(&c->first).text, bnb_label(&c->first).text);
    return t;
}

struct bnb_tensor bnb_take_tensor(struct bnb_call *c, const char *name) { return tensor_of(c, take(c), name, -1); }

/* What an optional holds; false for None. */
static bool take_box(struct bnb_call *c, torch_value *value)
{
    torch_value *box = (torch_value *)(uintptr_t)take(c);
    if (!box)
        return false;
    *value = *box;
    bnb_delete_box(box);
    return true;
}

struct bnb_tensor bnb_take_optional(struct bnb_call *c, const char *name)
{
    torch_value value = 0;
    take_box(c, &value);
    return tensor_of(c, value, name, -1);
}

int32_t bnb_take_optional_dtype(struct bnb_call *c, enum bnb_torch_dtype otherwise)
{
    torch_value value = 0;
    return take_box(c, &value) ? (int32_t)(uint32_t)value : bnb_torch_dtypes[otherwise];
}

/* A list owns its items only as numbers: each must be taken, whatever happened before. */
struct bnb_tensors bnb_take_tensors(struct bnb_call *c, const char *name)
{
    torch_list list = (torch_list)(uintptr_t)take(c);
    struct bnb_tensors tensors = {NULL, 0};
    size_t count = 0;
    if (!list)
        return tensors;
    bnb_shim.list_size(list, &count);
    tensors.items = bnb_call_alloc(c, count, sizeof *tensors.items);
    for (size_t i = 0; i < count; i++) {
        torch_value value = 0;
        bnb_shim.list_item(list, i, &value);
        const struct bnb_tensor t = tensor_of(c, value, name, (int64_t)i);
        if (tensors.items)
            tensors.items[i] = t;
    }
    bnb_shim.delete_list(list);
    if (tensors.items)
        tensors.count = count;
    return tensors;
}

struct bnb_handles bnb_take_handles(struct bnb_call *c, const char *name)
{
    torch_list list = (torch_list)(uintptr_t)take(c);
    struct bnb_handles handles = {NULL, 0};
    size_t count = 0;
    if (!list)
        return handles;
    bnb_shim.list_size(list, &count);
    handles.items = bnb_call_alloc(c, count, sizeof *handles.items);
    for (size_t i = 0; i < count; i++) {
        torch_value value = 0;
        bnb_shim.list_item(list, i, &value);
        if (i == 0)
            tensor_of(c, value, name, 0);
        else if (value)
            bnb_call_own(c, (torch_tensor)(uintptr_t)value);
        if (handles.items)
            handles.items[i] = (torch_tensor)(uintptr_t)value;
    }
    bnb_shim.delete_list(list);
    if (handles.items)
        handles.count = count;
    return handles;
}

struct bnb_ints bnb_take_ints(struct bnb_call *c)
{
    torch_list list = (torch_list)(uintptr_t)take(c);
    struct bnb_ints ints = {NULL, 0};
    size_t count = 0;
    if (!list)
        return ints;
    bnb_shim.list_size(list, &count);
    int64_t *values = bnb_call_alloc(c, count, sizeof *values);
    for (size_t i = 0; values && i < count; i++) {
        torch_value value = 0;
        bnb_shim.list_item(list, i, &value);
        values[i] = (int64_t)value;
    }
    bnb_shim.delete_list(list);
    if (values) {
        ints.values = values;
        ints.count = count;
    }
    return ints;
}

int64_t bnb_take_int(struct bnb_call *c) { return (int64_t)take(c); }

double bnb_take_float(struct bnb_call *c)
{
    const torch_value bits = take(c);
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

bool bnb_take_bool(struct bnb_call *c) { return (take(c) & 0xff) != 0; }

int32_t bnb_take_dtype(struct bnb_call *c) { return (int32_t)(uint32_t)take(c); }

/* The text goes into messages, which must stay valid UTF-8 wherever they are cut: hence ASCII. */
const char *bnb_take_string(struct bnb_call *c)
{
    torch_string string = (torch_string)(uintptr_t)take(c);
    const char *text = "";
    if (!string)
        return c->string;
    if (bnb_shim.string_text(string, &text))
        text = "";
    size_t i = 0;
    for (; i + 1 < sizeof c->string && text[i]; i++)
        c->string[i] = (char)(text[i] >= ' ' && text[i] <= '~' ? text[i] : '?');
    c->string[i] = '\0';
    bnb_shim.delete_string(string);
    return c->string;
}
