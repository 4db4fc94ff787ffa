"""Embedding8bit, Embedding4bit, EmbeddingFP4, EmbeddingNF4: embeddings over a quantised table, for inference.

A lookup gathers the codes and the scales of the rows asked for and dequantises those alone; only where the rows of a
4-bit table are not whole blocks is the whole table dequantised.  The table [num_embeddings, embedding_dim] is a weight
[out, in] to the parameter classes and in a checkpoint, whose entries are those of Linear8bitLt and Linear4bit.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.types import Device

from ..functional import dequantize_4bit, int8_vectorwise_dequant
from ..optim.sharding import is_dtensor
from ..quant_state import QuantState
from .int8params import Int8Params
from .linear4bit import Linear4bit, fix_4bit_weight_quant_state_from_module
from .linear8bit import Linear8bitLt
from .params4bit import Params4bit
from .quantized_linear import QuantizedModule, check_format, logger


class _QuantizedEmbedding(QuantizedModule, nn.Embedding):
    """nn.Embedding over a parameter that carries statistics: what QuantizedLinear is to nn.Linear.

    Subclasses set `_kind`, the class of the parameter.
    """

    _kind: Any = None

    def __init__(self, num_embeddings: int, embedding_dim: int, device: Device, dtype: torch.dtype | None) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype  # of every output, whatever becomes of the table

    _table_shape = property(lambda self: (self.num_embeddings, self.embedding_dim))

    def _is_float_table(self) -> bool:
        """True if somebody put a plain float weight in the table's place, as tying does: there is nothing to decode."""
        return not isinstance(self.weight, self._kind) and self._fits(self.weight)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._follow()


# ---------------------------------------------------------------- 8 bits


class Embedding8bit(_QuantizedEmbedding):
    """nn.Embedding over an int8 table, one scale per row.

    num_embeddings, embedding_dim, device, dtype  as nn.Embedding's; it has no other options
    The table is quantised, by way of float16, when it is first moved from the CPU to a device, the CPU included.
    forward: integer indices [*] -> [*, embedding_dim] in the dtype of the table at construction; RuntimeError before
    that move.  No gradients.
    state_dict() holds weight, SCB (float32 [num_embeddings]) and weight_format;  load_state_dict() takes it, or a float
    table, into any Embedding8bit, quantised or not; a float table is quantised if this one was.
    Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale".
    """

    _kind = Int8Params

    def __init__(
        self, num_embeddings: int, embedding_dim: int, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device, dtype)
        self.weight = Int8Params(self.weight.data, requires_grad=False, has_fp16_weights=False)

    def forward(self, input: Tensor) -> Tensor:
        """The rows `input` asks for: integer indices of any shape."""
        weight = self.weight
        if self._is_float_table():
            return F.embedding(input, weight).to(self.dtype)
        scales = self.SCB
        if weight.dtype != torch.int8 or scales is None:
            raise RuntimeError(
                f"{type(self).__name__}: the table is not quantised yet: move the layer from the CPU to the device it "
                "shall run on, layer.to('cpu') or layer.to('cuda'), or load a quantised checkpoint"
            )
        codes = F.embedding(input, weight.data)
        return int8_vectorwise_dequant(codes, scales[input.reshape(-1)]).to(self.dtype)

    def _follow(self) -> None:
        if isinstance(self.weight, Int8Params) and self.weight.dtype == torch.int8:
            self.weight.follow()
        if self.weight.dtype == torch.int8:
            self._keep_scales()

    def _scales(self) -> Tensor | None:
        """float32 [num_embeddings] of the int8 table, None if it is not quantised."""
        scales = getattr(self.weight, "SCB", None)
        return self._kept if scales is None and self.weight.dtype == torch.int8 else scales

    _kept: Tensor | None = None
    _keep_scales = Linear8bitLt._keep_scales
    SCB = Linear8bitLt.SCB
    weight_format = Linear8bitLt.weight_format
    _holds_codes = Linear8bitLt._holds_codes
    _statistics = Linear8bitLt._statistics

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if prefix + "weight" in state_dict:
            check_format(state_dict.get(prefix + "weight_format", "row"))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    _owns = Linear8bitLt._owns
    _take = Linear8bitLt._take

    def _load_int8(self, weight: Tensor, scales: Tensor, quantised: bool, assign: bool) -> bool:
        """Take int8 codes and their scales. False: the scales alone, because torch loads the codes of a shard."""
        expected = (self.num_embeddings, self.embedding_dim), (self.num_embeddings,)
        given = tuple(weight.shape), tuple(scales.shape)
        if given != expected:
            raise ValueError(f"size mismatch: weight and SCB have shapes {given}, expected {expected}")
        if weight.dtype != torch.int8:
            raise ValueError(f"the weight beside SCB has dtype {weight.dtype}, expected torch.int8")
        if is_dtensor(self.weight):
            self._kept = scales.to(self.weight.device, torch.float32, copy=True)
            return False
        device = self._target(weight, assign)
        codes = weight.to(device, copy=not assign)
        scales = scales.to(device, torch.float32, copy=not assign)
        self._install(Int8Params(codes, requires_grad=False, SCB=scales), assign)
        return True

    def _load_float(self, weight: Tensor, quantised: bool, assign: bool) -> None:
        """Take a float table; quantise it, where the layer is, if the layer's was quantised."""
        fresh = Int8Params(weight, requires_grad=False)
        if quantised:
            fresh.quantize(self._target(weight, assign))
        self._install(fresh, assign)

    def _target(self, weight: Tensor, assign: bool) -> torch.device:
        """The device of a loaded table: its own if it is assigned, or has no other to go to."""
        return weight.device if assign or self.weight.is_meta else self.weight.device

    def _install(self, loaded: Int8Params, assign: bool) -> None:
        """Make a loaded table the weight. The parameter stays the same object, unless it is on meta or not of ours."""
        current = self.weight
        if assign or current.is_meta or not isinstance(current, Int8Params):
            self.weight = loaded
        else:
            current.requires_grad = False
            current.data, current.SCB = loaded.data, loaded.SCB
        self._follow()


