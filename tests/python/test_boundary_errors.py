"""What bad input gets: the type of the exception, a text that names argument, value and expectation, nothing written.

Each row: operator, one change to good arguments, the exception, the text.  The checks of functional.py in front of the
operators are tested with functional.py.
"""

import threading

import pytest
import torch

from bitsandbytes import _ops
from operator_samples import (
    SAMPLES,
    SIGNED,
    UNSIGNED,
    bits,
    group_step,
    ops,
    overload,
    parameter,
    tensors_of,
    update_8bit,
    update_32bit,
)

MAP = "expected 256 (an 8-bit map)"


def changed(args, *changes):
    """The arguments with some replaced: pairs of position and value."""
    args = list(args)
    for position, value in changes:
        args[position] = value
    return args


def sample(name, *changes):
    return changed(SAMPLES[f"{name}-plain"][1](), *changes)


def group(bits=8, **lists):
    """_optimizer_step of three parameters, with entries or whole lists replaced: g={1: tensor} or g=[...]."""
    names = ["name", "p", "g", "state1", "state2", "absmax1", "absmax2", "qmaps", "steps", "unorm"]
    names += ["gnorm_scale", "norms", "lr_tensor", "step", "seed"]
    args = list(group_step([parameter("plain", bits) for _ in range(3)]))
    for name, change in lists.items():
        position = names.index(name)
        if isinstance(change, dict):
            args[position] = [change.get(i, item) for i, item in enumerate(args[position])]
        else:
            args[position] = change
    return args


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


u8, f16, f64, i32 = torch.uint8, torch.float16, torch.float64, torch.int32
V, N = ValueError, NotImplementedError

