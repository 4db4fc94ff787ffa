"""python -m bitsandbytes: what is installed, on which machine, and whether it works.

Prints a report for bug reports, then quantises, dequantises and trains a little on every device that the library
serves.  Exit status 0 after "SUCCESS!", 1 after a line that says what failed and what to do.
"""

import ctypes
import itertools
import platform
import sys
from importlib import metadata

import torch

import bitsandbytes as bnb
from bitsandbytes import cextension

_WIDTH = 60
_PACKAGES = ("accelerate", "diffusers", "numpy", "pip", "peft", "safetensors", "transformers", "triton", "trl")


def _line(name: str, value: object) -> None:
    print(f"{name + ':':<16}{value}")


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not found"


def print_report() -> None:
    """The facts about platform, packages, library and devices."""
    print(f" bitsandbytes v{bnb.__version__} ".center(_WIDTH, "="))
    libc = " ".join(platform.libc_ver()) if platform.system() == "Linux" else ""
    _line("Platform", platform.platform() + (f", {libc}" if libc.strip() else ""))
    _line("Python", platform.python_version())
    _line("PyTorch", torch.__version__)
    _line("  CUDA", torch.version.cuda or "none")
    _line("  HIP", getattr(torch.version, "hip", None) or "none")
    _line("  XPU", getattr(torch.version, "xpu", None) or "none")
    print("Packages")
    for package in _PACKAGES:
        _line(f"  {package}", _version_of(package))
    print("=" * _WIDTH)
    _line("Library", cextension.library_path)
    if cextension.load_error is None:
        _line("  version", cextension.library_version())
        isa = cextension.lib.bnb_cpu_isa
        isa.argtypes, isa.restype = [], ctypes.c_char_p
        _line("  CPU kernels", isa().decode())
    else:
        _line("  not loaded", cextension.load_error)
    _line("CPU", f"{platform.machine()}, {torch.get_num_threads()} threads")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for i in range(count):
        major, minor = torch.cuda.get_device_capability(i)
        _line(f"GPU {i}", f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}")
        _line("  CUDA kernels", cextension.card_text(i))
    if not count:
        _line("GPU", "none found by PyTorch")
        _line("  CUDA kernels", cextension.card_text(0))


def _check_round_trip(device: str) -> None:
    """Quantise random values and restore them; RuntimeError if one is further off than its map allows."""
    F = bnb.functional
    x = torch.randn(257, 64, generator=torch.Generator().manual_seed(0)).to(device)
    scale = x.abs().amax(dim=1, keepdim=True)
    forms = (
        ("8-bit", F.quantize_blockwise, F.dequantize_blockwise),
        ("NF4", F.quantize_nf4, F.dequantize_nf4),
        ("FP4", F.quantize_fp4, F.dequantize_fp4),
    )
    for name, quantize, dequantize in forms:
        codes, state = quantize(x, blocksize=64)
        error = ((x - dequantize(codes, state)).abs() / scale).max().item()
        entries = state.code.sort().values  # half of the widest gap, or what the ends leave of [-1, 1]
        bound = 1.001 * max(entries.diff().max() / 2, 1 + entries[0], 1 - entries[-1]).item()
        if not error <= bound:
            raise RuntimeError(f"{name}: a value is off by {error:.4f} of its block's maximum, expected <= {bound:.4f}")


def _check_training(device: str) -> None:
    """A few steps of AdamW8bit on a small regression; RuntimeError unless the loss falls by a quarter."""
    generator = torch.Generator().manual_seed(0)
    x, target = (torch.randn(128, 64, generator=generator).to(device) for _ in range(2))
    weight = torch.nn.Parameter(torch.zeros(64, 64, device=device))
    optimizer = bnb.optim.AdamW8bit([weight], lr=3e-2, min_8bit_size=0)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.mse_loss(x @ weight, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if optimizer.state[weight]["state1"].dtype != torch.uint8:
        raise RuntimeError("AdamW8bit has no 8-bit state")
    if not losses[-1] < 0.75 * losses[0]:
        raise RuntimeError(f"AdamW8bit: loss {losses[0]:.4f} became {losses[-1]:.4f}, expected 3/4 or less")


def main() -> int:
    """Print the report and run the checks. Returns the exit status."""
    print_report()
    print("=" * _WIDTH)
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    checks = (("quantisation", _check_round_trip), ("training", _check_training))
    for device, (check_name, check) in itertools.product(["cpu", *(f"cuda:{i}" for i in range(cards))], checks):
        name = check_name if device == "cpu" else f"{check_name} on {device}"
        try:
            check(device)
        except Exception as error:  # the report must name whatever happened
            print(f"Check of {name}: FAILED\n{type(error).__name__}: {error}")
            print("The installation does not work. If the text above gives no remedy, reinstall the package, and")
            print("report the problem together with everything that this command printed.")
            return 1
        print(f"Check of {name}: passed")
    print("SUCCESS!")
    return 0


if __name__ == "__main__":
    sys.exit(main())
