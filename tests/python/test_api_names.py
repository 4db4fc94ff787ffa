"""Names outside nn and optim: that they exist, with which signatures; moved and gone ones; backends of others."""

import dataclasses
import importlib
import inspect
import os
import pathlib
import subprocess
import sys

import pytest
import torch

import bitsandbytes as bnb
from bitsandbytes import cextension, consts, cuda_specs, gone
from bitsandbytes import functional as F

u8, i8, i32, f32, half = torch.uint8, torch.int8, torch.int32, torch.float32, torch.half
NONE = None

# Signatures that clients rely on: names and defaults, in order.  "..." marks a parameter without a default.
SIGNATURES = {
    "create_linear_map": {"signed": True, "total_bits": 8, "add_zero": True},
    "create_dynamic_map": {"signed": True, "max_exponent_bits": 7, "total_bits": 8},
    "create_fp8_map": {"signed": True, "exponent_bits": 5, "precision_bits": 2, "total_bits": 8},
    "create_normal_map": {"offset": 0.9677083, "use_extra_value": True},
    "create_quantile_map": {"A": ..., "total_bits": 8},
    "estimate_quantiles": {"A": ..., "out": NONE, "offset": 1 / 512, "num_quantiles": 256},
    "get_4bit_type": {"typename": ..., "device": NONE, "blocksize": 64},
    "quantize_blockwise": {"A": ..., "code": NONE, "absmax": NONE, "out": NONE, "blocksize": 4096, "nested": False},
    "dequantize_blockwise": {
        "A": ...,
        "quant_state": NONE,
        "absmax": NONE,
        "code": NONE,
        "out": NONE,
        "blocksize": 4096,
        "nested": False,
    },
    "quantize_4bit": {
        "A": ...,
        "absmax": NONE,
        "out": NONE,
        "blocksize": NONE,
        "compress_statistics": False,
        "quant_type": "fp4",
        "quant_storage": u8,
    },
    **dict.fromkeys(
        ("quantize_fp4", "quantize_nf4"),
        (("A", ...), ("absmax", NONE), ("out", NONE), ("blocksize", NONE), ("compress_statistics", False))
        + (("quant_storage", u8),),
    ),
    "dequantize_4bit": {
        "A": ...,
        "quant_state": NONE,
        "absmax": NONE,
        "out": NONE,
        "blocksize": NONE,
        "quant_type": "fp4",
    },
    **dict.fromkeys(
        ("dequantize_fp4", "dequantize_nf4"),
        (("A", ...), ("quant_state", NONE), ("absmax", NONE), ("out", NONE), ("blocksize", NONE)),
    ),
    "gemv_4bit": {
        "A": ...,
        "B": ...,
        "out": NONE,
        "transposed_A": False,
        "transposed_B": False,
        "state": NONE,
    },
    "int8_linear_matmul": {"A": ..., "B": ..., "out": NONE, "dtype": i32},
    "int8_mm_dequant": {"A": ..., "row_stats": ..., "col_stats": ..., "out": NONE, "bias": NONE},
    **dict.fromkeys(
        ("int8_double_quant", "double_quant"),
        (("A", ...), ("col_stats", NONE), ("row_stats", NONE), ("out_col", NONE), ("out_row", NONE))
        + (("threshold", 0.0),),
    ),
    "int8_vectorwise_quant": {"A": ..., "threshold": 0.0},
    "int8_vectorwise_dequant": {"A": ..., "stats": ...},
    "check_matmul": {
        "A": ...,
        "B": ...,
        "out": ...,
        "transposed_A": ...,
        "transposed_B": ...,
        "expected_type": i8,
    },
    **dict.fromkeys(
        ("igemm", "batched_igemm"),
        (("A", ...), ("B", ...), ("out", NONE), ("transposed_A", False), ("transposed_B", False)),
    ),
    "is_on_gpu": {"tensors": ...},
    "get_ptr": {"A": ...},
    "prefetch_tensor": {"A": ..., "to_cpu": False},
    "elementwise_func": {"func_name": ..., "A": ..., "B": ..., "value": ..., "prefetch": True},
    "fill": {"A": ..., "value": ..., "device": NONE, "prefetch": True},
    "_mul": {"A": ..., "B": ..., "device": NONE},
    "_convert_weight_packed_for_cpu": {"qweight": ..., "quant_state": ..., "block_n": 32},
    "_convert_weight_packed_for_cpu_inverse": {"packed_weight": ..., "quant_state": ..., "block_n": 32},
    "has_avx512bf16": {},
    "quantize": {"A": ..., "code": NONE, "out": NONE},
    "quantize_no_absmax": {"A": ..., "code": ..., "out": NONE},
    "dequantize_no_absmax": {"A": ..., "code": ..., "out": NONE},
    "percentile_clipping": {"grad": ..., "gnorm_vec": ..., "step": ..., "percentile": 5},
    "vectorwise_quant": {"x": ..., "dim": 1, "quant_type": "vector"},
    "vectorwise_mm_dequant": {"xq": ..., "S1": ..., "S2": ..., "dtype": half, "quant_type": "vector"},
    "QuantState": {
        "absmax": ...,
        "shape": NONE,
        "code": NONE,
        "blocksize": NONE,
        "quant_type": NONE,
        "dtype": NONE,
        "offset": NONE,
        "state2": NONE,
    },
}


