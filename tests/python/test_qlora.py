"""A QLoRA run on real text, by examples/qlora.py: as good as the same run over the float weights that NF4 stands for.

The twin of the 4-bit model has the dequantised weights in plain linear layers; seeds, batches, adapters and optimizer
are the same.  What differs is the product of every frozen layer, forward and backward, for 100 steps.
"""

import importlib.metadata
import importlib.util
import os
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from layer_samples import same_bytes

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the import: nothing here needs the network
pytest.importorskip("accelerate")
pytest.importorskip("transformers").utils.logging.disable_progress_bar()
peft = pytest.importorskip("peft")
try:
    importlib.metadata.version("bitsandbytes")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("clients look for an installed distribution, this is a source tree", allow_module_level=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*erge lora module to:UserWarning"),
]

EXAMPLE = Path(__file__).parents[2] / "examples" / "qlora.py"
STEPS, LR = 100, 2e-3
# Largest relative difference of a loss from that of the float twin.
CLOSE = 0.005


def mean(losses):
    return sum(losses) / len(losses)


@pytest.fixture(scope="module")
def qlora():
    """examples/qlora.py as a module."""
    spec = importlib.util.spec_from_file_location("qlora_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text(qlora):
    """(training text, held-out text)"""
    return qlora.text()


@pytest.fixture(scope="module")
def folder(qlora, text, tmp_path_factory):
    """Where a Llama that has learnt a little is saved."""
    folder = tmp_path_factory.mktemp("base")
    qlora.make_base(folder, text[0], steps=60)
    return folder


@pytest.fixture(scope="module")
def trained(qlora, text, folder):
    """The 4-bit run: model, its state dict before, held-out losses before and after, losses of the steps, optimizer."""
    model = qlora.add_adapters(qlora.load_4bit(folder))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    start = qlora.evaluate(model, text[1])
    made = []

    def make(*args, **kwargs):
        made.append(bnb.optim.AdamW8bit(*args, **kwargs))
        return made[0]

    losses = qlora.train(model, text[0], STEPS, seed=2, lr=LR, optimizer=make)
    return model, before, (start, qlora.evaluate(model, text[1])), losses, made[0]


def test_the_loss_is_that_of_the_float_twin(qlora, text, folder, trained):
    _, _, (start, end), losses, _ = trained
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = qlora.load_4bit(folder).dequantize(torch.float32)
    assert not any(isinstance(module, bnb.nn.Linear4bit) for module in twin.modules())
    twin = qlora.add_adapters(twin)
    twin_start = qlora.evaluate(twin, text[1])
    twin_losses = qlora.train(twin, text[0], STEPS, seed=2, lr=LR)
    twin_end = qlora.evaluate(twin, text[1])

    assert start == pytest.approx(twin_start, rel=1e-4)
    assert losses[0] == pytest.approx(twin_losses[0], rel=1e-4)
    assert mean(losses[-10:]) == pytest.approx(mean(twin_losses[-10:]), rel=CLOSE)
    assert end == pytest.approx(twin_end, rel=CLOSE)
    for first, last in ((start, end), (twin_start, twin_end)):
        assert last < 0.92 * first
    for run in (losses, twin_losses):
        assert mean(run[-10:]) < 0.92 * mean(run[:10])


def test_only_the_adapters_change(trained):
    model, before, _, _, _ = trained
    after = model.state_dict()
    assert list(after) == list(before)
    for key, value in before.items():
        assert same_bytes(value, after[key]) == ("lora" not in key), key
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}


def test_the_adapters_are_trained_with_8_bit_states(trained):
    model, _, _, _, optimizer = trained
    states = [optimizer.state[parameter] for parameter in model.parameters() if parameter.requires_grad]
    assert len(states) == 28
    assert {state[name].dtype for state in states for name in ("state1", "state2")} == {torch.uint8}


def test_bytes_of_a_frozen_parameter(qlora, trained):
    model = trained[0]
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    parameters = sum(layer.in_features * layer.out_features for layer in layers)
    # A code; a byte for each block of 64; a float32 for 256 of those.  In each layer two tables and an offset, float32.
    each = 0.5 + 1 / 64 + 4 / (64 * 256)
    tables = 4 * (16 + 256 + 1)
    assert qlora.bytes_per_parameter(model) == pytest.approx(each + len(layers) * tables / parameters, rel=1e-12)
    assert qlora.bytes_per_parameter(model) < 0.53


def test_merged_into_4_bits_and_into_floats(qlora, text, folder, trained, tmp_path):
    model, _, (start, end), _, _ = trained
    model.save_pretrained(tmp_path)
    gain = start - end
    merged = peft.PeftModel.from_pretrained(qlora.load_4bit(folder), tmp_path).merge_and_unload()
    assert sum(isinstance(module, bnb.nn.Linear4bit) for module in merged.modules()) == 14
    assert qlora.bytes_per_parameter(merged) == qlora.bytes_per_parameter(model)
    assert abs(qlora.evaluate(merged, text[1]) - end) < 0.25 * gain

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = qlora.load_4bit(folder).dequantize(torch.float32)
    plain = peft.PeftModel.from_pretrained(plain, tmp_path).merge_and_unload()
    assert {type(plain.get_submodule(f"model.layers.0.self_attn.{name}")) for name in ("q_proj", "v_proj")} == {
        nn.Linear
    }
    assert qlora.evaluate(plain, text[1]) == pytest.approx(end, rel=1e-4)


def test_the_paged_optimizer_takes_the_same_steps(qlora, text, folder, trained):
    model = qlora.add_adapters(qlora.load_4bit(folder))
    losses = qlora.train(model, text[0], 20, seed=2, lr=LR, optimizer=bnb.optim.PagedAdamW8bit)
    assert losses == trained[3][:20]


def test_the_example_runs(qlora, tmp_path, capsys):
    qlora.main(["--steps", "12", "--base-steps", "3", "--output", str(tmp_path / "adapters")])
    printed = capsys.readouterr().out
    assert "frozen: 0.5275 bytes per parameter" in printed
    assert printed.count("held out: loss") == 2
    assert (tmp_path / "adapters" / "adapter_model.safetensors").exists()
