"""Load sample checkpoints with the bitsandbytes that this interpreter imports, and compare with what their writer made.

    python tests/upstream/read_checkpoints.py FOLDER

FOLDER is one that write_checkpoints.py wrote, with another implementation.  Per kind of file it prints how many were
equal: in every byte after loading and saving again; in the dequantised weight; in the output, or the parameters after
one more step, within rounding.  Exit status 1 if any was not.
Not read: pickled objects (module-*, parameter-*, state-object), which name the modules that their classes live in; and
upstream's used4bit-*, whose scales it has repacked: test_upstream_checkpoints.py knows what is left of them.
"""

import json
import os
import sys
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # upstream compiles its fallbacks, once per shape

import torch
from safetensors import safe_open
from write_checkpoints import OPTIMIZERS, dequantized, take_step

import bitsandbytes
import bitsandbytes.functional as F
from bitsandbytes import nn
from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized

PICKLES = ("module-", "parameter-", "state-object")


def same(given, expected):
    """Equal names, dtypes, shapes and bytes, of tensors, dicts and plain values."""
    if isinstance(expected, torch.Tensor):
        alike = given.dtype == expected.dtype and given.shape == expected.shape
        return alike and torch.equal(given.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))
    if isinstance(expected, dict):
        return sorted(map(str, given)) == sorted(map(str, expected)) and all(
            same(given[k], expected[k]) for k in expected
        )
    return given == expected


def near(given, expected, x, w, bias, extra=0.0):
    """Two products x W^T + bias, rounded to their dtype up to three times, of sums in float32. extra: relative."""
    size = x.float().abs() @ w.float().abs().t() + (0 if bias is None else bias.float().abs())
    error = 1.5 * torch.finfo(expected.dtype).eps + x.shape[-1] * torch.finfo(torch.float32).eps + extra
    return given.dtype == expected.dtype and bool(((given.float() - expected.float()).abs() <= error * size).all())


def split(tensors, start):
    return {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}


def linear4bit(options, state, x, y, w):
    layer = nn.Linear4bit(**options)
    layer.weight = nn.Params4bit.from_prequantized(
        state["weight"].clone(), split(state, "weight."), device="cpu", module=layer
    )
    if "bias" in state:
        layer.bias = torch.nn.Parameter(state["bias"].clone())
    weight = dequantized(layer.weight.data, layer.weight.quant_state)
    saved = {key: value.clone() for key, value in layer.state_dict().items()}
    aligned = x.shape[-1] % layer.weight.quant_state.blocksize == 0
    output = layer(x) if aligned else torch.nn.functional.linear(x, weight, layer.bias)
    return same(saved, state), torch.equal(weight, w), near(output, y, x, w, state.get("bias"))


def linear8bit(options, state, x, y, w):
    """The inputs of one side are quantised from float16: a code may differ by one, 1/127 of the largest input."""
    layer = nn.Linear8bitLt(**options, has_fp16_weights=False).to(x.dtype).to("cpu").eval()
    layer.load_state_dict(dict(state), strict=True)
    saved = {key: value.clone() for key, value in layer.state_dict().items()}
    weight = F.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    with torch.no_grad():
        output = layer(x)
    error = 2.0**-10 + 2e-5 + (0 if x.dtype == torch.float16 else 1 / 127)
    return same(saved, state), torch.equal(weight, w), near(output, y, x, w, state.get("bias"), error)


def stable_embedding(options, state, x, y, w):
    layer = nn.StableEmbedding(**options)
    layer.load_state_dict(state)
    return same(layer.state_dict(), state), True, torch.allclose(layer(x), y, rtol=0, atol=1e-6)


def parametrized(options, state, x, y, w):
    module = torch.nn.Module()
    module.experts = torch.nn.Parameter(state["experts"].clone(), requires_grad=False)
    statistics = {key: value for key, value in state.items() if key != "experts"}
    replace_parameter_4bit_prequantized(module, "experts", statistics, "cpu")
    product = x @ module.experts[1].t()
    return same(module.state_dict(), state), torch.equal(module.experts, w), near(product, y, x, w[1], None)


LAYERS = {
    "linear4bit": linear4bit,
    "used4bit": linear4bit,
    "linear8bit": linear8bit,
    "stable-embedding": stable_embedding,
    "parametrized": parametrized,
}


def read_layer(path):
    with safe_open(path, "pt") as file:
        sample = json.loads(file.metadata()["sample"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no iterator)
    if sample["kind"] == "used4bit" and sample["bitsandbytes"].startswith("0."):
        return sample["kind"], None
    rest = tensors["x"], tensors["y"], tensors.get("w")
    return sample["kind"], LAYERS[sample["kind"]](sample["options"], split(tensors, "layer."), *rest)


def read_states(entry):
    ok = [True, True]
    for name, each in entry.items():
        for form in ("packed", "unpacked"):
            if form not in each:
                continue
            state = F.QuantState.from_dict(dict(each[form]), device=torch.device("cpu"))
            decode = dequantized if name.startswith("4bit") else F.dequantize_blockwise
            ok[0] &= same(state.as_dict(packed=form == "packed"), each[form])
            ok[1] &= torch.equal(decode(each["codes"], state), each["w"])
    return "quant state", (*ok, True)


def read_optimizer(name, entry):
    """States, and the parameters after one more step."""
    cls = OPTIMIZERS[name][0]
    params = [torch.nn.Parameter(p.clone()) for p in entry["params"]]
    optimizer = cls(params, lr=0.5, **entry["options"], **entry["extra"])
    optimizer.load_state_dict(entry["state_dict"])
    loaded = same(optimizer.state_dict()["state"], entry["state_dict"]["state"])
    take_step(optimizer, params, entry["grads"])
    close = True
    for p, old, expected in zip(params, entry["params"], entry["next_params"], strict=True):
        error = torch.finfo(p.dtype).eps * expected.float().abs() + 1e-5 * (expected - old).abs().max()
        close &= bool(((p.detach().float() - expected.float()).abs() <= error).all())
    return "optimizer", (loaded, True, close)


def read(path):
    if path.suffix == ".safetensors":
        return read_layer(path)
    entry = torch.load(path, weights_only=True)
    if path.stem.startswith("optimizer-"):
        return read_optimizer(path.stem.removeprefix("optimizer-"), entry)
    return read_states(entry)


def main(folder):
    table, failed = defaultdict(lambda: [0, 0, 0, 0]), False
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".safetensors", ".pt") or path.stem.startswith(PICKLES):
            continue
        kind, results = read(path)
        if results is None:
            continue
        for i, good in enumerate((True, *results)):
            table[kind][i] += good
        if not all(results):
            failed = True
            print(f"{path.name}: bytes, weight, output equal: {results}")
    print(f"bitsandbytes {bitsandbytes.__version__} on {folder}")
    print(f"{'kind':18} {'files':>6} {'bytes':>6} {'weight':>7} {'output':>7}")
    for kind, (files, *counts) in table.items():
        print(f"{kind:18} {files:6} {counts[0]:6} {counts[1]:7} {counts[2]:7}")
    return 1 if failed or not table else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: read_checkpoints.py FOLDER")
    sys.exit(main(Path(sys.argv[1])))
