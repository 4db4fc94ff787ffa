"""Small helpers: replaced layers, dictionaries packed into tensors, device synchronisation, running a command.

A checkpoint can hold tensors only, so the part of a quantisation state that is not a tensor travels as JSON, one byte
per element of a uint8 tensor.  Layout: docs/FORMAT.md, section 6.
"""

import json
import shlex
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .outliers import OutlierTracer as OutlierTracer
from .outliers import find_outlier_dims as find_outlier_dims
from .outliers import outlier_hook as outlier_hook

# How checkpoints number the layouts of an int8 weight; all but the first are of old releases.
LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {"row": 0, "col32": 1, "col_turing": 2, "col_ampere": 3}
INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = dict(enumerate(LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING))


def replace_linear(
    model: torch.nn.Module,
    linear_replacement: Callable[[int, int, bool], torch.nn.Module],
    skip_modules: Sequence[str] = ("lm_head",),
    copy_weights: bool = False,
    post_processing_function: str | None = None,
) -> torch.nn.Module:
    """Replace the nn.Linear modules below `model`, in place. Returns model.

    linear_replacement        called as linear_replacement(in_features, out_features, has_bias)
    skip_modules              names of children that stay, at any depth; what is below them is replaced
    copy_weights              the new layers take over the parameters, the same objects
    post_processing_function  name of a method of the new layers, called as method(replaced layer) where there is one
    """
    for name, child in model.named_children():
        replace_linear(child, linear_replacement, skip_modules, copy_weights, post_processing_function)
        if not isinstance(child, torch.nn.Linear) or name in skip_modules:
            continue
        new = linear_replacement(child.in_features, child.out_features, child.bias is not None)
        if copy_weights:
            new.weight, new.bias = child.weight, child.bias
        setattr(model, name, new)
        finish = getattr(new, post_processing_function, None) if post_processing_function else None
        if finish is not None:
            finish(child)
    return model


def pack_dict_to_tensor(source_dict: dict[str, Any]) -> Tensor:
    """Encode a dictionary of JSON values. Returns uint8 [bytes] on the CPU: UTF-8 JSON with default separators."""
    return torch.tensor(list(json.dumps(source_dict).encode("utf-8")), dtype=torch.uint8, device="cpu")


def unpack_tensor_to_dict(tensor_data: Tensor) -> dict[str, Any]:
    """Decode what pack_dict_to_tensor() wrote. tensor_data: uint8 [bytes], any device, any JSON whitespace.

    Raises ValueError where the dtype is not uint8, or the bytes are not UTF-8, not JSON or not a JSON object.
    """
    if tensor_data.dtype != torch.uint8:
        raise ValueError(f"packed dictionary: dtype is {tensor_data.dtype}, expected torch.uint8")
    raw = bytes(tensor_data.detach().reshape(-1).tolist())
    try:
        decoded = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        shown = raw[:80] + (b"..." if len(raw) > 80 else b"")
        raise ValueError(f"packed dictionary: {shown!r} is not JSON in UTF-8 ({error})") from None
    if not isinstance(decoded, dict):
        raise ValueError(f"packed dictionary: the JSON value is a {type(decoded).__name__}, expected an object")
    return decoded


def sync_gpu(t: Tensor) -> None:
    """Wait until the device of tensor t has finished its queued work; the CPU has none."""
    if t.device.type != "cpu":
        getattr(torch, t.device.type).synchronize(t.device)


def execute_and_return(command_string: str) -> tuple[str, str]:
    """Run a command without a shell. Returns (stdout, stderr) as text; FileNotFoundError: no such program."""
    done = subprocess.run(shlex.split(command_string), capture_output=True, text=True, check=False)
    return done.stdout, done.stderr
