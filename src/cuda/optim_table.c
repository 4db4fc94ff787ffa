/*
 * optim_table.c - the tensors of an optimizer step as kernels read them: see optim_table.h
 *
 * The host computes the scalars of an update where it knows all that they follow from.  Where learning rate, step counts,
 * norms or gradient scales are on the device, a second, small kernel computes them there, and nothing is waited for.
 */
#include "cuda/optim_table.h"

#include <stdlib.h>

#include "cuda/pages.h"

enum { PLAN_THREADS = 256, ALIGNED = 256 };

/* What paged states pass through unless the caller says otherwise, at most. */
static const size_t usual_pages = (size_t)256 << 20;

static int64_t elements_of(const bnb_optim_tensor *t) { return t->g ? t->n : 0; }

static size_t aligned(size_t bytes) { return (bytes + ALIGNED - 1) / ALIGNED * ALIGNED; }

/* ---------------------------------------------------------------- pieces and spans */

static int states_of(const struct bnb_optim_row *row) { return row->states + row->is_double; }

/* The bytes of one state of so many elements in a slot. */
static size_t room_of(int64_t n, int bits) { return aligned((size_t)n * (size_t)(bits / 8)); }

static bool is_paged(const bnb_optim_tensor *t) { return t->paged && elements_of(t) > 0; }

/* The most elements, in whole units, of which `states` states fit into so many bytes. */
static int64_t fitting(size_t bytes, int states, int bits, int unit)
{
    const size_t each = bytes / (size_t)states / ALIGNED * ALIGNED;
    return (int64_t)(each / (size_t)(bits / 8)) / unit * unit;
}

static void end_span(struct bnb_cuda_step *s, struct bnb_cuda_span *span)
{
    if (s->spans)
        s->spans[s->span_count] = *span;
    s->span_count++;
    *span = (struct bnb_cuda_span){.piece = span->piece + span->pieces, .chunk = span->chunk + span->chunks};
}

/* Cut the tensors into pieces, and these into spans; as long as there are no arrays for them, only count. */
static void cut(struct bnb_cuda_step *s, size_t count, int unit)
{
    const int states = states_of(s->row);
    struct bnb_cuda_span span = {0};
    size_t used = 0;
    s->piece_count = s->span_count = 0;
    for (size_t i = 0; i < count; i++) {
        const bnb_optim_tensor *t = &s->tensors[i];
        const int64_t n = elements_of(t);
        int64_t begin = 0;
        do {
            int64_t length = n - begin;
            if (is_paged(t) && (size_t)states * room_of(length, t->bits) > s->slot_bytes - used)
                length = fitting(s->slot_bytes - used, states, t->bits, unit);
            if (length == 0 && n > 0) {
                end_span(s, &span);
                used = 0;
                continue;
            }
            if (s->pieces)
                s->pieces[s->piece_count] = (struct bnb_cuda_piece){i, used, begin, length};
            s->piece_count++;
            span.pieces++;
            span.chunks += bnb_blocks(length, unit);
            used += is_paged(t) ? (size_t)states * room_of(length, t->bits) : 0;
            begin += length;
        } while (begin < n);
    }
    end_span(s, &span);
}

static bnb_status check_pages(const struct bnb_cuda_call *c, const bnb_optim_tensor *t, size_t i)
{
    const void *const state[2] = {t->state1, t->state2};
    for (int k = 0; k < 2; k++) {
        unsigned type = 0;
        const cu_address address = (cu_address)(uintptr_t)state[k];
        if (state[k] &&
            (c->card->cu->pointer_attribute(&type, CU_POINTER_MEMORY_TYPE, address) != 0 || type != CU_MEMORY_HOST))
            return bnb_fail(BNB_EINVAL,
                            "%s: tensors[%zu].state%d is ordinary memory of the host, expected memory of the device, "
                            "or page-locked "
                            "memory (bnb_pages_alloc)",
                            c->function, i, k + 1);
    }
    return BNB_OK;
}

/* How large a slot has to be; 0 if no state is paged. */
static bnb_status measure_slots(const struct bnb_cuda_call *c, struct bnb_cuda_step *s, size_t bytes, size_t count,
                                int unit)
{
    const size_t states = (size_t)states_of(s->row);
    size_t all = 0, least = 0;
    bnb_status status = BNB_OK;
    for (size_t i = 0; i < count && !status; i++) {
        const bnb_optim_tensor *t = &s->tensors[i];
        if (!is_paged(t))
            continue;
        const size_t of_unit = states * room_of(unit, t->bits);
        all += states * room_of(t->n, t->bits);
        least = of_unit > least ? of_unit : least;
        status = check_pages(c, t, i);
    }
    if (bytes == 0)
        bytes = all / 4 < usual_pages ? all / 4 : usual_pages;
    s->slot_bytes = aligned(bytes / BNB_CUDA_SLOTS);
    if (s->slot_bytes < least)
        s->slot_bytes = least;
    if (s->slot_bytes > all)
        s->slot_bytes = all;
    return status;
}

