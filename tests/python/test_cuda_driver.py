"""Which device code runs on a card: the report, the compiler at run time, its cache; what CUDA tests compare with."""

import os
import re
import stat

import pytest
import torch

import cuda_cases
from bitsandbytes import cextension
from cuda_cases import check_parameter, check_same, needs_cuda, python

# Two kinds of image, one of them with variants, so that little is compiled: four-bit codes of f32, and SGD with its
# tables.  The hash of all results is printed.
WORK = """
import torch, bitsandbytes as bnb, cuda_cases
x = cuda_cases.values(10007, "f32", "wide", 1).cuda()
codes, absmax = torch.ops.bitsandbytes.quantize_4bit(x, 64, "nf4", torch.uint8)
back = torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, 64, "nf4", [10007], torch.float32)
p = torch.nn.Parameter(x.nan_to_num(0, 0, 0).clamp(-1, 1))
optimizer = bnb.optim.SGD8bit([p], lr=0.1, momentum=0.9, weight_decay=0.01)
for step in range(3):
    p.grad = p.detach() * 0.3 - 0.01 * step
    optimizer.step()
state = optimizer.state[p]
print(cuda_cases.digest(codes, absmax, back, p.data, state["state1"], state["absmax1"]))
"""
TEXTS = (
    r"machine code of \d+\.\d",
    r"PTX of \d+\.\d, compiled by the driver",
    r"source, compiled on first use by NVRTC \d+\.\d+ for (sm|compute)_\w+ \(.+\)",
)


def run(code, **environment):
    """The lines that the code printed."""
    status, out, err = python("-c", code, **environment)
    assert status == 0, err
    return out.split()


def has_compiler():
    """Could the run-time compiler serve the first card?"""
    code = "import torch, bitsandbytes; torch.ones(1).cuda(); print(bitsandbytes.cextension.card_text(0))"
    return "source, compiled" in " ".join(run(code, BNB_CUDA_JIT="1"))


# ---- on every machine


def test_the_report_says_what_runs_or_why_not():
    status, out, err = python("-m", "bitsandbytes")
    assert (status, err) == (0, "")
    lines = re.findall(r"^  CUDA kernels: +(.+)$", out, re.MULTILINE)
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    assert len(lines) == max(cards, 1)
    if cards:
        assert all(re.fullmatch("|".join(TEXTS), line) for line in lines), lines
    else:
        assert re.search(r"^GPU: +none found by PyTorch$", out, re.MULTILINE)


def test_text_of_a_card_that_is_not_there():
    text = cextension.card_text(63)
    if torch.cuda.is_available():
        assert re.fullmatch(r"ex->ordinal is 63, expected 0\.\.\d+", text)
    else:
        assert re.match("the CUDA driver |cuInit|cuDevice", text)
    assert "expected 0" in cextension.card_text(-1)


def test_text_without_the_library(tmp_path):
    code = "from bitsandbytes import cextension; print(cextension.card_text(0))"
    status, out, _ = python("-c", code, BNB_LIBRARY=str(tmp_path / "absent.so"))
    assert status == 0
    assert "BNB_LIBRARY" in out


def test_the_comparison_sees_one_bit(dtype):
    """check_same() and check_parameter() would notice what they are there for."""
    a = cuda_cases.values(1000, dtype, "special", 1)
    check_same(a.clone(), a)
    check_parameter(a.clone(), a, a, dtype)
    at = int((a.abs() > 0.5).nonzero()[0])
    integer = torch.int32 if dtype == "f32" else torch.int16
    for units in (1, 2, -2):
        b = a.clone()
        b.view(integer)[at] += units
        with pytest.raises(AssertionError, match="differ"):
            check_same(b, a)
        if dtype == "f32" or abs(units) > 1:
            with pytest.raises(AssertionError, match=r"differ|beyond one ulp"):
                check_parameter(b, a, a, dtype)
        else:
            check_parameter(b, a, a, dtype)
    b = a.clone()
    b[at] = torch.nan
    with pytest.raises(AssertionError, match="differ"):
        check_same(b, a)
    with pytest.raises(AssertionError):
        check_parameter(b, a, a, dtype)
    zero = torch.zeros(3)
    with pytest.raises(AssertionError, match="differ"):
        check_same(-zero, zero)
    with pytest.raises(AssertionError):
        check_same(zero.half(), zero)


# ---- on a card


@needs_cuda
def test_a_report_from_source():
    """BNB_CUDA_JIT=1 is named as the reason; where there is no compiler, that is said."""
    _, out, _ = python("-m", "bitsandbytes", BNB_CUDA_JIT="1", BNB_NVRTC="/nowhere/libnvrtc.so")
    line = re.search(r"^  CUDA kernels: +(.+)$", out, re.MULTILINE)
    assert line
    assert "BNB_CUDA_JIT is 1" in line[1]


@needs_cuda
def test_code_compiled_here_gives_the_same_bits(tmp_path):
    """The images; then the source, compiled; then the source, from the cache that this filled."""
    if not has_compiler():
        pytest.skip(cextension.card_text(0))
    cache = tmp_path / "cache"
    images = run(WORK, BNB_CUDA_JIT="0", BNB_CACHE_DIR=str(tmp_path / "unused"))
    compiled = run(WORK, BNB_CUDA_JIT="1", BNB_CACHE_DIR=str(cache))
    assert compiled == images
    files = sorted(cache.glob("*.cubin"))
    assert len(files) >= 3
    assert stat.S_IMODE(cache.stat().st_mode) & 0o022 == 0
    before = [f.stat().st_mtime_ns for f in files]
    assert run(WORK, BNB_CUDA_JIT="1", BNB_CACHE_DIR=str(cache)) == images
    assert [f.stat().st_mtime_ns for f in sorted(cache.glob("*.cubin"))] == before
    files[0].write_bytes(files[0].read_bytes()[:-1])  # a damaged file is made again
    assert run(WORK, BNB_CUDA_JIT="1", BNB_CACHE_DIR=str(cache)) == images


@needs_cuda
def test_a_cache_folder_that_cannot_be_written(tmp_path):
    """A read-only folder, and a path below a file: compiled in every process, and all is well."""
    if not has_compiler():
        pytest.skip(cextension.card_text(0))
    code = WORK[: WORK.index("p = torch")] + "print(cuda_cases.digest(codes, absmax, back))"
    images = run(code, BNB_CUDA_JIT="0")
    folder, file = tmp_path / "closed", tmp_path / "file"
    folder.mkdir(mode=0o500)
    file.write_text("")
    assert run(code, BNB_CUDA_JIT="1", BNB_CACHE_DIR=str(folder)) == images
    if os.geteuid():  # the administrator may write anywhere
        assert not list(folder.iterdir())
    assert run(code, BNB_CUDA_JIT="1", BNB_CACHE_DIR=str(file / "below")) == images
    assert file.read_text() == ""
