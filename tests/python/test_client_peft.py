"""PEFT over quantised layers: adapters of six kinds train, merge, unmerge, merge again, are saved and loaded.

What a merge ought to give is computed by PEFT itself, over plain linear layers that hold the dequantised weights (the
twin); what it gives differs by one quantisation, whose error is bounded here element by element from the widest gap of
the code.  Models are random and made here.  CPU only.
"""

import importlib.metadata
import os
import warnings

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, int8_vectorwise_dequant
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from layer_samples import check_linked, same_bytes

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the import: nothing here needs the network
pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
transformers.utils.logging.disable_progress_bar()
try:
    importlib.metadata.version("bitsandbytes")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("clients look for an installed distribution, this is a source tree", allow_module_level=True)

import client_models  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*erge lora module to:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*OFT.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning"),
]

F32 = torch.float32
BASES = {
    "nf4-nested": {"quant_type": "nf4", "use_double_quant": True, "compute_dtype": F32},
    "fp4": {"quant_type": "fp4", "compute_dtype": F32},
    "nf4-bf16-storage": {"quant_type": "nf4", "quant_storage": torch.bfloat16, "compute_dtype": F32},
    "int8": {"threshold": 6.0},
    "int8-threshold-0": {"threshold": 0.0},
}
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
IDS = torch.arange(3, 27).reshape(2, 12)
# Half of the widest gap between neighbours of a code, in units of the largest magnitude of a block.
HALF_GAP = {"nf4": (1 - 0.6961928) / 2, "fp4": (1 - 2 / 3) / 2}


def adapter(kind, model):
    """The configuration of an adapter for a model of client_models."""
    both = {"target_modules": TARGETS[model], "task_type": "CAUSAL_LM"}
    if kind in ("lora", "dora"):
        return peft.LoraConfig(r=4, lora_alpha=16, use_dora=kind == "dora", **both)
    if kind == "oft":
        return peft.OFTConfig(r=0, oft_block_size=16, use_cayley_neumann=False, **both)
    if kind == "vera":
        return peft.VeraConfig(r=32, d_initial=0.5, **both)
    if kind == "adalora":
        return peft.AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=1, total_step=10, lora_alpha=16, **both)
    return peft.IA3Config(feedforward_modules=[both["target_modules"][-1]], **both)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Where a float model of each kind is saved."""
    return {name: client_models.save(getattr(client_models, name)(), tmp_path_factory.mktemp(name)) for name in TARGETS}


def load(folder, base):
    options = BASES[base]
    if base.startswith("int8"):
        config = {"load_in_8bit": True, "llm_int8_threshold": options["threshold"]}
    else:
        config = {"load_in_4bit": True, **{f"bnb_4bit_{key}": value for key, value in options.items()}}
    config = transformers.BitsAndBytesConfig(**config)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=F32)


def load_twin(folder, base):
    """The float model of the dequantised weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(folder, base).dequantize(F32)


def wrap(model, config, **options):
    model = peft.prepare_model_for_kbit_training(model, **{"use_gradient_checkpointing": False, **options})
    torch.manual_seed(1)
    return peft.get_peft_model(model, config)


def train(model, steps=3, lr=2e-2):
    """AdamW8bit over what requires gradients."""
    optimizer = bnb.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for _ in range(steps):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def evaluate(model):
    with torch.no_grad():
        return model(IDS, labels=IDS).loss


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def layers(model):
    """{name: quantised layer} of those with an adapter, under the names that they have without."""
    found = {}
    for name, module in model.named_modules():
        if name.endswith(".base_layer"):
            assert isinstance(module, (Linear4bit, Linear8bitLt))
            found[name.removeprefix("base_model.model.").removesuffix(".base_layer")] = module
    return found


def decoded(layer):
    """The dequantised weight of a layer, read from the weight's own statistics."""
    weight = layer.weight
    if isinstance(layer, Linear8bitLt):
        return int8_vectorwise_dequant(weight.data, weight.SCB)
    return dequantize_4bit(weight.data, weight.quant_state)


def half_steps(layer, target):
    """The largest error of each element if target [out, in] is quantised as the layer's weight, scales being exact."""
    if isinstance(layer, Linear8bitLt):
        rounded = 2.0**-11 * target.abs()  # to float16, before the codes
        return (target.abs() + rounded).amax(1, keepdim=True) / 254 + rounded
    state = layer.weight.quant_state
    largest = target.reshape(-1, state.blocksize).abs().amax(1)
    return (HALF_GAP[state.quant_type] * largest).repeat_interleave(state.blocksize).reshape(target.shape)


