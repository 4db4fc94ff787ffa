"""Layer maps in Transformers: quantised while loading, saved, sharded, found again; PEFT; what happens without them."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from bitsandbytes.nn import Embedding8bit, Linear4bit, Linear8bitLt, layer_map_of, quantize_layers
from layer_samples import check_same_state, same_bytes

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the import: nothing here needs the network
pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers", minversion="5")
transformers.utils.logging.disable_progress_bar()
try:
    importlib.metadata.version("bitsandbytes")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("clients look for an installed distribution, this is a source tree", allow_module_level=True)

from bitsandbytes.nn.layer_map_transformers import METHOD, LayerMapConfig, quantize_pretrained  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*erge lora module to:UserWarning"),
]

SKIP = {"type": "skip"}
NF4 = {"type": "nf4", "nested": True, "blocksize": 128, "compute_dtype": "bfloat16"}
MIXED = {
    "lm_head": SKIP,
    r".*\.self_attn\..*": NF4,
    r".*\.down_proj": {"type": "int8", "threshold": 6.0},
    ".*": {"type": "fp4", "blocksize": 32, "compute_dtype": "bfloat16"},
}
IDS = torch.arange(3, 15).reshape(2, 6)
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def save(folder, config, kind=transformers.LlamaForCausalLM):
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a float Llama."""
    return save(tmp_path_factory.mktemp("llama"), transformers.LlamaConfig(**SIZES, attention_bias=True))


def load(folder, layer_map=None, dtype=torch.bfloat16, **options):
    if layer_map is not None:
        options["quantization_config"] = LayerMapConfig(layer_map)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def test_loads_as_converted_in_memory(saved):
    model = load(saved, MIXED)
    want = quantize_layers(load(saved), MIXED)
    check_same_state(model, want)
    assert layer_map_of(model) == layer_map_of(want)
    assert torch.equal(logits(model), logits(want))
    assert (logits(model) - logits(load(saved))).abs().max() < 0.12
    block = model.model.layers[1]
    assert [type(block.self_attn.q_proj), type(block.mlp.up_proj), type(block.mlp.down_proj), type(model.lm_head)] == [
        Linear4bit,
        Linear4bit,
        Linear8bitLt,
        nn.Linear,
    ]
    assert block.self_attn.q_proj.weight.quant_state.nested
    assert block.self_attn.q_proj.weight.quant_state.blocksize == 128
    assert block.mlp.up_proj.weight.quant_state.blocksize == 32
    assert block.mlp.down_proj.state.threshold == 6.0
    assert model.num_parameters() == load(saved).num_parameters()
    assert not any(p.requires_grad for name, p in model.named_parameters() if "_proj.weight" in name)


def test_bytes_that_devices_are_planned_with(saved):
    model = load(saved, MIXED)
    sizes = {"self_attn.q_proj.weight": 0.5, "mlp.down_proj.weight": 1, "self_attn.q_proj.bias": 2}
    sizes = {f"model.layers.0.{name}": size for name, size in sizes.items()} | {"lm_head.weight": 2}
    for name, size in sizes.items():
        parameter = torch.empty(1, dtype=torch.bfloat16, device="meta")  # of the skeleton
        assert model.hf_quantizer.param_element_size(model, name, parameter) == size, name


@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_save_and_reload_without_arguments(shard, saved, tmp_path):
    model = load(saved, MIXED)
    want = logits(model)
    mask = torch.ones_like(IDS)
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(IDS, **options)
    for step in range(2):  # what was reloaded can be saved again
        folder = tmp_path / str(step)
        model.save_pretrained(folder, max_shard_size=shard)
        assert len(list(folder.glob("*.safetensors"))) == (1 if shard == "50GB" else 5)
        stored = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert stored["quant_method"] == METHOD
        assert [pattern for pattern, _ in stored["layers"]] == list(MIXED)
        assert dict(stored["layers"]) == MIXED
        again = load(folder)
        check_same_state(again, model)
        assert torch.equal(logits(again), want)
        assert torch.equal(again.generate(IDS, **options), tokens)
        model = again


