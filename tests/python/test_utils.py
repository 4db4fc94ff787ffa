"""Layers replaced throughout a model, and the numbers of old weight layouts."""

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes.utils import (
    INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING,
    LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING,
    replace_linear,
)


class Block(nn.Module):
    """Children of every kind that replacement meets: a linear, a nested one, one without bias, other modules."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.inner = nn.Sequential(nn.ReLU(), nn.Linear(8, 6, bias=False))
        self.lm_head = nn.Linear(6, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(self.lm_head(self.inner(self.up(x))))


class Marked(nn.Linear):
    """A replacement that can be told what it replaced."""

    replaced = None

    def finish(self, replaced):
        self.replaced = (replaced,)


def test_replaces_below_and_skips_by_name():
    model = nn.Sequential(Block(), nn.Linear(4, 4))
    made = []

    def make(*arguments):
        made.append(arguments)
        return Marked(*arguments)

    assert replace_linear(model, make) is model
    assert made == [(6, 8, True), (8, 6, False), (4, 4, True)]
    assert [type(m) for m in (model[0].up, model[0].inner[1], model[1])] == [Marked] * 3
    assert type(model[0].lm_head) is nn.Linear and type(model[0].norm) is nn.LayerNorm
    assert model[0].up.replaced is None


@pytest.mark.parametrize(
    "skipped, expected", [((), [1, 1, 1]), (("up", "lm_head"), [0, 1, 0]), (("inner",), [1, 1, 1])]
)
def test_names_to_skip(skipped, expected):
    model = replace_linear(Block(), Marked, skip_modules=skipped)
    assert [isinstance(m, Marked) for m in (model.up, model.inner[1], model.lm_head)] == expected


def test_weights_are_the_same_objects():
    torch.manual_seed(0)
    model = Block()
    x = torch.randn(3, 6)
    before, want = dict(model.named_parameters()), model(x)
    replace_linear(model, Marked, copy_weights=True)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(after[name] is before[name] for name in before)
    assert torch.equal(model(x), want) and model.inner[1].bias is None

    fresh = replace_linear(Block(), Marked)
    assert fresh.up.weight is not before["up.weight"]


def test_post_processing_is_a_method_of_the_new_layer():
    model = Block()
    up = model.up
    replace_linear(model, Marked, post_processing_function="finish")
    assert model.up.replaced[0] is up
    # The old layers have this method, and it takes no argument: it must not be called.
    replace_linear(model, lambda *arguments: nn.Identity(), post_processing_function="reset_parameters")
    assert type(model.up) is nn.Identity


def test_quantised_layers_through_replacement():
    torch.manual_seed(0)
    model = Block()
    x = torch.randn(3, 6)
    want = model(x)

    class Layer(bnb.nn.Linear8bitLt):
        def load(self, replaced):
            self.load_state_dict(replaced.state_dict())

    def make(*arguments):
        return Layer(*arguments, has_fp16_weights=False)

    replace_linear(model, make, skip_modules=(), post_processing_function="load").to("cpu")
    assert {m.weight.dtype for m in (model.up, model.inner[1], model.lm_head)} == {torch.int8}
    assert (model(x) - want).abs().max() < 0.05


def test_weight_formats():
    assert LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING == {"row": 0, "col32": 1, "col_turing": 2, "col_ampere": 3}
    assert INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING == {0: "row", 1: "col32", 2: "col_turing", 3: "col_ampere"}
