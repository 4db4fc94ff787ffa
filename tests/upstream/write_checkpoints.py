"""Write sample checkpoints with the bitsandbytes that this interpreter imports, upstream's or this project's.

    python tests/upstream/write_checkpoints.py FOLDER

Run by upstream's interpreter it makes the files of tests/upstream/checkpoints, for test_upstream_checkpoints.py; run by
ours it makes files for read_checkpoints.py, which upstream's interpreter runs.  Only what both have is used.
*.safetensors  a layer: its state dict under "layer.", and the input x, the output y, the dequantised weight w
               (both of the writer); the metadata has its constructor's arguments
*.pt           pickles: states as dicts and as objects, whole modules, state dicts of optimizers
"""

import itertools
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # upstream compiles its fallbacks, once per shape

import torch
from safetensors.torch import save_file

import bitsandbytes
import bitsandbytes.functional as F
from bitsandbytes import nn, optim
from bitsandbytes.nn.parametrize import replace_parameter_4bit

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# [out, in] and the block size: whole rows, blocks that straddle rows, an odd number of codes, a short last block.
PLAIN_SHAPES = [(16, 64, 64), (17, 33, 64), (12, 96, 64), (3, 256, 128), (5, 130, 128), (2, 600, 512)]
FLOAT_SHAPES = [(16, 64, 64), (12, 96, 128), (4, 256, 256)]  # whole items of 4 bytes
OPTIMIZERS = {
    "adam8bit": (optim.Adam8bit, {"weight_decay": 0.01}),
    "adamw8bit": (optim.AdamW8bit, {}),
    "lion8bit": (optim.Lion8bit, {"weight_decay": 0.1}),
    "ademamix8bit": (optim.AdEMAMix8bit, {}),
    "pagedadamw8bit": (optim.PagedAdamW8bit, {"betas": (0.9, 0.95)}),
    "adamw32bit": (optim.AdamW32bit, {}),
    "lion32bit": (optim.Lion32bit, {}),
    "ademamix": (optim.AdEMAMix, {}),
}


def dequantized(packed, state):
    """The weight, decoded as one row: upstream's CPU kernel takes wrong scales where rows are not whole blocks."""
    shape, state.shape = state.shape, torch.Size((1, state.shape.numel()))
    weight = F.dequantize_4bit(packed, state).reshape(shape)
    state.shape = shape
    return weight


def write_layer(path, kind, options, layer, x, y, w=None):
    tensors = {f"layer.{key}": value for key, value in layer.state_dict().items()}
    tensors.update({"x": x, "y": y} if w is None else {"x": x, "y": y, "w": w})
    sample = {"kind": kind, "options": options, "bitsandbytes": bitsandbytes.__version__}
    tensors = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    save_file(tensors, path, {"sample": json.dumps(sample)})  # one entry: several come in random order


def linear4bit(quant_type, nested, dtype, storage, shape, block, bias):
    """A quantised layer of random weights of the given dtype, in training mode: upstream then keeps its statistics."""
    rows, columns = shape
    layer = nn.Linear4bit(columns, rows, bias, None, nested, quant_type, storage)
    layer.weight = nn.Params4bit(
        layer.weight.data.to(dtype),
        requires_grad=False,
        blocksize=block,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
        module=layer,
    )
    if bias:
        layer.bias.data = layer.bias.data.to(dtype)
    return layer.to("cpu")