def error_bound(layer, target):
    """The largest error of each element now that target [out, in] has been quantised into the layer's weight."""
    bound = 1.001 * half_steps(layer, target)
    if isinstance(layer, Linear8bitLt):
        return bound
    state = layer.weight.quant_state
    largest = target.reshape(-1, state.blocksize).abs().amax(1)
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    off = (scales - largest).abs()
    assert off.max() <= (0.02 * largest.max() if state.nested else 1e-6)
    return bound + off.repeat_interleave(state.blocksize).reshape(target.shape)


def check_fresh(layer, old):
    """A layer whose weight was replaced: class and statistics are new, and those of the module are the weight's."""
    weight = layer.weight
    assert weight is not old
    assert weight.requires_grad is False
    if isinstance(layer, Linear8bitLt):
        assert type(weight) is Int8Params
        assert (weight.dtype, weight.CB.data_ptr()) == (torch.int8, weight.data_ptr())
        assert weight.SCB is not old.SCB
        assert layer.state.SCB is None  # until the next forward, which takes it from the weight
    else:
        check_linked(layer)
        assert weight.quant_state is not old.quant_state
        assert weight.bnb_quantized is True
        options = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        assert [getattr(weight, name) for name in options] == [getattr(old, name) for name in options]
        assert (weight.dtype, weight.shape) == (old.dtype, old.shape)