def parameters(function):
    empty = inspect.Parameter.empty
    found = inspect.signature(function).parameters.values()
    return {p.name: ... if p.default is empty else p.default for p in found}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_of_functional(name):
    found, expected = parameters(getattr(F, name)), dict(SIGNATURES[name])
    assert list(found.items()) == list(expected.items())


def test_further_signatures():
    state = ["state", "absmax", "code", "out"]  # quant_state is the oldest name of the first
    assert list(parameters(F.dequantize)) == ["A", *state, "quant_state"]
    paged = parameters(F.get_paged)
    assert paged == {"shape": ..., "dtype": f32, "device": torch.device("cuda:0")}
    assert parameters(bnb.matmul) == {"A": ..., "B": ..., "out": None, "state": None, "threshold": 0.0, "bias": None}
    assert list(parameters(bnb.matmul_4bit)) == ["A", "B", "quant_state", "out", "bias"]
    cublas = {"A": ..., "B": ..., "out": None, "quant_type": "vector", "precision": None}
    assert parameters(bnb.matmul_cublas) == cublas


def test_names_of_the_package():
    assert bnb.features == {"multi_backend"}
    assert {"cpu", "cuda"} <= bnb.supported_torch_devices
    assert bnb.modules is bnb.nn.modules
    assert bnb.adam is bnb.optim.adam
    assert isinstance(bnb.__pdoc__, dict)
    assert bnb.__version__ >= "0.46.1"
    assert bnb.matmul is bnb.autograd._functions.matmul
    for name in ("functional", "nn", "optim", "utils", "consts", "cuda_specs", "cextension", "legacy", "MatmulLtState"):
        assert hasattr(bnb, name)
    assert bnb.PACKAGE_GITHUB_URL == consts.PACKAGE_GITHUB_URL


def test_names_of_functional():
    assert F.C == 127.0
    assert F.lib is cextension.lib
    assert set(F.name2qmap) >= {"dynamic", "udynamic"}
    for name in ("optimizer_update_32bit", "optimizer_update_8bit_blockwise", "GlobalPageManager", "CUBLAS_Context"):
        assert callable(getattr(F, name))
    for name in F.__all__:
        assert hasattr(F, name)


# ---------------------------------------------------------------- consts, cuda_specs, cextension


def test_consts():
    assert pathlib.Path(bnb.__file__).parent == consts.PACKAGE_DIR
    assert consts.DYNAMIC_LIBRARY_SUFFIX == ".so"
    assert cextension.library_path.suffix == consts.DYNAMIC_LIBRARY_SUFFIX
    assert consts.PACKAGE_GITHUB_URL.startswith("https://")
    assert consts.NONPYTORCH_DOC_URL.startswith("https://")


def test_one_library_for_every_cuda():
    record = cuda_specs.CUDASpecs((8, 6), "117", (11, 7))
    assert cextension.get_cuda_bnb_library_path(record) == cextension.library_path
    assert cextension._find_cuda_libs() == [cextension.library_path]
    assert (cextension.HIP_ENVIRONMENT, cextension.ROCM_GPU_ARCH) == (False, "unknown")
    assert cextension.BNB_BACKEND in ("CPU", "CUDA")
    assert isinstance(cextension.lib.compiled_with_cuda, bool)


def test_no_library_to_find(monkeypatch, tmp_path):
    monkeypatch.setattr(cextension, "library_path", tmp_path / "absent.so")
    assert cextension._find_cuda_libs() == []


def test_the_record_of_cuda(monkeypatch):
    record = cuda_specs.CUDASpecs(
        highest_compute_capability=(7, 5), cuda_version_string="118", cuda_version_tuple=(11, 8)
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.cuda_version_string = "120"
    monkeypatch.setattr(torch.version, "hip", None)
    assert record.has_imma
    assert cuda_specs.CUDASpecs((12, 0), "128", (12, 8)).has_imma
    old = cuda_specs.CUDASpecs((7, 2), "118", (11, 8))
    assert not old.has_imma
    monkeypatch.setattr(torch.version, "hip", "6.2.41133")
    assert old.has_imma


def test_what_torch_says_about_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda_specs.get_cuda_version_tuple() is None
    assert cuda_specs.get_cuda_version_string() is None
    assert cuda_specs.get_cuda_specs() is None
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_specs.get_cuda_version_string() == "128"
    assert cuda_specs.get_cuda_specs() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(8, 6), (10, 0), (9, 0)][i])
    assert cuda_specs.get_compute_capabilities() == [(8, 6), (9, 0), (10, 0)]
    assert cuda_specs.get_cuda_specs() == cuda_specs.CUDASpecs((10, 0), "128", (12, 8))
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "6.2.41133")
    assert cuda_specs.get_cuda_specs().cuda_version_tuple == (6, 2)