def write_linear4bit(folder):
    cases = list(itertools.product(("nf4", "fp4"), (False, True), DTYPES, ("uint8", "float")))
    for i, (quant_type, nested, name, storage) in enumerate(cases):
        dtype = DTYPES[name]
        shapes = PLAIN_SHAPES if storage == "uint8" else FLOAT_SHAPES
        *shape, block = shapes[(i // 2 + i // 12) % len(shapes)]
        torch.manual_seed(i)
        held = torch.uint8 if storage == "uint8" else (torch.float32 if name == "f32" else torch.bfloat16)
        write_one_4bit(folder, quant_type, nested, name, held, shape, block, i % 4 < 2, dtype)
    torch.manual_seed(100)
    write_one_4bit(folder, "nf4", True, "f16", torch.uint8, (33, 256), 32, False, torch.float16)


def write_one_4bit(folder, quant_type, nested, name, held, shape, block, bias, dtype):
    layer = linear4bit(quant_type, nested, dtype, held, shape, block, bias)
    w = dequantized(layer.weight.data, layer.weight.quant_state)
    x = torch.randn(2, shape[1]).to(dtype)
    aligned = shape[1] % block == 0
    y = layer(x) if aligned else torch.nn.functional.linear(x, w, layer.bias)
    options = {"input_features": shape[1], "output_features": shape[0], "bias": bias, "quant_type": quant_type}
    options["compress_statistics"] = nested
    storage = str(held).removeprefix("torch.")
    kind = f"linear4bit-{quant_type}-{'nested' if nested else 'plain'}-{name}-{storage}-{shape[0]}x{shape[1]}-{block}"
    write_layer(folder / f"{kind}.safetensors", "linear4bit", options, layer, x, y, w)


def write_after_inference(folder):
    """Layers saved after a forward in eval mode, for which upstream repacks the weight on CPUs with AVX512-BF16."""
    for nested in (False, True):
        torch.manual_seed(101)
        layer = linear4bit("nf4", nested, torch.bfloat16, torch.uint8, (32, 64), 64, True).eval()
        w = dequantized(layer.weight.data, layer.weight.quant_state)
        x = torch.randn(3, 64).to(torch.bfloat16)
        with torch.no_grad():
            y = layer(x)
        options = {"input_features": 64, "output_features": 32, "quant_type": "nf4", "compress_statistics": nested}
        path = folder / f"used4bit-{'nested' if nested else 'plain'}.safetensors"
        write_layer(path, "used4bit", options, layer, x, y, w)


def write_linear8bit(folder):
    cases = itertools.product(DTYPES, (0.0, 6.0), (False, True))
    for i, (name, threshold, used) in enumerate(cases):
        torch.manual_seed(200 + i)
        rows, columns = [(8, 48), (9, 33), (8, 64)][i % 3]
        bias = i % 2 == 0
        layer = nn.Linear8bitLt(columns, rows, bias, has_fp16_weights=False, threshold=threshold).to(DTYPES[name])
        layer = layer.to("cpu").eval()
        w = F.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
        x = torch.randn(4, columns)
        x[1, 5] = 8.0
        x = x.to(DTYPES[name])
        saved = {key: value.clone() for key, value in layer.state_dict().items()}
        with torch.no_grad():
            y = layer(x)
        after = layer.state_dict()
        assert list(after) == list(saved)
        options = {"input_features": columns, "output_features": rows, "bias": bias, "threshold": threshold}
        kind = f"linear8bit-{name}-{'used' if used else 'new'}-{rows}x{columns}-{threshold:g}"
        holder = layer if used else _Saved(saved)
        write_layer(folder / f"{kind}.safetensors", "linear8bit", options, holder, x, y, w)


class _Saved:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state


def write_others(folder):
    torch.manual_seed(300)
    layer = nn.StableEmbedding(20, 24, padding_idx=3)
    x = torch.tensor([[0, 3, 19], [7, 7, 1]])
    options = {"num_embeddings": 20, "embedding_dim": 24, "padding_idx": 3}
    write_layer(folder / "stable-embedding.safetensors", "stable-embedding", options, layer, x, layer(x))
    for nested in (False, True):
        module = torch.nn.Module()
        module.experts = torch.nn.Parameter(torch.randn(3, 8, 64).to(torch.bfloat16))
        replace_parameter_4bit(module, "experts", compress_statistics=nested, quant_type="nf4")
        x = torch.randn(2, 64).to(torch.bfloat16)
        w = module.experts
        options = {"compress_statistics": nested, "quant_type": "nf4", "blocksize": 64}
        path = folder / f"parametrized-{'nested' if nested else 'plain'}.safetensors"
        write_layer(path, "parametrized", options, module, x, x @ w[1].t(), w)


def write_states(folder):
    """States in both dict forms and as objects, of 4-bit and 8-bit tensors."""
    torch.manual_seed(400)
    result = {}
    for nested in (False, True):
        packed, state = F.quantize_4bit(torch.randn(9, 70), blocksize=64, compress_statistics=nested, quant_type="fp4")
        w = dequantized(packed, state)
        both = {"unpacked": state.as_dict(packed=False), "packed": state.as_dict(packed=True)}
        result[f"4bit-{nested}"] = {"codes": packed, "w": w, **both}
    for nested, name in ((False, "f16"), (False, "f32"), (True, "bf16")):
        a = torch.randn(2, 130).to(DTYPES[name])
        codes, state = F.quantize_blockwise(a, blocksize=64 if nested else 128, nested=nested)
        w = F.dequantize_blockwise(codes, state)
        result[f"8bit-{nested}-{name}"] = {"codes": codes, "w": w, "unpacked": state.as_dict()}
    torch.save(result, folder / "states.pt")
    torch.manual_seed(401)
    packed, state = F.quantize_4bit(torch.randn(9, 70), compress_statistics=True, quant_type="nf4")
    torch.save({"codes": packed, "state": state, "w": dequantized(packed, state)}, folder / "state-object.pt")


def write_modules(folder):
    """Whole modules, and a bare parameter, as torch.save pickles them."""
    torch.manual_seed(500)
    four = linear4bit("nf4", True, torch.float32, torch.uint8, (8, 64), 64, True)
    eight = nn.Linear8bitLt(48, 16, has_fp16_weights=False, threshold=6.0).to("cpu").eval()
    x4, x8 = torch.randn(3, 64), torch.randn(3, 48)
    with torch.no_grad():
        y4, y8 = four(x4), eight(x8)
    w4 = dequantized(four.weight.data, four.weight.quant_state)
    w8 = F.int8_vectorwise_dequant(eight.state.CB, eight.state.SCB)
    codes = four.weight.data.clone(), eight.state.CB.clone()
    torch.save({"layer": four, "x": x4, "y": y4, "w": w4, "codes": codes[0]}, folder / "module-4bit.pt")
    torch.save({"layer": eight, "x": x8, "y": y8, "w": w8, "codes": codes[1]}, folder / "module-8bit.pt")
    bare = nn.Params4bit(torch.randn(8, 64), requires_grad=False, quant_type="fp4").to("cpu")
    w = dequantized(bare.data, bare.quant_state)
    torch.save({"weight": bare, "w": w, "codes": bare.data.clone()}, folder / "parameter-4bit.pt")


def write_optimizers(folder):
    """After three steps: the state dict, the parameters, the gradients of the fourth step and what it makes."""
    for i, (name, (cls, options)) in enumerate(OPTIMIZERS.items()):
        torch.manual_seed(600 + i)
        shapes = [(17, 241), (7,)] if name == "adam8bit" else [(17, 19), (7,)]
        dtype = torch.bfloat16 if name == "adam8bit" else torch.float32
        params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
        extra = {"min_8bit_size": 256} if "8bit" in name and name != "adam8bit" else {}
        optimizer = cls(params, lr=1e-2, **options, **extra)
        for _ in range(3):
            take_step(optimizer, params, new_grads(params))
        state, before = optimizer.state_dict(), [p.detach().clone() for p in params]
        saved = {
            "class": cls.__name__,
            "options": options,
            "extra": extra,
            "state_dict": clone(state),
            "params": before,
        }
        grads = new_grads(params)
        take_step(optimizer, params, grads)
        saved |= {"grads": grads, "next_params": [p.detach().clone() for p in params]}
        torch.save(saved, folder / f"optimizer-{name}.pt")


def clone(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: clone(each) for key, each in value.items()}
    return [clone(each) for each in value] if isinstance(value, list) else value


def new_grads(params):
    return [torch.randn(p.shape).to(p.dtype) for p in params]


def take_step(optimizer, params, grads):
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.clone()
    optimizer.step()


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for write in (
        write_linear4bit,
        write_after_inference,
        write_linear8bit,
        write_others,
        write_states,
        write_modules,
        write_optimizers,
    ):
        write(folder)
    sizes = [each.stat().st_size for each in folder.iterdir() if each.suffix in (".safetensors", ".pt")]
    print(f"bitsandbytes {bitsandbytes.__version__}: {len(sizes)} files, {sum(sizes)} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: write_checkpoints.py FOLDER")
    main(Path(sys.argv[1]))
