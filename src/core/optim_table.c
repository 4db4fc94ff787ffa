/*
 * optim_table.c - the optimizer table
 *
 * An algorithm is a row: its rule, its states and its form of weight decay.  Every device implements the rules; a row
 * that is a special case of a rule differs in its scalars alone.
 */
#include <string.h>

#include "core/internal.h"
#include "core/random.h"

static const struct bnb_optim_row rows[] = {
    {.name = "adam", .rule = BNB_RULE_ADAM, .states = 2, .decoupled = true},
    {.name = "lamb", .rule = BNB_RULE_ADAM, .states = 2, .decoupled = true},
    {.name = "ademamix", .rule = BNB_RULE_ADEMAMIX, .states = 2, .is_double = true, .decoupled = true},
    {.name = "momentum", .rule = BNB_RULE_MOMENTUM, .states = 1},
    {.name = "lars", .rule = BNB_RULE_MOMENTUM, .states = 1},
    {.name = "lion", .rule = BNB_RULE_LION, .states = 1, .decoupled = true},
    {.name = "rmsprop", .rule = BNB_RULE_RMSPROP, .states = 1},
    {.name = "adagrad", .rule = BNB_RULE_RMSPROP, .states = 1, .no_gain = true},
};
enum { ROWS = sizeof rows / sizeof rows[0] };

const char *bnb_optim_name(int i) { return i >= 0 && i < ROWS ? rows[i].name : NULL; }

int bnb_optim_states(int i) { return i >= 0 && i < ROWS ? rows[i].states : 0; }

int bnb_optim_averages(int i) { return i >= 0 && i < ROWS ? 1 + rows[i].is_double : 0; }

bool bnb_optim_is_signed(int i, int state)
{
    return i >= 0 && i < ROWS && state == 0 && rows[i].rule != BNB_RULE_RMSPROP;
}

const struct bnb_optim_row *bnb_optim_find(const char *name)
{
    for (int i = 0; i < ROWS; i++)
        if (!strcmp(rows[i].name, name))
            return &rows[i];
    return NULL;
}

struct bnb_optim_recipe bnb_optim_recipe_of(const struct bnb_optim_row *row, const bnb_optim_config *c)
{
    return (struct bnb_optim_recipe){.rule = (int)row->rule,
                                     .states = row->states,
                                     .decoupled = row->decoupled && !c->coupled_decay,
                                     .no_gain = row->no_gain,
                                     .skip_zeros = c->skip_zeros,
                                     .nesterov = c->nesterov,
                                     .corrected = !c->no_bias_correction,
                                     .stochastic = c->stochastic_rounding,
                                     .beta1 = c->beta1,
                                     .beta2 = c->beta2,
                                     .beta3 = c->beta3,
                                     .alpha = c->alpha,
                                     .t_alpha = c->t_alpha,
                                     .t_beta3 = c->t_beta3,
                                     .eps = c->eps,
                                     .weight_decay = c->weight_decay,
                                     .gnorm_scale = c->gnorm_scale,
                                     .max_unorm = c->max_unorm};
}

uint64_t bnb_optim_key(uint64_t seed, int64_t step) { return bnb_mix64(bnb_mix64(seed) + (uint64_t)step); }