def merge(model):
    """merge_adapter(), checked. Returns {name: weight} after it."""
    before = {name: layer.weight for name, layer in layers(model).items()}
    model.merge_adapter()
    for name, layer in layers(model).items():
        check_fresh(layer, before[name])
    return {name: decoded(layer) for name, layer in layers(model).items()}


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("model_name", TARGETS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", ["lora", "dora", "oft", "vera", "ia3", "adalora"])
def test_train_save_and_load(kind, base, model_name, folders, tmp_path):
    model = wrap(load(folders[model_name], base), adapter(kind, model_name))
    start, first_loss = logits(model), evaluate(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    train(model)
    assert evaluate(model) < first_loss
    after = model.state_dict()
    assert len(trained) > 0
    assert [key for key in after if same_bytes(after[key], before[key]) == (key in trained)] == []
    assert not torch.equal(logits(model), start)

    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(folders[model_name], base), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("base", ["nf4-nested", "nf4-bf16-storage", "int8", "int8-threshold-0"])
def test_gradient_checkpointing_changes_no_gradient(base, reentrant, folders):
    gradients = []
    for options in ({}, {"use_gradient_checkpointing": True}):
        if options:
            options["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
        model = wrap(load(folders["llama"], base), adapter("dora", "llama"), **options)
        assert model.is_gradient_checkpointing == bool(options)
        train(model, steps=2)
        model.train()
        model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) == 18
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize("base", ["nf4-nested", "nf4-bf16-storage", "int8"])
def test_prepare_casts_the_rest_and_leaves_the_codes(base, folders):
    model = load(folders["llama"], base).to(memory_format=torch.preserve_format)
    for parameter in model.parameters():
        if not isinstance(parameter, (Params4bit, Int8Params)):
            parameter.data = parameter.data.bfloat16()
    quantised = [m for m in model.modules() if isinstance(m, (Linear4bit, Linear8bitLt))]
    codes = [(layer.weight, layer.weight.data.clone()) for layer in quantised]
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    rest = {p.dtype for p in model.parameters() if not isinstance(p, (Params4bit, Int8Params))}
    assert rest == {torch.float32}
    for layer, (weight, data) in zip(quantised, codes, strict=True):
        assert layer.weight is weight
        assert weight.dtype == data.dtype
        assert same_bytes(weight.data, data)
    assert not any(p.requires_grad for p in model.parameters())


# ---------------------------------------------------------------- merging


def check_near(model, weights, bounds, slack):
    """The layers' weights differ from `weights` by at most slack * bounds, in the Frobenius norm."""
    for name, layer in layers(model).items():
        assert (decoded(layer) - weights[name]).norm() <= slack * bounds[name].norm(), name


@pytest.mark.parametrize("model_name", TARGETS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", ["lora", "dora", "oft", "vera"])
def test_merge_unmerge_merge(kind, base, model_name, folders, tmp_path):
    """A merge leaves the error of one quantisation; with each further step comes one more, so bytes need not return."""
    folder = folders[model_name]
    model = wrap(load(folder, base), adapter(kind, model_name))
    train(model, steps=4, lr=0.2 if kind == "vera" else 5e-2)
    original = {name: decoded(layer) for name, layer in layers(model).items()}
    model.save_pretrained(tmp_path)
    twin = peft.PeftModel.from_pretrained(load_twin(folder, base), tmp_path).eval()
    unmerged = logits(model)
    assert (unmerged - logits(twin)).abs().mean() < (0.05 if base.startswith("int8") else 1e-4) * unmerged.abs().mean()
    twin = twin.merge_and_unload()

    first = merge(model)
    errors = {}
    for name, layer in layers(model).items():
        target = twin.get_submodule(name).weight.data
        assert ((first[name] - target).abs() <= error_bound(layer, target)).all(), name
        errors[name] = first[name] - target
        assert (target - original[name]).norm() > 2.5 * errors[name].norm(), name
    merged = logits(model)
    state = model.state_dict()

    # Unmerging undoes the adapter, and what it does to the error left is to turn it, or to scale it a little.
    model.unmerge_adapter()
    check_near(model, original, errors, slack=2.2)
    before = {name: layer.weight for name, layer in layers(model).items()}
    model.merge_adapter()
    for name, layer in layers(model).items():
        check_fresh(layer, before[name])
    check_near(model, first, errors, slack=2.2)

    model.load_state_dict(state)
    assert torch.equal(logits(model), merged)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merge_and_unload_save_and_load(kind, base, folders, tmp_path):
    model = wrap(load(folders["llama"], base), adapter(kind, "llama"))
    start = logits(model)
    train(model, steps=4, lr=5e-2)
    trained = logits(model)
    model = model.merge_and_unload(safe_merge=True)
    assert type(model) is transformers.LlamaForCausalLM
    merged = logits(model)
    assert (merged - trained).abs().mean() < 0.3 * (trained - start).abs().mean()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=F32)
    assert torch.equal(logits(again), merged)


@pytest.mark.parametrize("base", ["nf4-nested", "int8"])
def test_two_adapters(base, folders):
    """Merged together they are the sum, within two quantisations; disabled, the base answers, to the bit."""
    model = load(folders["llama"], base)
    plain = logits(model)
    model = wrap(model, adapter("lora", "llama"))
    model.add_adapter("second", adapter("lora", "llama"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.15)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    original = {name: decoded(layer) for name, layer in layers(model).items()}
    model.merge_adapter(["default", "second"])
    steps, targets = {}, {}
    for name, layer in layers(model).items():
        owner = model.get_submodule(f"base_model.model.{name}")
        middle = original[name] + owner.get_delta_weight("default").detach()
        targets[name] = middle + owner.get_delta_weight("second").detach()
        steps[name] = half_steps(layer, middle) + half_steps(layer, targets[name])
        assert (targets[name] - original[name]).norm() > 0.8 * steps[name].norm(), name
    check_near(model, targets, steps, slack=0.6)
    with model.disable_adapter():
        logits(model)  # unmerges
        check_near(model, original, steps, slack=0.8)


# ---------------------------------------------------------------- initialisations that read or replace the base


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dora", [False, True])
def test_olora_replaces_the_weight(dora, base, folders):
    """OLoRA takes its adapter out of the base, whose weight it quantises anew; DoRA then reads the norms of the sum."""
    config = adapter("dora" if dora else "lora", "llama")
    config.init_lora_weights, config.lora_alpha = "olora", 4
    model = load(folders["llama"], base)
    before = {n: m.weight for n, m in model.named_modules() if isinstance(m, (Linear4bit, Linear8bitLt))}
    whole = {name: decoded(model.get_submodule(name)) for name in before}
    logits(model)  # the layers have been in use
    model = wrap(model, config)
    for name, layer in layers(model).items():
        check_fresh(layer, before[name])
        owner = model.get_submodule(f"base_model.model.{name}")
        delta = owner.get_delta_weight("default").detach()
        bound = error_bound(layer, whole[name] - delta)
        assert ((decoded(layer) + delta - whole[name]).abs() <= bound).all(), name
        if dora:
            norms = owner.lora_magnitude_vector["default"].weight
            assert torch.allclose(norms, (decoded(layer) + delta).norm(dim=1), rtol=1e-5), name
    if base.startswith("int8"):
        logits(model)
        assert all(layer.state.SCB is None or layer.state.SCB is layer.weight.SCB for layer in layers(model).values())


# ---------------------------------------------------------------- LoftQ


@pytest.fixture
def loftq(monkeypatch):
    """peft.utils.loftq_utils, whose functions name the device "cuda" in their bodies: here they name the CPU."""
    from peft.tuners.lora import layer
    from peft.utils import loftq_utils

    for name in ("loftq_init", "_loftq_init_new"):
        function = getattr(loftq_utils, name).__wrapped__
        code = function.__code__
        assert "cuda" in code.co_consts
        constants = tuple("cpu" if value == "cuda" else value for value in code.co_consts)
        monkeypatch.setattr(function, "__code__", code.replace(co_consts=constants))
    assert layer.loftq_init is loftq_utils.loftq_init
    return loftq_utils


@pytest.mark.parametrize(("bits", "rounds"), [(4, 1), (4, 4), (8, 1)])
def test_loftq_splits_a_weight(bits, rounds, loftq):
    """Q + BA is nearer to the weight than what quantising alone gives; Q is a fixed point of the quantisation."""
    torch.manual_seed(0)
    weight = torch.randn(96, 128)
    alone, _, _ = loftq.loftq_init(weight, num_bits=bits, reduced_rank=1)
    quantised, a, b = loftq.loftq_init(weight, num_bits=bits, reduced_rank=16, num_iter=rounds)
    assert (a.shape, b.shape) == ((16, 128), (96, 16))
    assert (quantised + b @ a - weight).norm() < 0.85 * (alone - weight).norm()
    if bits == 4:
        again = Params4bit(quantised, quant_type="nf4", compress_statistics=False).to("cpu")
        assert torch.equal(dequantize_4bit(again.data, again.quant_state), quantised)


def test_loftq_as_initialisation_then_4_bits(loftq, folders):
    """A float model initialised by LoftQ is quantised without loss, and is nearer to the float model than NF4 is."""
    plain = client_models.llama()
    config = adapter("lora", "llama")
    config.init_lora_weights, config.lora_alpha, config.r = "loftq", 16, 16
    config.loftq_config = vars(peft.LoftQConfig(loftq_bits=4, loftq_iter=2))
    model = peft.get_peft_model(client_models.llama(), config).eval()
    split = logits(model)
    for name, owner in list(model.named_modules()):
        if name.endswith(".base_layer"):
            layer = Linear4bit(owner.in_features, owner.out_features, owner.bias is not None, F32, False, "nf4")
            layer.load_state_dict(owner.state_dict())
            model.set_submodule(name, layer.to("cpu"))
    assert len(layers(model)) == 6
    assert (logits(model) - split).abs().max() < 1e-4
    for name, layer in layers(model).items():
        weight = plain.get_submodule(name).weight.data
        delta = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        alone = Params4bit(weight.clone(), quant_type="nf4", compress_statistics=False).to("cpu")
        error = (dequantize_4bit(alone.data, alone.quant_state) - weight).norm()
        assert (decoded(layer) + delta - weight).norm() < 0.8 * error


@pytest.mark.parametrize("base", ["nf4-nested", "fp4", "nf4-bf16-storage"])
def test_replace_lora_weights_loftq(base, loftq, folders):
    config = adapter("lora", "llama")
    config.r, config.lora_alpha = 16, 16
    model = wrap(load(folders["llama"], base), config)
    weights = {name: layer.weight.data.clone() for name, layer in layers(model).items()}
    start = {name: decoded(layer) for name, layer in layers(model).items()}
    seen = []
    loftq.replace_lora_weights_loftq(
        model,
        str(folders["llama"]),
        callback=lambda owner, name: seen.append(name) or name != "model.layers.1.mlp.down_proj",
    )
    assert sorted(seen) == sorted(weights)
    float_model = client_models.llama()
    for name, layer in layers(model).items():
        assert same_bytes(layer.weight.data, weights[name])
        weight = float_model.get_submodule(name).weight.data
        delta = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        left, before = (start[name] + delta - weight).norm(), (start[name] - weight).norm()
        assert left == before if name == "model.layers.1.mlp.down_proj" else left < 0.8 * before