static bnb_status cut_into_spans(const struct bnb_cuda_call *c, struct bnb_cuda_step *s, size_t count, int unit)
{
    cut(s, count, unit);
    s->pieces = calloc((size_t)s->piece_count + 1, sizeof *s->pieces);
    s->spans = calloc((size_t)s->span_count + 1, sizeof *s->spans);
    if (!s->pieces || !s->spans)
        return bnb_fail(BNB_ENOMEM, "%s: out of memory for %zu tensors", c->function, count);
    cut(s, count, unit);
    return BNB_OK;
}

/* ---------------------------------------------------------------- the table */

/* Where the parts of the table lie. */
struct layout { size_t tensors, plans, origins, first, bytes; };

/* Must the device make the scalars? */
static bool is_remote(const bnb_optim_config *config, const bnb_optim_tensor *tensors, size_t count)
{
    bool remote = config->lr_value || (config->norms && config->max_unorm > 0.0);
    for (size_t i = 0; i < count && !remote; i++)
        remote = tensors[i].step_count || tensors[i].gnorm_scale;
    return remote;
}

/* The host needs as many plans as fill_plans() will make, one as a rule, and no origins. */
static struct layout layout_of(const struct bnb_cuda_step *s, size_t count, bool remote)
{
    struct layout l = {0};
    size_t plans = remote ? count : 1;
    int64_t step = 0;
    for (size_t i = 0; i < count && !remote; i++) {
        if (elements_of(&s->tensors[i]) > 0 && s->tensors[i].step != step) {
            step = s->tensors[i].step;
            plans++;
        }
    }
    l.plans = (size_t)s->piece_count * sizeof(struct bnb_cuda_tensor);
    l.origins = l.plans + plans * sizeof(struct bnb_optim_plan);
    l.first = l.origins + (remote ? count : 0) * sizeof(struct bnb_cuda_origin);
    l.bytes = l.first + (count + 1) * sizeof(int64_t);
    return l;
}

/* State k, in the kernels' numbering, from element `begin` on: where its owner keeps it. */
static char *state_of(const bnb_optim_tensor *t, int k, int64_t begin)
{
    char *const state = k == 1 ? t->state2 : t->state1;
    return state + ((k == 2 ? t->n : 0) + begin) * (t->bits / 8);
}

static float *absmax_of(const bnb_optim_tensor *t, int k, int64_t begin)
{
    float *const absmax = k == 1 ? t->absmax2 : t->absmax1;
    return absmax + (k == 2 ? bnb_blocks(t->n, BNB_OPTIM_BLOCK) : 0) + begin / BNB_OPTIM_BLOCK;
}

/* The same of a piece in its span's slot. */
static char *state_in_slot(const struct bnb_cuda_step *s, const struct bnb_cuda_piece *piece, int span, int k)
{
    const size_t room = room_of(piece->n, s->tensors[piece->tensor].bits);
    return s->slots + (size_t)(span % BNB_CUDA_SLOTS) * s->slot_bytes + piece->at + (size_t)k * room;
}

static struct bnb_cuda_tensor entry_of(const struct bnb_cuda_step *s, const struct bnb_cuda_piece *piece, int span)
{
    const bnb_optim_tensor *t = &s->tensors[piece->tensor];
    const int64_t size = t->dtype == BNB_F32 ? 4 : 2;
    struct bnb_cuda_tensor e = {.n = piece->n, .dtype = (int)t->dtype, .bits = t->bits};
    if (piece->n == 0)
        return e;
    e.p = (char *)t->p + piece->begin * size;
    e.g = (const char *)t->g + piece->begin * size;
    e.vector = bnb_cuda_aligned(e.p, 16) && bnb_cuda_aligned(e.g, 16); /* 8 elements of each array at a time */
    for (int k = 0; k < states_of(s->row); k++) {
        e.state[k] = t->paged ? state_in_slot(s, piece, span, k) : state_of(t, k, piece->begin);
        e.absmax[k] = t->bits == 8 ? absmax_of(t, k, piece->begin) : NULL;
        e.vector = e.vector && bnb_cuda_aligned(e.state[k], t->bits == 8 ? 8 : 16);
    }
    return e;
}

