"""Linear8bitLt: forward, gradients, outliers, both modes, moves, clients that edit the state, compilation."""

import copy
import inspect
import io
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bitsandbytes as bnb
from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant
from bitsandbytes.nn import Int8Params, Linear8bitLt
from layer_samples import check_same_state, inputs, make_8bit

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of the largest output: float32 scales, and one rounding to the output's dtype.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-11 + 2e-6, torch.bfloat16: 2**-8 + 2e-6}


def reference(layer, x, threshold=None):
    """LLM.int8() in double precision: int8 rows, with the outlier columns multiplied as they are."""
    threshold = layer.state.threshold if threshold is None else threshold
    rows = x.detach().double().reshape(-1, x.shape[-1])
    outlier = rows.abs() >= threshold if threshold > 0 else torch.zeros_like(rows, dtype=torch.bool)
    kept = rows.masked_fill(outlier, 0)
    scale = kept.abs().amax(1, keepdim=True)
    # The library quantises in float32: the same quotient, rounded once more.
    codes = torch.round(kept.float() * (127 / scale.float())).nan_to_num().double()
    columns = outlier.any(0)
    if len(rows) > 1:
        codes[:, columns] = 0
    weight = layer.weight.data.double() * layer.weight.SCB.double()[:, None] / 127
    y = codes * scale / 127 @ weight.t() + rows[:, columns] @ weight[:, columns].t()
    if layer.bias is not None:
        y = y + layer.bias.double()
    return y.reshape(*x.shape[:-1], -1)


def check_close(got, want, dtype):
    bound = TOLERANCE[dtype] * want.abs().max().item()
    assert (got.double() - want).abs().max().item() <= bound


# ---------------------------------------------------------------- construction


def test_signature_and_attributes():
    parameters = inspect.signature(Linear8bitLt).parameters
    names = ["input_features", "output_features", "bias", "has_fp16_weights", "threshold", "index", "device"]
    assert list(parameters)[:7] == names
    layer = Linear8bitLt(64, 8, True, False, 6.0, index=[1])
    assert isinstance(layer, nn.Linear)
    assert type(layer.weight) is Int8Params
    assert not layer.weight.requires_grad
    assert (layer.state.threshold, layer.state.has_fp16_weights, layer.state.use_pool) == (6.0, False, True)
    assert layer.index == [1]
    default = Linear8bitLt(64, 8)
    assert default.weight.requires_grad
    assert (default.state.threshold, default.state.has_fp16_weights, default.state.use_pool) == (0.0, True, False)
    assert bnb.nn.modules.Linear8bitLt is Linear8bitLt
    assert Linear8bitLt(64, 8, device="meta").weight.is_meta
    Linear8bitLt(64, 8, memory_efficient_backward=False)
    with pytest.raises(ValueError, match="memory_efficient_backward"):
        Linear8bitLt(64, 8, memory_efficient_backward=True)


# ---------------------------------------------------------------- forward and gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 3)])
def test_forward(dtype, bias, threshold, outliers, shape):
    layer = make_8bit(bias=bias, threshold=threshold)
    x = inputs(*shape, 96, dtype=dtype, outliers=outliers)
    y = layer(x)
    assert (y.dtype, y.shape) == (dtype, (*shape, 40))
    check_close(y, reference(layer, x), dtype)
    if threshold and shape:
        assert (5 in layer.state.idx.tolist()) == outliers


@pytest.mark.parametrize("k, n", [(33, 7), (1, 1), (10, 20), (20, 30), (500, 3)])
@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_odd_shapes(k, n, threshold):
    layer = make_8bit(k, n, threshold=threshold)
    x = inputs(4, k)
    check_close(layer(x), reference(layer, x), torch.float32)


def test_a_threshold_that_nothing_reaches_changes_nothing():
    x = inputs(6, 96)
    assert torch.equal(make_8bit(threshold=100.0)(x), make_8bit()(x))


@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96)])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_empty_batch(shape, threshold):
    layer = make_8bit(threshold=threshold)
    x = torch.zeros(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 40)
    y.sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3)])
@pytest.mark.parametrize("training", [False, True])
def test_gradients(dtype, threshold, shape, training):
    layer = make_8bit(threshold=threshold).train(training)
    x = inputs(*shape, 96, dtype=dtype, outliers=True).requires_grad_()
    grad = inputs(*shape, 40, dtype=dtype, seed=4)
    layer(x).backward(grad)
    weight = int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB).double()
    assert x.grad.dtype == dtype
    check_close(x.grad, grad.double() @ weight, dtype)
    check_close(layer.bias.grad, grad.double().reshape(-1, 40).sum(0), torch.float32)
    assert layer.weight.grad is None


def test_bias_of_another_dtype_is_not_changed():
    layer = make_8bit()
    bias = layer.bias.data.clone()
    for dtype in DTYPES:
        x = inputs(4, 96, dtype=dtype)
        check_close(layer(x), reference(layer, x), dtype)
    assert layer.bias.dtype == torch.float32
    assert torch.equal(layer.bias.data, bias)


