"""Layers and clients on CUDA: moves, checkpoints of either device, torch.compile, Transformers, PEFT, Accelerate."""

import copy
import importlib.metadata
import io
import os
import pickle

import pytest
import torch
from torch import nn

import cuda_cases
from bitsandbytes.nn import Embedding4bit, Embedding8bit, Int8Params, Params4bit
from cuda_cases import needs_cuda
from layer_samples import check_same_state, inputs, make_4bit, make_8bit, same_bytes

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the import: nothing here needs the network

pytestmark = needs_cuda

LAYERS = {
    "nf4 nested": lambda device: make_4bit(device=device),
    "fp4": lambda device: make_4bit(device=device, quant_type="fp4", compress_statistics=False),
    "int8": lambda device: make_8bit(device=device, threshold=6.0),
    "embedding 4 bits": lambda device: seeded(Embedding4bit, 40, 96, quant_type="nf4").to(device),
    "embedding 8 bits": lambda device: seeded(Embedding8bit, 40, 96).to(device),
}
CONFIGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
every_layer = pytest.mark.parametrize("kind", LAYERS)
every_config = pytest.mark.parametrize("config", CONFIGS)


def seeded(cls, *args, **options):
    torch.manual_seed(0)
    return cls(*args, **options)


def input_of(kind, device):
    x = torch.tensor([[1, 39, 0], [7, 7, 20]]) if "embedding" in kind else inputs(5, 96, outliers=True)
    return x.to(device)


def devices_of(model):
    """The devices of what a state dict holds, but for tags and packed descriptions, which are on the CPU."""
    kept = ("weight_format", "bitsandbytes__")
    return {value.device.type for key, value in model.state_dict().items() if not any(k in key for k in kept)}


def used(kind):
    layer = LAYERS[kind](cuda_cases.DEVICE)
    return layer, layer(input_of(kind, cuda_cases.DEVICE))


# ---------------------------------------------------------------- layers


@every_layer
def test_quantised_to_the_bytes_of_the_cpu(kind):
    check_same_state(LAYERS[kind](cuda_cases.DEVICE).cpu(), LAYERS[kind]("cpu"))


@every_layer
@pytest.mark.parametrize("way", ["cpu and back", "parent", "deepcopy", "pickle", "new dtype"])
def test_a_move_keeps_bytes_and_outputs(kind, way):
    layer, y = used(kind)
    model = nn.Sequential(layer)
    if way == "cpu and back":
        model[0] = layer.cpu()
        assert devices_of(model) == {"cpu"}
        model[0] = model[0].to(cuda_cases.DEVICE)
    elif way == "parent":
        assert devices_of(model.to("cpu")) == {"cpu"}
        model = model.to(cuda_cases.DEVICE)
    elif way == "deepcopy":
        model = copy.deepcopy(model)
    elif way == "pickle":
        model = pickle.loads(pickle.dumps(model))
    else:
        model = model.half().float()
    assert devices_of(model) == {cuda_cases.DEVICE.type}
    assert same_bytes(model[0].weight.data.cpu(), LAYERS[kind]("cpu").weight.data)
    tolerance = 2e-3 if way == "new dtype" else 0.0
    assert torch.allclose(model(input_of(kind, cuda_cases.DEVICE)), y, rtol=tolerance, atol=tolerance)


@every_layer
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_goes_from_device_to_device(kind, assign):
    layer, y = used(kind)
    for source in (cuda_cases.DEVICE, torch.device("cpu")):
        file = io.BytesIO()
        torch.save(layer.to(source).state_dict(), file)
        file.seek(0)
        again = LAYERS[kind](cuda_cases.DEVICE)
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.data.zero_()
        result = again.load_state_dict(torch.load(file, map_location=cuda_cases.DEVICE), assign=assign)
        assert not result.missing_keys
        assert not result.unexpected_keys
        assert torch.equal(again(input_of(kind, cuda_cases.DEVICE)), y)


