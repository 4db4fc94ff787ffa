"""Arguments for every operator of torch.ops.bitsandbytes, for the tests of the boundary.

SAMPLES maps a readable name to (operator overload, function that makes fresh arguments).  Every operator has an
ordinary sample, one with other strides and one without elements.
"""

import torch

import bitsandbytes  # noqa: F401  (defines the operators)
from bitsandbytes.functional import create_dynamic_map

ops = torch.ops.bitsandbytes
SIGNED = create_dynamic_map(signed=True)
UNSIGNED = create_dynamic_map(signed=False)

SHAPES = {"plain": (5, 67), "strided": (67, 5), "empty": (0, 3)}


def values(kind, dtype=torch.float32, seed=0):
    """Normal values [5, 67]; "strided": the transpose of [67, 5]; "empty": [0, 3]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SHAPES[kind], generator=generator).to(dtype)
    return x.t() if kind == "strided" else x


def strided_vector(x):
    """The same 1-D values, two elements apart in memory."""
    return torch.stack([x, x], dim=-1)[..., 0]


def quantized_8bit(kind):
    """codes, absmax (blocks of 64), and the values they stand for."""
    codes, absmax = ops.quantize_blockwise(values(kind), SIGNED, 64)
    if kind == "strided":
        codes, absmax = codes.t().contiguous().t(), strided_vector(absmax)
    return codes, absmax


def quantized_4bit(kind, storage=torch.uint8):
    packed, absmax = ops.quantize_4bit(values(kind), 32, "nf4", storage)
    if kind == "strided":
        packed, absmax = strided_vector(packed.flatten()), strided_vector(absmax)
    return packed, absmax, list(values(kind).shape)


def nested_scales(kind):
    """codes, map, absmax2, offset of the scales of quantized_4bit(kind), blocks of 4."""
    codes, absmax2, offset = ops._quantize_scales(quantized_4bit(kind)[1], SIGNED, 4)
    if kind == "strided":
        codes, absmax2 = strided_vector(codes), strided_vector(absmax2)
    return codes, SIGNED, absmax2, offset


def out_tensor(kind, dtype):
    shape = values(kind).shape
    return torch.full(shape[::-1], 7, dtype=dtype).t() if kind == "strided" else torch.full(shape, 7, dtype=dtype)


def parameter(kind, bits, dtype=torch.float32):
    """p, g, state1, state2, absmax1, absmax2 before the first step; with "strided", the states are row-major."""
    p, g = values(kind, dtype, 1), values(kind, dtype, 2)
    blocks = (p.numel() + 255) // 256
    state_dtype = torch.uint8 if bits == 8 else torch.float32
    states = [torch.zeros(p.shape, dtype=state_dtype) for _ in range(2)]
    return [p, g, *states, torch.zeros(blocks), torch.zeros(blocks)]


def update_32bit(kind, dtype=torch.float32, name="adam", state2=True, max_unorm=0.0, step=1, lr=1e-2):
    p, g, state1, second, _, _ = parameter(kind, 32, dtype)
    second = second if state2 else None
    return (name, g, p, state1, second, None, max_unorm, 0.0, 0.9, 0.999, 0.0, 0.0, 1e-8, 0.1, step, lr, 1.0, False)


def update_8bit(kind, dtype=torch.float32):
    p, g, state1, state2, absmax1, absmax2 = parameter(kind, 8, dtype)
    scalars = (0.9, 0.999, 0.0, 0.0, 1e-8, 1, 1e-2)
    return ("adam", g, p, state1, state2, *scalars, SIGNED, UNSIGNED, absmax1, absmax2, 0.1, 1.0, False)


def group_step(parameters, steps=None, name="adam", max_unorm=0.0, **options):
    """Arguments of _optimizer_step and _optimizer_norms for a list of parameter(...) results.

    options: counters (tensors that count the steps), unorm, gnorm_scale, norms, lr_tensor, seed, stochastic_rounding
    """
    p, g, state1, state2, absmax1, absmax2 = (list(column) for column in zip(*parameters, strict=True))
    eight = [i for i, s in enumerate(state1) if s.dtype == torch.uint8]
    absmax1, absmax2 = [absmax1[i] for i in eight], [absmax2[i] for i in eight]
    qmaps = [SIGNED, UNSIGNED] if eight else []
    lists = (p, g, state1, state2, absmax1, absmax2, qmaps, options.get("counters", []), options.get("unorm", []))
    optional = (options.get(key) for key in ("gnorm_scale", "norms", "lr_tensor"))
    counts = ([] if "counters" in options else steps or [1] * len(p), options.get("seed", []))
    scalars = (1e-2, 0.9, 0.999, 0.0, 0.0, 0.0, 0.0, 1e-8, 0.1, max_unorm, False, False, True, True)
    return (name, *lists, *optional, *counts, *scalars, options.get("stochastic_rounding", False), 0)


def _group_of_three(kind, dtype=torch.float32):
    return [parameter(kind, 8, dtype), parameter(kind, 32, dtype), parameter("plain", 8, dtype)]


def _all_options(kind):
    """A step that uses every argument: counters and learning rate as tensors, norms given, noise, a factor each."""
    return group_step(
        _group_of_three(kind, torch.bfloat16),
        max_unorm=0.5,
        counters=[torch.tensor(float(i)) for i in range(3)],
        unorm=[torch.zeros(1) for _ in range(3)],
        gnorm_scale=torch.tensor([1.0, 0.5, 2.0]),
        norms=torch.ones(3, 2, dtype=torch.float64),
        lr_tensor=torch.tensor(1e-2),
        seed=[1, 2, 3],
        stochastic_rounding=True,
    )


def _clip(_):
    histories, steps = [torch.ones(100), torch.zeros(100)], [torch.tensor(4.0), torch.tensor(0.0)]
    return histories, torch.tensor([9.0, 4.0], dtype=torch.float64), steps, [], 5


def _quantize_4bit(kind, quant_type, storage, dtype=torch.float32):
    return lambda: (values(kind, dtype), 64, quant_type, storage)


def _quantize_4bit_floats(storage):
    """Positive values have FP4 codes below 8, so the bytes, read as floats, are never NaN and can be compared."""
    return lambda: (values("plain", torch.bfloat16).abs(), 64, "fp4", storage)


def _dequantize_4bit(kind, storage=torch.uint8):
    def make():
        packed, absmax, shape = quantized_4bit(kind, storage)
        return packed, absmax, 32, "nf4", shape, torch.float16

    return make


def _nested(kind):
    def make():
        packed, _, shape = quantized_4bit(kind)
        return packed, *nested_scales(kind), 4, 32, "nf4", shape, torch.bfloat16

    return make


def _samples():
    for kind in SHAPES:
        both = {
            "quantize_blockwise": lambda k=kind: (values(k), SIGNED, 64),
            "dequantize_blockwise": lambda k=kind: (*quantized_8bit(k), SIGNED, 64, torch.float32),
            "dequantize_blockwise.out": lambda k=kind: (
                *(*quantized_8bit(k), SIGNED, 64, torch.bfloat16),
                out_tensor(k, torch.bfloat16),
            ),
            "quantize_4bit": _quantize_4bit(kind, "nf4", torch.uint8),
            "dequantize_4bit": _dequantize_4bit(kind),
            "dequantize_4bit.out": lambda k=kind: (*_dequantize_4bit(k)(), out_tensor(k, torch.float16)),
            "_dequantize_4bit_nested": _nested(kind),
            "_quantize_scales": lambda k=kind: (quantized_4bit(k)[1], SIGNED, 4),
            "_dequantize_scales": lambda k=kind: (*nested_scales(k), 4),
            "optimizer_update_32bit": lambda k=kind: update_32bit(k),
            "optimizer_update_8bit_blockwise": lambda k=kind: update_8bit(k),
            "_optimizer_step": lambda k=kind: group_step(_group_of_three(k)),
            "_optimizer_norms": lambda k=kind: group_step(_group_of_three(k), max_unorm=1.0),
            "_gradient_norms": lambda k=kind: ([values(k), values("plain", torch.bfloat16)],),
            "_percentile_clip": lambda k=kind: _clip(k),
        }
        if kind != "empty":
            both["_estimate_quantiles"] = lambda k=kind: (values(k), 1 / 512, 256)
        for name, make in both.items():
            yield f"{name}-{kind}", (name, make)
        yield f"_optimizer_step-options-{kind}", ("_optimizer_step", lambda k=kind: _all_options(k))
    for storage in (torch.float16, torch.bfloat16, torch.float32):
        yield f"quantize_4bit-{storage}", ("quantize_4bit", _quantize_4bit_floats(storage))
        yield f"dequantize_4bit-{storage}", ("dequantize_4bit", _dequantize_4bit("plain", storage))
    for dtype in (torch.float16, torch.bfloat16):
        yield f"optimizer_update_32bit-{dtype}", ("optimizer_update_32bit", lambda d=dtype: update_32bit("plain", d))
        yield (
            f"optimizer_update_8bit_blockwise-{dtype}",
            ("optimizer_update_8bit_blockwise", lambda d=dtype: update_8bit("strided", d)),
        )


def overload(name):
    """The OpOverload of "name" or "name.overload"."""
    packet, _, which = name.partition(".")
    return getattr(getattr(ops, packet), which or "default")


SAMPLES = {key: (overload(name), make) for key, (name, make) in _samples()}
EVERY_OPERATOR = {
    "quantize_blockwise",
    "dequantize_blockwise",
    "dequantize_blockwise.out",
    "quantize_4bit",
    "dequantize_4bit",
    "dequantize_4bit.out",
    "_quantize_scales",
    "_dequantize_scales",
    "_dequantize_4bit_nested",
    "_estimate_quantiles",
    "optimizer_update_32bit",
    "optimizer_update_8bit_blockwise",
    "_optimizer_step",
    "_optimizer_norms",
    "_gradient_norms",
    "_percentile_clip",
}


def tensors_of(args):
    """All tensors among arguments or results, lists opened."""
    found = []
    for arg in args if isinstance(args, (list, tuple)) else [args]:
        if isinstance(arg, torch.Tensor):
            found.append(arg)
        elif isinstance(arg, (list, tuple)):
            found.extend(tensors_of(arg))
    return found


def bits(tensor):
    """The bytes of the elements in row-major order: equal for equal NaN, different for 0.0 and -0.0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
