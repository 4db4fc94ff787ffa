"""Fused experts of a Qwen3-MoE through Transformers' load_in_4bit, after experts_transformers.enable().

The whole way of a model: load, compute, decode, save in one file and in shards, reload, dequantise; its size on disk.
More models, options and forwards: test_experts.py.  The linear layers of this model: test_client_architectures.py.
"""

import copy
import importlib.metadata
import json
import os

import pytest
import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the import: nothing here needs the network
pytest.importorskip("accelerate")
pytest.importorskip("transformers", minversion="5")
try:
    importlib.metadata.version("bitsandbytes")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("clients look for an installed distribution, this is a source tree", allow_module_level=True)

import transformers

import client_models
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import experts_transformers
from bitsandbytes.nn.experts import expert_parameters
from bitsandbytes.quant_state import QuantState
from client_checks import (
    check_reload,
    files_of,
    greedy,
    least_gap,
    load,
    logits,
    quantised_layers,
    relative,
    twin_of,
)
from layer_samples import check_same_state, same_bytes

CONFIGS = {
    "nf4-nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}
EXPERTS = [f"model.layers.{i}.mlp.experts.{leaf}" for i in range(2) for leaf in ("gate_up_proj", "down_proj")]


@pytest.fixture
def enabled():
    experts_transformers.enable()
    yield
    experts_transformers.enable(False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(float model, its folder)"""
    plain = client_models.qwen3_moe()
    return plain, client_models.save(plain, tmp_path_factory.mktemp("qwen3_moe"))


def statistics_of(state, name):
    return {key: value for key, value in state.items() if key.startswith(f"{name}.")}


def moe_twin(model, plain):
    """The float model with the weights that the linear layers and the experts of `model` stand for."""
    twin, state = twin_of(model, plain), model.state_dict()
    for name in EXPERTS:
        quant_state = QuantState.from_dict(statistics_of(state, name), device="cpu")
        twin.get_parameter(name).data.copy_(dequantize_4bit(state[name], quant_state))
    return twin


@pytest.mark.parametrize("config", CONFIGS)
def test_experts_hold_the_quantised_float_weights(config, saved, enabled):
    plain, folder = saved
    options = CONFIGS[config]
    model = load(folder, options)
    assert len(quantised_layers(model)) == 8
    assert list(expert_parameters(model)) == []
    state = model.state_dict()
    nested = options.get("bnb_4bit_use_double_quant", False)
    for name in EXPERTS:
        packed, quant_state = quantize_4bit(
            plain.get_parameter(name).data, compress_statistics=nested, quant_type=options["bnb_4bit_quant_type"]
        )
        assert same_bytes(state[name], packed), name
        ours, want = statistics_of(state, name), quant_state.as_dict(packed=True)
        assert list(ours) == [f"{name}.{key}" for key in want]
        assert all(same_bytes(ours[f"{name}.{key}"], value) for key, value in want.items()), name
    for layer in (0, 1):
        router = model.get_parameter(f"model.layers.{layer}.mlp.gate.weight")
        assert torch.equal(router, plain.get_parameter(f"model.layers.{layer}.mlp.gate.weight"))


@pytest.mark.parametrize("config", CONFIGS)
def test_runs_and_decodes_as_the_dequantised_float_model(config, saved, enabled):
    plain, folder = saved
    model = load(folder, CONFIGS[config])
    twin = moe_twin(model, plain)
    assert relative(logits(model), logits(twin)) < 3e-6
    # The experts count: with theirs in float the logits are others
    assert relative(logits(model), logits(twin_of(model, plain))) > 0.02
    assert relative(logits(model), logits(plain)) < 0.5
    tokens, scores = greedy(model)
    want_tokens, want_scores = greedy(twin)
    error = (scores - want_scores).abs().max().item()
    assert least_gap(want_scores) > 10 * error
    assert torch.equal(tokens, want_tokens)
    assert torch.equal(greedy(model, use_cache=False)[0], tokens)
    assert len(tokens.unique()) > 10


@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "sharded"])
@pytest.mark.parametrize("config", CONFIGS)
def test_saved_and_reloaded_twice(config, sharded, saved, enabled, tmp_path):
    _, folder = saved
    model = load(folder, CONFIGS[config])
    tokens = greedy(model)[0]
    for step in ("first", "second"):
        model = check_reload(model, tmp_path / step, sharded)
        assert list(expert_parameters(model)) == []
        assert torch.equal(greedy(model)[0], tokens)
        config_saved = json.loads((tmp_path / step / "config.json").read_text())["quantization_config"]
        assert all(config_saved[key] == value for key, value in CONFIGS[config].items())
    if sharded:
        files = files_of(tmp_path / "first")
        for name in EXPERTS:
            assert sum(any(key == name or key.startswith(f"{name}.") for key in keys) for keys in files.values()) >= 2


@pytest.mark.parametrize("config", CONFIGS)
def test_dequantize(config, saved, enabled):
    plain, folder = saved
    model = load(folder, CONFIGS[config])
    twin = moe_twin(model, plain)
    result = copy.deepcopy(model).dequantize(torch.float32)
    check_same_state(result, twin)
    assert torch.equal(logits(result), logits(twin))
    assert torch.equal(greedy(result)[0], greedy(twin)[0])
    assert quantised_layers(result) == {}
    assert type(result.get_parameter(EXPERTS[0])) is nn.Parameter


SKIPPED = {
    "one-weight": (["model.layers.0.mlp.experts.down_proj"], EXPERTS[1:2]),
    "one-layer": (["model.layers.1.mlp.experts"], EXPERTS[2:]),
    "one-projection": ([r"model\.layers\.\d+\.mlp\.experts\.gate_up_proj"], EXPERTS[::2]),
    "all": (["mlp.experts"], EXPERTS),
}


@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "sharded"])
@pytest.mark.parametrize("name", SKIPPED)
def test_experts_that_are_passed_over_are_reloaded_as_floats(name, sharded, saved, enabled, tmp_path):
    plain, folder = saved
    patterns, names = SKIPPED[name]
    model = load(folder, {**CONFIGS["fp4"], "llm_int8_skip_modules": ["lm_head", *patterns]})
    again = check_reload(model, tmp_path, sharded)
    for each in (model, again):
        assert [full for full, _, _ in expert_parameters(each)] == names
        assert all(torch.equal(each.get_parameter(full), plain.get_parameter(full)) for full in names)


def test_another_storage_type_is_that_of_the_linear_layers(saved, enabled, tmp_path):
    _, folder = saved
    model = load(folder, {**CONFIGS["nf4-nested"], "bnb_4bit_quant_storage": torch.bfloat16})
    again = check_reload(model, tmp_path, True)
    assert torch.equal(logits(again), logits(load(folder, CONFIGS["nf4-nested"])))
    state = again.state_dict()
    assert {state[name].dtype for name in EXPERTS} == {torch.uint8}
    assert state["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16


def test_a_dequantised_model_is_saved_as_a_float_one(saved, enabled, tmp_path):
    _, folder = saved
    model = load(folder, CONFIGS["fp4"]).dequantize(torch.float32)
    model.save_pretrained(tmp_path)
    experts_transformers.enable(False)
    again = load(tmp_path)
    assert files_of(tmp_path) == files_of(folder)
    assert torch.equal(logits(again), logits(model))


def test_a_checkpoint_saved_without_the_call_loads_with_it(saved, tmp_path):
    _, folder = saved
    model = load(folder, CONFIGS["fp4"])
    model.save_pretrained(tmp_path / "first")
    experts_transformers.enable()
    try:
        again = load(tmp_path / "first")
        assert [full for full, _, _ in expert_parameters(again)] == EXPERTS
        check_same_state(again, model)
        again.save_pretrained(tmp_path / "second")
    finally:
        experts_transformers.enable(False)
    assert files_of(tmp_path / "second") == files_of(tmp_path / "first")
    check_same_state(load(tmp_path / "second"), model)


def bytes_of(state):
    return sum(value.numel() * value.element_size() for value in state.values())


@pytest.mark.parametrize("config", CONFIGS)
def test_experts_take_the_bytes_of_linear_layers(config, saved, enabled):
    """Codes: half a byte for each weight.  Scales: 4 bytes for each 64 weights; nested 1, and 4 for each 256 scales."""
    plain, folder = saved
    state = load(folder, CONFIGS[config]).state_dict()
    for name in [*EXPERTS, "model.layers.0.self_attn.q_proj.weight"]:
        weights = plain.get_parameter(name).numel()
        entries = statistics_of(state, name)
        rest = {key: value for key, value in entries.items() if "quant_state" not in key and "quant_map" not in key}
        blocks = weights // 64
        scales = blocks + 4 * -(-blocks // 256) if config == "nf4-nested" else 4 * blocks
        assert bytes_of({name: state[name]}) == weights // 2
        assert bytes_of(rest) == scales, name


def test_experts_counted_under_other_names(enabled, tmp_path):
    """LongCat-Flash: 4 experts, and 2 that compute nothing, for which one of the two weights has rows."""
    config = transformers.LongcatFlashConfig(
        vocab_size=client_models.VOCABULARY,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        hidden_size=32,
        ffn_hidden_size=64,
        expert_ffn_hidden_size=48,
        num_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=16,
        head_dim=8,
    )
    torch.manual_seed(0)
    plain = transformers.LongcatFlashForCausalLM(config).eval()
    names = [name for name, parameter in plain.named_parameters() if parameter.dim() == 3]
    assert {plain.get_parameter(name).shape[0] for name in names} == {4, 6}
    assert [full for full, _, _ in expert_parameters(plain)] == names
    client_models.save(plain, tmp_path / "float")
    # The router reads its classifier's weight itself: a 4-bit one it could not
    model = load(tmp_path / "float", {**CONFIGS["fp4"], "llm_int8_skip_modules": ["lm_head", "classifier"]})
    assert list(expert_parameters(model)) == []
    check_reload(model, tmp_path / "again", False)


def test_shared_experts_are_found():
    module = nn.Module()
    module.n_shared_experts = 2
    module.up_proj = nn.Parameter(torch.zeros(2, 8, 4))
    module.other = nn.Parameter(torch.zeros(3, 8, 4))
    assert [full for full, _, _ in expert_parameters(module)] == ["up_proj"]


@pytest.mark.parametrize("on", [False, True])
def test_dense_models_are_saved_as_without(on, tmp_path):
    """A model without experts keeps the names of the checkpoint that it came from."""
    plain = client_models.llama()
    client_models.save(plain, tmp_path / "float")
    mapping = {"^decoder": "model"}
    state = {key.replace("model.", "decoder.", 1): value for key, value in plain.state_dict().items()}
    plain.save_pretrained(tmp_path / "renamed", state_dict=state)
    assert "decoder.norm.weight" in files_of(tmp_path / "renamed")["model.safetensors"]
    experts_transformers.enable(on)
    try:
        model = load(tmp_path / "renamed", CONFIGS["fp4"], key_mapping=mapping)
        model.save_pretrained(tmp_path / "again")
        keys = files_of(tmp_path / "again")["model.safetensors"]
        assert "decoder.layers.0.mlp.up_proj.weight.absmax" in keys
        assert not any(key.startswith("model.") for key in keys)
        again = load(tmp_path / "again", key_mapping=mapping)
        check_same_state(again, model)
        if on:  # which Transformers' own quantizer refuses: it has no way back from its 4-bit layers
            again.save_pretrained(tmp_path / "third")
            assert files_of(tmp_path / "third")["model.safetensors"] == keys
    finally:
        experts_transformers.enable(False)


def test_without_the_call_the_experts_stay_float_and_their_checkpoint_is_refused(saved, enabled, tmp_path):
    _, folder = saved
    load(folder, CONFIGS["fp4"]).save_pretrained(tmp_path)
    experts_transformers.enable(False)
    assert len(list(expert_parameters(load(folder, CONFIGS["fp4"])))) == 4
    with pytest.raises(RuntimeError, match=r"mismatched"):
        load(tmp_path)