# quantize_blockwise(A, code, blocksize); A is [5, 67] everywhere: 335 values
ROWS = [
    ("quantize_blockwise", {0: zeros(9, dtype=f64)}, V, "the dtype of A is float64, expected float32, float16 or"),
    ("quantize_blockwise", {0: zeros(9, dtype=u8)}, V, "the dtype of A is uint8, expected float32"),
    ("quantize_blockwise", {0: zeros(9, dtype=torch.complex64)}, V, "the dtype of A is number 9 of torch, expected"),
    ("quantize_blockwise", {2: 0}, V, "blocksize is 0, expected a number above 0"),
    ("quantize_blockwise", {2: -64}, V, "blocksize is -64, expected a number above 0"),
    ("quantize_blockwise", {1: SIGNED.half()}, V, "code has dtype float16, expected float32"),
    ("quantize_blockwise", {1: SIGNED[:16].clone()}, V, f"code has 16 elements, {MAP}"),
    # dequantize_blockwise(A, absmax, code, blocksize, dtype[, out])
    ("dequantize_blockwise", {0: zeros(5, 67)}, V, "A has dtype float32, expected uint8"),
    ("dequantize_blockwise", {1: zeros(5)}, V, "absmax has 5 elements, expected 6 (335 values in blocks of 64)"),
    ("dequantize_blockwise", {1: zeros(7)}, V, "absmax has 7 elements, expected 6"),
    ("dequantize_blockwise", {1: zeros(0)}, V, "absmax has 0 elements, expected 6"),
    ("dequantize_blockwise", {1: zeros(6, dtype=u8)}, V, "absmax has dtype uint8, expected float32"),
    ("dequantize_blockwise", {2: zeros(257)}, V, f"code has 257 elements, {MAP}"),
    ("dequantize_blockwise", {3: 0}, V, "blocksize is 0, expected a number above 0"),
    ("dequantize_blockwise", {4: i32}, V, "dtype is int32, expected float32, float16 or bfloat16"),
    ("dequantize_blockwise.out", {5: zeros(5, 67)}, V, "out has dtype float32, expected bfloat16"),
    ("dequantize_blockwise.out", {5: zeros(5, 66, dtype=torch.bfloat16)}, V, "size 66 in dimension 1, expected 67"),
    ("dequantize_blockwise.out", {5: zeros(335, dtype=torch.bfloat16)}, V, "out has 1 dimensions, expected 2"),
    ("dequantize_blockwise.out", {5: zeros(1, 1, dtype=torch.bfloat16).expand(5, 67)}, V, "out is written but has"),
    # quantize_4bit(A, blocksize, quant_type, quant_storage)
    ("quantize_4bit", {0: zeros(9, dtype=i32)}, V, "the dtype of A is int32, expected float32"),
    *[
        ("quantize_4bit", {1: block}, V, f"blocksize is {block}, expected a power of two from 32 to 4096")
        for block in (0, 1, 16, 48, 8192, -64, -(2**63))
    ],
    ("quantize_4bit", {2: "int4"}, V, 'quant_type is "int4", expected "nf4" or "fp4"'),
    ("quantize_4bit", {2: ""}, V, 'quant_type is "", expected "nf4" or "fp4"'),
    ("quantize_4bit", {2: "NF4"}, V, 'quant_type is "NF4", expected "nf4" or "fp4"'),
    ("quantize_4bit", {2: "nf4" + "ü" * 900}, V, 'quant_type is "nf4?'),
    ("quantize_4bit", {3: torch.int8}, V, "quant_storage is int8, expected uint8, float16, bfloat16 or float32"),
    ("quantize_4bit", {3: torch.float8_e4m3fn}, V, "quant_storage is number 24 of torch, expected uint8"),
    # dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype[, out])
    ("dequantize_4bit", {0: zeros(167, 1, dtype=u8)}, V, "A has 167 bytes, expected 168 (335 values of 4 bits)"),
    ("dequantize_4bit", {0: zeros(169, 1, dtype=u8)}, V, "A has 169 bytes, expected 168 (335 values of 4 bits)"),
    ("dequantize_4bit", {0: zeros(41, 1)}, V, "A has 164 bytes, expected 168 (335 values of 4 bits, padded to whole"),
    ("dequantize_4bit", {1: zeros(10)}, V, "absmax has 10 elements, expected 11 (335 values in blocks of 32)"),
    ("dequantize_4bit", {1: zeros(11, dtype=f16)}, V, "absmax has dtype float16, expected float32"),
    ("dequantize_4bit", {2: 48}, V, "blocksize is 48, expected a power of two from 32 to 4096"),
    ("dequantize_4bit", {3: "af4"}, V, 'quant_type is "af4", expected "nf4" or "fp4"'),
    ("dequantize_4bit", {4: [5, -67]}, V, "shape[1] is -67, expected 0 or more"),
    ("dequantize_4bit", {4: [2**32, 2**32]}, V, "the product of shape is too large, expected at most 2^63 - 1"),
    ("dequantize_4bit", {4: [5, 68]}, V, "A has 168 bytes, expected 170 (340 values of 4 bits)"),
    ("dequantize_4bit", {5: f64}, V, "dtype is float64, expected float32, float16 or bfloat16"),
    ("dequantize_4bit.out", {6: zeros(5, 67)}, V, "out has dtype float32, expected float16"),
    ("dequantize_4bit.out", {6: zeros(67, 5, dtype=f16)}, V, "out has size 67 in dimension 0, expected 5"),
    # _dequantize_4bit_nested(A, absmax, absmax_code, absmax2, offset, blocksize2, blocksize, quant_type, shape, dtype)
    ("_dequantize_4bit_nested", {1: zeros(11)}, V, "absmax has dtype float32, expected uint8"),
    ("_dequantize_4bit_nested", {1: zeros(12, dtype=u8)}, V, "absmax has 12 elements, expected 11"),
    ("_dequantize_4bit_nested", {2: zeros(16)}, V, f"absmax_code has 16 elements, {MAP}"),
    ("_dequantize_4bit_nested", {3: zeros(2)}, V, "absmax2 has 2 elements, expected 3 (11 values in blocks of 4)"),
    ("_dequantize_4bit_nested", {4: zeros(2)}, V, "offset has 2 elements, expected 1"),
    ("_dequantize_4bit_nested", {4: torch.tensor(0.0, dtype=f64)}, V, "offset has dtype float64, expected float32"),
    ("_dequantize_4bit_nested", {5: 0}, V, "blocksize of the nested scales is 0, expected a number above 0"),
    # _quantize_scales(absmax, code, blocksize), _dequantize_scales(absmax, code, absmax2, offset, blocksize)
    ("_quantize_scales", {0: zeros(11, dtype=f16)}, V, "absmax has dtype float16, expected float32"),
    ("_quantize_scales", {2: 0}, V, "blocksize is 0, expected a number above 0"),
    ("_dequantize_scales", {0: zeros(11)}, V, "absmax has dtype float32, expected uint8"),
    ("_dequantize_scales", {2: zeros(4)}, V, "absmax2 has 4 elements, expected 3 (11 values in blocks of 4)"),
    # _estimate_quantiles(A, offset, num_quantiles)
    ("_estimate_quantiles", {0: zeros(300, dtype=i32)}, N, "the dtype of A is int32, expected float32"),
    ("_estimate_quantiles", {0: zeros(0)}, V, "A has 0 elements, expected 1 or more"),
    ("_estimate_quantiles", {1: 0.6}, V, "offset is 0.6"),
    ("_estimate_quantiles", {2: 0}, V, "num_quantiles is 0, expected 1 to 256"),
    ("_estimate_quantiles", {2: -1}, V, "num_quantiles is -1, expected 1 to 256"),
    ("_estimate_quantiles", {2: 257}, N, "num_quantiles is 257, expected 1 to 256"),
]

