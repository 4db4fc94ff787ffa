"""matmul() and matmul_4bit(): values and gradients against float64, what is saved, state, compilation."""

import logging
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import bitsandbytes as bnb
import bitsandbytes.functional as F
from gemm_cases import K, N, int8_state, normal, weight_4bit, weight_int8

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SHAPES = [(K,), (5, K), (2, 3, K), (2, 1, 3, K), (0, K), (2, 0, K)]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def close(got, expected, slack=2e-4):
    """Within one rounding to the dtype, and `slack` of the largest value for rounding and sums on the way."""
    assert got.shape == expected.shape
    if got.numel():
        tolerance = UNIT[got.dtype] * expected.abs() + slack * max(expected.abs().max().item(), 1.0)
        excess = (got.double() - expected).abs() - tolerance
        assert excess.max() <= 0, f"{excess.max()} above the tolerance"


def leaf(*shape, dtype, seed=3):
    return normal(*shape, dtype=dtype, seed=seed).requires_grad_()


def backward(output, dtype):
    """Run backward with a random gradient; that gradient as float64 rows."""
    grad = normal(*output.shape, dtype=dtype, seed=11)
    output.backward(grad)
    return grad.double()


def rows(t):
    return t.reshape(-1, t.shape[-1])


def int8_activations(x, threshold):
    """What the rows of x become: quantised in float64 from the public codes, outlier columns as they are."""
    codes, stats, columns = F.int8_vectorwise_quant(x, threshold=threshold)
    a = codes.double() * stats.double().reshape(*x.shape[:-1], 1) / 127
    if columns is not None:
        a[..., columns] = x.double()[..., columns]
    return a


# ---------------------------------------------------------------- 4 bits


@every_dtype
@every_shape
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bias_dtype", [None, *DTYPES])
def test_matmul_4bit(dtype, shape, nested, bias_dtype):
    packed, state, w = weight_4bit(nested=nested)
    x = leaf(*shape, dtype=dtype)
    bias = None if bias_dtype is None else leaf(N, dtype=bias_dtype, seed=9)
    y = bnb.matmul_4bit(x, packed, state, bias=bias)
    expected = x.detach().double() @ w.t()
    if bias is not None:
        expected = expected + bias.detach().to(dtype).double()
    assert y.dtype == dtype
    close(y.detach(), expected)
    with torch.no_grad():
        assert torch.equal(bnb.matmul_4bit(x, packed.t(), state, bias=bias), y)
    grad = backward(y, dtype)
    assert x.grad.dtype == dtype
    close(x.grad, grad @ w)
    if bias is not None:
        assert bias.grad.dtype == bias_dtype
        close(bias.grad, rows(grad).sum(0))


def test_matmul_4bit_with_a_bias_that_alone_wants_a_gradient():
    packed, state, _ = weight_4bit()
    x, bias = normal(4, K), leaf(N, dtype=torch.float32)
    bnb.matmul_4bit(x, packed, state, bias=bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((N,), 4.0)) and x.grad is None
    assert not bnb.matmul_4bit(x, packed, state, bias=bias.detach()).requires_grad


