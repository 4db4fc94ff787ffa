"""Accelerate over quantised layers: offloaded to meta, RAM or disk and back for each forward, to the same bit.

Everything runs on the CPU, which Accelerate takes for a place to offload to.  Out of reach without an accelerator are,
in accelerate 1.15:

- utils/bnb.py, load_and_quantize_model() of a loaded model, or without a device map: RuntimeError, asks for a GPU;
- utils/bnb.py, get_quantized_model_device_map(): refuses "cpu" and "disk" for modules that shall have 4 bits;
- utils/modeling.py, set_module_tensor_to_device(..., "cpu") of an Int8Params: quantises on device 0, the accelerator.
  quantize_and_offload_8bit() too.  A torch.device("cpu") compares unequal to "cpu" and takes the direct way, as here;
- in Transformers, quantizer_bnb_4bit.py and quantizer_bnb_8bit.py keep modules on "cpu" or "disk" in float where the
  map names several places (llm_int8_enable_fp32_cpu_offload), and refuse without that option.
"""

import importlib.metadata
import os

import pytest
import torch

from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from layer_samples import check_same_state, inputs, make_4bit, make_8bit, same_bytes

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the import: nothing here needs the network
accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
try:
    importlib.metadata.version("bitsandbytes")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("clients look for an installed distribution, this is a source tree", allow_module_level=True)

from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module  # noqa: E402
from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model, set_module_tensor_to_device  # noqa: E402

import client_models  # noqa: E402