# optimizer_update_32bit(name, g, p, state1, state2, unorm_vec, max_unorm, param_norm, beta1, beta2, beta3, alpha, eps,
#                        weight_decay, step, lr, gnorm_scale, skip_zeros)
UPDATES = [
    (lambda: changed(update_32bit("plain"), (0, "adamant")), V, "optimizer_name is 'adamant'"),
    (lambda: changed(update_32bit("plain"), (0, "\N{SNOWMAN}" * 400)), V, "optimizer_name is '??"),
    (lambda: changed(update_32bit("plain"), (1, zeros(5, 67, dtype=f16))), V, "g has dtype float16, expected float32"),
    (lambda: changed(update_32bit("plain"), (1, zeros(5, 66))), V, "g has 330 elements, expected 335 (as many as p)"),
    (lambda: changed(update_32bit("plain", dtype=f64)), V, "p has dtype float64, expected float32, float16"),
    (lambda: changed(update_32bit("plain"), (3, zeros(5, 67, dtype=u8))), V, "state1 has dtype uint8, expected f"),
    (lambda: changed(update_32bit("plain"), (3, zeros(334))), V, "state1 has 334 elements, expected 335"),
    (lambda: changed(update_32bit("plain"), (4, None)), V, 'state2 is None, expected a tensor for optimizer "adam"'),
    (lambda: changed(update_32bit("plain"), (4, zeros(5, 67, dtype=f16))), V, "state2 has dtype float16, expected"),
    (lambda: changed(update_32bit("plain"), (5, zeros(2)), (6, 1.0)), V, "unorm_vec has 2 elements, expected 1"),
    (lambda: changed(update_32bit("plain"), (6, -1.0)), V, "max_unorm is -1, expected a number in [0, inf)"),
    (lambda: changed(update_32bit("plain"), (6, float("nan"))), V, "max_unorm is nan, expected a number in"),
    (lambda: changed(update_32bit("plain"), (8, 1.0)), V, "beta1 is 1"),
    (lambda: changed(update_32bit("plain"), (9, float("nan"))), V, "beta2 is nan"),
    (lambda: changed(update_32bit("plain"), (12, -1e-8)), V, "eps is -1e-08"),
    (lambda: changed(update_32bit("plain"), (13, -1.0)), V, "weight_decay is -1"),
    (lambda: changed(update_32bit("plain"), (14, 0)), V, "step is 0, expected 1 or more"),
    (lambda: changed(update_32bit("plain"), (15, -1.0)), V, "lr is -1"),
    (lambda: changed(update_32bit("plain"), (2, zeros(1).expand(5, 67))), V, "p is written but has stride 0"),
    # optimizer_update_8bit_blockwise(name, g, p, state1, state2, beta1, beta2, beta3, alpha, eps, step, lr,
    #                                 qmap1, qmap2, absmax1, absmax2, weight_decay, gnorm_scale, skip_zeros)
    (lambda: changed(update_8bit("plain"), (0, "lion9")), V, "optimizer_name is 'lion9'"),
    (lambda: changed(update_8bit("plain"), (3, zeros(5, 67))), V, "state1 has dtype float32, expected uint8"),
    (lambda: changed(update_8bit("plain"), (4, zeros(5, 67))), V, "state2 has dtype float32, expected uint8"),
    (lambda: changed(update_8bit("plain"), (12, SIGNED.half())), V, "qmap1 has dtype float16, expected float32"),
    (lambda: changed(update_8bit("plain"), (13, UNSIGNED[:255])), V, f"qmap2 has 255 elements, {MAP}"),
    (lambda: changed(update_8bit("plain"), (13, None)), V, 'qmap2 is None, expected a tensor for optimizer "adam"'),
    (lambda: changed(update_8bit("plain"), (14, zeros(1))), V, "absmax1 has 1 elements, expected 2 (335"),
    (lambda: changed(update_8bit("plain"), (15, zeros(3))), V, "absmax2 has 3 elements, expected 2 (335"),
    (lambda: changed(update_8bit("plain"), (15, None)), V, 'absmax2 is None, expected a tensor for optimizer "adam"'),
    # _optimizer_step
    (lambda: group(name="x"), V, "optimizer_name is 'x'"),
    (lambda: group(g=[]), V, "g has 0 entries, expected 3 (one per parameter)"),
    (lambda: group(state1=[zeros(5, 67)] * 2), V, "state1 has 2 entries, expected 3 (one per parameter)"),
    (lambda: group(step=[1, 2]), V, "step has 2 entries, expected 3 (one per parameter, or steps)"),
    (lambda: group(state2=[]), V, "state2 has 0 entries, expected 3 (one per parameter and second state)"),
    (lambda: group(absmax1=[zeros(2)] * 4), V, "absmax1 has 4 entries, expected 3 (one per uint8 state1)"),
    (lambda: group(absmax2=[]), V, "absmax2 has 0 entries, expected 3 (one per uint8 state2)"),
    (lambda: group(qmaps=[]), V, "qmaps has 0 entries, expected 2 (one per state if any is uint8)"),
    (lambda: group(qmaps={0: zeros(16)}), V, f"qmaps[0] has 16 elements, {MAP}"),
    (lambda: group(32, qmaps=[SIGNED, UNSIGNED]), V, "qmaps has 2 entries, expected 0 (one per state if any is uint8)"),
    (lambda: group(g={1: zeros(5, 66)}), V, "g[1] has 330 elements, expected 335 (as many as p)"),
    (lambda: group(g={2: zeros(5, 67, dtype=f16)}), V, "g[2] has dtype float16, expected float32, the dtype of p[2]"),
    (lambda: group(p={2: zeros(5, 67, dtype=i32)}), V, "p[2] has dtype int32, expected float32, float16"),
    (lambda: group(state2={2: zeros(5, 67)}), V, "state2[2] has dtype float32, expected uint8"),
    (lambda: group(absmax2={2: zeros(1)}), V, "absmax2[2] has 1 elements, expected 2 (335 values in blocks of 256)"),
    (lambda: group(step=[1, 2, -3]), V, "step is -3, expected 1 or more"),
    (lambda: group(steps=[zeros()] * 3), V, "step has 3 entries, expected 0 (one per parameter, or steps)"),
    (lambda: group(steps=[zeros()] * 2, step=[]), V, "steps has 2 entries, expected 3 (one per parameter, or step)"),
    (lambda: group(steps=[zeros(2)] * 3, step=[]), V, "steps[0] has 2 elements, expected 1"),
    (lambda: group(unorm=[zeros(1)]), V, "unorm has 1 entries, expected 3 (one per parameter, or none)"),
    (lambda: group(unorm=[zeros(1, dtype=f16)] * 3), V, "unorm[0] has dtype float16, expected float32"),
    (lambda: group(gnorm_scale=zeros(2)), V, "gnorm_scale has 2 elements, expected 3 (one per parameter)"),
    (lambda: group(norms=zeros(3, 2)), V, "norms has dtype float32, expected float64"),
    (lambda: group(norms=zeros(3, dtype=torch.float64)), V, "norms has 3 elements, expected 6 (two per parameter)"),
    (lambda: group(lr_tensor=zeros(2)), V, "lr_tensor has 2 elements, expected 1"),
    (lambda: group(seed=[1]), V, "seed has 1 entries, expected 3 (one per parameter, with stochastic_rounding)"),
    (lambda: group_step([parameter("plain", 32)] * 2), V, "p[1] shares memory with another parameter"),
    (lambda: group(lr_tensor=torch.tensor(-1.0)), V, "lr is -1, expected a number in [0, inf)"),
]


