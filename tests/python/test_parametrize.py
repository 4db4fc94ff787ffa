"""nn.parametrize: 4-bit parameters of any module are read, differentiated through, cached and released."""

import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn.parametrize import (
    Bnb4bitParametrization,
    _disable_parametrization_cache,
    _register_parametrization_hooks,
    replace_parameter_4bit,
    replace_parameter_4bit_prequantized,
)
from layer_samples import inputs, same_bytes
from parametrize_samples import OPTIONS, Experts, make, reference

SHAPES = [(7, 63), (3, 16, 24), (5,), (1,), (2, 3, 4, 5)]


@pytest.fixture
def count(monkeypatch):
    """The shapes of the tensors that parametrisations have dequantised, in order."""
    seen = []
    plain = Bnb4bitParametrization.forward

    def forward(self, packed):
        seen.append(tuple(self.quant_state.shape))
        return plain(self, packed)

    monkeypatch.setattr(Bnb4bitParametrization, "forward", forward)
    return seen


# ---------------------------------------------------------------- replacing and reading


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_reads_as_quantise_and_dequantise_do(shape, options, dtype):
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    module = nn.Module()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    module.weight = nn.Parameter(weight.clone())
    assert replace_parameter_4bit(module, "weight", **options) is None
    packed, state = quantize_4bit(weight, **{"quant_type": "nf4", **options})
    inner = module.parametrizations.weight
    assert same_bytes(inner.original, packed)
    assert type(inner.original) is nn.Parameter
    assert inner.original.requires_grad is False
    assert inner[0].quant_state == state
    got = module.weight
    assert got.requires_grad is False
    assert got.dtype == dtype
    assert torch.equal(got, dequantize_4bit(packed, state))


def test_defaults_and_signatures():
    module = Experts()
    replace_parameter_4bit(module, "w")
    state = module.parametrizations.w[0].quant_state
    assert (state.quant_type, state.blocksize, state.nested) == ("nf4", 64, False)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_prequantised(packed, storage):
    weight = torch.randn(3, 16, 24)
    codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True, quant_storage=storage)
    module = nn.Module()
    module.weight = nn.Parameter(codes, requires_grad=False)
    given = {f"experts.weight.{key}": value for key, value in state.as_dict(packed=packed).items()}
    before = dict(given)
    replace_parameter_4bit_prequantized(module, "weight", given, torch.device("cpu"))
    assert given == before
    assert torch.equal(module.weight, dequantize_4bit(codes, state))
    assert module.state_dict()["weight"].dtype == storage


def test_errors():
    module = Experts()
    module.plain = torch.zeros(4)
    for replace, extra in ((replace_parameter_4bit, ()), (replace_parameter_4bit_prequantized, ({}, "cpu"))):
        with pytest.raises(AttributeError, match=r"^Module does not have parameter 'nothing'$"):
            replace(module, "nothing", *extra)
        with pytest.raises(TypeError, match=r"^Parameter 'plain' is not an instance of nn.Parameter$"):
            replace(module, "plain", *extra)
    weight = module.w
    for options in ({"blocksize": 48}, {"quant_type": "int4"}):
        with pytest.raises(ValueError):
            replace_parameter_4bit(module, "w", **options)
    _, state = quantize_4bit(torch.randn(10, 10))
    with pytest.raises(ValueError, match=r"'w' has .* bytes, expected .* shape \(10, 10\)"):
        replace_parameter_4bit_prequantized(module, "w", state.as_dict(), "cpu")
    with pytest.raises(KeyError):
        replace_parameter_4bit_prequantized(module, "w", {"absmax": state.absmax, "quant_type": "nf4"}, "cpu")
    assert module.w is weight
    assert not parametrize.is_parametrized(module)
    replace_parameter_4bit(module, "w")
    with pytest.raises(TypeError, match="'w' is not an instance"):
        replace_parameter_4bit(module, "w")