@pytest.mark.parametrize("layer_map", [{"lm_head": SKIP, ".*": {"type": "int8"}}, {".*proj": NF4}])
def test_one_type_keeps_the_method(layer_map, saved, tmp_path):
    model = load(saved, layer_map)
    assert (model.is_loaded_in_4bit, model.is_loaded_in_8bit) == (
        (True, False) if len(layer_map) == 1 else (False, True)
    )
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    check_same_state(again, model)
    assert again.config.quantization_config.quant_method == METHOD


def test_with_and_without_the_head(saved, tmp_path):
    """Names of the layers are one level deeper in the model with the head."""
    layer_map = {"lm_head": SKIP, r"model\.layers\.0\..*": NF4, r"model\..*": {"type": "int8"}}
    model = load(saved, layer_map)
    model.save_pretrained(tmp_path / "with")
    base = transformers.AutoModel.from_pretrained(tmp_path / "with")
    check_same_state(base, model.model)
    layer_map = {r"layers\.0\..*": NF4, ".*": {"type": "int8"}}
    options = {"quantization_config": LayerMapConfig(layer_map), "dtype": torch.bfloat16}
    base = transformers.AutoModel.from_pretrained(saved, **options)
    base.save_pretrained(tmp_path / "without")
    model = load(tmp_path / "without")
    check_same_state(model.model, base)
    assert type(model.lm_head) is nn.Linear
    # A head that the checkpoint has nothing of is new, whatever the map says of its name.
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "without", num_labels=3)
    check_same_state(again.model, base)
    assert type(again.score) is nn.Linear
    assert again.score.weight.is_floating_point()


def test_quantised_in_memory_and_saved(saved, tmp_path):
    model = quantize_pretrained(load(saved), MIXED)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    check_same_state(again, model)
    check_same_state(again, load(saved, MIXED))
    with pytest.raises(ValueError, match="quantised by bitsandbytes_layers, expected a float one"):
        quantize_pretrained(again, MIXED)


def test_embeddings_conv1d_and_tied_heads(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    folder = save(tmp_path / "float", config, transformers.GPT2LMHeadModel)
    with pytest.raises(ValueError, match=r"lm_head\.weight and transformer\.wte\.weight are one tensor"):
        load(folder, {".*": {"type": "nf4"}})
    layer_map = {
        "lm_head|.*wte": SKIP,
        ".*wpe": {"type": "int8", "embeddings": True},
        ".*c_attn": {"type": "int8"},
        ".*": {"type": "nf4"},
    }
    model = load(folder, layer_map, torch.float32)
    assert type(model.transformer.wpe) is Embedding8bit
    assert type(model.transformer.h[0].attn.c_attn) is Linear8bitLt
    assert type(model.transformer.h[0].mlp.c_fc) is Linear4bit
    check_same_state(model, quantize_layers(load(folder, dtype=torch.float32), layer_map))
    assert (logits(model) - logits(load(folder, dtype=torch.float32))).abs().max() < 0.1
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", dtype=torch.float32)
    check_same_state(again, model)
    assert again.lm_head.weight is again.transformer.wte.weight
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("experts", [True, False])
def test_experts(experts, tmp_path):
    config = transformers.Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=48, num_experts_per_tok=2)
    folder = save(tmp_path / "float", config, transformers.Qwen3MoeForCausalLM)
    layer_map = {
        r"lm_head|.*\.gate": SKIP,
        r".*\.experts\.down_proj": {"type": "fp4", "blocksize": 32} if experts else SKIP,
        r".*\.experts\..*": {"type": "nf4", "nested": True} if experts else SKIP,
        ".*": {"type": "int8"},
    }
    model = load(folder, layer_map)
    want = quantize_layers(load(folder), layer_map).state_dict()  # the experts of a module may come in another order
    assert set(want) == set(model.state_dict())
    assert all(same_bytes(value, want[key]) for key, value in model.state_dict().items())
    name = "model.layers.0.mlp.experts.down_proj"
    assert (f"{name}.absmax" in model.state_dict()) == experts
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    check_same_state(again, model)
    assert torch.equal(logits(again), logits(model))
    plain = again.dequantize()
    assert layer_map_of(plain) == {}
    assert (logits(plain) - logits(model)).abs().max() < 0.05