# ---------------------------------------------------------------- moved and gone


@pytest.mark.parametrize("module", sorted(gone._GONE))
def test_what_is_gone_names_the_alternative(module):
    for name, advice in gone._GONE[module].items():
        text = f"{module}.{name} is gone: {advice} (docs/MIGRATION.md)"
        with pytest.raises(AttributeError) as caught:
            gone.find(module, name)
        assert str(caught.value) == text
        with pytest.raises(AttributeError) as caught:
            getattr(importlib.import_module(module), name)
        assert str(caught.value) == text


def test_the_migration_page_lists_what_is_gone():
    page = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "MIGRATION.md").read_text()
    names = {name for table in (gone._GONE, gone._MOVED) for part in table.values() for name in part}
    assert len(names) > 50
    assert [name for name in sorted(names) if f"`{name}`" not in page and f"`functional.{name}`" not in page] == []


@pytest.mark.parametrize("name", ["research", "triton", "research.nn", "triton.triton_utils"])
def test_packages_that_are_gone(name):
    first = name.split(".")[0]
    with pytest.raises(ImportError, match=rf"bitsandbytes\.{first} is gone: "):
        importlib.import_module(f"bitsandbytes.{name}")
    with pytest.raises(ImportError, match=rf"bitsandbytes\.{first} is gone: "):
        exec(f"from bitsandbytes import {first}")
    assert not hasattr(bnb, first)


def test_moved_names_lead_to_one_object():
    for module, names in gone._MOVED.items():
        for name, home in names.items():
            assert gone.find(module, name) is getattr(importlib.import_module(home), name)
    assert F.quantize is bnb.legacy.quantize
    assert bnb.mm_cublas is bnb.legacy.matmul_cublas


def test_unknown_names_stay_unknown():
    for module in (bnb, F):
        with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'no_such_name'"):
            module.no_such_name  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'igemmlt'"):
        exec("from bitsandbytes.functional import igemmlt")


# ---------------------------------------------------------------- importing, and backends of other packages


def python(code, *folders):
    """Run code in a fresh interpreter that finds this package and `folders`. Returns (status, stdout, stderr)."""
    path = [str(pathlib.Path(bnb.__file__).parents[1]), *map(str, folders), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    run = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, env=env, check=False, timeout=120)
    return done.returncode, done.stdout, done.stderr


def backend(folder, body, target="third_party:register"):
    """A distribution `third-party-kernels` in `folder` with one entry point, `mine`, and a module third_party."""
    (folder / "third_party.py").write_text(body)
    info = folder / "third_party_kernels-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party-kernels\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[bitsandbytes.backends]\nmine = {target}\n")


def test_old_names_are_loaded_when_asked_for():
    code = (
        "import sys, bitsandbytes as bnb; old = ['bitsandbytes.legacy', 'bitsandbytes.cpu_layout']\n"
        "assert not any(name in sys.modules for name in old)\n"
        "bnb.functional.quantize, bnb.functional.has_avx512bf16, bnb.legacy\n"
        "assert all(name in sys.modules for name in old)"
    )
    assert python(code) == (0, "", "")


def test_a_backend_is_loaded_and_called_once_everything_is_there(tmp_path):
    body = """
import torch
import bitsandbytes as bnb
calls = 0

def register():
    global calls
    calls += 1
    bnb.functional, bnb.nn, bnb.optim, bnb.__version__

    @bnb._ops.register_kernel("bitsandbytes::int8_linear_matmul", "mtia")
    def kernel(A, B):
        return A.new_empty((1, 2, 3), dtype=torch.int32)
"""
    backend(tmp_path, body)
    code = (
        "import torch, bitsandbytes, third_party\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print(third_party.calls, has('bitsandbytes::int8_linear_matmul', 'MTIA'),"
        " has('bitsandbytes::int8_scaled_mm', 'MTIA'))"
    )
    assert python(code, tmp_path) == (0, "1 True False\n", "")


@pytest.mark.parametrize(
    ("body", "target", "text"),
    [
        ("def register(): raise KeyError('driver')", "third_party:register", "KeyError: 'driver'"),
        ("import no_such_module", "third_party:register", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("", "third_party:register", "AttributeError"),
        ("register = 3", "third_party:register", "TypeError"),
        ("def register(): pass", "nowhere:register", "ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_a_backend_that_fails_is_named(tmp_path, body, target, text):
    backend(tmp_path, body, target)
    code = "try:\n    import bitsandbytes\nexcept RuntimeError as error:\n    print(error)"
    status, out, err = python(code, tmp_path)
    assert (status, err) == (0, "")
    assert out.startswith(f"backend 'mine' ({target}, package third-party-kernels) failed: {text}")
    assert out.rstrip().endswith("uninstall it.")