static void fill_entries(const struct bnb_cuda_step *s, const bnb_optim_config *config, int unit,
                         struct bnb_cuda_tensor *entries)
{
    for (int i = 0; i < s->span_count; i++) {
        int64_t first = 0;
        for (int j = s->spans[i].piece; j < s->spans[i].piece + s->spans[i].pieces; j++) {
            const struct bnb_cuda_piece *piece = &s->pieces[j];
            entries[j] = entry_of(s, piece, i);
            entries[j].first = first;
            entries[j].key = config->stochastic_rounding ? (uint64_t)(piece->begin / BNB_OPTIM_BLOCK) : 0;
            first += bnb_blocks(piece->n, unit);
        }
    }
}

/* The scalars of every tensor, each kind of them once. */
static void fill_plans(const struct bnb_cuda_step *s, const bnb_optim_config *config, struct bnb_cuda_tensor *entries,
                       struct bnb_optim_plan *plans)
{
    const struct bnb_optim_recipe recipe = bnb_optim_recipe_of(s->row, config);
    int64_t step = 0;
    int used = 0;
    for (int j = 0; j < s->piece_count; j++) {
        const bnb_optim_tensor *t = &s->tensors[s->pieces[j].tensor];
        if (elements_of(t) > 0 && t->step != step) {
            step = t->step;
            plans[used++] = bnb_optim_plan_of(&recipe, config->lr, step, 1.0, NULL);
        }
        entries[j].plan = used > 0 ? used - 1 : 0;
        if (recipe.stochastic)
            entries[j].key += bnb_optim_key(t->seed, t->step);
    }
}

/* What the scalars follow from, one plan for each tensor; in the order of the tensors, as the pieces are. */
static void fill_origins(const struct bnb_cuda_step *s, struct bnb_cuda_tensor *entries,
                         struct bnb_cuda_origin *origins)
{
    for (int j = 0; j < s->piece_count; j++) {
        const size_t i = s->pieces[j].tensor;
        const bnb_optim_tensor *t = &s->tensors[i];
        entries[j].plan = (int)i;
        if (s->pieces[j].begin == 0) {
            origins[i] = (struct bnb_cuda_origin){.step = t->step, .seed = t->seed, .piece = j};
            origins[i].step_count = t->g ? t->step_count : NULL;
            origins[i].gnorm_scale = t->g ? t->gnorm_scale : NULL;
            origins[i].unorm = t->g ? t->unorm : NULL;
        }
        origins[i].pieces++;
    }
}

static bnb_status make_plans(const struct bnb_cuda_call *c, const struct bnb_cuda_step *s,
                             const bnb_optim_config *config, const struct layout *l, bool advance)
{
    static struct bnb_cuda_kernel kernel = {
        .image = "optim_tables", .name = "bnb_k_plan", .dtype = -1, .threads = PLAN_THREADS};
    char *device = s->table.device;
    const struct bnb_cuda_planner args = {.recipe = bnb_optim_recipe_of(s->row, config),
                                          .origins = (const void *)(device + l->origins),
                                          .tensors = (void *)(device + l->tensors),
                                          .plans = (void *)(device + l->plans),
                                          .lr_value = config->lr_value,
                                          .norms = advance ? config->norms : NULL,
                                          .lr = config->lr,
                                          .count = s->args.count,
                                          .advance = advance};
    return bnb_cuda_launch(c, &kernel, (s->args.count + PLAN_THREADS - 1) / PLAN_THREADS, &args);
}

/* Table, tail and slots are one piece of workspace. */
static bnb_status open_table(const struct bnb_cuda_call *c, struct bnb_cuda_step *s, const bnb_optim_config *config,
                             const struct layout *l, size_t count, size_t tail)
{
    const int slots = s->span_count < BNB_CUDA_SLOTS ? s->span_count : BNB_CUDA_SLOTS;
    const struct bnb_cuda_span *last = &s->spans[s->span_count - 1];
    const int64_t chunks = last->chunk + last->chunks;
    const size_t sums = aligned((size_t)chunks * tail), pages = s->slot_bytes > 0 ? (size_t)slots * s->slot_bytes : 0;
    const bnb_status status = bnb_cuda_table_open(c, &s->table, aligned(l->bytes), sums + pages);
    if (status)
        return status;
    s->tail = s->table.device + s->table.bytes;
    s->slots = s->tail + sums;
    s->first = (const void *)(s->table.device + l->first);
    s->args = (struct bnb_cuda_optim){.tensors = (const void *)(s->table.device + l->tensors),
                                      .plans = (const void *)(s->table.device + l->plans),
                                      .map1 = config->qmap1,
                                      .map2 = s->row->states == 2 ? config->qmap2 : NULL,
                                      .chunks = chunks,
                                      .count = (int)count,
                                      .stochastic = config->stochastic_rounding};
    return BNB_OK;
}