def test_matmul_4bit_out_is_filled_and_returned():
    packed, state, _ = weight_4bit(nested=True)
    x = normal(2, 3, K, dtype=torch.bfloat16)
    expected = bnb.matmul_4bit(x, packed, state)
    out = torch.zeros(2, 3, N, dtype=torch.bfloat16)
    assert bnb.matmul_4bit(x, packed, state, out=out) is out and torch.equal(out, expected)
    packed, state, _ = weight_4bit(K, N)
    out = torch.zeros(2, 3, N)
    with pytest.warns(DeprecationWarning, match="Re-quantize"):
        assert bnb.matmul_4bit(x.float(), packed, state, out=out) is out and torch.any(out != 0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_matmul_4bit_with_a_weight_quantised_as_in_by_out(transposed, nested):
    packed, state, w = weight_4bit(K, N, nested=nested)
    x, bias = leaf(2, 3, K, dtype=torch.float32), leaf(N, dtype=torch.float32, seed=9)
    with pytest.warns(DeprecationWarning, match="Re-quantize from the weight"):
        y = bnb.matmul_4bit(x, packed.t() if transposed else packed, state, bias=bias)
    close(y.detach(), x.detach().double() @ w + bias.detach().double())
    grad = backward(y, torch.float32)
    close(x.grad, grad @ w.t())
    close(bias.grad, rows(grad).sum(0))


def test_square_weights_are_out_by_in():
    packed, state, w = weight_4bit(K, K)
    x = normal(3, K)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(bnb.matmul_4bit(x, packed, state), x.double() @ w.t())


def test_edits_of_the_state_are_obeyed():
    """Clients expand nested statistics in place, and rescale absmax: nothing of a state is remembered."""
    packed, state, w = weight_4bit(nested=True)
    x = normal(3, K)
    before = bnb.matmul_4bit(x, packed, state)
    inner = state.state2
    state.absmax = torch.ops.bitsandbytes._dequantize_scales(
        state.absmax, inner.code, inner.absmax, state.offset, inner.blocksize
    )
    state.nested, state.state2, state.offset = False, None, None
    assert torch.equal(bnb.matmul_4bit(x, packed, state), before)
    state.absmax = state.absmax * 2
    assert torch.equal(bnb.matmul_4bit(x, packed, state), before * 2)
    close(before, x.double() @ w.t())


def test_state_of_another_dtype_and_weights_that_want_gradients():
    w = torch.randn(N, K).half()
    packed, state = F.quantize_4bit(w, blocksize=32, quant_type="nf4", quant_storage=torch.float32)
    packed.requires_grad_()
    x = leaf(3, K, dtype=torch.float32)
    y = bnb.matmul_4bit(x, packed, state)
    state.dtype = torch.float32
    close(y.detach(), x.detach().double() @ F.dequantize_4bit(packed.detach(), state).double().t())
    y.sum().backward()
    assert packed.grad is None and x.grad is not None
    assert not bnb.matmul_4bit(x.detach(), packed, state).requires_grad


# ---------------------------------------------------------------- int8


@every_dtype
@every_shape
@pytest.mark.parametrize("threshold", [0.0, 1.5, 50.0])
@pytest.mark.parametrize("bias_dtype", [None, *DTYPES])
@pytest.mark.parametrize("training", [False, True])
def test_matmul_of_a_frozen_weight(dtype, shape, threshold, bias_dtype, training):
    state, weight, w = int8_state()
    state.is_training = training
    x = leaf(*shape, dtype=dtype)
    bias = None if bias_dtype is None else leaf(N, dtype=bias_dtype, seed=9)
    y = bnb.matmul(x, weight, state=state, threshold=threshold, bias=bias)
    expected = int8_activations(x.detach(), threshold) @ w.t()
    if bias is not None:
        expected = expected + bias.detach().double()
    assert y.dtype == dtype and state.threshold == threshold
    close(y.detach(), expected)
    with torch.no_grad():
        assert torch.equal(bnb.matmul(x, weight, state=state, bias=bias), y)
    grad = backward(y, dtype)
    assert x.grad.dtype == dtype
    close(x.grad, grad @ w)
    if bias is not None:
        assert bias.grad.dtype == bias_dtype
        close(bias.grad, rows(grad).sum(0))
    if threshold == 0:
        assert state.idx is None
    else:
        outlier = (rows(x.detach()).float().abs() >= threshold).any(0)
        assert state.idx.dtype == torch.int64 and torch.equal(state.idx, outlier.nonzero()[:, 0])


@every_dtype
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 1.5])
@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, K), (0, K)], ids=str)
def test_matmul_of_a_trained_weight(dtype, weight_dtype, threshold, shape):
    """The forward uses the int8 weight; the weight's gradient is the plain product of gradient and activation."""
    state = bnb.MatmulLtState()
    weight, bias = leaf(N, K, dtype=weight_dtype, seed=2), leaf(N, dtype=dtype, seed=9)
    x = leaf(*shape, dtype=dtype)
    y = bnb.matmul(x, weight, state=state, threshold=threshold, bias=bias)
    codes, scales, _ = F.int8_vectorwise_quant(weight.detach().half())
    assert torch.equal(state.CB, codes) and torch.equal(state.SCB, scales)
    w = codes.double() * scales.double()[:, None] / 127
    close(y.detach(), int8_activations(x.detach(), threshold) @ w.t() + bias.detach().double())
    grad = backward(y, dtype)
    close(x.grad, grad @ w)
    close(bias.grad, rows(grad).sum(0))
    assert weight.grad.dtype == weight_dtype and weight.grad.shape == weight.shape
    close(weight.grad, rows(grad).t() @ rows(x.detach().double()), slack=2e-4 + 2 * UNIT[dtype])


def test_a_default_state_quantises_the_weight():
    w, x = normal(N, K), normal(4, K)
    y = bnb.matmul(x, w)
    assert (y - x @ w.t()).abs().mean() < 0.1 and not y.requires_grad
    assert torch.equal(bnb.matmul(x, w, out=torch.zeros(1)), y), "out is ignored"


def test_master_weights_are_quantised_again_when_written():
    state, x = bnb.MatmulLtState(), normal(4, K)
    weight = torch.nn.Parameter(normal(N, K))
    state.is_training = False
    bnb.matmul(x, weight, state=state)
    first = state.CB
    bnb.matmul(x, weight, state=state)
    assert state.CB is first, "nothing was written"
    with torch.no_grad():
        weight.mul_(2)
    bnb.matmul(x, weight, state=state)
    assert torch.equal(state.CB, first) and torch.equal(state.SCB, F.int8_vectorwise_quant(weight.half())[1])
    weight.data = normal(N, K, seed=77)
    bnb.matmul(x, weight, state=state)
    assert torch.equal(state.CB, F.int8_vectorwise_quant(weight.half())[0])


