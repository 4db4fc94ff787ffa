"""Linear8bitLt between devices: its own moves and its parent's, checkpoints, offload hooks, quantising on arrival."""

import copy
import io

import pytest
import torch
from torch import nn

from bitsandbytes.nn import Int8Params, Linear8bitLt
from cuda_cases import DEVICE, check_same, needs_cuda

pytestmark = needs_cuda

K, N = 256, 136
used_or_not = pytest.mark.parametrize("used", [False, True])


def made(seed=0, threshold=6.0, has_fp16_weights=False):
    torch.manual_seed(seed)
    return Linear8bitLt(K, N, has_fp16_weights=has_fp16_weights, threshold=threshold).half()


def inputs(rows=5):
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(1)).half()
    x[:, 7] = 20
    return x


def run(layer):
    with torch.no_grad():
        return layer(inputs().to(layer.weight.device))


def check_home(layer, device):
    """Everything of the weight is there, once."""
    weight, state = layer.weight, layer.state
    assert type(weight) is Int8Params and weight.dtype == torch.int8
    assert weight.device.type == weight.CB.device.type == weight.SCB.device.type == layer.bias.device.type == device
    assert weight.CB.data_ptr() == weight.data.data_ptr()
    if state.CB is not None:
        assert state.CB.data_ptr() == weight.data.data_ptr() and state.SCB.device.type == device


def test_quantised_the_same_wherever_it_arrives():
    on_cpu, on_card = made().to("cpu"), made().to(DEVICE)
    check_same(on_card.weight.data, on_cpu.weight.data)
    check_same(on_card.weight.SCB, on_cpu.weight.SCB)
    lazily = made()
    lazily.weight = Int8Params(made().weight.data.to(DEVICE), requires_grad=False)
    lazily.bias.data = lazily.bias.data.to(DEVICE)
    check_same(run(lazily), run(on_card))
    check_same(lazily.weight.data, on_cpu.weight.data)


@used_or_not
@pytest.mark.parametrize("parent", [False, True])
def test_there_and_back(used, parent):
    layer = made().to(DEVICE)
    model = nn.Sequential(layer) if parent else layer
    want = run(made().to(DEVICE))
    for device in ("cpu", "cuda", "cpu", "cuda"):
        if used:
            run(layer)
        model.to(device)
        check_home(layer, device)
        run(layer)
        check_home(layer, device)
    check_same(run(layer), want)


@used_or_not
def test_on_the_cpu_it_gives_what_the_card_gave(used):
    layer = made().to(DEVICE)
    want = run(made().to(DEVICE))
    if used:
        run(layer)
    nn.Sequential(layer).cpu()
    torch.testing.assert_close(run(layer), want.cpu(), rtol=2e-3, atol=2e-3)


@used_or_not
def test_saved_and_loaded(used):
    layer = made().to(DEVICE)
    want = run(made().to(DEVICE))
    if used:
        run(layer)
    state = layer.state_dict()
    assert set(state) == {"weight", "bias", "SCB", "weight_format"}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    for where in ("cpu", "cuda"):
        buffer.seek(0)
        loaded = torch.load(buffer, map_location=where)
        other = made(seed=5).to(DEVICE)
        if used:
            run(other)
        assert other.load_state_dict(loaded, strict=True)
        check_home(other, "cuda")
        check_same(run(other), want)
    check_same(run(copy.deepcopy(layer)), want)


def test_an_offload_hook_takes_the_scales_away():
    layer = made().to(DEVICE)
    want = run(layer)
    layer.state.SCB = None
    check_same(run(layer), want)
    layer.state.CB = layer.state.SCB = None
    check_same(run(layer), want)
    layer.state.reset_grads()
    nn.Sequential(layer).cpu()
    layer.state.SCB = None
    nn.Sequential(layer).to(DEVICE)
    check_same(run(layer), want)
    check_home(layer, "cuda")


def test_a_trained_layer_moves_its_master_weight():
    layer = made(has_fp16_weights=True).to(DEVICE)
    assert layer.weight.dtype == torch.float16
    want = run(layer)
    layer.cpu()
    assert layer.weight.dtype == torch.float16 and layer.state.CB is None
    layer.to(DEVICE)
    check_same(run(layer), want)


def test_outlier_columns_after_a_call():
    layer = made().to(DEVICE)
    run(layer)
    assert layer.state.idx.tolist() == [7] and layer.state.idx.device.type == "cuda"