# ---------------------------------------------------------------- forward and backward


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_input_gradient_equal_the_dequantised_reference(options, dtype):
    module = make(dtype=dtype, **options)
    twin = reference(module)
    x, y = (inputs(5, 16, dtype=dtype).requires_grad_() for _ in range(2))
    got, want = module(x), twin(y)
    assert torch.equal(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert module.bias.grad is not None
    assert all(p.grad is None for p in module.parametrizations.parameters())
    with torch.no_grad():
        assert torch.equal(module(x), want)
    with torch.inference_mode():
        assert torch.equal(module(x), want)


def test_autocast():
    module = make()
    twin = reference(module)
    x, y = (inputs(5, 16).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = module(x), twin(y)
    assert got.dtype == want.dtype == torch.bfloat16 or torch.equal(got, want)
    assert torch.equal(got, want)
    got.sum().backward()
    want.sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_each_parameter_is_dequantised_once_in_a_forward(count):
    module = make()
    x = inputs(5, 16)
    for _ in range(2):
        module(x)
    assert count == [(4, 24, 16), (4, 8, 24)] * 2
    assert parametrize._cache_enabled == 0
    assert parametrize._cache == {}
    assert module.w is not module.w


@pytest.mark.parametrize("options", OPTIONS)
def test_the_backward_keeps_codes_and_no_dequantised_tensor(options, monkeypatch):
    made = []
    plain = Bnb4bitParametrization.forward

    def forward(self, packed):
        result = plain(self, packed)
        made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(Bnb4bitParametrization, "forward", forward)
    module = make(**options)
    x = inputs(5, 16).requires_grad_()
    y = module(x)
    assert len(made) == 2
    assert [ref() for ref in made] == [None, None]
    y.sum().backward()


def test_views_that_cross_blocks_are_decoded_again_exactly():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 7, 13))

        def forward(self, x):
            return (
                x[:, :7] @ self.w[1] @ self.w[2].t()
                + x[:, :6] @ self.w[0, 1:, ::2]
                + (x[:, :3] @ self.w[:, 3, 5:12]) * self.w[2, 0, :7]
            )

    torch.manual_seed(0)
    module = Odd()
    replace_parameter_4bit(module, "w", blocksize=32)
    twin = Odd().requires_grad_(False)
    twin.w.copy_(module.w)
    x, y = (inputs(4, 13).requires_grad_() for _ in range(2))
    module(x).square().sum().backward()
    twin(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_a_weight_changed_in_place_is_saved_as_it_is():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 64))

        def forward(self, x):
            w = self.w
            w[:4] = 0
            return linear(x, w)

    module = Masked()
    replace_parameter_4bit(module, "w")
    x = inputs(3, 64).requires_grad_()
    module(x).sum().backward()
    want = module.w.clone()
    want[:4] = 0
    torch.testing.assert_close(x.grad, want.sum(0).expand(3, -1))


def test_codes_changed_before_the_backward_are_an_error():
    module = make()
    y = module(inputs(5, 16).requires_grad_())
    with torch.no_grad():
        module.parametrizations.w.original.zero_()
    with pytest.raises(RuntimeError, match="changed between a forward and its backward"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    module = make()
    twin = reference(module)
    x, y = (inputs(5, 16).requires_grad_() for _ in range(2))
    for _ in range(2):
        checkpoint(module, x, use_reentrant=reentrant).sum().backward()
        twin(y).sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert parametrize._cache_enabled == 0
    assert parametrize._cache == {}
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_torch_func_gradients():
    module = make()
    twin = reference(module)
    x = inputs(5, 16)
    got = torch.func.grad(lambda t: module(t).sum())(x)
    assert torch.equal(got, torch.func.grad(lambda t: twin(t).sum())(x))


def test_compiled():
    module = make()
    x = inputs(5, 16)
    want = module(x)
    compiled = torch.compile(module, backend="aot_eager")
    assert torch.equal(compiled(x), want)
    y = inputs(5, 16).requires_grad_()
    compiled(y).sum().backward()
    x.requires_grad_()
    module(x).sum().backward()
    assert torch.equal(y.grad, x.grad)
    assert parametrize._cache_enabled == 0


def test_the_counter_survives_exceptions():
    module = make()
    with pytest.raises(RuntimeError):
        module(inputs(5, 17))
    assert parametrize._cache_enabled == 0
    assert parametrize._cache == {}
    parametrize._cache["left"] = torch.zeros(1)
    _disable_parametrization_cache(nn.Identity(), (), None)
    assert parametrize._cache_enabled == 0
    assert parametrize._cache == {}

    def refuse(module, args):
        raise KeyError("refused")

    handle = module.register_forward_pre_hook(refuse, prepend=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t), pytest.raises(KeyError):
        module(inputs(5, 16))
    handle.remove()
    assert parametrize._cache_enabled == 0
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    module(inputs(5, 16))


def test_hooks_alone_do_no_harm():
    layer = nn.Linear(4, 4)
    keys = list(layer.state_dict())
    _register_parametrization_hooks(layer, "weight")
    assert list(layer.state_dict()) == keys
    layer.load_state_dict(nn.Linear(4, 4).state_dict())
    layer(torch.randn(2, 4)).sum().backward()
