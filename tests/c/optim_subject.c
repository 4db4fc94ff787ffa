/* optim_subject.c - what the optimizer tests work on */
#include "optim_subject.h"

#include <math.h>
#include <string.h>

float subject_signed_map[256], subject_unsigned_map[256];

/* Elements of every buffer, and their sizes. */
struct layout { size_t count[SUBJECT_BUFFERS], size[SUBJECT_BUFFERS]; };

static struct layout layout_of(const struct reference_row *row, int64_t n, bnb_dtype dtype, int bits)
{
    const size_t values = (size_t)n, blocks = (values + STATE_BLOCK - 1) / STATE_BLOCK, state = bits == 8 ? 1 : 4;
    const size_t rows1 = row->averages == 3 ? 2 : 1, rows2 = row->states == 2 ? 1 : 0, scales = bits == 8 ? blocks : 0;
    return (struct layout){{values, values, rows1 * values, rows2 * values, rows1 * scales, rows2 * scales},
                           {bnb_dtype_size(dtype), bnb_dtype_size(dtype), state, state, 4, 4}};
}

struct subject subject_make(const char *row, int64_t n, bnb_dtype dtype, int bits)
{
    const struct layout l = layout_of(reference_find(row), n, dtype, bits);
    struct subject s;
    for (int k = 0; k < SUBJECT_BUFFERS; k++) {
        s.buffer[k] = guarded_make(l.count[k] * l.size[k], l.size[k]);
        memset(s.buffer[k].data, 0, s.buffer[k].bytes);
    }
    fill_values(s.buffer[0].data, dtype, n, FILL_BELL, (uint64_t)n);
    s.t = (bnb_optim_tensor){.p = s.buffer[0].data,
                             .g = s.buffer[1].data,
                             .state1 = s.buffer[2].data,
                             .state2 = s.buffer[3].bytes ? s.buffer[3].data : NULL,
                             .absmax1 = s.buffer[4].bytes ? s.buffer[4].data : NULL,
                             .absmax2 = s.buffer[5].bytes ? s.buffer[5].data : NULL,
                             .n = n,
                             .step = 1,
                             .seed = (uint64_t)n,
                             .dtype = dtype,
                             .bits = bits};
    return s;
}

void subject_copy(const struct subject *to, const struct subject *from)
{
    for (int k = 0; k < SUBJECT_BUFFERS; k++)
        memcpy(to->buffer[k].data, from->buffer[k].data, from->buffer[k].bytes);
}

void subject_gradient(const struct subject *s, enum fill kind, int64_t step)
{
    void *g = s->buffer[1].data;
    fill_values(g, s->t.dtype, s->t.n, kind, (uint64_t)(s->t.n + step * 7));
    for (int64_t i = 0; i < s->t.n; i++)
        if (i / STATE_BLOCK % 5 == 3 || (i + step) % 11 == 0)
            store_at(g, s->t.dtype, i, i % 2 ? 0.0f : -0.0f);
}

static bool same_floats(const void *a, const void *b, bnb_dtype dtype, int64_t n)
{
    if (!memcmp(a, b, (size_t)n * bnb_dtype_size(dtype)))
        return true;
    for (int64_t i = 0; i < n; i++) {
        const float x = value_at(a, dtype, i), y = value_at(b, dtype, i);
        if (bits_of(x) != bits_of(y) && !(isnan(x) && isnan(y)))
            return false;
    }
    return true;
}

const char *subject_difference(const struct subject *a, const struct subject *b)
{
    static const char *const name[SUBJECT_BUFFERS] = {"p", "g", "state1", "state2", "absmax1", "absmax2"};
    for (int k = 0; k < SUBJECT_BUFFERS; k++) {
        const void *x = a->buffer[k].data, *y = b->buffer[k].data;
        const size_t bytes = a->buffer[k].bytes;
        const bool floats = k < 2 || (k < 4 && a->t.bits == 32);
        const bnb_dtype dtype = k < 2 ? a->t.dtype : BNB_F32;
        if (floats ? !same_floats(x, y, dtype, (int64_t)(bytes / bnb_dtype_size(dtype))) : memcmp(x, y, bytes) != 0)
            return name[k];
    }
    return NULL;
}

bool subject_free(struct subject *s)
{
    bool intact = true;
    for (int k = 0; k < SUBJECT_BUFFERS; k++) {
        intact = intact && guarded_intact(&s->buffer[k]);
        guarded_free(&s->buffer[k]);
    }
    return intact;
}

bnb_optim_config usual_config(const char *row)
{
    const enum reference_rule rule = reference_find(row)->rule;
    bnb_create_dynamic_map(true, 7, 8, subject_signed_map);
    bnb_create_dynamic_map(false, 7, 8, subject_unsigned_map);
    bnb_optim_config c = {.size = sizeof c,
                          .name = row,
                          .lr = 1e-2,
                          .beta1 = 0.9,
                          .beta2 = 0.999,
                          .eps = 1e-8,
                          .weight_decay = 0.01,
                          .gnorm_scale = 1.0,
                          .qmap1 = subject_signed_map,
                          .qmap2 = subject_unsigned_map};
    if (rule == ADEMAMIX) {
        c.beta3 = 0.9999;
        c.alpha = 5.0;
    }
    if (rule == MOMENTUM)
        c.beta2 = 0.0; /* dampening */
    if (rule == LION)
        c.beta2 = 0.99;
    if (rule == RMSPROP || rule == ADAGRAD)
        c.qmap1 = subject_unsigned_map;
    if (reference_find(row)->states == 1)
        c.qmap2 = NULL;
    return c;
}

void run_table(const struct bnb_cpu_ops *ops, const bnb_optim_config *config, const bnb_optim_tensor *t)
{
    struct bnb_cpu_step step;
    double direction;
    bnb_cpu_open_step(&step, config, t, 1);
    const struct bnb_optim_args a = bnb_cpu_optim_args(&step, 0, &direction);
    (t->bits == 8 ? ops->optim8 : ops->optim32)[step.row->rule](&a, 0, (t->n + STATE_BLOCK - 1) / STATE_BLOCK);
}