@pytest.mark.parametrize("set_to_none", [False, True])
def test_codes_follow_an_optimizer_step(set_to_none):
    """Also with zero_grad(set_to_none=False), and in evaluation right after a step."""
    state, x = bnb.MatmulLtState(), normal(4, K)
    weight = torch.nn.Parameter(normal(N, K))
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=set_to_none)
        bnb.matmul(x, weight, state=state).square().sum().backward()
        optimizer.step()
        state.is_training = False
        bnb.matmul(x, weight, state=state)
        assert torch.equal(state.SCB, F.int8_vectorwise_quant(weight.detach().half())[1])
        state.is_training = True


def test_accumulation_keeps_the_codes():
    state, x = bnb.MatmulLtState(), normal(4, K)
    weight = torch.nn.Parameter(normal(N, K))
    bnb.matmul(x, weight, state=state).sum().backward()
    first = state.CB
    bnb.matmul(x, weight, state=state).sum().backward()
    assert state.CB is first
    close(weight.grad, 2 * torch.ones(N, 4, dtype=torch.float64) @ x.double())


def test_writes_that_torch_does_not_count():
    state, x = bnb.MatmulLtState(), normal(4, K)
    weight = torch.nn.Parameter(normal(N, K))
    bnb.matmul(x, weight, state=state)
    weight.data.mul_(3)
    bnb.matmul(x, weight, state=state)
    assert torch.equal(state.SCB, F.int8_vectorwise_quant(weight.detach().half())[1])
    with torch.inference_mode():
        constant = normal(N, K)
        state.is_training = False
        bnb.matmul(x, constant, state=state)
        constant.mul_(3)
        bnb.matmul(x, constant, state=state)
        assert torch.equal(state.SCB, F.int8_vectorwise_quant(constant.half())[1])


def test_int8_data_with_statistics_are_a_quantised_weight():
    """Neither requantised nor changed: SCB from the state or from the parameter."""
    codes, scales, w = weight_int8()
    x = normal(4, K)
    for has_fp16_weights in (False, True):
        state, weight = bnb.MatmulLtState(), torch.nn.Parameter(codes, requires_grad=False)
        state.has_fp16_weights, weight.SCB = has_fp16_weights, scales
        close(bnb.matmul(x, weight, state=state), int8_activations(x, 0.0) @ w.t())
        assert torch.equal(state.CB, codes) and torch.equal(state.SCB, scales)
    state, _, _ = int8_state()
    state.CB = None
    close(bnb.matmul(x, codes, state=state), int8_activations(x, 0.0) @ w.t())


def test_weights_that_are_computed():
    """A weight that is no leaf is quantised every time, and its gradient goes on."""
    base, state = leaf(N, K, dtype=torch.float32), bnb.MatmulLtState()
    x = normal(4, K)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bnb.matmul(x, base * 2, state=state).sum().backward()
    close(base.grad, 2 * torch.ones(N, 4, dtype=torch.float64) @ x.double())


@every_dtype
def test_nothing_is_said_about_casts(dtype, caplog):
    state, weight, _ = int8_state(1.5)
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings():
        warnings.simplefilter("error")
        bnb.matmul(leaf(3, K, dtype=dtype), weight, state=state, bias=normal(N)).sum().backward()
    assert not caplog.records


# ---------------------------------------------------------------- what is saved


def saved(function):
    """Run function under a hook; the tensors that autograd was asked to keep."""
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return kept


@every_dtype
def test_only_the_quantised_weight_is_saved(dtype):
    x, bias = leaf(64, K, dtype=dtype), leaf(N, dtype=dtype)
    packed, state, _ = weight_4bit(nested=True)
    kept = saved(lambda: bnb.matmul_4bit(x, packed, state, bias=bias))
    inner = state.state2
    expected = {t.data_ptr() for t in (packed, state.absmax, inner.code, inner.absmax, state.offset)}
    assert {t.data_ptr() for t in kept} == expected
    state, weight, _ = int8_state(1.5)
    kept = saved(lambda: bnb.matmul(x, weight, state=state, bias=bias))
    assert {t.data_ptr() for t in kept} == {state.CB.data_ptr(), state.SCB.data_ptr()}
    state, master = bnb.MatmulLtState(), leaf(N, K, dtype=dtype)
    kept = saved(lambda: bnb.matmul(x, master, state=state, bias=bias))
    assert {t.data_ptr() for t in kept} == {state.CB.data_ptr(), state.SCB.data_ptr(), x.data_ptr()}