def _update_name(args):
    if isinstance(args[1], list):
        return "_optimizer_step"
    return "optimizer_update_32bit" if len(args) == 18 else "optimizer_update_8bit_blockwise"


CASES = [(name, lambda n=name, c=change: sample(n, *c.items()), error, text) for name, change, error, text in ROWS]
CASES += [(None, make, error, text) for make, error, text in UPDATES]


IDS = [f"{i}-{case[3][:40]}" for i, case in enumerate(CASES)]


@pytest.mark.parametrize(("name", "make", "error", "text"), CASES, ids=IDS)
def test_bad_input(name, make, error, text):
    args = make()
    name = name or _update_name(args)
    before = [(bits(t).clone(), t.stride()) for t in tensors_of(args)]
    with pytest.raises(error) as caught:
        _ops.call(overload(name), *args)
    assert type(caught.value) is error
    message = str(caught.value)
    assert text in message
    assert "\n" not in message
    assert caught.value.__suppress_context__
    for tensor, (old, stride) in zip(tensors_of(args), before, strict=True):
        assert torch.equal(bits(tensor), old)
        assert tensor.stride() == stride


def test_the_bare_operator_raises_runtime_error():
    with pytest.raises(RuntimeError, match="quantize_blockwise: blocksize is 0, expected a number above 0"):
        ops.quantize_blockwise(zeros(9), SIGNED, 0)


