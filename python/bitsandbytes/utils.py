"""Small helpers: dictionaries packed into tensors, device synchronisation, running a command.

A checkpoint can hold tensors only, so the part of a quantisation state that is not a tensor travels as JSON, one byte
per element of a uint8 tensor.  Layout: docs/FORMAT.md, section 6.
"""

import json
import shlex
import subprocess

import torch


def pack_dict_to_tensor(source_dict):
    """Encode a dictionary of JSON values. Returns uint8 [bytes] on the CPU: UTF-8 JSON with default separators."""
    return torch.tensor(list(json.dumps(source_dict).encode("utf-8")), dtype=torch.uint8, device="cpu")


def unpack_tensor_to_dict(tensor_data):
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


def sync_gpu(t):
    """Wait until the device of tensor t has finished its queued work; the CPU has none."""
    if t.device.type != "cpu":
        getattr(torch, t.device.type).synchronize(t.device)


def execute_and_return(command_string):
    """Run a command without a shell. Returns (stdout, stderr) as text; FileNotFoundError: no such program."""
    done = subprocess.run(shlex.split(command_string), capture_output=True, text=True, check=False)
    return done.stdout, done.stderr
