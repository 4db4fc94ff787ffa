"""Linear4bit: forward, gradients, dtypes, moves, copies, compilation."""

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
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, LinearFP4, LinearNF4, Params4bit
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from layer_samples import check_linked, check_same_state, make_4bit, same_bytes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STORAGES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
# Of the largest output: sums of 96 products in float32, and one rounding to the output's dtype.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-11 + 2e-4, torch.bfloat16: 2**-8 + 2e-4}


def reference(layer, x):
    """The product in double precision, on the weight that the layer's bytes stand for."""
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    y = x.double() @ weight.t()
    return y if layer.bias is None else y + layer.bias.double()


def check_close(got, want, dtype):
    bound = TOLERANCE[dtype] * want.abs().max().item()
    assert (got.double() - want).abs().max().item() <= bound


# ---------------------------------------------------------------- construction


def test_signatures():
    names = list(inspect.signature(Linear4bit).parameters)
    common = ["input_features", "output_features", "bias", "compute_dtype", "compress_statistics"]
    assert names == [*common, "quant_type", "quant_storage", "device"]
    for cls, kind in ((LinearFP4, "fp4"), (LinearNF4, "nf4")):
        assert list(inspect.signature(cls).parameters) == [*common, "quant_storage", "device"]
        layer = cls(64, 8, False, torch.bfloat16, False, torch.float16, "meta")
        assert layer.weight.quant_type == kind
        assert (layer.compute_dtype, layer.quant_storage) == (torch.bfloat16, torch.float16)
        assert not layer.weight.compress_statistics
        assert layer.weight.is_meta
    assert bnb.nn.modules.Linear4bit is Linear4bit
    assert Linear4bit.__name__ == "Linear4bit"


def test_attributes_of_a_new_layer():
    layer = Linear4bit(64, 8)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (64, 8)
    assert layer.weight.shape == (8, 64)
    assert layer.weight.module is layer
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad
    assert layer.weight.quant_type == "fp4"
    assert (layer.compute_dtype, layer.compute_type_is_set, layer.quant_state) == (None, False, None)
    assert Linear4bit(64, 8, compute_dtype=torch.float32).compute_type_is_set
    assert Linear4bit(64, 8, bias=False).bias is None
    layer.source_cls = nn.Linear
    layer.compute_dtype, layer.compute_type_is_set = torch.bfloat16, False


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_forward_before_quantising_says_what_to_do(device):
    layer = Linear4bit(64, 8, device=device)
    with pytest.raises(RuntimeError, match=r"layer\.to\('cpu'\)"):
        layer(torch.zeros(1, 64, device=device))


# ---------------------------------------------------------------- forward and gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,)])
def test_forward(dtype, quant_type, nested, bias, shape):
    layer = make_4bit(quant_type=quant_type, compress_statistics=nested, bias=bias)
    x = torch.randn(*shape, 96).to(dtype)
    y = layer(x)
    assert (y.dtype, y.shape) == (dtype, (*shape, 40))
    if y.numel():
        check_close(y, reference(layer, x), dtype)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("k, n", [(96, 40), (33, 7), (1, 1), (1, 9), (9, 1), (400, 300), (64, 64)])