def test_dequantize(saved, tmp_path):
    model = load(saved, MIXED)
    want = logits(model)
    model.save_pretrained(tmp_path)  # which leaves the dtype of the config as a string
    plain = model.dequantize()
    assert {type(m) for m in plain.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert plain.lm_head.weight.dtype == plain.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert (logits(plain) - want).abs().max() < 0.02
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_lora_trains_over_all_types(saved):
    import peft

    model = load(saved, MIXED, torch.float32)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(1)
    targets = ["q_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    block = model.base_model.model.model.layers[0]
    kinds = [type(layer) for layer in (block.self_attn.q_proj, block.mlp.up_proj, block.mlp.down_proj)]
    assert kinds == [peft.tuners.lora.bnb.Linear4bit] * 2 + [peft.tuners.lora.bnb.Linear8bitLt]
    frozen = {key: value.clone() for key, value in model.state_dict().items() if "lora" not in key}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    state = model.state_dict()
    assert all(same_bytes(value, state[key]) for key, value in frozen.items())
    model.eval()
    trained = logits(model)
    model.merge_adapter()
    assert (logits(model) - trained).abs().max() < 0.1


# ---------------------------------------------------------------- errors


def test_bad_configs():
    with pytest.raises(ValueError, match="entry 'lm_head': type is 'nf3'"):
        LayerMapConfig({"lm_head": {"type": "nf3"}})
    with pytest.raises(ValueError, match="unexpected load_in_4bit, expected layers alone"):
        LayerMapConfig(MIXED, load_in_4bit=True)
    with pytest.raises(ValueError, match="quant_method is 'bitsandbytes', expected 'bitsandbytes_layers'"):
        LayerMapConfig(MIXED, quant_method="bitsandbytes")


def test_bad_maps_and_devices(saved):
    with pytest.raises(ValueError, match="entry 'lm_haed': matches no layer"):
        load(saved, {"lm_haed": SKIP, ".*": {"type": "nf4"}})
    with pytest.raises(ValueError, match="device_map has cpu, disk, expected all layers on accelerators or all on"):
        load(saved, MIXED, device_map={"model": "cpu", "lm_head": "disk"})


@pytest.mark.parametrize("layers", [[[".*", {"type": "nf4"}]], [["lm_head", SKIP], [".*", {"type": "int8"}]]])
def test_a_checkpoint_that_is_not_what_its_map_says(layers, saved, tmp_path):
    load(saved, MIXED).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["layers"] = layers
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=r"(?i)conversion|loading"):
        load(tmp_path)


WITHOUT = """
import sys, transformers
from transformers.quantizers.auto import AutoQuantizationConfig
for folder in sys.argv[1:]:
    try:
        AutoQuantizationConfig.from_pretrained(folder)
    except ValueError as error:
        print("config:", error)
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
        print("loaded")
    except RuntimeError as error:
        print("refused:", error)
"""


def test_without_the_import(saved, tmp_path):
    """Transformers names the unknown type. 4-bit codes then have wrong sizes; int8 codes have not (docs/LAYERS.md)."""
    load(saved, MIXED).save_pretrained(tmp_path / "mixed")
    load(saved, {"lm_head": SKIP, ".*": {"type": "int8"}}).save_pretrained(tmp_path / "int8")
    command = [sys.executable, "-c", WITHOUT, str(tmp_path / "mixed"), str(tmp_path / "int8")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("config: Unknown quantization type, got bitsandbytes_layers")
    assert lines[1].startswith("refused: ")
    assert lines[2].startswith("config: Unknown quantization type, got bitsandbytes_layers")
    assert done.stderr.count("Unknown quantization type, got bitsandbytes_layers") == 2
    assert "mlp.down_proj.SCB" in done.stderr
