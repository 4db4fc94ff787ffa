/* ops_update.c - the public operators of the optimizers: one parameter, upstream's schemas */
#include "ops.h"
#include "optim_call.h"

/* optimizer_update_32bit(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2,
 *     Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, float beta1, float beta2, float beta3, float alpha,
 *     float eps, float weight_decay, int step, float lr, float gnorm_scale, bool skip_zeros=False) -> () */
void bnb_op_optimizer_update_32bit(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    (void)outputs;
    bnb_call_begin(&c, "optimizer_update_32bit", stack, inputs, 18);
    bnb_optim_config config = {.size = sizeof config, .name = bnb_take_string(&c)};
    struct bnb_tensor g = bnb_take_tensor(&c, "g"), p = bnb_take_tensor(&c, "p");
    c.host_too = true;
    struct bnb_tensor state1 = bnb_take_tensor(&c, "state1"), state2 = bnb_take_optional(&c, "state2");
    c.host_too = false;
    struct bnb_tensor unorm = bnb_take_optional(&c, "unorm_vec");
    struct bnb_parameter q = {.p = &p, .g = &g, .state1 = &state1, .state2 = &state2, .unorm = &unorm};
    config.max_unorm = bnb_take_float(&c);
    bnb_take_float(&c); /* param_norm: measured here, with the norm of the update */
    config.beta1 = bnb_take_float(&c);
    config.beta2 = bnb_take_float(&c);
    config.beta3 = bnb_take_float(&c);
    config.alpha = bnb_take_float(&c);
    config.eps = bnb_take_float(&c);
    config.weight_decay = bnb_take_float(&c);
    q.step = bnb_take_int(&c);
    config.lr = bnb_take_float(&c);
    config.gnorm_scale = bnb_take_float(&c);
    config.skip_zeros = bnb_take_bool(&c);

    bnb_check_optimizer(&c, &config);
    bnb_check_dtype(&c, &state1, BNB_TORCH_float32);
    bnb_check_given(&c, &state2, bnb_states_of(config.name) == 2, config.name);
    bnb_step_parameters(&c, &config, &q, 1);
    bnb_call_end(&c);
}

/* optimizer_update_8bit_blockwise(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1,
 *     Tensor(a3!)? state2, float beta1, float beta2, float beta3, float alpha, float eps, int step, float lr,
 *     Tensor(a4!) qmap1, Tensor(a5!)? qmap2, Tensor(a6!) absmax1, Tensor(a7!)? absmax2, float weight_decay,
 *     float gnorm_scale, bool skip_zeros=False) -> () */
void bnb_op_optimizer_update_8bit_blockwise(torch_value *stack, uint64_t inputs, uint64_t outputs)
{
    struct bnb_call c;
    (void)outputs;
    bnb_call_begin(&c, "optimizer_update_8bit_blockwise", stack, inputs, 19);
    bnb_optim_config config = {.size = sizeof config, .name = bnb_take_string(&c)};
    struct bnb_tensor g = bnb_take_tensor(&c, "g"), p = bnb_take_tensor(&c, "p");
    c.host_too = true;
    struct bnb_tensor state1 = bnb_take_tensor(&c, "state1"), state2 = bnb_take_optional(&c, "state2");
    c.host_too = false;
    struct bnb_parameter q = {.p = &p, .g = &g, .state1 = &state1, .state2 = &state2};
    config.beta1 = bnb_take_float(&c);
    config.beta2 = bnb_take_float(&c);
    config.beta3 = bnb_take_float(&c);
    config.alpha = bnb_take_float(&c);
    config.eps = bnb_take_float(&c);
    q.step = bnb_take_int(&c);
    config.lr = bnb_take_float(&c);
    struct bnb_tensor qmap1 = bnb_take_tensor(&c, "qmap1"), qmap2 = bnb_take_optional(&c, "qmap2");
    struct bnb_tensor absmax1 = bnb_take_tensor(&c, "absmax1"), absmax2 = bnb_take_optional(&c, "absmax2");
    q.absmax1 = &absmax1;
    q.absmax2 = &absmax2;
    config.weight_decay = bnb_take_float(&c);
    config.gnorm_scale = bnb_take_float(&c);
    config.skip_zeros = bnb_take_bool(&c);

    bnb_check_optimizer(&c, &config);
    const bool two = bnb_states_of(config.name) == 2;
    bnb_check_dtype(&c, &state1, BNB_TORCH_uint8);
    bnb_check_given(&c, &state2, two, config.name);
    bnb_check_given(&c, &qmap2, two, config.name);
    bnb_check_given(&c, &absmax2, two, config.name);
    config.qmap1 = bnb_read_floats(&c, &qmap1, 256, " (an 8-bit map)");
    config.qmap2 = bnb_read_floats(&c, &qmap2, 256, " (an 8-bit map)");
    bnb_step_parameters(&c, &config, &q, 1);
    bnb_call_end(&c);
}
