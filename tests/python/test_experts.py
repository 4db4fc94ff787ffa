"""quantize_experts() on tiny mixture-of-experts models of Transformers, made here: numbers, memory, checkpoints."""

import copy
import os
import weakref

import pytest
import torch
from torch import nn

from bitsandbytes.nn import Linear4bit
from bitsandbytes.nn.experts import dequantize_experts, expert_parameters, quantize_experts
from bitsandbytes.nn.parametrize import Bnb4bitParametrization, replace_parameter_4bit
from layer_samples import check_same_state, same_bytes

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the import: nothing here needs the network
transformers = pytest.importorskip("transformers", minversion="5")
transformers.utils.logging.disable_progress_bar()
safetensors = pytest.importorskip("safetensors.torch")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "head_dim": 16,
}
MODELS = {
    "qwen3": ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 48}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "gpt_oss": ("GptOss", {"num_local_experts": 4}),
}
FORWARDS = ["eager", "batched_mm", "grouped_mm"]
OPTIONS = [{}, {"quant_type": "fp4", "blocksize": 32}, {"compress_statistics": True, "blocksize": 128}]
IDS = torch.arange(3, 15).reshape(2, 6)


def make(name, forward="eager", dtype=torch.float32, seed=0):
    kind, sizes = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **sizes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(
        config, experts_implementation=forward, attn_implementation="eager", dtype=dtype
    )
    with torch.no_grad():
        for _, module, parameter in list(expert_parameters(model)):
            getattr(module, parameter).normal_(std=0.2)
    return model.eval()


def dequantised(model, name, forward, dtype):
    """A plain model with the weights that `model` reads."""
    twin = make(name, forward, dtype, seed=1)
    with torch.no_grad():
        for key, parameter in twin.named_parameters():
            module, _, leaf = key.rpartition(".")
            parameter.copy_(getattr(model.get_submodule(module), leaf))
    return twin.requires_grad_(False)


def run(model):
    """(logits, gradient of the embedded input)"""
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    logits.float().square().sum().backward()
    return logits.detach(), embedded.grad


def total_bytes(state):
    return sum(value.numel() * value.element_size() for value in state.values())


@pytest.mark.parametrize("name", MODELS)
def test_finds_the_experts_and_nothing_else(name):
    model = make(name)
    want = [f"model.layers.{i}.mlp.experts.{leaf}" for i in range(2) for leaf in ("gate_up_proj", "down_proj")]
    assert [full for full, _, _ in expert_parameters(model)] == want
    assert quantize_experts(model) == want
    assert quantize_experts(model) == []
    state = model.state_dict()
    assert all(state[key].dtype == torch.uint8 and f"{key}.absmax" in state for key in want)
    assert not any("parametrizations" in key for key in state)
    plain = {key for key in state if not any(key.startswith(each) for each in want)}
    assert all(state[key].dtype == torch.float32 for key in plain)


def test_dense_models_and_other_3d_parameters_stay():
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(3, 3))
    model.num_experts = 4
    assert quantize_experts(model) == []


def test_skip():
    model = make("qwen3")
    assert quantize_experts(model, skip=[r"layers\.0\.", "down_proj$"]) == ["model.layers.1.mlp.experts.gate_up_proj"]
    with pytest.raises(ValueError, match="skip is 'down_proj', expected a list"):
        quantize_experts(model, skip="down_proj")
    with pytest.raises(ValueError, match="48"):
        quantize_experts(model, blocksize=48)


# "eager" goes through the experts one by one, which takes seconds: one set of options is enough for it.
CASES = [(name, forward, options) for name in MODELS for forward in FORWARDS for options in OPTIONS]
CASES = [case for case in CASES if case[1] != "eager" or case[2] is OPTIONS[0]]


@pytest.mark.parametrize(("name", "forward", "options"), CASES)
def test_forward_and_input_gradient_equal_the_dequantised_reference(name, forward, options):
    for dtype in (torch.float32, torch.bfloat16):
        model = make(name, forward, dtype)
        plain = run(model)
        quantize_experts(model, **options)
        logits, gradient = run(model)
        want, want_gradient = run(dequantised(model, name, forward, dtype))
        assert torch.equal(logits, want)
        assert torch.equal(gradient, want_gradient)
        assert not torch.equal(logits, plain[0])


def test_generates():
    model = make("qwen3", "grouped_mm")
    quantize_experts(model)
    twin = dequantised(model, "qwen3", "grouped_mm", torch.float32)
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **options), twin.generate(IDS, **options))


