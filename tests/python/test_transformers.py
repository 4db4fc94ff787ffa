"""Real clients: Transformers loads, runs, saves and reloads a tiny Llama; PEFT trains and merges; Accelerate loads.

The model is made here, random, and saved to a temporary folder: nothing is downloaded.  CPU only.
"""

import copy
import importlib.metadata
import importlib.util
import logging
import os

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from layer_samples import check_same_state, same_bytes

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the import: nothing here needs the network
pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
try:
    importlib.metadata.version("bitsandbytes")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("clients look for an installed distribution, this is a source tree", allow_module_level=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*erge lora module to:UserWarning"),
]

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"load_in_8bit": True}
CONFIGS = {
    "nf4": NF4,
    "nf4-nested-bf16": {**NF4, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16},
    "nf4-bf16-storage": {**NF4, "bnb_4bit_quant_storage": torch.bfloat16, "bnb_4bit_compute_dtype": torch.bfloat16},
    "fp4-f32": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.float32},
    "fp4-nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": INT8,
    "int8-threshold-0": {**INT8, "llm_int8_threshold": 0.0},
}
IDS = torch.arange(3, 15).reshape(2, 6)
# Largest difference of a logit from the float model's, whose logits span +-0.49; and what merging an adapter moves it.
NEAR = {"nf4": 0.12, "fp4": 0.12, "int8": 0.02}
MERGED = {"nf4": 0.03, "fp4": 0.03, "int8": 0.01}


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, (Linear4bit, Linear8bitLt))]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, float model)"""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attention_bias=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder, model


def load(folder, options=None, dtype=torch.bfloat16):
    config = {} if options is None else {"quantization_config": transformers.BitsAndBytesConfig(**options)}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **config, dtype=dtype)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


# ---------------------------------------------------------------- Transformers


@pytest.mark.parametrize("name", CONFIGS)
def test_load_generate_save_reload(name, saved, tmp_path, caplog):
    folder, plain = saved
    options = CONFIGS[name]
    with caplog.at_level(logging.WARNING):
        model = load(folder, options)
    assert [record for record in caplog.records if "bitsandbytes" in record.name] == []
    layers = layers_of(model)
    assert len(layers) == 14
    kind = Int8Params if "load_in_8bit" in options else Params4bit
    assert {type(layer.weight) for layer in layers} == {kind}
    assert type(model.lm_head) is nn.Linear
    if kind is Params4bit:
        storage = options.get("bnb_4bit_quant_storage", torch.uint8)
        assert {layer.weight.dtype for layer in layers} == {storage}
        assert {layer.weight.quant_type for layer in layers} == {options["bnb_4bit_quant_type"]}
        nested = options.get("bnb_4bit_use_double_quant", False)
        assert {layer.weight.quant_state.nested for layer in layers} == {nested}
        assert all(layer.quant_state is layer.weight.quant_state for layer in layers)
    else:
        assert {layer.state.threshold for layer in layers} == {options.get("llm_int8_threshold", 6.0)}

    want = logits(model)
    near = NEAR[name.split("-")[0]]
    assert (want - logits(plain)).abs().max() < near
    mask = torch.ones_like(IDS)
    tokens = model.generate(IDS, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape == (2, 10)

    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert {type(layer.weight) for layer in layers_of(again)} == {kind}
    check_same_state(again, model)
    assert torch.equal(logits(again), want)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert model.to("cpu") is model
    assert all(same_bytes(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("name", ["nf4-nested-bf16", "int8"])
def test_plain_load_state_dict_deepcopy_and_casts(name, saved):
    folder, _ = saved
    model = load(folder, CONFIGS[name])
    twin = copy.deepcopy(model)
    check_same_state(twin, model)
    want = logits(model)
    assert torch.equal(logits(twin), want)
    for layer in layers_of(twin):
        layer.weight.data.zero_()
    result = twin.load_state_dict(model.state_dict(), strict=True)
    assert result.missing_keys == result.unexpected_keys == []
    assert torch.equal(logits(twin), want)
    nn.Module.to(twin, torch.float16)  # Transformers itself refuses the cast
    assert all(same_bytes(a.weight, b.weight) for a, b in zip(layers_of(twin), layers_of(model), strict=True))


@pytest.mark.parametrize("name", ["nf4-nested-bf16", "nf4-bf16-storage", "int8"])
def test_dequantize(name, saved):
    folder, _ = saved
    model = load(folder, CONFIGS[name])
    weights = []
    for layer in layers_of(model):
        if isinstance(layer, Linear4bit):
            weights.append(dequantize_4bit(layer.weight.data, layer.weight.quant_state))
        else:
            weights.append(int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB).bfloat16())
    names = [key for key, module in model.named_modules() if isinstance(module, (Linear4bit, Linear8bitLt))]
    want = logits(model)
    plain = model.dequantize(torch.bfloat16)
    assert layers_of(plain) == []
    for key, weight in zip(names, weights, strict=True):
        assert torch.equal(plain.get_submodule(key).weight.data, weight), key
    assert (logits(plain) - want).abs().max() < 0.01


def test_conv1d_of_gpt2_is_replaced(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    plain = transformers.GPT2LMHeadModel(config).eval()
    plain.save_pretrained(tmp_path / "float")
    for name, near in (("nf4", 0.05), ("int8", 0.005)):
        model = load(tmp_path / "float", CONFIGS[name], torch.float32)
        assert len(layers_of(model)) == 4
        assert (logits(model) - logits(plain)).abs().max() < near
        model.save_pretrained(tmp_path / name)
        check_same_state(load(tmp_path / name, dtype=torch.float32), model)


def test_number_of_parameters(saved):
    folder, plain = saved
    assert load(folder, NF4).num_parameters() == plain.num_parameters()


# ---------------------------------------------------------------- PEFT


def lora(model, name):
    import peft

    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=name.startswith("nf4"))
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


@needs_peft
@pytest.mark.parametrize("name", ["nf4-nested-bf16", "fp4-f32", "int8", "int8-threshold-0"])
def test_lora_trains_merges_and_unmerges(name, saved):
    folder, _ = saved
    model = lora(load(folder, CONFIGS[name], torch.float32), name)
    frozen = {key: value.clone() for key, value in model.state_dict().items() if "lora" not in key}
    start = logits(model)
    optimizer = bnb.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(4):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    state = model.state_dict()
    assert all(same_bytes(value, state[key]) for key, value in frozen.items())

    trained = logits(model)
    assert (trained - start).abs().max() > 0.05
    model.merge_adapter()
    assert all(layer.weight.requires_grad is False for layer in layers_of(model))
    merged = logits(model)
    near = MERGED[name.split("-")[0]]
    assert (merged - trained).abs().max() < near
    assert (merged - start).abs().max() > 0.05
    if "int8" not in name:
        assert all(layer.quant_state is layer.weight.quant_state for layer in layers_of(model))
    model.unmerge_adapter()
    assert (logits(model) - trained).abs().max() < near


@needs_peft
def test_adapters_are_saved_and_loaded(saved, tmp_path):
    import peft

    folder, _ = saved
    model = lora(load(folder, NF4, torch.float32), "nf4")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(folder, NF4, torch.float32), tmp_path)
    assert torch.equal(logits(again.eval()), logits(model.eval()))


# ---------------------------------------------------------------- Accelerate


def test_set_module_tensor_to_device_with_4_bits():
    from accelerate.utils import set_module_tensor_to_device

    torch.manual_seed(0)
    weight, x = torch.randn(24, 64), torch.randn(3, 64)
    layer = Linear4bit(64, 24, bias=False, quant_type="nf4", device="meta")
    layer.weight._is_hf_initialized = True
    set_module_tensor_to_device(layer, "weight", "cpu", value=weight)
    assert type(layer.weight) is Params4bit
    assert layer.weight.bnb_quantized
    twin = Linear4bit(64, 24, bias=False, quant_type="nf4")
    twin.load_state_dict({"weight": weight})
    twin.to("cpu")
    check_same_state(layer, twin)
    packed = layer.weight.data.clone()
    # Away and back, as an offload hook does
    set_module_tensor_to_device(layer, "weight", "meta")
    assert layer.weight.is_meta
    set_module_tensor_to_device(layer, "weight", "cpu", value=packed)
    check_same_state(layer, twin)
    assert torch.equal(layer(x), twin(x))


def test_set_module_tensor_to_device_with_int8():
    from accelerate.utils import set_module_tensor_to_device

    layer = Linear8bitLt(64, 24, bias=False, has_fp16_weights=False, threshold=6.0).to("cpu")
    x = torch.randn(3, 64)
    want, packed, scales = layer(x), layer.weight.data, layer.weight.SCB
    set_module_tensor_to_device(layer, "weight", "meta")
    layer.state.SCB = None
    layer.state.CxB = None
    assert layer.weight.is_meta
    layer._parameters["weight"] = Int8Params(packed, requires_grad=False, **layer.weight.__dict__).to("cpu")
    layer.weight.SCB = scales
    assert torch.equal(layer(x), want)


@pytest.mark.parametrize("cls", [Linear4bit, Linear8bitLt])
def test_empty_weights(cls):
    from accelerate import init_empty_weights

    options = {"has_fp16_weights": False} if cls is Linear8bitLt else {}
    with init_empty_weights():
        layer = nn.Sequential(cls(64, 24, **options))
        twin = copy.deepcopy(layer)
    for module in (layer[0], twin[0]):
        assert module.weight.is_meta
        assert type(module.weight) is (Int8Params if cls is Linear8bitLt else Params4bit)


@pytest.mark.parametrize("options", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_accelerates_own_replacement(options):
    from accelerate.utils import BnbQuantizationConfig
    from accelerate.utils.bnb import replace_with_bnb_layers

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    x = torch.randn(5, 64)
    want = model(x)
    model = replace_with_bnb_layers(model, BnbQuantizationConfig(**options), modules_to_not_convert=[]).to("cpu")
    assert len(layers_of(model)) == 2
    assert (model(x) - want).abs().max() < (0.01 if "load_in_8bit" in options else 0.15)