def test_modes_and_not_contiguous_input():
    layer = make_8bit(threshold=6.0)
    x = inputs(4, 96, outliers=True)
    want = layer(x).detach()
    with torch.no_grad():
        assert torch.equal(layer(x), want)
    with torch.inference_mode():
        assert torch.equal(layer(x), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), want)
    assert torch.equal(layer.eval()(x), want)
    assert torch.equal(layer(torch.empty(96, 4).t().copy_(x)), want)
    assert torch.equal(x, inputs(4, 96, outliers=True))


def test_master_weights_train():
    torch.manual_seed(0)
    layer, plain = Linear8bitLt(96, 40, threshold=6.0).to("cpu"), nn.Linear(96, 40)
    plain.load_state_dict(layer.state_dict())
    assert layer.weight.is_floating_point()
    x = inputs(6, 96)
    grad = inputs(6, 40, seed=4)
    for training in (True, True, False, True):
        layer.train(training)
        y = layer(x)
        frozen = make_8bit(threshold=6.0)
        frozen.load_state_dict(layer.state_dict())  # quantises the weights of this moment
        assert torch.equal(y, frozen(x))
        y.backward(grad)
        plain(x).backward(grad)
        torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad)
        with torch.no_grad():
            for parameter in (*layer.parameters(), *plain.parameters()):
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    assert type(layer.weight) is Int8Params
    assert list(layer.state_dict()) == ["weight", "bias"]


# ---------------------------------------------------------------- when it is quantised, and what clients edit


def test_quantised_by_a_move_or_by_the_first_forward():
    torch.manual_seed(0)
    lazy = Linear8bitLt(96, 40, has_fp16_weights=False)
    weight = lazy.weight
    want = make_8bit()(inputs(4, 96))
    assert torch.equal(lazy(inputs(4, 96)), want)
    assert lazy.weight is weight
    check_same_state(lazy, make_8bit())
    data = weight.data_ptr()
    lazy.to("cpu")
    lazy(inputs(4, 96))
    assert weight.data_ptr() == data


def test_codes_and_scales_stay_readable():
    layer = make_8bit()
    for _ in range(2):
        assert layer.weight.CB.data_ptr() == layer.weight.data_ptr()
        assert layer.weight.SCB.shape == (40,)
        layer(inputs(2, 96))
        assert layer.state.CB is layer.weight.CB
        assert layer.state.SCB is layer.weight.SCB


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_recovers_after_an_offload_hook(threshold):
    layer = make_8bit(threshold=threshold)
    x = inputs(4, 96, outliers=True)
    want = layer(x)
    layer.state.SCB = None
    layer.state.CxB = None
    assert torch.equal(layer(x), want)
    layer.state.reset_grads()
    assert torch.equal(layer(x), want)
    scales = layer.weight.SCB
    layer.weight.SCB = None
    assert torch.equal(layer(x), want)
    layer.weight.SCB, layer.state.SCB = scales, None
    layer.init_8bit_state()
    assert layer.state.SCB is scales


def test_weight_replaced_by_a_client():
    layer = make_8bit()
    layer(inputs(2, 96))
    weight = torch.randn(40, 96)
    layer.weight = Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    layer.state.reset_grads()
    check_close(layer(inputs(4, 96)), reference(layer, inputs(4, 96)), torch.float32)
    # No reset: the state follows all the same
    codes, scales, _ = int8_vectorwise_quant(weight.half().flip(0))
    layer.weight.data, layer.weight.CB, layer.weight.SCB = codes, codes, scales
    check_close(layer(inputs(4, 96)), reference(layer, inputs(4, 96)), torch.float32)
    # int8 codes and scales, with no CB and no move
    layer.weight = Int8Params(codes, requires_grad=False, SCB=scales)
    check_close(layer(inputs(4, 96)), reference(layer, inputs(4, 96)), torch.float32)
    assert torch.equal(layer.weight.data, codes)
    assert torch.equal(layer.weight.SCB, scales)