F32 = torch.float32
CPU = torch.device("cpu")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": F32}
BASES = {
    "nf4-nested": {**NF4, "bnb_4bit_use_double_quant": True},
    "nf4-bf16-storage": {**NF4, "bnb_4bit_quant_storage": torch.bfloat16},
    "fp4": {**NF4, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
    "int8-threshold-0": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}
LAYERS = {
    "nf4-nested": lambda: make_4bit(compute_dtype=F32),
    "fp4-bf16-storage": lambda: make_4bit(quant_type="fp4", quant_storage=torch.bfloat16, compress_statistics=False),
    "int8": lambda: make_8bit(threshold=6.0),
    "int8-threshold-0": lambda: make_8bit(bias=False),
}
IDS = torch.arange(3, 27).reshape(2, 12)
REST = ("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


def device_map(rest):
    """The first layer on disk, the rest where told."""
    return {"model.layers.0": "disk", **dict.fromkeys(REST, rest)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return client_models.save(client_models.llama(), tmp_path_factory.mktemp("llama"))


def load(folder, base, **options):
    config = transformers.BitsAndBytesConfig(**BASES[base], **options)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=F32)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def quantised(model):
    return [module for module in model.modules() if isinstance(module, (Linear4bit, Linear8bitLt))]


def check_offloaded(model, want, count=7):
    """Answers as it did, again and again; between forwards, `count` quantised weights are on meta."""
    for _ in range(2):
        assert torch.equal(logits(model), want)
        away = [layer for layer in quantised(model) if layer.weight.is_meta]
        assert len(away) == count
        for layer in away:
            assert type(layer.weight) is (Int8Params if isinstance(layer, Linear8bitLt) else Params4bit)
            if isinstance(layer, Linear8bitLt):
                assert layer.state.SCB is None


# ---------------------------------------------------------------- hooks on one layer


@pytest.mark.parametrize("name", LAYERS)
def test_offload_hook_on_a_layer(name):
    layer, twin = LAYERS[name](), LAYERS[name]()
    x = inputs(3, 96, outliers=True)
    want = twin(x)
    add_hook_to_module(layer, AlignDevicesHook(execution_device=CPU, offload=True))
    assert layer.weight.is_meta
    for _ in range(3):
        assert torch.equal(layer(x), want)
        assert all(parameter.is_meta for parameter in layer.parameters())
        if isinstance(layer, Linear8bitLt):
            assert layer.state.SCB is None
    remove_hook_from_module(layer)
    check_same_state(layer, twin)
    assert torch.equal(layer(x), want)
    layer.to("cpu")
    check_same_state(layer, twin)


@pytest.mark.parametrize("name", LAYERS)
def test_gradient_through_an_offloaded_layer(name):
    """The weight is away when the backward asks for it."""
    layer, twin = LAYERS[name](), LAYERS[name]()
    add_hook_to_module(layer, AlignDevicesHook(execution_device=CPU, offload=True))
    gradients = []
    for module in (layer, twin):
        x = inputs(3, 96).requires_grad_(True)
        y = module(x)
        y.backward(torch.ones_like(y))
        gradients.append(x.grad)
    assert layer.weight.is_meta
    assert gradients[1].abs().max() > 0
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", LAYERS)
def test_execution_device_hook_on_a_layer(name):
    layer, twin = LAYERS[name](), LAYERS[name]()
    x = inputs(3, 96, outliers=True)
    add_hook_to_module(layer, AlignDevicesHook(execution_device=CPU, io_same_device=True))
    check_same_state(layer, twin)
    assert torch.equal(layer(x), twin(x))


# ---------------------------------------------------------------- set_module_tensor_to_device


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_int8_of_a_float_value(dtype):
    torch.manual_seed(0)
    weight = torch.randn(40, 96).to(dtype)
    layer = Linear8bitLt(96, 40, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
    set_module_tensor_to_device(layer, "weight", CPU, value=weight, dtype=dtype)
    twin = Linear8bitLt(96, 40, bias=False, has_fp16_weights=False, threshold=6.0)
    twin.load_state_dict({"weight": weight.float()})
    twin.to("cpu")
    assert type(layer.weight) is Int8Params
    check_same_state(layer, twin)
    x = inputs(3, 96, outliers=True)
    assert torch.equal(layer(x), twin(x))


@pytest.mark.parametrize("statistics", [True, False])
def test_int8_of_codes(statistics):
    """With statistics they are taken; without, those that the weight on meta remembers."""
    layer, twin = make_8bit(), make_8bit()
    codes, scales = layer.weight.data.clone(), layer.weight.SCB.clone()
    set_module_tensor_to_device(layer, "weight", "meta")
    if statistics:
        layer.weight.SCB = None
    layer.state.SCB = layer.state.CxB = None
    set_module_tensor_to_device(layer, "weight", CPU, value=codes, fp16_statistics=scales if statistics else None)
    assert layer.weight.dtype == torch.int8
    check_same_state(layer, twin)
    x = inputs(3, 96)
    assert torch.equal(layer(x), twin(x))


def test_int8_by_way_of_an_accelerator(monkeypatch):
    """Accelerate's way for "cpu": to device 0, which is the CPU here, and the parts back."""
    plain = Int8Params.to
    seen = []

    def to(self, device, *args, **kwargs):
        seen.append(device)
        return plain(self, "cpu" if device == 0 else device, *args, **kwargs)

    monkeypatch.setattr(Int8Params, "to", to)
    torch.manual_seed(0)
    weight = torch.randn(40, 96)
    twin = Linear8bitLt(96, 40, bias=False, has_fp16_weights=False)
    twin.load_state_dict({"weight": weight})
    twin.to("cpu")
    seen.clear()
    layer = Linear8bitLt(96, 40, bias=False, has_fp16_weights=False, device="meta")
    set_module_tensor_to_device(layer, "weight", "cpu", value=weight)  # quantises
    assert seen == [0, "cpu"]
    codes, x = layer.weight.data, inputs(3, 96)
    for _ in range(2):
        check_same_state(layer, twin)
        assert layer.weight.CB.data_ptr() == layer.weight.data_ptr()
        assert torch.equal(layer(x), twin(x))
        set_module_tensor_to_device(layer, "weight", "meta")
        layer.state.SCB = layer.state.CxB = None
        set_module_tensor_to_device(layer, "weight", "cpu", value=codes)  # comes back


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_4_bits_of_codes(storage):
    """Packed bytes of any storage come back as bytes, whatever dtype the call names."""
    layer, twin = make_4bit(quant_storage=storage), make_4bit(quant_storage=storage)
    packed = layer.weight.data.clone()
    set_module_tensor_to_device(layer, "weight", "meta")
    set_module_tensor_to_device(layer, "weight", "cpu", value=packed)
    assert same_bytes(layer.weight.data, packed)
    check_same_state(layer, twin)
    assert layer.quant_state is layer.weight.quant_state


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("base", BASES)
def test_dispatch_with_a_layer_on_disk(base, folder, tmp_path):
    model = load(folder, base)
    want, before = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    model = accelerate.dispatch_model(model, device_map("cpu"), main_device=CPU, offload_dir=tmp_path)
    check_offloaded(model, want, count=14)
    assert (tmp_path / "index.json").exists()
    mask = torch.ones_like(IDS)
    tokens = model.generate(IDS, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert tokens.shape == (2, 15)
    remove_hook_from_module(model, recurse=True)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(same_bytes(after[key], value) for key, value in before.items())
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("base", [name for name in BASES if not name.startswith("int8")])
def test_dispatch_by_an_inferred_map(base, folder, tmp_path):
    model = load(folder, base)
    want = logits(model)
    size = accelerate.utils.compute_module_sizes(model)
    assert size["model.layers.0.mlp.up_proj.weight"] == 96 * 64 / 2
    options = {"no_split_module_classes": ["LlamaDecoderLayer"]}
    assert accelerate.infer_auto_device_map(model, max_memory={"cpu": 2 * size[""]}, **options) == {"": "cpu"}
    places = accelerate.infer_auto_device_map(model, max_memory={"cpu": size[""] - 10_000}, **options)
    assert (places["model.layers.0"], places["model.layers.1"]) == ("cpu", "disk")
    check_offloaded(accelerate.dispatch_model(model, places, offload_dir=tmp_path), want)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_offload_of_a_whole_model(where, base, folder, tmp_path):
    model = load(folder, base)
    want = logits(model)
    if where == "memory":
        accelerate.cpu_offload(model, CPU)
    else:
        accelerate.disk_offload(model, tmp_path, CPU)
    check_offloaded(model, want, count=14)


@pytest.mark.parametrize("base", ["nf4-nested", "int8", "int8-threshold-0"])
def test_load_and_quantize_model(base, folder, tmp_path):
    """A model on meta is filled and quantised from a checkpoint, as Transformers does it."""
    options = {**BASES[base], "torch_dtype": F32}
    checkpoint = str(tmp_path / "pytorch_model.bin")
    torch.save(client_models.llama().state_dict(), checkpoint)
    with accelerate.init_empty_weights():
        model = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(folder)).eval()
    model = load_and_quantize_model(model, BnbQuantizationConfig(**options), checkpoint, device_map={"": CPU})
    want = load(folder, base)
    assert len(quantised(model)) == 14
    assert all(same_bytes(a.weight, b.weight) for a, b in zip(quantised(model), quantised(want), strict=True))
    assert torch.equal(logits(model), logits(want))


def test_load_and_quantize_model_with_a_layer_on_disk(folder, tmp_path):
    """What is on disk stays float, and is offloaded; the other layer has 4 bits."""
    checkpoint = str(tmp_path / "pytorch_model.bin")
    torch.save(client_models.llama().state_dict(), checkpoint)
    with accelerate.init_empty_weights():
        model = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(folder)).eval()
    config = BnbQuantizationConfig(**BASES["nf4-nested"], torch_dtype=F32)
    model = load_and_quantize_model(model, config, checkpoint, device_map(CPU), offload_folder=tmp_path / "offload")
    assert len(quantised(model)) == 7
    assert all(parameter.is_meta for parameter in model.model.layers[0].parameters())
    want = logits(load(folder, "nf4-nested", llm_int8_skip_modules=["model.layers.0", "lm_head"]))
    for _ in range(2):
        assert torch.equal(logits(model), want)


@pytest.mark.parametrize("base", ["nf4-nested", "int8"])
def test_device_maps_of_transformers(base, folder, tmp_path):
    config = transformers.BitsAndBytesConfig(**BASES[base])
    options = {"dtype": F32, "offload_folder": tmp_path}
    kind = transformers.AutoModelForCausalLM
    want = logits(load(folder, base))
    for places in ("auto", "cpu", {"": "cpu"}, dict.fromkeys(device_map("cpu"), "cpu")):
        model = kind.from_pretrained(folder, quantization_config=config, device_map=places, **options)
        assert torch.equal(logits(model), want)
        assert len(quantised(model)) == 14
    with pytest.raises(ValueError, match="dispatched on the CPU or the disk"):
        kind.from_pretrained(folder, quantization_config=config, device_map=device_map("cpu"), **options)
    config = transformers.BitsAndBytesConfig(**BASES[base], llm_int8_enable_fp32_cpu_offload=True)
    model = kind.from_pretrained(folder, quantization_config=config, device_map=device_map("cpu"), **options)
    assert quantised(model) == []
    assert torch.equal(logits(model), logits(client_models.llama()))
