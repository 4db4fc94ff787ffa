"""A set of matching tensors, and the table of calls that must be refused: for test_bad_input.py."""

import torch

import bitsandbytes.functional as F

OPS = torch.ops.bitsandbytes
REFUSED = (ValueError, RuntimeError)  # a raw operator raises through torch; F turns the same text into ValueError
MAP_ERRORS = (ValueError, AssertionError)
NAN = float("nan")


class Bench:
    """A set of matching tensors; 1000 elements, blocks of 64 (quantised) or 256 (optimizer state)."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(1000, generator=g)
        self.code = F.create_dynamic_map()
        self.q, self.q_state = F.quantize_blockwise(self.x, blocksize=64)
        self.packed, self.state = F.quantize_4bit(self.x, quant_type="nf4")
        self.nested_packed, self.nested = F.quantize_4bit(self.x, quant_type="nf4", compress_statistics=True)
        self.absmax = self.q_state.absmax.clone()
        self.out, self.absmax_out = torch.full((1000,), 7.0), torch.full((16,), 7.0)
        self.out8 = torch.full((1000,), 7, dtype=torch.uint8)
        self.p, self.g = torch.randn(1000, generator=g), torch.randn(1000, generator=g)
        self.s1, self.s2 = (torch.full((1000,), c, dtype=torch.uint8) for c in (130, 5))
        self.f1, self.f2 = torch.full((1000,), 0.5), torch.full((1000,), 0.25)
        self.a1, self.a2 = torch.ones(4), torch.ones(4)
        self.m1, self.m2 = F.create_dynamic_map(), F.create_dynamic_map(signed=False)

    def q8(self, **change):
        return F.quantize_blockwise(**({"A": self.x, "blocksize": 64} | change))

    def d8(self, **change):
        return F.dequantize_blockwise(**({"A": self.q, "absmax": self.absmax, "blocksize": 64} | change))

    def d8s(self, **change):
        return F.dequantize_blockwise(self.q, self.q_state, **change)

    def q4(self, **change):
        return F.quantize_4bit(**({"A": self.x, "quant_type": "nf4"} | change))

    def d4(self, **change):
        return F.dequantize_4bit(self.packed, absmax=self.absmax, out=self.out, **change)

    def d4s(self, packed=None, **change):
        return F.dequantize_4bit(self.packed if packed is None else packed, self.state, **change)

    def adam8(self, **change):
        a = {
            "optimizer_name": "adam",
            "g": self.g,
            "p": self.p,
            "state1": self.s1,
            "state2": self.s2,
            "beta1": 0.9,
            "beta2": 0.999,
            "beta3": 0.0,
            "alpha": 0.0,
            "eps": 1e-8,
            "step": 1,
            "lr": 1e-3,
            "qmap1": self.m1,
            "qmap2": self.m2,
            "absmax1": self.a1,
            "absmax2": self.a2,
            "weight_decay": 0.01,
            "gnorm_scale": 1.0,
        }
        F.optimizer_update_8bit_blockwise(**(a | change))

    def adam32(self, **change):
        a = {
            "optimizer_name": "adam",
            "g": self.g,
            "p": self.p,
            "state1": self.f1,
            "state2": self.f2,
            "beta1": 0.9,
            "beta2": 0.999,
            "eps": 1e-8,
            "step": 1,
            "lr": 1e-3,
            "weight_decay": 0.01,
            "gnorm_scale": 1.0,
        }
        F.optimizer_update_32bit(**(a | change))

    def multi(self, **change):
        a = {
            "p": [self.p],
            "g": [self.g],
            "state1": [self.s1],
            "state2": [self.s2],
            "absmax1": [self.a1],
            "absmax2": [self.a2],
            "qmaps": [self.m1, self.m2],
            "step": [1],
        } | change
        lists = [a[name] for name in ("p", "g", "state1", "state2", "absmax1", "absmax2", "qmaps")]
        scalars = (1e-3, 0.9, 0.999, 0.0, 0.0, 0.0, 0.0, 1e-8, 0.0, 0.0, False, False, True, True, False, 0)
        OPS._optimizer_step("adam", *lists, [], [], None, None, None, a["step"], [], *scalars)

    def decode4(self, **change):
        a = {
            "absmax": self.state.absmax,
            "blocksize": 64,
            "quant_type": "nf4",
            "shape": [1000],
            "dtype": torch.float32,
        } | change
        return OPS.dequantize_4bit(self.packed, a["absmax"], a["blocksize"], a["quant_type"], a["shape"], a["dtype"])

    def tensors(self):
        return {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor)}


def meta(t):
    return t.to("meta")


# name -> (call, exception, words that the text must hold)
CASES = {
    # 8-bit quantiser
    "quantize8 int input": (lambda b: b.q8(A=b.x.int()), ValueError, ["A", "int32"]),
    "quantize8 double input": (lambda b: b.q8(A=b.x.double()), ValueError, ["A", "float64"]),
    "quantize8 block 0": (lambda b: b.q8(blocksize=0), ValueError, ["blocksize", "0"]),
    "quantize8 block -1": (lambda b: b.q8(blocksize=-1), ValueError, ["blocksize", "-1"]),
    "quantize8 nested block 0": (lambda b: b.q8(blocksize=0, nested=True), ValueError, ["blocksize"]),
    "quantize8 code of 255": (lambda b: b.q8(code=b.code[:255]), ValueError, ["code", "255", "256"]),
    "quantize8 code of 0": (lambda b: b.q8(code=b.code[:0]), ValueError, ["code", "0", "256"]),
    "quantize8 code f64": (lambda b: b.q8(code=b.code.double()), ValueError, ["code", "float64"]),
    "quantize8 code f16": (lambda b: b.q8(code=b.code.half()), ValueError, ["code", "float16"]),
    "quantize8 op code on meta": (lambda b: OPS.quantize_blockwise(b.x, meta(b.code), 64), REFUSED, ["code", "meta"]),
    "quantize8 absmax short": (lambda b: b.q8(absmax=b.absmax_out[:15]), ValueError, ["absmax", "15"]),
    "quantize8 out short": (lambda b: b.q8(out=b.out8[:999]), ValueError, ["out", "999"]),
    "quantize8 out f32": (lambda b: b.q8(out=b.out), ValueError, ["out", "float32"]),
    # 8-bit dequantiser
    "dequantize8 nothing": (lambda b: F.dequantize_blockwise(b.q), ValueError, ["absmax", "quant_state"]),
    "dequantize8 codes f32": (lambda b: b.d8(A=b.x), ValueError, ["A", "float32", "uint8"]),
    "dequantize8 codes int8": (lambda b: b.d8(A=b.q.to(torch.int8)), ValueError, ["A", "int8"]),
    "dequantize8 block 0": (lambda b: b.d8(blocksize=0), ValueError, ["blocksize", "0"]),
    "dequantize8 block -64": (lambda b: b.d8(blocksize=-64), ValueError, ["blocksize", "-64"]),
    "dequantize8 absmax short": (lambda b: b.d8(absmax=b.absmax[:15]), ValueError, ["absmax", "15", "16"]),
    "dequantize8 absmax long": (lambda b: b.d8(blocksize=128), ValueError, ["absmax", "16", "8"]),
    "dequantize8 absmax f64": (lambda b: b.d8(absmax=b.absmax.double()), ValueError, ["absmax", "float64"]),
    "dequantize8 code of 16": (lambda b: b.d8(code=b.code[:16]), ValueError, ["code", "16", "256"]),
    "dequantize8 op dtype int": (
        lambda b: OPS.dequantize_blockwise(b.q, b.absmax, b.code, 64, torch.int32),
        REFUSED,
        ["dtype", "int32"],
    ),
    "dequantize8 op absmax on meta": (
        lambda b: OPS.dequantize_blockwise(b.q, meta(b.absmax), b.code, 64, torch.float32),
        REFUSED,
        ["absmax", "meta"],
    ),
    "dequantize8 out short": (lambda b: b.d8s(out=b.out[:999]), ValueError, ["out", "999", "1000"]),
    "dequantize8 out f16": (lambda b: b.d8s(out=b.out.half()), ValueError, ["out", "float16", "float32"]),
    "dequantize8 out 2-D": (lambda b: b.d8s(out=b.out.view(10, 100)), ValueError, ["out", "2", "1"]),
    "dequantize8 op out block 0": (
        lambda b: OPS.dequantize_blockwise.out(b.q, b.absmax, b.code, 0, torch.float32, out=b.out),
        REFUSED,
        ["blocksize", "0"],
    ),
    # 4-bit quantiser
    "quantize4 type": (lambda b: b.q4(quant_type="nf5"), ValueError, ["quant_type", "nf5"]),
    "quantize4 table-only type": (lambda b: b.q4(quant_type="int4"), ValueError, ["quant_type", "int4"]),
    "quantize4 empty type": (lambda b: b.q4(quant_type=""), ValueError, ["quant_type"]),
    "quantize4 long input": (lambda b: b.q4(A=b.x.long()), ValueError, ["A", "int64"]),
    **{
        f"quantize4 block {n}": (lambda b, n=n: b.q4(blocksize=n), ValueError, ["blocksize", str(n)])
        for n in (0, -1, 1, 16, 48, 96, 8192, 2**40)
    },
    "quantize4 storage": (lambda b: b.q4(quant_storage=torch.int32), ValueError, ["quant_storage", "int32"]),
    "quantize4 absmax long": (lambda b: b.q4(absmax=torch.cat([b.absmax_out, b.a1])), ValueError, ["absmax", "20"]),
    "quantize4 out short": (lambda b: b.q4(out=b.out8[:499].view(-1, 1)), ValueError, ["out", "499"]),
    # 4-bit dequantiser
    "dequantize4 nothing": (lambda b: F.dequantize_4bit(b.packed), ValueError, ["absmax", "out"]),
    "dequantize4 absmax alone": (lambda b: F.dequantize_4bit(b.packed, absmax=b.absmax), ValueError, ["absmax", "out"]),
    "dequantize4 block 48": (lambda b: b.d4(blocksize=48), ValueError, ["blocksize", "48"]),
    "dequantize4 type": (lambda b: b.d4(quant_type="fp5"), ValueError, ["quant_type", "fp5"]),
    "dequantize4 truncated": (lambda b: b.d4s(b.packed[:499]), ValueError, ["A", "499", "500"]),
    "dequantize4 too long": (
        lambda b: F.dequantize_4bit(torch.cat([b.packed, b.packed]), b.state),
        ValueError,
        ["A", "1000", "500"],
    ),
    "dequantize4 truncated, out": (lambda b: b.d4s(b.packed[:499], out=b.out), ValueError, ["A", "499", "500"]),
    "dequantize4 truncated, nested": (
        lambda b: F.dequantize_4bit(b.nested_packed[:1], b.nested),
        ValueError,
        ["A", "1", "500"],
    ),
    "dequantize4 out f16": (lambda b: b.d4s(out=b.out.half()), ValueError, ["out", "float16"]),
    "dequantize4 out short": (lambda b: b.d4s(out=b.out[:998]), ValueError, ["out", "998"]),
    "dequantize4 op absmax short": (lambda b: b.decode4(absmax=b.absmax[:3]), REFUSED, ["absmax", "3", "16"]),
    "dequantize4 op absmax u8": (lambda b: b.decode4(absmax=b.nested.absmax), REFUSED, ["absmax", "uint8"]),
    "dequantize4 op negative size": (lambda b: b.decode4(shape=[-1000]), REFUSED, ["shape", "-1000"]),
    "dequantize4 op two negative sizes": (lambda b: b.decode4(shape=[-10, -100]), REFUSED, ["shape", "-10"]),
    "dequantize4 op shape overflow": (lambda b: b.decode4(shape=[2**62, 4]), REFUSED, ["shape"]),
    "dequantize4 op shape overflow to 1000": (lambda b: b.decode4(shape=[2**61 + 125, 8]), REFUSED, ["shape"]),
    "dequantize4 op huge shape": (lambda b: b.decode4(shape=[2**62]), REFUSED, ["500"]),
    "dequantize4 op dtype": (lambda b: b.decode4(dtype=torch.float64), REFUSED, ["dtype", "float64"]),
    "dequantize4 op absmax on meta": (lambda b: b.decode4(absmax=meta(b.absmax)), REFUSED, ["absmax", "meta"]),
    # nested statistics
    "scales f64": (lambda b: OPS._quantize_scales(b.absmax.double(), b.code, 256), REFUSED, ["absmax", "float64"]),
    "scales block 0": (lambda b: OPS._quantize_scales(b.absmax, b.code, 0), REFUSED, ["blocksize", "0"]),
    "scales code of 16": (lambda b: OPS._quantize_scales(b.absmax, b.code[:16], 256), REFUSED, ["code", "16"]),
    "scales back, absmax2 long": (
        lambda b: OPS._dequantize_scales(b.nested.absmax, b.code, b.a1, b.a1[:1].view(()), 256),
        REFUSED,
        ["absmax2", "4", "1"],
    ),
    "scales back, plain codes": (
        lambda b: OPS._dequantize_scales(b.absmax, b.code, b.a1[:1], b.a1[0], 256),
        REFUSED,
        ["absmax", "float32"],
    ),
    # codebooks and quantiles
    "map type": (lambda b: F.get_4bit_type("nf9", device="cpu"), NotImplementedError, ["nf9"]),
    "dynamic map of 9 bits": (lambda b: F.create_dynamic_map(True, 7, 9), MAP_ERRORS, ["total_bits", "9"]),
    "dynamic map, 0 exponent bits": (
        lambda b: F.create_dynamic_map(True, 0, 8),
        MAP_ERRORS,
        ["max_exponent_bits", "0"],
    ),
    "linear map of 0 bits": (lambda b: F.create_linear_map(True, 0), MAP_ERRORS, ["total_bits", "0"]),
    "linear map of 9 bits": (lambda b: F.create_linear_map(True, 9), MAP_ERRORS, ["total_bits", "9"]),
    "normal map, offset 1": (lambda b: F.create_normal_map(offset=1.0), ValueError, ["offset", "1"]),
    "normal map, offset NaN": (lambda b: F.create_normal_map(offset=NAN), ValueError, ["offset", "nan"]),
    "quantiles of nothing": (lambda b: F.estimate_quantiles(b.x[:0]), ValueError, ["A", "0"]),
    "257 quantiles": (
        lambda b: F.estimate_quantiles(b.x, num_quantiles=257),
        NotImplementedError,
        ["num_quantiles", "257"],
    ),
    "0 quantiles": (lambda b: F.estimate_quantiles(b.x, num_quantiles=0), ValueError, ["num_quantiles", "0"]),
    "quantiles of doubles": (lambda b: F.estimate_quantiles(b.x.double()), NotImplementedError, ["A", "float64"]),
    "quantiles, offset -1": (lambda b: F.estimate_quantiles(b.x, offset=-1.0), ValueError, ["offset", "-1"]),
    "quantiles, offset NaN": (lambda b: F.estimate_quantiles(b.x, offset=NAN), ValueError, ["offset", "nan"]),
    "quantiles out short": (lambda b: F.estimate_quantiles(b.x, out=b.out[:255]), ValueError, ["out", "255"]),
    # optimizer, functional
    "adam8 name": (lambda b: b.adam8(optimizer_name="adamx"), ValueError, ["optimizer_name", "adamx"]),
    "adam8 lr": (lambda b: b.adam8(lr=-1.0), ValueError, ["lr", "-1"]),
    "adam8 lr NaN": (lambda b: b.adam8(lr=NAN), ValueError, ["lr", "nan"]),
    "adam8 lr Inf": (lambda b: b.adam8(lr=float("inf")), ValueError, ["lr", "inf"]),
    "adam8 beta1": (lambda b: b.adam8(beta1=1.0), ValueError, ["beta1", "1"]),
    "adam8 beta2": (lambda b: b.adam8(beta2=-0.5), ValueError, ["beta2", "-0.5"]),
    "adam8 eps": (lambda b: b.adam8(eps=-1e-8), ValueError, ["eps", "-1e-08"]),
    "adam8 weight decay": (lambda b: b.adam8(weight_decay=-0.25), ValueError, ["weight_decay", "-0.25"]),
    "adam8 step 0": (lambda b: b.adam8(step=0), ValueError, ["step", "0"]),
    "adam8 sigma NaN": (lambda b: b.adam8(gnorm_scale=NAN), ValueError, ["gnorm_scale", "nan"]),
    "adam8 g dtype": (lambda b: b.adam8(g=b.g.half()), ValueError, ["g", "float16", "float32"]),
    "adam8 g length": (lambda b: b.adam8(g=b.g[:999]), ValueError, ["g", "999", "1000"]),
    "adam8 g on meta": (lambda b: b.adam8(g=meta(b.g)), ValueError, ["g", "meta"]),
    "adam8 p int": (lambda b: b.adam8(p=b.p.int(), g=b.g.int()), ValueError, ["p", "int32"]),
    "adam8 state f32": (lambda b: b.adam8(state1=b.f1), ValueError, ["state1", "float32", "uint8"]),
    "adam8 state2 missing": (lambda b: b.adam8(state2=None), ValueError, ["state2"]),
    "adam8 state2 short": (lambda b: b.adam8(state2=b.s2[:900]), ValueError, ["state2", "900", "1000"]),
    "adam8 absmax short": (lambda b: b.adam8(absmax1=b.a1[:3]), ValueError, ["absmax1", "3", "4"]),
    "adam8 absmax2 missing": (lambda b: b.adam8(absmax2=None), ValueError, ["absmax2"]),
    "adam8 absmax2 f64": (lambda b: b.adam8(absmax2=b.a2.double()), ValueError, ["absmax2", "float64"]),
    "adam8 map of 524": (lambda b: b.adam8(qmap2=torch.zeros(524)), ValueError, ["qmap2", "524", "256"]),
    "adam8 map missing": (lambda b: b.adam8(qmap2=None), ValueError, ["qmap2"]),
    "adam32 name": (lambda b: b.adam32(optimizer_name=""), ValueError, ["optimizer_name"]),
    "adam32 lr": (lambda b: b.adam32(lr=-0.5), ValueError, ["lr", "-0.5"]),
    "adam32 beta1 NaN": (lambda b: b.adam32(beta1=NAN), ValueError, ["beta1", "nan"]),
    "adam32 step -3": (lambda b: b.adam32(step=-3), ValueError, ["step", "-3"]),
    "adam32 state u8": (lambda b: b.adam32(state1=b.s1), ValueError, ["state1", "uint8", "float32"]),
    "adam32 state short": (lambda b: b.adam32(state2=b.f2[:10]), ValueError, ["state2", "10", "1000"]),
    "adam32 state2 missing": (lambda b: b.adam32(state2=None), ValueError, ["state2"]),
    "adam32 g shape": (lambda b: b.adam32(g=torch.cat([b.g, b.g])), ValueError, ["g", "2000", "1000"]),
    "adam32 trust ratio": (
        lambda b: b.adam32(max_unorm=-1.0, unorm_vec=torch.zeros(1)),
        ValueError,
        ["max_unorm", "-1"],
    ),
    "multi: one g too few": (lambda b: b.multi(g=[]), REFUSED, ["g", "0", "1"]),
    "multi: a second p is bad": (
        lambda b: b.multi(
            p=[b.p, b.x],
            g=[b.g, b.x[:5]],
            state1=[b.s1, b.out8],
            state2=[b.s2, b.out8.clone()],
            absmax1=[b.a1, b.absmax_out[:4]],
            absmax2=[b.a2, b.absmax_out[4:8]],
            step=[1, 1],
        ),
        REFUSED,
        ["g[1]", "5", "1000"],
    ),
    "multi: one step too many": (lambda b: b.multi(step=[1, 2]), REFUSED, ["step", "2", "1"]),
    "multi: absmax missing": (lambda b: b.multi(absmax1=[]), REFUSED, ["absmax1", "0", "1"]),
    "multi: no maps": (lambda b: b.multi(qmaps=[]), REFUSED, ["qmaps", "0", "2"]),
}