# ---------------------------------------------------------------- 4 bits


class Embedding4bit(_QuantizedEmbedding):
    """nn.Embedding over a 4-bit table, one scale per block of 64.

    num_embeddings, embedding_dim, dtype, device  as nn.Embedding's; it has no other options
    quant_type     "fp4" or "nf4"
    quant_storage  dtype that carries the packed bytes: uint8, float16, bfloat16 or float32
    The table is quantised by the first move to a device, the CPU included.
    forward: integer indices [*] -> [*, embedding_dim] in the dtype of the table at construction; RuntimeError before
    that move.  No gradients.  If embedding_dim is no multiple of the block size, every forward dequantises the whole
    table, and a warning says so at construction.
    state_dict() holds weight [items, 1] and the statistics as weight.*;  load_state_dict() takes it, or a float table,
    into any Embedding4bit, quantised or not; a float table is quantised if this one was.
    Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs".
    """

    _kind = Params4bit

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: Device = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device, dtype)
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            compress_statistics=False,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.quant_state = None
        self.quant_storage = quant_storage
        blocksize = self.weight.blocksize
        if embedding_dim % blocksize:
            logger.warning(
                f"{type(self).__name__}: embedding_dim is {embedding_dim}, no multiple of the block size {blocksize}: "
                "every forward dequantises the whole table, which makes for slow inference."
            )

    def forward(self, input: Tensor) -> Tensor:
        """The rows `input` asks for: integer indices of any shape."""
        if getattr(self.weight, "quant_state", None) is None:
            if self._is_float_table():
                return F.embedding(input, self.weight).to(self.dtype)
            fix_4bit_weight_quant_state_from_module(self)
        packed, state = self.weight.data, self.weight.quant_state
        if self.embedding_dim % state.blocksize:
            return F.embedding(input, dequantize_4bit(packed, _described(state, state.absmax, self.dtype, state.shape)))
        return self._dequantise_rows(input, packed.view(torch.uint8), state)

    def _dequantise_rows(self, input: Tensor, packed: Tensor, state: QuantState) -> Tensor:
        """packed: the bytes of the table, of whose rows each is a number of whole blocks."""
        blocks = self.embedding_dim // state.blocksize
        rows = F.embedding(input, packed.reshape(-1, self.embedding_dim // 2))
        scales = F.embedding(input, state.absmax.reshape(-1, blocks))
        shape = (*input.shape, self.embedding_dim)  # a torch.Size would fix the batch of a compiled graph
        wanted = _described(state, scales.reshape(-1), self.dtype, shape)
        if state.nested:
            # Scales of scattered rows share no block any more: each takes the scale of its block along.
            numbers = input.reshape(-1, 1).long() * blocks + torch.arange(blocks, device=input.device)
            inner = state.state2
            of_each = inner.absmax[(numbers // inner.blocksize).reshape(-1)]
            wanted.state2 = QuantState(of_each, code=inner.code, blocksize=1, dtype=inner.dtype)
        return dequantize_4bit(rows.reshape(-1, 1), wanted)

    _follow = Linear4bit._follow
    _state = Linear4bit._state
    _holds_codes = Linear4bit._holds_codes
    _statistics = Linear4bit._statistics
    _owns = Linear4bit._owns
    _take = Linear4bit._take
    _load_packed = Linear4bit._load_packed
    _load_sharded = Linear4bit._load_sharded
    _load_float = Linear4bit._load_float
    _check_shape = Linear4bit._check_shape


def _described(state: QuantState, absmax: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> QuantState:
    """A state like `state`, of other scales, for a result of another dtype and shape."""
    return QuantState(
        absmax,
        shape=shape,
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=dtype,
        offset=state.offset if state.nested else None,
        state2=state.state2 if state.nested else None,
    )


class EmbeddingFP4(Embedding4bit):
    """Embedding4bit with quant_type "fp4". Arguments: Embedding4bit, without quant_type."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: Device = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)


class EmbeddingNF4(Embedding4bit):
    """Embedding4bit with quant_type "nf4": quantiles of the normal distribution, for normally distributed tables.

    Arguments: Embedding4bit, without quant_type.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: Device = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)