def test_int8_without_scales_says_so():
    layer = Linear8bitLt(8, 4, has_fp16_weights=False)
    layer.weight = Int8Params(torch.ones(4, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(RuntimeError, match="no SCB"):
        layer(torch.zeros(1, 8))


def test_weight_tied_to_a_float_parameter():
    layer = make_8bit()
    embedding = nn.Embedding(40, 96)
    layer.weight = embedding.weight
    layer.to("cpu")
    x = inputs(3, 96, dtype=torch.bfloat16)
    assert torch.equal(layer(x), nn.functional.linear(x, embedding.weight.bfloat16(), layer.bias.bfloat16()))
    assert list(layer.state_dict()) == ["weight", "bias"]
    state = {**layer.state_dict(), "SCB": torch.ones(40)}
    with pytest.raises(RuntimeError, match="Loading a quantized checkpoint into non-quantized Linear8bitLt"):
        layer.load_state_dict(state, strict=False)


# ---------------------------------------------------------------- moves, copies


@pytest.mark.parametrize("used", [False, True])
def test_casts_and_moves(used):
    layer = make_8bit()
    x = inputs(4, 96)
    want, twin = make_8bit()(x), make_8bit()
    if used:
        layer(x)
    model = nn.Sequential(layer)
    moves = [model.half, model.float, model.cpu, lambda: model.to("cpu"), lambda: model.to(torch.float64), model.float]
    moves.append(lambda: model.type(torch.float32))
    for move in moves:
        move()
        assert type(layer.weight) is Int8Params
        assert layer.weight.dtype == torch.int8
        assert torch.equal(layer.weight.data, twin.weight.data)
        assert layer.weight.CB.data_ptr() == layer.weight.data_ptr()
        assert (layer.state.CB is not None) == used
    torch.testing.assert_close(layer(x), want, atol=1e-3, rtol=0)  # the bias went through float16


@pytest.mark.parametrize("used", [False, True])
def test_a_parent_moves_codes_scales_and_state(used):
    layer = make_8bit()
    if used:
        layer(inputs(2, 96))
    codes = layer.weight.data
    nn.Sequential(layer).to("meta")
    assert type(layer.weight) is Int8Params
    assert layer.weight.is_meta
    assert layer.weight.CB.is_meta
    assert layer.state.CB is None
    layer.weight = Int8Params(codes, requires_grad=False, **layer.weight.__dict__).to("cpu")
    layer.bias = nn.Parameter(make_8bit().bias.data)
    assert torch.equal(layer(inputs(2, 96)), make_8bit()(inputs(2, 96)))


@pytest.mark.parametrize("used", [False, True])
def test_copies_and_pickles(used):
    layer = make_8bit(threshold=6.0)
    x = inputs(3, 96, outliers=True)
    want = make_8bit(threshold=6.0)(x)
    if used:
        layer(x)
    buffer = io.BytesIO()
    torch.save(nn.Sequential(layer), buffer)
    buffer.seek(0)
    others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)[0]]
    for other in others:
        assert type(other.weight) is Int8Params
        check_same_state(other, layer)
        assert other.weight.data_ptr() != layer.weight.data_ptr()
        assert other.weight.CB.data_ptr() == other.weight.data_ptr()
        assert (other.state.CB is not None) == used
        if used:
            assert other.state.CB.data_ptr() == other.weight.data_ptr()
        else:
            assert other.state == layer.state
        assert torch.equal(other(x), want)
    assert copy.copy(layer).weight is layer.weight


@pytest.mark.parametrize("dump", [pickle.dump, torch.save])
def test_codes_are_saved_once(dump):
    layer = make_8bit(512, 256)
    layer(inputs(2, 512))
    buffer = io.BytesIO()
    dump(layer, buffer)
    assert buffer.tell() < 1.1 * 512 * 256


# ---------------------------------------------------------------- logs, compilation


def test_no_logs(caplog):
    with caplog.at_level(logging.WARNING):
        for dtype in DTYPES:
            layer = make_8bit(threshold=6.0)
            layer(inputs(2, 96, dtype=dtype))
            layer.load_state_dict(make_8bit().state_dict())
            layer(inputs(1, 96, dtype=dtype))
    assert caplog.records == []


@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("has_fp16_weights", [False, True])
@pytest.mark.parametrize("mode", ["no_grad", "training", "checkpointed"])
def test_compiles_to_one_graph(threshold, has_fp16_weights, mode):
    torch.compiler.reset()
    torch.manual_seed(0)
    layers = [Linear8bitLt(64, 64, has_fp16_weights=has_fp16_weights, threshold=threshold) for _ in range(2)]
    net = nn.Sequential(*layers).to("cpu")

    def run(x):
        return checkpoint(net, x, use_reentrant=False) if mode == "checkpointed" else net(x)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for rows in (1, 16):
        ours, theirs = inputs(rows, 64), inputs(rows, 64)
        if mode == "no_grad":
            with torch.no_grad():
                assert torch.equal(compiled(ours), run(theirs))
            continue
        ours.requires_grad_()
        theirs.requires_grad_()
        a, b = compiled(ours), run(theirs)
        assert torch.equal(a, b)
        a.square().sum().backward()
        b.square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_compiled_before_it_is_quantised():
    torch.compiler.reset()
    torch.manual_seed(0)
    layer = Linear8bitLt(96, 40, has_fp16_weights=False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got = compiled(inputs(4, 96))
    assert torch.equal(got, make_8bit()(inputs(4, 96)))


def test_checkpointing_in_eager_mode():
    layer = make_8bit(threshold=6.0)
    x, y = (inputs(4, 96, outliers=True).requires_grad_() for _ in range(2))
    for _ in range(2):
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        layer(y).sum().backward()
    assert torch.equal(x.grad, y.grad)
