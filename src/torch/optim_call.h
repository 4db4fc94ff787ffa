/*
 * optim_call.h - the parameters of an optimizer call: checks, staging, and the step itself
 *
 * An update works element by element, in the order in which state1 lies in memory, because the blocks of 8-bit state
 * follow that order.  A parameter, gradient or state with other strides is updated through a temporary, so that no
 * stride ever changes; where all agree, the storage is updated directly.
 */
#ifndef BNB_TORCH_OPTIM_CALL_H
#define BNB_TORCH_OPTIM_CALL_H

#include "call.h"

/* The tensors of one parameter; NULL, or not present: there is none. */
struct bnb_parameter {
    struct bnb_tensor *p, *g, *state1, *state2, *absmax1, *absmax2, *step_count, *unorm;
    int64_t step;
    uint64_t seed;
    const float *gnorm_scale;
};

/* The arguments of the operators of a group: _optimizer_step and its like. */
struct bnb_group {
    bnb_optim_config config;
    struct bnb_tensors p, g, state1, state2, absmax1, absmax2, qmaps, steps, unorm;
    struct bnb_tensor gnorm_scale, norms, lr_tensor;
    struct bnb_ints step, seed;
};

/* Take all of them; or those behind the lists of tensors alone, which every operator of a group ends with. */
struct bnb_group bnb_take_group(struct bnb_call *c);
void bnb_take_options(struct bnb_call *c, struct bnb_group *l);

/* Deal the entries of the lists out to the parameters; NULL on failure. */
struct bnb_parameter *bnb_deal_group(struct bnb_call *c, struct bnb_group *l);

/* What is left of the arguments after that: maps, learning rate, norms; l->p.count parameters. */
void bnb_finish_config(struct bnb_call *c, struct bnb_group *l);

/* How many states an algorithm has; 0 for a name that is not in the core's table. */
int bnb_states_of(const char *name);

/* Fail on an unknown name, with the core's text. */
void bnb_check_optimizer(struct bnb_call *c, const bnb_optim_config *config);

/* A tensor that the algorithm needs, but the caller left out; or one that it has no use for. */
void bnb_check_given(struct bnb_call *c, const struct bnb_tensor *t, bool needed, const char *name);

/* The values of a small f32 tensor (a map, a factor, a count), staged; NULL if it is absent. */
const float *bnb_read_floats(struct bnb_call *c, struct bnb_tensor *t, int64_t count, const char *why);

/* Check and stage all parameters; the result, NULL on failure, is what the core's calls take. */
bnb_optim_tensor *bnb_open_parameters(struct bnb_call *c, const bnb_optim_config *config, struct bnb_parameter *q,
                                      size_t count);

/* The step; measures norms first where trust clipping needs them and config has none. */
void bnb_step_parameters(struct bnb_call *c, bnb_optim_config *config, struct bnb_parameter *q, size_t count);

/* The same for parameters that are open already. */
void bnb_step_tensors(struct bnb_call *c, bnb_optim_config *config, const bnb_optim_tensor *tensors, size_t count);

/* A new f64 tensor [count, 2] of bnb_optim_norms(). */
struct bnb_tensor bnb_measure_parameters(struct bnb_call *c, const bnb_optim_config *config,
                                         const bnb_optim_tensor *tensors, size_t count);

#endif