def test_scales_that_an_offload_hook_took():
    """Accelerate's hooks move the weight away and back, and set the state's scales to None."""
    layer, y = used("int8")
    x = input_of("int8", cuda_cases.DEVICE)
    codes, scales = layer.weight.data.cpu(), layer.weight.SCB.cpu()
    for _ in range(2):
        layer.weight = Int8Params(
            codes.to(cuda_cases.DEVICE), requires_grad=False, has_fp16_weights=False, SCB=scales.to(cuda_cases.DEVICE)
        )
        layer.state.CB = layer.state.SCB = None
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("kind", ["nf4 nested", "int8"])
def test_compiled_to_one_graph(kind):
    layer, _ = used(kind)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for rows in (2, 3, 17):
        x = inputs(rows, 96, outliers=True).to(cuda_cases.DEVICE)
        assert torch.allclose(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
        one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
        compiled(one).sum().backward()
        layer(two).sum().backward()
        assert torch.allclose(one.grad, two.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4 nested", "int8"])
def test_autocast(kind):
    layer, y = used(kind)
    x = input_of(kind, cuda_cases.DEVICE)
    with torch.autocast(cuda_cases.DEVICE.type, dtype=torch.bfloat16):
        mixed = layer(x)
    assert torch.allclose(mixed.float(), y, rtol=3e-2, atol=3e-2 * y.abs().max().item())


# ---------------------------------------------------------------- clients


@pytest.fixture(scope="module")
def clients():
    """(client_models, client_checks), where their clients are installed."""
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers", minversion="5")
    try:
        importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("clients look for an installed distribution, this is a source tree")
    import client_checks
    import client_models

    return client_models, client_checks


@pytest.fixture
def saved(clients, tmp_path):
    """A function: architecture -> (float model on the CPU, the folder it is saved in)."""

    def save(name):
        model = getattr(clients[0], name)()
        folder = tmp_path / name
        return model, clients[0].save(model, folder)

    return save


def on_card(clients, folder, config):
    return clients[1].load(folder, CONFIGS[config], device_map={"": cuda_cases.DEVICE.type})


def run(checks, model):
    return checks.logits(model, cuda_cases.DEVICE)


@every_config
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5", "qwen3_moe"])
def test_transformers_loads_runs_saves_and_loads_again(name, config, clients, saved, tmp_path):
    checks = clients[1]
    plain, folder = saved(name)
    model = on_card(clients, folder, config)
    layers = checks.quantised_layers(model)
    assert layers
    assert {layer.weight.device.type for layer in layers.values()} == {cuda_cases.DEVICE.type}
    there = checks.load(folder, CONFIGS[config])
    for key, layer in checks.quantised_layers(there).items():
        assert same_bytes(layers[key].weight.data.cpu(), layer.weight.data.cpu()), key
    logits = run(checks, model)
    assert checks.relative(logits, checks.logits(there.cpu())) < (1e-4 if config == "nf4" else 2e-2)
    tokens = model.generate(checks.IDS.to(cuda_cases.DEVICE), max_new_tokens=4, do_sample=False)
    assert tokens.shape[0] == 2
    model.save_pretrained(tmp_path / "again", max_shard_size=checks.SHARD)
    again = checks.load(tmp_path / "again", device_map={"": cuda_cases.DEVICE.type})
    check_same_state(again, model)
    assert torch.equal(run(checks, again), logits)
    assert checks.relative(run(checks, model.dequantize(torch.float32).to(cuda_cases.DEVICE)), logits) < 0.1


@every_config
def test_peft_trains_adapters(config, clients, saved):
    peft = pytest.importorskip("peft")
    checks = clients[1]
    base = on_card(clients, saved("llama")[1], config)
    before = {key: layer.weight.data.clone() for key, layer in checks.quantised_layers(base).items()}
    torch.manual_seed(0)
    options = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(base), options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, losses = checks.IDS.to(cuda_cases.DEVICE), []
    model.train()
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
    after = checks.quantised_layers(base)
    assert all(torch.equal(after[f"{key}.base_layer"].weight.data, codes) for key, codes in before.items())
    model.eval()
    apart = run(checks, model)
    merged = run(checks, model.merge_and_unload())  # weights are quantised again
    assert checks.relative(merged, apart) < (0.4 if config == "nf4" else 0.1)


@every_config
def test_accelerate_keeps_layers_on_the_cpu_between_calls(config, clients, saved):
    accelerate = pytest.importorskip("accelerate")
    checks = clients[1]
    model = on_card(clients, saved("llama")[1], config)
    logits = run(checks, model)
    accelerate.cpu_offload(model, execution_device=cuda_cases.DEVICE)
    for _ in range(2):
        assert torch.equal(run(checks, model), logits)


def test_parameters_know_what_they_are():
    assert type(LAYERS["nf4 nested"](cuda_cases.DEVICE).weight) is Params4bit
    assert type(LAYERS["int8"](cuda_cases.DEVICE).weight) is Int8Params