def test_storages_and_odd_shapes(storage, k, n):
    layer = make_4bit(k, n, quant_storage=storage)
    assert layer.weight.dtype == storage
    assert layer.weight.shape == (-(-((n * k + 1) // 2) // storage.itemsize), 1)
    x = torch.randn(3, k)
    check_close(layer(x), reference(layer, x), torch.float32)
    assert torch.equal(layer(x), make_4bit(k, n)(x))


@pytest.mark.parametrize("compute", [None, *DTYPES])
@pytest.mark.parametrize("given", DTYPES)
def test_compute_dtype_is_of_the_call(compute, given):
    layer = make_4bit(compute_dtype=compute)
    bias = layer.bias.data.clone()
    for dtype in (given, torch.float32, torch.bfloat16):
        x = torch.randn(4, 96).to(dtype)
        y = layer(x)
        assert y.dtype == dtype
        x = x if compute is None else x.to(compute)
        check_close(y, reference(layer, x), max(dtype, x.dtype, key=lambda d: TOLERANCE[d]))
        assert layer.compute_dtype == compute
    assert layer.bias.dtype == torch.float32
    assert torch.equal(layer.bias.data, bias)


def test_compute_dtype_may_be_written():
    layer = make_4bit()
    x = torch.randn(4, 96)
    layer.compute_dtype = torch.bfloat16
    assert torch.equal(layer(x), layer(x.bfloat16()).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3)])
def test_gradients(dtype, nested, shape):
    layer = make_4bit(compress_statistics=nested)
    x = torch.randn(*shape, 96).to(dtype).requires_grad_()
    grad = torch.randn(*shape, 40).to(dtype)
    layer(x).backward(grad)
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    assert (x.grad.dtype, x.grad.shape) == (dtype, x.shape)
    check_close(x.grad, grad.double() @ weight, dtype)
    check_close(layer.bias.grad, grad.double().reshape(-1, 40).sum(0), torch.float32)
    assert layer.weight.grad is None


def test_gradients_of_an_empty_batch():
    layer = make_4bit()
    x = torch.zeros(0, 96, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (0, 96)
    assert (layer.bias.grad == 0).all()


def test_modes():
    layer = make_4bit()
    x = torch.randn(4, 96)
    want = layer(x).detach()
    with torch.no_grad():
        assert torch.equal(layer(x), want)
    with torch.inference_mode():
        assert torch.equal(layer(x), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float32
    assert torch.equal(layer.eval()(x), want)
    assert torch.equal(layer(torch.randn(96, 4).t().copy_(x)), want)


@pytest.mark.parametrize(
    "x, text",
    [
        (torch.zeros(2, 95), "95"),
        (torch.zeros(2, 96, dtype=torch.float64), "float64|dtype"),
        (torch.zeros(2, 96, dtype=torch.int64), "int64|dtype"),
    ],
)
def test_bad_input(x, text):
    with pytest.raises(ValueError, match=text):
        make_4bit()(x)


# ---------------------------------------------------------------- moves and casts


@pytest.mark.parametrize("storage", STORAGES)
def test_casts_and_moves_keep_bytes(storage):
    layer = make_4bit(quant_storage=storage)
    x = torch.randn(3, 96)
    want, before = layer(x), layer.weight.data.clone()
    model = nn.Sequential(layer)
    casts = [model.half, model.bfloat16, model.double, model.float, model.cpu]
    casts += [lambda: model.to("cpu"), lambda: model.to(torch.float16), lambda: model.type(torch.float32)]
    for cast in casts:
        cast()
        assert same_bytes(layer.weight.data, before)
        assert layer.weight.dtype == storage
        check_linked(layer)
    torch.testing.assert_close(layer(x), want, atol=2e-3, rtol=0)  # the bias went through float16


def test_a_quantised_layer_is_not_quantised_again():
    layer = make_4bit()
    weight, state, data = layer.weight, layer.quant_state, layer.weight.data_ptr()
    layer.to("cpu")
    assert layer.weight is weight
    assert layer.quant_state is state
    assert layer.weight.data_ptr() == data


@pytest.mark.parametrize("future", [False, True])
def test_to_meta_keeps_class_and_statistics(future):
    torch.__future__.set_overwrite_module_params_on_conversion(future)
    try:
        layer = make_4bit()
        packed = layer.weight.data
        layer.to("meta")
        assert layer.weight.is_meta
        assert layer.bias.is_meta
        check_linked(layer)
        layer.weight.data = layer.weight.data
        again = Params4bit(packed, requires_grad=False, **layer.weight.__dict__).to("cpu")
        layer.weight, layer.bias = again, nn.Parameter(torch.zeros(40))
        x = torch.randn(2, 96)
        check_close(layer(x), reference(layer, x), torch.float32)
        check_linked(Linear4bit(64, 8, quant_type="nf4").to("cpu"))
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def test_skeleton_on_meta_then_a_parameter():
    layer = Linear4bit(96, 40, quant_type="nf4", device="meta")
    assert layer.weight.data.to(torch.uint8).is_meta
    layer.weight.data = layer.weight.data.to(torch.uint8)
    torch.manual_seed(0)
    weight = torch.randn(40, 96)
    layer.weight = Params4bit(weight, quant_type="nf4")
    layer.bias = nn.Parameter(torch.zeros(40))
    layer.to("cpu")
    check_linked(layer)
    assert torch.equal(layer.weight.data, quantize_4bit(weight, quant_type="nf4")[0])


@pytest.mark.parametrize("storage", STORAGES)
def test_weight_that_lost_its_attributes(storage):
    layer = make_4bit(quant_storage=storage)
    x = torch.randn(3, 96)
    want, saved = layer(x), layer.state_dict()
    flat = torch.cat([layer.weight.data.flatten(), torch.zeros(3, dtype=storage)])
    layer.weight = nn.Parameter(flat[:-3].view(-1, 1), requires_grad=False)
    assert list(layer.state_dict()) == list(saved)
    assert torch.equal(layer(x), want)
    check_linked(layer)
    assert (layer.weight.quant_type, layer.weight.quant_storage, layer.weight.bnb_quantized) == ("nf4", storage, True)
    layer.weight.quant_state = None
    fix_4bit_weight_quant_state_from_module(layer)
    check_linked(layer)


def test_weight_replaced_by_a_float_parameter():
    layer = make_4bit()
    layer.weight = nn.Parameter(torch.randn(40, 96))
    x = torch.randn(3, 96, dtype=torch.bfloat16)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight.bfloat16(), layer.bias.bfloat16()))
    assert list(layer.state_dict()) == ["weight", "bias"]
    layer.weight = nn.Parameter(torch.randn(40, 95))
    with pytest.raises(RuntimeError, match="not quantised"):
        layer(x)


# ---------------------------------------------------------------- copies


def test_copy_deepcopy_and_pickle():
    layer = make_4bit()
    x = torch.randn(3, 96)
    want = layer(x)
    buffer = io.BytesIO()
    torch.save(nn.Sequential(layer), buffer)
    buffer.seek(0)
    others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)[0]]
    for other in others:
        check_linked(other)
        check_same_state(other, layer)
        assert torch.equal(other(x), want)
        assert other.weight.data_ptr() != layer.weight.data_ptr()
    check_linked(layer)
    shallow = copy.copy(layer)
    assert shallow.weight is layer.weight
    unquantised = pickle.loads(pickle.dumps(Linear4bit(64, 8, quant_type="nf4"))).to("cpu")
    check_linked(unquantised)


