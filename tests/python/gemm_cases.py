"""Tensors that fit together for the matrix products, and the table of calls that must be refused."""

import torch

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bitsandbytes import _ops

OPS = torch.ops.bitsandbytes
N, K = 20, 67
NAN = float("nan")


def weight_4bit(n=N, k=K, *, nested=False, quant_type="nf4", blocksize=32, storage=torch.uint8, seed=1):
    """(packed, state, float64 [n, k]) of a random weight; the third is what the codes stand for."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    packed, state = F.quantize_4bit(
        w, blocksize=blocksize, quant_type=quant_type, quant_storage=storage, compress_statistics=nested
    )
    return packed, state, F.dequantize_4bit(packed, state).double()


def weight_int8(n=N, k=K, seed=2):
    """(CB int8 [n, k], SCB float32 [n], float64 [n, k])."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    scales = torch.rand(n, generator=generator) + 0.5
    return codes, scales, codes.double() * scales.double()[:, None] / 127


def int8_state(threshold=0.0):
    """A frozen int8 weight: (state, the parameter, float64 weight)."""
    state = bnb.MatmulLtState()
    state.has_fp16_weights, state.threshold = False, threshold
    state.CB, state.SCB, w = weight_int8()
    return state, state.CB, w


def normal(*shape, dtype=torch.float32, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expert_samples(x, grad, bias):
    """Arguments of the operators for experts, of which there are two; the second has more rows."""

    def arguments(nested):
        packed, state, _ = weight_4bit(2 * N, K, nested=nested)
        return packed, *F.weight_arguments("test", state)[:-2], N, K

    rows = x.numel() // x.shape[-1]
    first = torch.tensor([0, rows // 3, rows])
    return {
        "_experts_4bit": (x, *arguments(False), first, torch.stack([bias, -bias])),
        "_experts_4bit nested": (x, *arguments(True), first, None),
        "_experts_4bit_grad": (grad, *arguments(False), first),
    }


class Bench:
    """Arguments of every product, each matching; a case changes one of them."""

    def __init__(self):
        self.x, self.bias = normal(5, K), normal(N, seed=4)
        self.grad = normal(5, N, seed=5)
        self.packed, self.state, _ = weight_4bit()
        self.nested_packed, self.nested, _ = weight_4bit(nested=True)
        self.absmax, self.code = self.state.absmax, self.state.code
        self.CB, self.SCB, _ = weight_int8()
        self.CA, self.SCA, _ = OPS.int8_vectorwise_quant(self.x)
        self.C32 = OPS.int8_linear_matmul(self.CA, self.CB)
        self.columns = torch.tensor([3, 40])
        self.out, self.out32 = torch.full((5, N), 7.0), torch.full((5, N), 7, dtype=torch.int32)

    def tensors(self):
        found = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return found | {"offset": self.nested.offset, "absmax2": self.nested.state2.absmax}

    def _call(self, op, defaults, change):
        unknown = set(change) - set(defaults)
        assert not unknown, unknown
        return _ops.call(op, *(defaults | change).values())

    def linear4(self, **change):
        a = {"x": self.x, "weight": self.packed, "absmax": self.absmax, "absmax_code": None, "absmax2": None}
        a |= {"offset": None, "blocksize2": 0, "blocksize": 32, "quant_type": "nf4", "n": N, "k": K}
        return self._call(OPS._linear_4bit.default, a | {"bias": self.bias, "exact": False}, change)

    def linear4_nested(self, **change):
        inner = self.nested.state2
        a = {"x": self.x, "weight": self.nested_packed, "absmax": self.nested.absmax, "absmax_code": inner.code}
        a |= {"absmax2": inner.absmax, "offset": self.nested.offset, "blocksize2": 256, "blocksize": 32}
        a |= {"quant_type": "nf4", "n": N, "k": K, "bias": None, "exact": False}
        return self._call(OPS._linear_4bit.default, a, change)

    def linear4_grad(self, **change):
        a = {"grad": self.grad, "weight": self.packed, "absmax": self.absmax, "absmax_code": None, "absmax2": None}
        a |= {"offset": None, "blocksize2": 0, "blocksize": 32, "quant_type": "nf4", "n": N, "k": K}
        return self._call(OPS._linear_4bit_grad.default, a, change)

    def gemm4(self, **change):
        a = {"A": self.x, "B": self.packed, "shapeB": [N, K], "absmax": self.absmax, "blocksize": 32}
        a |= {"quant_type": "nf4", "bias": None, "absmax_8bit": None, "absmax_code": None, "absmax_offset": None}
        return self._call(OPS.gemm_4bit.default, a, change)

    def gemv4(self, **change):
        a = {"A": self.x, "B": self.packed, "shapeB": [N, K], "absmax": self.absmax, "code": self.code}
        a |= {"blocksize": 32, "out": self.out}
        return self._call(OPS.gemv_4bit.out, a, change)

    def linear8(self, **change):
        a = {"x": self.x, "CB": self.CB, "SCB": self.SCB, "bias": self.bias, "threshold": 0.0}
        return self._call(OPS._linear_int8.default, a, change)

    def linear8_grad(self, **change):
        a = {"grad": self.grad, "CB": self.CB, "SCB": self.SCB}
        return self._call(OPS._linear_int8_grad.default, a, change)

    def matmul8(self, **change):
        a = {"A": self.CA, "B": self.CB, "out": self.out32}
        return self._call(OPS.int8_linear_matmul.out, a, change)

    def scaled8(self, **change):
        a = {"A": self.CA, "B": self.CB, "row_stats": self.SCA, "col_stats": self.SCB, "bias": None}
        return self._call(OPS.int8_scaled_mm.default, a | {"dtype": torch.float32}, change)

    def mixed8(self, **change):
        a = {"A": self.x, "CA": self.CA, "CB": self.CB, "SCA": self.SCA, "SCB": self.SCB}
        return self._call(OPS.int8_mixed_scaled_mm.default, a | {"outlier_cols": self.columns, "bias": None}, change)

    def dequant8(self, **change):
        a = {"A": self.C32, "row_stats": self.SCA, "col_stats": self.SCB, "dtype": None, "bias": None}
        return self._call(OPS.int8_mm_dequant.default, a, change)


def _long(*values):
    return torch.tensor(values)


def _flat_state(bench):
    state = F.QuantState(bench.absmax, [N * K], bench.code, 32, "nf4", torch.float32)
    return bnb.matmul_4bit(bench.x, bench.packed, state)


# name -> (call, words that the text must hold); every one is a ValueError
CASES = {
    # 4-bit
    "x of another width": (lambda b: b.linear4(x=b.x[:, :60]), ["x", "60", "67"]),
    "x without dimensions": (lambda b: b.linear4(x=b.x[0, 0]), ["x", "0", "dimensions"]),
    "x float64": (lambda b: b.linear4(x=b.x.double()), ["x", "float64"]),
    "x int32": (lambda b: b.linear4(x=b.x.int()), ["x", "int32"]),
    "weight one byte short": (lambda b: b.linear4(weight=b.packed[:-1]), ["weight", "669", "670"]),
    "weight as bfloat16, short": (
        lambda b: b.linear4(weight=b.packed.flatten().view(torch.bfloat16)[:-1]),
        ["weight", "668", "670"],
    ),
    "absmax one short": (lambda b: b.linear4(absmax=b.absmax[:-1]), ["absmax", "41", "42"]),
    "absmax one more": (lambda b: b.linear4(absmax=torch.ones(43)), ["absmax", "43", "42"]),
    "absmax float16": (lambda b: b.linear4(absmax=b.absmax.half()), ["absmax", "float16"]),
    "absmax uint8 without nested parts": (lambda b: b.linear4(absmax=b.nested.absmax), ["absmax", "uint8"]),
    "blocksize 48": (lambda b: b.linear4(blocksize=48), ["blocksize", "48"]),
    "blocksize 8192": (lambda b: b.linear4(blocksize=8192), ["blocksize", "8192"]),
    "blocksize 0": (lambda b: b.linear4(blocksize=0), ["blocksize", "0"]),
    "blocksize -64": (lambda b: b.linear4(blocksize=-64), ["blocksize", "-64"]),
    "quant_type int4": (lambda b: b.linear4(quant_type="int4"), ["quant_type", "int4"]),
    "n negative": (lambda b: b.linear4(n=-20), ["weight", "-20"]),
    "n times k too large": (lambda b: b.linear4(n=2**40, x=b.x[:, :0].expand(5, 0), k=2**40), ["weight", "2^63 - 1"]),
    "bias short": (lambda b: b.linear4(bias=b.bias[:-1]), ["bias", "19", "20"]),
    "bias 2-D": (lambda b: b.linear4(bias=b.bias[None]), ["bias", "2", "1"]),
    "bias int64": (lambda b: b.linear4(bias=b.bias.long()), ["bias", "int64"]),
    "bias on meta": (lambda b: b.linear4(bias=b.bias.to("meta")), ["bias", "meta"]),
    "nested without its map": (lambda b: b.linear4_nested(absmax_code=None), ["absmax_code", "None"]),
    "nested without offset": (lambda b: b.linear4_nested(offset=None), ["offset", "None"]),
    "nested absmax2 long": (lambda b: b.linear4_nested(absmax2=torch.ones(2)), ["absmax2", "2", "1"]),
    "nested absmax float32": (lambda b: b.linear4_nested(absmax=b.absmax), ["absmax", "float32", "uint8"]),
    "nested blocksize 0": (lambda b: b.linear4_nested(blocksize2=0), ["blocksize", "0"]),
    "nested map of 16": (lambda b: b.linear4_nested(absmax_code=b.code), ["absmax_code", "16", "256"]),
    "nested offset int64": (lambda b: b.linear4_nested(offset=_long(1)), ["offset", "int64"]),
    "nested offset of 2": (lambda b: b.linear4_nested(offset=torch.ones(2)), ["offset", "2", "1"]),
    "gradient of another width": (lambda b: b.linear4_grad(grad=b.x), ["grad", "67", "20"]),
    "gemm_4bit shape 3-D": (lambda b: b.gemm4(shapeB=[1, N, K]), ["shapeB", "3", "2"]),
    "gemm_4bit bias of another dtype": (lambda b: b.gemm4(bias=b.bias.half()), ["bias", "float16", "float32"]),
    "gemm_4bit wrong shape": (lambda b: b.gemm4(shapeB=[K, N]), ["A", "67", "20"]),
    "gemv_4bit out short": (lambda b: b.gemv4(out=b.out[:4]), ["out", "4", "5"]),
    "gemv_4bit out float16": (lambda b: b.gemv4(out=b.out.half()), ["out", "float16"]),
    "gemv_4bit code of 256": (lambda b: b.gemv4(code=b.nested.state2.code), ["code", "256", "16"]),
    "gemv_4bit without a state": (lambda b: F.gemv_4bit(b.x, b.packed), ["state", "None"]),
    "matmul_4bit without a state": (lambda b: bnb.matmul_4bit(b.x, b.packed, None), ["quant_state", "None"]),
    "matmul_4bit of a vector": (_flat_state, ["1340", "2"]),
    "matmul_4bit out short": (
        lambda b: bnb.matmul_4bit(b.x, b.packed, b.state, out=b.out[:3]),
        ["out", "3", "5"],
    ),
    # int8
    "int8 x of another width": (lambda b: b.linear8(x=b.x[:, 1:]), ["x", "66", "67"]),
    "int8 x float64": (lambda b: b.linear8(x=b.x.double()), ["x", "float64"]),
    "CB uint8": (lambda b: b.linear8(CB=b.CB.view(torch.uint8)), ["CB", "uint8", "int8"]),
    "CB 1-D": (lambda b: b.linear8(CB=b.CB[0]), ["CB", "1", "2"]),
    "SCB short": (lambda b: b.linear8(SCB=b.SCB[1:]), ["SCB", "19", "20"]),
    "SCB float16": (lambda b: b.linear8(SCB=b.SCB.half()), ["SCB", "float16"]),
    "int8 bias long": (lambda b: b.linear8(bias=torch.ones(21)), ["bias", "21", "20"]),
    "int8 bias float64": (lambda b: b.linear8(bias=b.bias.double()), ["bias", "float64"]),
    "threshold negative": (lambda b: b.linear8(threshold=-1.5), ["threshold", "-1.5"]),
    "threshold NaN": (lambda b: b.linear8(threshold=NAN), ["threshold", "nan"]),
    "int8 gradient of another width": (lambda b: b.linear8_grad(grad=b.x), ["grad", "67", "20"]),
    "matmul8 A float32": (lambda b: b.matmul8(A=b.x), ["A", "float32", "int8"]),
    "matmul8 inner sizes": (lambda b: b.matmul8(B=b.CB[:, :64]), ["B", "64", "67"]),
    "matmul8 B 3-D": (lambda b: b.matmul8(B=b.CB[None]), ["B", "3", "2"]),
    "matmul8 out of another shape": (lambda b: b.matmul8(out=b.out32.t()), ["out", "20", "5"]),
    "matmul8 out float32": (lambda b: b.matmul8(out=b.out), ["out", "float32", "int32"]),
    "scaled_mm row_stats short": (lambda b: b.scaled8(row_stats=b.SCA[:4]), ["row_stats", "4", "5"]),
    "scaled_mm dtype int32": (lambda b: b.scaled8(dtype=torch.int32), ["dtype", "int32"]),
    "mixed column too large": (lambda b: b.mixed8(outlier_cols=_long(3, 67)), ["outlier_cols", "67"]),
    "mixed column negative": (lambda b: b.mixed8(outlier_cols=_long(-1, 3)), ["outlier_cols", "-1"]),
    "mixed columns unsorted": (lambda b: b.mixed8(outlier_cols=_long(5, 3)), ["outlier_cols", "3", "ascending"]),
    "mixed columns int32": (lambda b: b.mixed8(outlier_cols=_long(3).int()), ["outlier_cols", "int32", "int64"]),
    "mixed A with other rows": (lambda b: b.mixed8(A=b.x[:3]), ["A", "3", "5"]),
    "mm_dequant of int8": (lambda b: b.dequant8(A=b.CA), ["A", "int8", "int32"]),
    "mm_dequant col_stats float64": (lambda b: b.dequant8(col_stats=b.SCB.double()), ["col_stats", "float64"]),
    "mm_dequant out short": (
        lambda b: F.int8_mm_dequant(b.C32, b.SCA, b.SCB, out=b.out.half()[:3]),
        ["out", "3", "5"],
    ),
    "vectorwise_quant threshold": (lambda b: F.int8_vectorwise_quant(b.x, threshold=-6.0), ["threshold", "-6"]),
    "vectorwise_quant of int8": (lambda b: F.int8_vectorwise_quant(b.CA), ["A", "int8"]),
    "vectorwise_dequant stats": (lambda b: F.int8_vectorwise_dequant(b.CA, b.SCA[:2]), ["stats", "2", "5"]),
    "double_quant with storage": (lambda b: F.int8_double_quant(b.x, col_stats=b.SCB), ["col_stats", "None"]),
    "matmul of int8 without statistics": (lambda b: bnb.matmul(b.x, b.CB), ["B", "SCB"]),
}