def test_no_autograd_without_a_gradient():
    packed, state, _ = weight_4bit()
    lt, weight, _ = int8_state()
    x = leaf(3, K, dtype=torch.float32)
    with torch.no_grad():
        assert bnb.matmul_4bit(x, packed, state).grad_fn is None and bnb.matmul(x, weight, state=lt).grad_fn is None
    with torch.inference_mode():
        assert bnb.matmul_4bit(x, packed, state).is_inference()
    assert bnb.matmul(x.detach(), weight, state=lt).grad_fn is None


def test_only_wanted_gradients_are_computed():
    x = normal(3, K)
    state, weight = bnb.MatmulLtState(), leaf(N, K, dtype=torch.float32)
    bnb.matmul(x, weight, state=state).sum().backward()
    assert x.grad is None and weight.grad is not None
    state.has_fp16_weights = False
    x.requires_grad_()
    weight.grad = None
    bnb.matmul(x, weight, state=state).sum().backward()
    assert x.grad is not None and weight.grad is None


def test_second_derivatives_are_refused_not_wrong():
    packed, state, _ = weight_4bit()
    lt, weight, _ = int8_state()
    for run in (lambda x: bnb.matmul_4bit(x, packed, state), lambda x: bnb.matmul(x, weight, state=lt)):
        x = leaf(3, K, dtype=torch.float32)
        (grad,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


# ---------------------------------------------------------------- checkpointing and compilation


def products():
    """name -> function of (x, bias); every kind of weight."""
    packed, state, _ = weight_4bit()
    nested_packed, nested, _ = weight_4bit(nested=True)
    states = [int8_state(threshold) for threshold in (0.0, 1.5)]
    master, trained = leaf(N, K, dtype=torch.float32, seed=2), bnb.MatmulLtState()
    return {
        "4-bit": lambda x, bias: bnb.matmul_4bit(x, packed, state, bias=bias),
        "4-bit nested": lambda x, bias: bnb.matmul_4bit(x, nested_packed.t(), nested, bias=bias),
        "int8": lambda x, bias: bnb.matmul(x, states[0][1], state=states[0][0], bias=bias),
        "int8 outliers": lambda x, bias: bnb.matmul(x, states[1][1], state=states[1][0], bias=bias),
        "int8 trained": lambda x, bias: bnb.matmul(x, master, state=trained, bias=bias),
    }


def results(function, shape, dtype):
    x, bias = leaf(*shape, dtype=dtype), leaf(N, dtype=dtype, seed=9)
    y = function(x, bias)
    backward(y, dtype)
    return y.detach(), x.grad, bias.grad


@pytest.mark.parametrize("name", products())
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name, reentrant):
    function = products()[name]
    expected = results(function, (2, 3, K), torch.bfloat16)
    again = results(lambda x, bias: checkpoint(function, x, bias, use_reentrant=reentrant), (2, 3, K), torch.bfloat16)
    for a, b in zip(expected, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", products())
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile_fullgraph(name, mode):
    """Forward and backward, batches of 1 and 16, with and without gradients, equal to eager."""
    function = products()[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, mode=mode)
    for shape in ((1, K), (16, K), (2, 3, K)):
        for dtype in (torch.float32, torch.bfloat16):
            for a, b in zip(results(compiled, shape, dtype), results(function, shape, dtype), strict=True):
                torch.testing.assert_close(a, b)
    x = normal(4, K)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, None), function(x, None))


def test_compiled_first_forward_of_a_frozen_float_weight():
    """Quantised inside the graph, once: the state holds the codes afterwards."""
    state, weight, x = bnb.MatmulLtState(), normal(N, K), normal(3, K)
    state.has_fp16_weights = False
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: bnb.matmul(x, weight, state=state), fullgraph=True, backend="aot_eager")
    first = compiled(x)
    assert torch.equal(state.CB, F.int8_vectorwise_quant(weight.half())[0])
    codes = state.CB
    assert torch.equal(compiled(x), first) and torch.equal(bnb.matmul(x, weight, state=state), first)
    assert state.CB is codes


@pytest.mark.parametrize("name", products())
def test_compiled_checkpointing(name):
    function = products()[name]
    torch._dynamo.reset()

    def run(x, bias):
        return checkpoint(function, x, bias, use_reentrant=False)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(compiled, (3, K), torch.float32), results(function, (3, K), torch.float32), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", products())
def test_autocast_and_modules_around(name):
    """Under autocast the product runs in the dtype of its input; gradients reach earlier layers."""
    function = products()[name]
    layer = torch.nn.Linear(K, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = function(layer(normal(3, K)), None)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert torch.isfinite(layer.weight.grad).all() and layer.weight.grad.abs().sum() > 0
