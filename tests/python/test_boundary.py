"""The boundary to torch: every operator under opcheck, compilation, modes and threads; strides; leaks; loading.

What the numbers must be is tested elsewhere (test_quantize_oracle.py, test_optim*.py); here the same call is compared
across the ways to make it.  torch.func.functionalize() is not among them: by torch's own rule it refuses every custom
operator that writes to an argument; functionalization is tested through AOT instead, which is what torch.compile uses.
"""

import ctypes
import gc
import os
import subprocess
import sys
import threading

import pytest
import torch

from bitsandbytes import _ops, cextension
from operator_samples import (
    EVERY_OPERATOR,
    SAMPLES,
    SIGNED,
    UNSIGNED,
    bits,
    group_step,
    ops,
    parameter,
    quantized_4bit,
    tensors_of,
    update_32bit,
    values,
)

call = _ops.call
every_sample = pytest.mark.parametrize("key", SAMPLES)


def same(a, b):
    """Equal results, arguments included: values, dtypes and strides."""
    a, b = tensors_of(a), tensors_of(b)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert x.stride() == y.stride()
        assert torch.equal(bits(x), bits(y))


def eager(key):
    """Results and arguments of one ordinary call."""
    op, make = SAMPLES[key]
    args = make()
    return op(*args), args


def test_every_operator_has_samples():
    named = {str(op).removeprefix("bitsandbytes.").removesuffix(".default") for op, _ in SAMPLES.values()}
    assert named == EVERY_OPERATOR
    for name in EVERY_OPERATOR:
        for key in ("CPU", "CUDA") if torch.version.cuda else ("CPU",):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bitsandbytes::{name}", key)
        assert torch.Tag.pt2_compliant_tag in SAMPLES[f"{name}-plain"][0].tags


@every_sample
def test_opcheck(key):
    op, make = SAMPLES[key]
    assert set(torch.library.opcheck(op, make()).values()) == {"SUCCESS"}


@every_sample
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(key, dynamic):
    """Arguments of the graph are written directly, and the operator is the whole graph."""
    op, make = SAMPLES[key]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: call(op, *args), fullgraph=True, dynamic=dynamic)
    args = make()
    same((compiled(*args), args), eager(key))


@every_sample
def test_compile_intermediates(key):
    """The written tensors are born inside the graph: functionalization must copy, and must not lose a write."""
    op, make = SAMPLES[key]
    torch._dynamo.reset()

    def again(arg):
        if isinstance(arg, torch.Tensor):
            return arg.clone()
        return [again(item) for item in arg] if isinstance(arg, list) else arg

    def graph(*args):
        inner = [again(arg) for arg in args]
        result = call(op, *inner)
        return result, [t.clone() for t in tensors_of(inner)]

    compiled = torch.compile(graph, fullgraph=True, backend="aot_eager")
    args = make()
    got, expected = compiled(*args), graph(*make())
    assert len(tensors_of(got)) == len(tensors_of(expected))
    for x, y in zip(tensors_of(got), tensors_of(expected), strict=True):
        assert torch.equal(bits(x), bits(y))
    same(args, make())