# ---------------------------------------------------------------- logs


def test_no_log_but_one_for_float16(caplog, monkeypatch):
    monkeypatch.setattr(bnb.nn.quantized_linear, "_said", set())
    with caplog.at_level(logging.WARNING):
        layers = [make_4bit() for _ in range(3)]
        for layer in layers:
            layer.load_state_dict(layers[0].state_dict())
            layer(torch.zeros(2, 96))
            layer(torch.zeros(2, 96, dtype=torch.bfloat16))
            make_4bit(compute_dtype=torch.float32)(torch.zeros(1, 96, dtype=torch.float16))
        assert caplog.records == []
        for layer in layers:
            layer(torch.zeros(2, 96, dtype=torch.float16))
        assert ["inference or training" in record.message for record in caplog.records] == [True]
        for layer in layers:
            layer(torch.zeros(1, 96, dtype=torch.float16))
    assert len(caplog.records) == 2
    assert "inference." in caplog.records[1].message
    assert {record.name for record in caplog.records} == {"bitsandbytes.nn.modules"}


# ---------------------------------------------------------------- compilation


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("compute", [None, torch.bfloat16])
@pytest.mark.parametrize("mode", ["no_grad", "training", "checkpointed"])
def test_compiles_to_one_graph(nested, compute, mode):
    torch.compiler.reset()
    options = {"quant_type": "nf4", "compress_statistics": nested, "compute_dtype": compute}
    net = nn.Sequential(*[Linear4bit(64, 64, **options) for _ in range(2)]).to("cpu")

    def run(x):
        return checkpoint(net, x, use_reentrant=False) if mode == "checkpointed" else net(x)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for rows in (1, 16):
        ours, theirs = (torch.randn(rows, 64, generator=torch.Generator().manual_seed(0)) for _ in range(2))
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


def test_checkpointing_in_eager_mode():
    layer = make_4bit()
    x, y = (torch.ones(4, 96).requires_grad_() for _ in range(2))
    for _ in range(2):
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        layer(y).sum().backward()
    assert torch.equal(x.grad, y.grad)
