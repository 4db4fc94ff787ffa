"""python -m bitsandbytes, and what importing the package does: in a fresh process each."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

import bitsandbytes as bnb
from bitsandbytes import __main__ as command

PACKAGES = ("accelerate", "diffusers", "numpy", "pip", "peft", "safetensors", "transformers", "triton", "trl")


def python(*args, **environment):
    """Run the interpreter on this package. Returns (exit status, stdout, stderr)."""
    path = os.pathsep.join([str(pathlib.Path(bnb.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env, check=False, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_report_and_self_check():
    status, out, err = python("-m", "bitsandbytes")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert len(lines[0]) == 60
    assert re.fullmatch(rf"=+ bitsandbytes v{re.escape(bnb.__version__)} =+", lines[0])
    assert lines[-1] == "SUCCESS!"
    labels = [line.split(":")[0].strip() for line in lines]
    order = ["Platform", "Python", "PyTorch", "CUDA", "HIP", "XPU", "Packages", *PACKAGES, "=" * 60]
    order += ["Library", "version", "CPU kernels", "CPU"]
    positions = [labels.index(label) for label in order]
    assert positions == sorted(positions)
    for name in ("quantisation", "training"):
        assert f"Check of {name}: passed" in lines
    assert str(bnb.cextension.library_path) in out


def test_a_lesser_instruction_set_is_reported():
    status, out, _ = python("-m", "bitsandbytes", BNB_CPU_ISA="scalar")
    assert status == 0
    assert re.search(r"CPU kernels: +scalar$", out, re.MULTILINE)


def test_missing_library(tmp_path):
    missing = str(tmp_path / "absent.so")
    status, out, err = python("-m", "bitsandbytes", BNB_LIBRARY=missing)
    assert (status, err) == (1, "")
    assert "FAILED" in out
    assert "BNB_LIBRARY" in out
    assert missing in out
    assert "SUCCESS" not in out


def test_a_file_that_is_no_library(tmp_path):
    fake = tmp_path / "libbitsandbytes.so"
    fake.write_bytes(b"not a library")
    status, out, _ = python("-m", "bitsandbytes", BNB_LIBRARY=str(fake))
    assert status == 1
    assert str(fake) in out


@pytest.mark.parametrize(
    ("target", "broken", "text"),
    [
        ("dequantize_blockwise", lambda codes, state: codes.float(), "8-bit"),
        ("dequantize_nf4", lambda codes, state: bnb.functional.dequantize_4bit(codes, state) * 1.5, "NF4"),
        ("dequantize_fp4", lambda codes, state: bnb.functional.dequantize_4bit(codes, state) * float("nan"), "FP4"),
    ],
)
def test_a_wrong_round_trip_is_noticed(monkeypatch, capsys, target, broken, text):
    monkeypatch.setattr(bnb.functional, target, broken)
    assert command.main() == 1
    out = capsys.readouterr().out
    assert f"RuntimeError: {text}: a value is off by" in out
    assert "SUCCESS" not in out


def test_an_optimizer_that_does_not_train_is_noticed(monkeypatch, capsys):
    monkeypatch.setattr(bnb.optim.AdamW8bit, "_update", lambda self, call, settings, grads: None)
    assert command.main() == 1
    out = capsys.readouterr().out
    assert "Check of quantisation: passed" in out
    assert "AdamW8bit: loss" in out


def test_importing_prints_nothing_and_works_without_the_library(tmp_path):
    code = "import bitsandbytes as bnb; bnb.functional, bnb.nn, bnb.optim, bnb.utils; bnb.optim.AdamW8bit"
    assert python("-W", "error", "-c", code) == (0, "", "")
    assert python("-W", "error", "-c", code, BNB_LIBRARY=str(tmp_path / "absent.so")) == (0, "", "")


def test_the_first_call_without_the_library_says_why(tmp_path):
    missing = str(tmp_path / "absent.so")
    code = """
import torch, bitsandbytes as bnb
p = torch.nn.Parameter(torch.ones(5000)); p.grad = torch.ones(5000)
calls = [
    lambda: bnb.functional.quantize_4bit(torch.ones(64)),
    lambda: bnb.functional.quantize_blockwise(torch.ones(64)),
    lambda: bnb.functional.create_dynamic_map(),
    lambda: bnb.optim.AdamW8bit([p]).step(),
    lambda: bnb.optim.AdamW([p]).step(),
]
for call in calls:
    try:
        call()
    except RuntimeError as error:
        print("BNB_LIBRARY" in str(error))
"""
    status, out, err = python("-c", code, BNB_LIBRARY=missing)
    assert (status, out.split(), err) == (0, ["True"] * 5, "")


def test_importing_does_not_initialise_an_accelerator():
    code = "import torch, bitsandbytes; print(torch.cuda.is_initialized())"
    assert python("-c", code) == (0, "False\n", "")