def test_export():
    class Module(torch.nn.Module):
        def forward(self, x):
            return ops.quantize_4bit(x, 64, "nf4", torch.uint8)

    program = torch.export.export(Module(), (values("plain"),), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    x = torch.randn(9, 67)
    same(program.module()(x), ops.quantize_4bit(x, 64, "nf4", torch.uint8))


@every_sample
def test_modes(key):
    """Inference mode, autocast and gradient mode change nothing."""
    op, make = SAMPLES[key]
    expected = eager(key)
    with torch.inference_mode():
        args = make()
        same((op(*args), args), expected)
    args = make()
    with torch.inference_mode():
        same((op(*args), args), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        args = make()
        same((op(*args), args), expected)


@every_sample
def test_fresh_thread(key):
    result = []
    thread = threading.Thread(target=lambda: result.append(eager(key)))
    thread.start()
    thread.join()
    same(result[0], eager(key))


@every_sample
def test_meta(key):
    """Meta tensors go through the fake: shapes, dtypes and strides of the real result, and nothing is computed."""
    op, make = SAMPLES[key]

    def meta(arg):
        if isinstance(arg, torch.Tensor):
            return torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype, device="meta")
        return [meta(item) for item in arg] if isinstance(arg, list) and tensors_of(arg) else arg

    fake, real = op(*[meta(arg) for arg in make()]), op(*make())
    for x, y in zip(tensors_of(fake), tensors_of(real), strict=True):
        assert (x.shape, x.stride(), x.dtype, x.device.type) == (y.shape, y.stride(), y.dtype, "meta")


def test_threads_are_torchs():
    x, before = torch.randn(700_001), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.quantize_blockwise(x, SIGNED, 256)
        torch.set_num_threads(2)
        same(ops.quantize_blockwise(x, SIGNED, 256), one)
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- strides


def test_strides_of_inputs_do_not_matter():
    for key in (k for k in SAMPLES if k.endswith("-strided")):
        op, make = SAMPLES[key]
        args, plain = make(), [a.contiguous() if isinstance(a, torch.Tensor) else a for a in make()]
        if any(isinstance(a, list) for a in args[:2]):
            plain = [[t.contiguous() for t in a] if isinstance(a, list) and tensors_of(a) else a for a in plain]
        before = [t.stride() for t in tensors_of(args)]
        got, expected = op(*args), op(*plain)
        assert [t.stride() for t in tensors_of(args)] == before, key
        for x, y in zip(tensors_of((got, args)), tensors_of((expected, plain)), strict=True):
            assert torch.equal(x, y), key


@pytest.mark.parametrize("precision", [8, 32])
@pytest.mark.parametrize("odd", [None, "p", "g", "state2"])
def test_update_follows_the_layout_of_the_state(precision, odd):
    """channels_last state: blocks run in storage order, whatever the layout of the others; no stride changes."""
    shape, names = (3, 5, 7, 9), ["p", "g", "state1", "state2"]
    rows = [torch.randn(shape) for _ in range(2)]
    dtype = torch.uint8 if precision == 8 else torch.float32
    rows += [torch.zeros(shape, dtype=dtype) for _ in range(2)]
    absmax = [torch.zeros(4), torch.zeros(4)]
    mixed = [t if n == odd else t.to(memory_format=torch.channels_last) for n, t in zip(names, rows, strict=True)]
    plain = [t.permute(0, 2, 3, 1).contiguous() for t in rows]
    mixed = [t.clone() for t in mixed] + [t.clone() for t in absmax]
    plain += [t.clone() for t in absmax]
    strides = [t.stride() for t in mixed]
    for step in (1, 2, 3):
        ops._optimizer_step(*group_step([mixed], [step]))
        ops._optimizer_step(*group_step([plain], [step]))
    assert [t.stride() for t in mixed] == strides
    for x, y in zip(mixed[:4], plain[:4], strict=True):
        assert torch.equal(x.permute(0, 2, 3, 1), y)
    same(mixed[4:], plain[4:])
    assert not torch.equal(mixed[0], rows[0])


def test_direct_update_copies_nothing():
    """Equal dense strides: the storage is written directly, so no memory beyond the arguments is touched."""
    p, g, m, v = (t.to(memory_format=torch.channels_last) for t in _four_dim())
    version = p._version
    ops._optimizer_step(*group_step([[p, g, m, v, None, None]]))
    assert p._version == version  # a copy back through torch would have counted
    ops._optimizer_step(*group_step([[p, g.contiguous(), m, v, None, None]]))
    assert p._version == version
    ops._optimizer_step(*group_step([[p, g, m.contiguous(), v.contiguous(), None, None]]))
    assert p._version == version + 1


def _four_dim():
    shape = (2, 3, 4, 5)
    return torch.randn(shape), torch.randn(shape), torch.zeros(shape), torch.zeros(shape)


def test_one_call_equals_many():
    """A group of mixed precision and dtype, against one public update per parameter."""
    kinds = [("plain", 8), ("plain", 32, torch.bfloat16), ("strided", 8, torch.float16), ("empty", 8)]
    group, single = [parameter(*kind) for kind in kinds], [parameter(*kind) for kind in kinds]
    ops._optimizer_step(*group_step(group, [1, 2, 3, 4]))
    for step, (p, g, state1, state2, absmax1, absmax2) in enumerate(single, 1):
        scalars = (0.9, 0.999, 0.0, 0.0, 1e-8)
        if state1.dtype == torch.uint8:
            ops.optimizer_update_8bit_blockwise(
                *("adam", g, p, state1, state2, *scalars, step, 1e-2, SIGNED, UNSIGNED, absmax1, absmax2, 0.1, 1.0)
            )
        else:
            ops.optimizer_update_32bit("adam", g, p, state1, state2, None, 0.0, 0.0, *scalars, 0.1, step, 1e-2, 1.0)
    same(group, single)


def test_parameters_that_require_grad():
    """No trace in autograd, with gradients enabled, direct or through a temporary."""
    for kind in ("plain", "strided"):
        args = list(update_32bit(kind))
        expected, args[2] = args[2].clone(), args[2].clone().requires_grad_()
        call(ops.optimizer_update_32bit.default, *args)
        assert args[2].grad_fn is None
        assert args[2].is_leaf
        assert not torch.equal(args[2], expected)


# ---------------------------------------------------------------- packed storage


@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 10, 64, 65])
def test_packed_storage_is_padded_with_zero(storage, n):
    x = torch.randn(n)
    bytes_, absmax = ops.quantize_4bit(x, 64, "nf4", torch.uint8)
    packed, _ = ops.quantize_4bit(x, 64, "nf4", storage)
    raw = packed.view(torch.uint8).flatten()
    assert packed.shape == (-(-bytes_.numel() // storage.itemsize), 1)
    assert torch.equal(raw[: bytes_.numel()], bytes_.flatten())
    assert not raw[bytes_.numel() :].any()
    expected = ops.dequantize_4bit(bytes_, absmax, 64, "nf4", [n], torch.float32)
    assert torch.equal(ops.dequantize_4bit(packed, absmax, 64, "nf4", [n], torch.float32), expected)
    assert torch.equal(ops.dequantize_4bit(packed.t(), absmax, 64, "nf4", [1, n], torch.float32)[0], expected)


# ---------------------------------------------------------------- leaks


_MALLINFO = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keep"]


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _MALLINFO]


def _bytes_in_use():
    """What malloc has handed out and not got back, in bytes (glibc)."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


def _refused_calls():
    """One refusal per taker: tensor, optional, list, ints, string."""
    packed, absmax, shape = quantized_4bit("plain")
    bad = group_step([parameter("plain", 8)] * 20)
    bad[4][7] = torch.zeros(3, dtype=torch.uint8)
    yield ops.dequantize_4bit.default, (packed, absmax, 32, "nf5" * 50, shape, torch.float32)
    yield ops.dequantize_4bit.default, (packed, absmax, 32, "nf4", [*shape, 2], torch.float32)
    yield ops.optimizer_update_32bit.default, update_32bit("plain", name="none")
    yield ops.optimizer_update_32bit.default, update_32bit("strided", step=0)
    yield ops._optimizer_step.default, bad


def test_no_leak():
    """Thousands of calls, refused ones too: references to the arguments and the memory of the process stay."""
    cases = [(op, make()) for op, make in SAMPLES.values()]
    refused = list(_refused_calls())
    counts = [[t._use_count() for t in tensors_of(args)] for _, args in cases + refused]

    def burst(rounds):
        for _ in range(rounds):
            for op, args in cases:
                op(*args)
            for op, args in refused:
                with pytest.raises(RuntimeError):
                    op(*args)
        gc.collect()

    burst(100)
    before = _bytes_in_use()
    burst(1500)
    grown = _bytes_in_use() - before
    assert [[t._use_count() for t in tensors_of(args)] for _, args in cases + refused] == counts
    assert grown < 32 * 1024  # the smallest leak, one box per round, would be 1500 x 32 bytes


def test_results_are_freed():
    for op, make in SAMPLES.values():
        for tensor in tensors_of(op(*make())):
            assert tensor._use_count() == 1
            assert torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) == 2  # the tensor, and this look at it


# ---------------------------------------------------------------- loading


def _python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


USE_WITHOUT_LIBRARY = """
import torch
import bitsandbytes as bnb
from bitsandbytes import _ops, cextension
assert cextension.load_error and isinstance(bnb.__version__, str)
assert callable(cextension.lib.no_such_function) and cextension.lib.compiled_with_cuda is False
meta = torch.ops.bitsandbytes.quantize_blockwise(torch.empty(65, device="meta"), torch.empty(256, device="meta"), 64)
assert meta[1].shape == (2,)
tensors = torch.ones(64), torch.ones(256)
for attempt in (
    lambda: _ops.call(torch.ops.bitsandbytes.quantize_blockwise.default, *tensors, 64),
    lambda: cextension.lib.bnb_create_normal_map(),
    lambda: cextension.last_status(),
):
    try:
        attempt()
    except RuntimeError as error:
        assert type(error) is RuntimeError, type(error)
        assert error.__suppress_context__ or error.__context__ is None
        print(error)
"""


@pytest.mark.parametrize("library", ["/nonexistent", "libm.so.6"])
def test_without_the_library(library):
    done = _python(USE_WITHOUT_LIBRARY, BNB_LIBRARY=library)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    texts = done.stdout.splitlines()
    assert len(texts) == 3
    for text in texts:
        assert f"cannot use its native library {library}" in text
        assert "pip install" in text
        assert "BNB_LIBRARY" in text


def test_import_is_silent_and_quick():
    code = (
        "import time, torch; t = time.perf_counter(); import bitsandbytes; "
        "import sys; assert bitsandbytes.cextension.load_error is None; sys.exit(time.perf_counter() - t > 0.3)"
    )
    done = min((_python(code) for _ in range(3)), key=lambda d: d.returncode)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("sys.modules['torch'] = None", "torch cannot be imported"),
        ("sys.modules['torch'] = types.SimpleNamespace(__version__='2.9.1+cpu')", "found torch 2.9.1+cpu"),
    ],
)
def test_torch_missing_or_too_old(code, text):
    done = _python(f"import sys, types; {code}\ntry:\n    import bitsandbytes\nexcept ImportError as e:\n    print(e)")
    assert done.returncode == 0, done.stderr
    assert "bitsandbytes needs torch >= 2.10" in done.stdout
    assert text in done.stdout


def test_library_functions():
    assert cextension.load_error is None
    assert cextension.library_version().count(".") == 2
    assert cextension.library_path.name.startswith("libbitsandbytes")
    assert cextension.HIP_ENVIRONMENT is False
    assert cextension.BNB_BACKEND in ("CPU", "CUDA")
    assert cextension.lib.bnb_torch_register(None) == 0  # a second registration does nothing
    with pytest.raises(RuntimeError, match="no_such_function is not available"):
        cextension.lib.no_such_function(1, 2)