bnb_status bnb_cuda_step_open(const struct bnb_cuda_call *c, struct bnb_cuda_step *s, const bnb_optim_config *config,
                              const bnb_optim_tensor *tensors, size_t count, int unit, size_t tail, bool advance)
{
    const bool remote = is_remote(config, tensors, count);
    *s = (struct bnb_cuda_step){.row = bnb_optim_find(config->name), .tensors = tensors};
    bnb_status status = measure_slots(c, s, config->page_bytes, count, unit);
    if (!status)
        status = cut_into_spans(c, s, count, unit);
    if (status)
        return status;
    const struct layout l = layout_of(s, count, remote);
    status = open_table(c, s, config, &l, count, tail);
    if (status)
        return status;
    struct bnb_cuda_tensor *entries = (void *)(s->table.host + l.tensors);
    int64_t *first = (void *)(s->table.host + l.first);
    for (size_t i = 0; i < count; i++)
        first[i + 1] = first[i] + bnb_blocks(elements_of(&tensors[i]), unit);
    fill_entries(s, config, unit, entries);
    if (remote)
        fill_origins(s, entries, (void *)(s->table.host + l.origins));
    else
        fill_plans(s, config, entries, (void *)(s->table.host + l.plans));
    status = bnb_cuda_table_send(c, &s->table);
    return status || !remote ? status : make_plans(c, s, config, &l, advance);
}

void bnb_cuda_step_close(const struct bnb_cuda_call *c, struct bnb_cuda_step *s)
{
    bnb_cuda_table_close(c, &s->table);
    free(s->pieces);
    free(s->spans);
}

/* ---------------------------------------------------------------- launches */

struct job {
    const struct bnb_cuda_call *c;
    const struct bnb_cuda_step *s;
    struct bnb_cuda_kernel *kernel;
    int each;
};

static bnb_status launch_span(void *arg, int span)
{
    const struct job *j = arg;
    const struct bnb_cuda_span *own = &j->s->spans[span];
    struct bnb_cuda_optim args = j->s->args;
    if (own->chunks == 0)
        return BNB_OK;
    args.tensors += own->piece;
    args.count = own->pieces;
    args.chunks = own->chunks;
    args.partial = args.partial ? args.partial + 2 * own->chunk : NULL;
    return bnb_cuda_launch_over(j->c, j->kernel, bnb_blocks(own->chunks, j->each), &args);
}

/* The paged states of a span, into their slot or back. */
static bnb_status copy_span(const struct job *j, int span, cu_stream stream, bool back)
{
    const struct bnb_cuda_span *own = &j->s->spans[span];
    const struct bnb_driver *cu = j->c->card->cu;
    bnb_status status = BNB_OK;
    for (int i = own->piece; i < own->piece + own->pieces; i++) {
        const struct bnb_cuda_piece *piece = &j->s->pieces[i];
        const bnb_optim_tensor *t = &j->s->tensors[piece->tensor];
        const size_t bytes = (size_t)piece->n * (size_t)(t->bits / 8);
        for (int k = 0; k < states_of(j->s->row) && is_paged(t) && !status; k++) {
            char *host = state_of(t, k, piece->begin);
            const cu_address device = (cu_address)(uintptr_t)state_in_slot(j->s, piece, span, k);
            if (back)
                status = bnb_cuda_check(cu, cu->copy_to_host(host, device, bytes, stream), j->c->function,
                                        "cuMemcpyDtoHAsync");
            else
                status = bnb_cuda_check(cu, cu->copy_to_device(device, host, bytes, stream), j->c->function,
                                        "cuMemcpyHtoDAsync");
        }
    }
    return status;
}

static bnb_status fetch_span(void *job, int span, cu_stream stream) { return copy_span(job, span, stream, false); }
static bnb_status store_span(void *job, int span, cu_stream stream) { return copy_span(job, span, stream, true); }

bnb_status bnb_cuda_step_launch(const struct bnb_cuda_call *c, struct bnb_cuda_step *s, struct bnb_cuda_kernel *kernel,
                                int each, bool store)
{
    struct job job = {c, s, kernel, each};
    const struct bnb_cuda_pages pages = {fetch_span, launch_span, store ? store_span : NULL};
    return s->slot_bytes > 0 ? bnb_cuda_pass_pages(c, &pages, s->span_count, &job) : launch_span(&job, 0);
}