@pytest.mark.parametrize("position", [0, 1])
def test_devices_are_not_mixed(position):
    args = sample("quantize_blockwise")
    args[position] = args[position].to("meta")
    with pytest.raises(ValueError, match=r"quantize_blockwise: code is on \w+, expected \w+"):
        _ops.call(ops.quantize_blockwise.default, *args)


def test_errors_of_others_pass_through():
    """Only the library's own failures are translated, not what torch or Python says, nor after an older failure."""
    with pytest.raises(ValueError, match="blocksize is 0"):
        _ops.call(ops.quantize_blockwise.default, zeros(9), SIGNED, 0)
    with pytest.raises(NotImplementedError, match="SparseCPU"):
        _ops.call(ops.quantize_blockwise.default, zeros(3, 3).to_sparse(), SIGNED, 64)
    with pytest.raises(RuntimeError, match="expected at most 3 argument"):
        _ops.call(ops.quantize_blockwise.default, zeros(9), SIGNED, 64, 7)
    with pytest.raises(ZeroDivisionError):
        _ops.call(lambda: 1 // 0)


def test_every_thread_has_its_own_text():
    """Two threads fail at the same time, each sees its own numbers."""
    wrong, barrier = [], threading.Barrier(2)

    def fail_often(length):
        barrier.wait()
        for _ in range(300):
            try:
                _ops.call(ops.dequantize_blockwise.default, zeros(640, dtype=u8), zeros(length), SIGNED, 64, f16)
            except ValueError as error:
                if f"absmax has {length} elements, expected 10" not in str(error):
                    wrong.append(str(error))
            else:
                wrong.append("no error")

    threads = [threading.Thread(target=fail_often, args=(length,)) for length in (3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_errors_inside_compiled_code():
    compiled = torch.compile(ops.dequantize_blockwise.default, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="absmax has 3 elements, expected 1"):
        compiled(zeros(9, dtype=u8), zeros(3), SIGNED, 64, f16)
    fake_checks = torch.compile(ops.quantize_blockwise.default, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="blocksize is 0, expected a number above 0"):
        fake_checks(zeros(9), SIGNED, 0)


def test_out_of_memory():
    """A result that no machine can hold: torch's exception type, with the operator and the buffer in the text."""
    with pytest.raises(torch.OutOfMemoryError, match="quantize_blockwise: CPU out of memory for A"):
        _ops.call(ops.quantize_blockwise.default, zeros(1).expand(2**55), SIGNED, 64)
