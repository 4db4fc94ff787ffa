"""torch.compile(fullgraph=True, dynamic=True) and torch.export of the quantised layers.

A changing batch size must not compile again: a backend counts the graphs it is given.  Graph breaks are errors under
fullgraph=True.  Sizes 0 and 1 are special to torch, which compiles for each of them once, for nn.Linear as for ours.
"""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch._dynamo import lookup_backend

from bitsandbytes.nn import Embedding4bit, Embedding8bit, EmbeddingFP4, EmbeddingNF4, Linear4bit, Linear8bitLt
from layer_samples import inputs
from parametrize_samples import make as make_experts

SIZES = (2, 3, 7, 16)


class Counted:
    """torch.compile with a backend that counts the graphs it is given after the first call.

    In the first call torch may give it a graph twice: it starts again when it learns that a float is a constant.
    """

    def __init__(self, function):
        torch.compiler.reset()
        self.graphs = 0
        self.call = torch.compile(function, fullgraph=True, dynamic=True, backend=self.keep)

    def keep(self, graph, example):
        self.graphs += 1
        return lookup_backend("aot_eager")(graph, example)

    def __call__(self, *args):
        first = self.graphs == 0
        result = self.call(*args)
        if first:
            assert self.graphs > 0
            self.graphs = 1
        return result


def four(**options):
    return lambda: Linear4bit(64, 40, **options)


def eight(**options):
    return lambda: Linear8bitLt(64, 40, **options)


BITS = (False, True)
LINEARS = {
    f"{quant_type}{'-nested' * nested}{'-bias' * bias}": four(
        quant_type=quant_type, compress_statistics=nested, bias=bias
    )
    for quant_type, nested, bias in itertools.product(("nf4", "fp4"), BITS, BITS)
}
LINEARS |= {
    f"int8{'-master' * master}-{threshold}{'-bias' * bias}": eight(
        has_fp16_weights=master, threshold=threshold, bias=bias
    )
    for master, threshold, bias in itertools.product(BITS, (0.0, 6.0), BITS)
}
LINEARS["nf4-compute-storage"] = four(quant_type="nf4", compute_dtype=torch.bfloat16, quant_storage=torch.bfloat16)


def made(make):
    torch.manual_seed(0)
    return make().to("cpu")


def gradients(function, layer, x):
    """[output, gradient of the input, gradients of the parameters]"""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = function(x)
    y.backward(inputs(*y.shape, seed=8).to(y.dtype))
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters() if p.requires_grad)]


def check(got, want):
    for one, two in zip(got, want, strict=True):
        assert one.dtype == two.dtype
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("name", LINEARS)
def test_linears_forward_and_backward(name):
    layer = made(LINEARS[name])
    compiled, twin = Counted(layer), copy.deepcopy(layer)
    for rows in SIZES:
        x = inputs(rows, 64, outliers=True)
        check(gradients(compiled, layer, x), gradients(twin, twin, x))
    assert compiled.graphs == 1


@pytest.mark.parametrize("name", ["nf4-nested-bias", "fp4", "int8-6.0-bias", "int8-0.0", "int8-master-6.0-bias"])
def test_linears_without_gradients_and_ranks(name):
    """Batch and length both change; then sizes 0 and 1, which cost what they cost nn.Linear."""
    counts = []
    for layer in (made(LINEARS[name]), nn.Linear(64, 40)):
        compiled, twin = Counted(layer), copy.deepcopy(layer)
        with torch.no_grad():
            for rows in SIZES:
                x = inputs(rows, 20 - rows, 64, outliers=True)
                assert torch.equal(compiled(x), twin(x)) or type(layer) is nn.Linear
            assert compiled.graphs == 1
            for rows in (1, 0, 5):
                x = inputs(rows, 9, 64)
                assert torch.equal(compiled(x), twin(x)) or type(layer) is nn.Linear
        counts.append(compiled.graphs)
    assert counts[0] <= counts[1]


def test_a_model_of_both_is_one_graph():
    model = made(
        lambda: nn.Sequential(
            Linear4bit(64, 64, quant_type="nf4"),
            nn.GELU(),
            Linear8bitLt(64, 64, has_fp16_weights=False, threshold=6.0),
            nn.LayerNorm(64),
            Linear8bitLt(64, 40, has_fp16_weights=True),
        )
    )
    compiled, twin = Counted(model), copy.deepcopy(model)
    for rows in SIZES:
        x = inputs(rows, 64)
        check(gradients(compiled, model, x), gradients(twin, twin, x))
    assert compiled.graphs == 1


def test_changing_weights_of_a_compiled_layer():
    """A loaded checkpoint and an optimizer step are seen by a graph that was compiled before."""
    for name in ("nf4-nested-bias", "int8-6.0-bias"):
        layer, other = made(LINEARS[name]), LINEARS[name]().to("cpu")
        compiled = Counted(layer)
        x = inputs(4, 64)
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))
            layer.load_state_dict(other.state_dict())
            assert torch.equal(compiled(x), other(x))
    layer = made(LINEARS["int8-master-0.0-bias"])
    compiled, optimizer = Counted(layer), torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(3):
        y = compiled(inputs(4, 64))
        assert torch.equal(y, copy.deepcopy(layer)(inputs(4, 64)))
        optimizer.zero_grad()
        y.square().sum().backward()
        optimizer.step()
    assert compiled.graphs == 1


EMBEDDINGS = {
    "int8": lambda: Embedding8bit(23, 65),
    "fp4": lambda: EmbeddingFP4(23, 64),
    "nf4-whole": lambda: EmbeddingNF4(23, 65),
    "4bit-storage": lambda: Embedding4bit(23, 128, quant_type="nf4", quant_storage=torch.float32),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings(name):
    layer = made(EMBEDDINGS[name])
    compiled = Counted(layer)
    for rows in SIZES:
        ids = torch.arange(rows * 3).remainder(23).view(rows, 3)
        assert torch.equal(compiled(ids), layer(ids))
    # Rows of whole blocks go through dequantize_4bit, whose shape is int[] by contract: constants to a graph.
    assert compiled.graphs == (1 if name in ("int8", "nf4-whole") else len(SIZES))


@pytest.mark.parametrize("options", [{}, {"compress_statistics": True, "quant_type": "fp4"}])
def test_parametrised_modules(options):
    module = make_experts(**options)
    compiled = Counted(module)
    for rows in SIZES:
        x = inputs(rows, 16)
        check(gradients(compiled, module, x), gradients(module, module, x))
    assert compiled.graphs == 1


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("master", [False, True])
def test_export_of_a_model_with_both_linears(threshold, master, tmp_path):
    model = made(
        lambda: nn.Sequential(
            Linear4bit(64, 48, quant_type="nf4"),
            nn.ReLU(),
            Linear8bitLt(48, 40, has_fp16_weights=master, threshold=threshold),
            Linear4bit(40, 8, quant_type="fp4", compress_statistics=False, compute_dtype=torch.bfloat16),
        )
    ).eval()
    rows = torch.export.Dim("rows", min=2, max=1024)
    with torch.no_grad():
        program = torch.export.export(model, (inputs(4, 64),), dynamic_shapes=({0: rows},))
        torch.export.save(program, tmp_path / "model.pt2")
        again = torch.export.load(tmp_path / "model.pt2")
        for each in (program, again):
            for size in SIZES:
                x = inputs(size, 64, outliers=True)
                assert torch.equal(each.module()(x), model(x))