@pytest.mark.parametrize("nested", [False, True])
def test_memory_is_that_of_linear_layers(nested):
    experts, out, k = 8, 96, 64
    module = nn.Module()
    module.num_experts = experts
    module.gate_up_proj = nn.Parameter(torch.randn(experts, out, k, dtype=torch.bfloat16))
    before = total_bytes(module.state_dict())
    quantize_experts(module, compress_statistics=nested)
    layer = Linear4bit(k, experts * out, bias=False, quant_type="nf4", compress_statistics=nested)
    layer = layer.to(torch.bfloat16).to("cpu")
    # The description in the checkpoint spells the shape: its length is no memory of the model's.
    ours, theirs = (
        total_bytes({key: value for key, value in each.state_dict().items() if "quant_state" not in key})
        for each in (module, layer)
    )
    assert ours == theirs
    assert ours < before * 0.29
    assert sum(p.numel() * p.element_size() for p in module.parameters()) * 4 == before


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("training", [False, True])
def test_no_dequantised_weight_outlives_its_layer(training, forward, monkeypatch):
    alive, most = [], 0
    plain = Bnb4bitParametrization.forward

    def counted(self, packed):
        nonlocal most
        result = plain(self, packed)
        alive.append(weakref.ref(result))
        most = max(most, sum(ref() is not None for ref in alive))
        return result

    monkeypatch.setattr(Bnb4bitParametrization, "forward", counted)
    model = make("qwen3", forward)
    quantize_experts(model)
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_(training)
    with torch.set_grad_enabled(training):
        logits = model(inputs_embeds=embedded).logits
    assert len(alive) == 4  # two layers of two weights, each dequantised once
    assert most == 2
    assert all(ref() is None for ref in alive)
    if training:
        logits.sum().backward()
        assert len(alive) == 4


def test_gradient_checkpointing():
    model = make("mixtral", "grouped_mm")
    quantize_experts(model)
    want = run(model)
    twin = copy.deepcopy(model).train()
    # The name of today's Transformers, or that of older ones.
    enable = getattr(twin, "activation_checkpointing_enable", None) or twin.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    logits, gradient = run(twin)
    assert torch.equal(logits, want[0])
    assert torch.equal(gradient, want[1])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_save_and_reload(name, options, tmp_path):
    model = make(name, "grouped_mm")
    quantize_experts(model, **options)
    want = run(model)
    path = tmp_path / "model.safetensors"
    safetensors.save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    for device, assign in (("cpu", False), ("meta", True)):
        with torch.device(device):
            again = make(name, "grouped_mm", seed=1)
        quantize_experts(again, **options)
        result = again.load_state_dict(safetensors.load_file(path), strict=True, assign=assign)
        assert result.missing_keys == result.unexpected_keys == []
        check_same_state(again, model)
        if device == "cpu":  # a rotary table is no part of a checkpoint
            assert all(torch.equal(a, b) for a, b in zip(run(again), want, strict=True))


def test_float_checkpoint_into_a_quantised_skeleton():
    plain, model = make("qwen3"), make("qwen3", seed=1)
    quantize_experts(model)
    model.load_state_dict(plain.state_dict())
    quantize_experts(plain)
    check_same_state(model, plain)


def test_one_parameter_by_hand():
    model = make("gpt_oss")
    experts = model.model.layers[0].mlp.experts
    replace_parameter_4bit(experts, "down_proj")
    assert len(quantize_experts(model)) == 3


def test_dequantize_experts():
    model = make("qwen3", dtype=torch.bfloat16)
    names = quantize_experts(model)
    want = run(model)
    assert dequantize_experts(model) == names
    assert all(torch.equal(a, b) for a, b in zip(run(model), want, strict=True))
    assert set(model.state_dict()) == set(make("qwen3").state_dict())
    assert quantize_experts(model) == names
    dequantize_experts(model, torch.float32)
    assert model.model.layers[0].mlp.experts.down_proj.dtype == torch.float32


# ---------------------------------------------------------------- Transformers' load_in_4bit


@pytest.fixture
def enabled():
    pytest.importorskip("accelerate")
    from bitsandbytes.nn import experts_transformers

    experts_transformers.enable()
    yield experts_transformers
    experts_transformers.enable(False)


def load(folder, **options):
    config = {"quantization_config": transformers.BitsAndBytesConfig(**options)} if options else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **config)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_load_in_4bit_save_and_reload(name, nested, enabled, tmp_path):
    plain = make(name, dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path / "float")
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": nested}
    model = load(tmp_path / "float", **options)
    assert isinstance(model.model.layers[0].self_attn.q_proj, Linear4bit)
    want = model.state_dict()
    quantize_experts(plain, compress_statistics=nested)
    for key, value in plain.state_dict().items():
        if ".experts." in key and "bias" not in key:
            assert torch.equal(want[key], value), key
    logits = run(model)[0]
    for step in ("first", "second"):
        model.save_pretrained(tmp_path / step)
        model = load(tmp_path / step)
        state = model.state_dict()
        assert set(state) == set(want)
        assert all(same_bytes(state[key], value) for key, value in want.items())
        assert torch.equal(run(model)[0], logits)
    model = model.dequantize(torch.bfloat16)
    assert set(model.state_dict()) == set(make(name).state_dict())
    for key, value in model.state_dict().items():
        if ".experts." in key and "bias" not in key:  # in `plain`, reading the attribute decodes it
            path, attribute = key.rsplit(".", 1)
            assert torch.equal(value, getattr(plain.get_submodule(path), attribute)), key


def test_load_in_4bit_honours_the_skip_list_and_can_be_disabled(enabled, tmp_path):
    make("qwen3", dtype=torch.bfloat16).save_pretrained(tmp_path)
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    skipped = "model.layers.0.mlp.experts.down_proj"
    model = load(tmp_path, **options, llm_int8_skip_modules=["lm_head", skipped])
    assert [full for full, _, _ in expert_parameters(model)] == [skipped]
    enabled.enable(False)
    assert len(list(expert_parameters(load(tmp_path, **options)))) == 4
