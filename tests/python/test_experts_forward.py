"""Fused experts that multiply by their codes: Transformers' models against the same models dequantised."""

import copy

import pytest
import torch

import test_experts as moe
from bitsandbytes.nn import experts_forward
from bitsandbytes.nn.experts import dequantize_experts, quantize_experts

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]
BOUND = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def run(model, ids=moe.IDS):
    """(logits, gradient of the embedded input)"""
    embedded = model.get_input_embeddings()(ids.to(model.device)).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    logits.float().square().sum().backward()
    return logits.detach(), embedded.grad


def check_close(got, expected, bound):
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error <= bound, error


@pytest.fixture
def everywhere(monkeypatch):
    """The CPU multiplies by codes too."""
    monkeypatch.setattr(experts_forward, "_worth_it", lambda x: True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", moe.MODELS)
@pytest.mark.parametrize("options", moe.OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.usefixtures("everywhere")
def test_equals_the_dequantised_model(device, name, options, dtype):
    model = moe.make(name, "grouped_mm", dtype).to(device)
    quantize_experts(model, **options)
    assert model.config._experts_implementation == experts_forward.NAME
    twin = copy.deepcopy(model)
    dequantize_experts(twin)
    check_close(run(model), run(twin), BOUND[dtype])


@pytest.mark.usefixtures("everywhere")
def test_nothing_is_dequantised(monkeypatch):
    model = moe.make("qwen3", "grouped_mm")
    quantize_experts(model)

    def refuse(*args):
        raise AssertionError("a weight was dequantised")

    monkeypatch.setattr("bitsandbytes.functional.dequantize_4bit", refuse)
    run(model)


@pytest.mark.usefixtures("everywhere")
def test_experts_of_other_processes():
    """Expert parallelism: numbers from num_experts on are somebody else's, with weight zero."""
    module = moe.make("qwen3", "grouped_mm").model.layers[0].mlp.experts
    quantize_experts(module)
    module._is_expert_parallel = True
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(5))
    index = torch.tensor([[0, 4], [4, 4], [1, 2], [3, 0], [4, 1], [2, 3]])
    weights = torch.rand(6, 2, generator=torch.Generator().manual_seed(6)) * (index < 4)
    got = experts_forward._forward(module, x, index, weights)
    expected = torch.zeros_like(x)
    for token, place in (index < 4).nonzero().tolist():
        up, gate = module.gate_up_proj[index[token, place]], module._apply_gate
        hidden = gate((x[token] @ up.t()).unsqueeze(0))[0]
        expected[token] += (hidden @ module.down_proj[index[token, place]].t()) * weights[token, place]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_another_forward_that_was_asked_for_stays():
    for forward in ("eager", "batched_mm"):
        model = moe.make("qwen3", forward)
        quantize_experts(model)
        assert model.config._experts_implementation == forward
    model = moe.make("qwen3", "grouped_mm")
    assert quantize_experts(model, skip=[""]) == []
    assert model.config._experts_implementation == "grouped_mm"


@pytest.mark.usefixtures("everywhere")
def test_models_that_are_quantised_in_part():
    model = moe.make("qwen3", "grouped_mm")
    quantize_experts(model, skip=[r"layers\.0\.mlp\.experts\.down_proj"])
    twin = copy.deepcopy(model)
    dequantize_experts(twin)
    check_close(run(model), run(twin), BOUND[torch.float32])
