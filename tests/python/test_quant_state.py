"""QuantState: fields, list form, moves, equality, copies; both dict forms, byte for byte; and bad checkpoints."""

import copy
import io
import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bitsandbytes.functional as F
from bitsandbytes.functional import QuantState
from bitsandbytes.utils import pack_dict_to_tensor, unpack_tensor_to_dict

PACKED = "quant_state.bitsandbytes__nf4"


def quantised(nested=True, quant_type="nf4", dtype=torch.float16, shape=(300, 400)):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return F.quantize_4bit(x, compress_statistics=nested, quant_type=quant_type)


def edited(change, nested=True):
    """A packed dict whose JSON went through `change`."""
    state = quantised(nested)[1].as_dict(packed=True)
    meta = unpack_tensor_to_dict(state[PACKED])
    change(meta)
    return {**state, PACKED: pack_dict_to_tensor(meta)}


# ---------------------------------------------------------------- the object


def test_fields_and_list_form():
    _, state = quantised()
    assert state.nested
    assert state[0] is state.absmax
    assert state[1:4] == [torch.Size((300, 400)), torch.float16, 64]
    assert state[4][0] is state.offset
    assert state[4][1] is state.state2
    assert state[5] == "nf4"
    assert quantised(False)[1][4] is None
    assert QuantState.valid_quant_types == ("fp4", "nf4")
    assert list(QuantState.valid_qs_type_keys) == ["bitsandbytes__fp4", "bitsandbytes__nf4"]
    assert len(QuantState.valid_qs_keys) == 12
    bare = QuantState(torch.ones(3))
    fields = bare.shape, bare.code, bare.blocksize, bare.quant_type, bare.dtype, bare.offset, bare.state2, bare.nested
    assert fields == (None,) * 7 + (False,)


def test_to_returns_self_and_moves_everything():
    _, state = quantised()
    assert state.to("meta") is state
    for tensor in (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code):
        assert tensor.device.type == "meta"
    assert QuantState(torch.ones(3)).to("meta").code is None


def test_repr_says_what_it_is():
    text = repr(quantised()[1])
    for part in ("QuantState(", "'nf4'", "(300, 400)", "torch.float16", "blocksize=64", "uint8[1875]", "nested=True"):
        assert part in text
    assert "absmax=None" in repr(QuantState(None))


@pytest.mark.parametrize("nested", [False, True])
def test_equality(nested):
    _, state = quantised(nested)
    same = copy.deepcopy(state)
    assert state == same
    same.absmax[0] += 1
    assert state != same
    for field, value in (("blocksize", 128), ("quant_type", "fp4"), ("dtype", torch.float32), ("shape", (3,))):
        other = copy.deepcopy(state)
        setattr(other, field, value)
        assert state != other, field
    shorter = copy.deepcopy(state)
    shorter.absmax = shorter.absmax[:-1]
    assert state != shorter
    assert state != "nf4"
    if nested:
        shifted, inner = copy.deepcopy(state), copy.deepcopy(state)
        shifted.offset = shifted.offset + 1
        inner.state2.absmax[0] += 1
        assert state != shifted
        assert state != inner
        assert state != quantised(False)[1]


def test_copies_and_pickles():
    packed, state = quantised()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for twin in (copy.copy(state), copy.deepcopy(state), pickle.loads(pickle.dumps(state)), loaded):
        assert twin == state
        assert torch.equal(F.dequantize_4bit(packed, twin), F.dequantize_4bit(packed, state))


def test_metadata_as_an_attribute():
    _, state = quantised()
    assert torch.equal(state.bitsandbytes__nf4, state.as_dict(packed=True)[PACKED])
    for name in ("bitsandbytes__fp4", "bitsandbytes__", "absmaxx"):
        with pytest.raises(AttributeError, match=name):
            getattr(state, name)
    assert not hasattr(QuantState(torch.ones(1)), "bitsandbytes__nf4")


# ---------------------------------------------------------------- written form


def test_unpacked_keys_in_order():
    _, state = quantised()
    unpacked = state.as_dict()
    head = ["quant_type", "absmax", "blocksize", "quant_map", "dtype", "shape"]
    tail = ["nested_absmax", "nested_blocksize", "nested_quant_map", "nested_dtype", "nested_offset"]
    assert list(unpacked) == head + tail
    assert list(quantised(False)[1].as_dict()) == head
    assert unpacked["dtype"] == "float16"
    assert unpacked["shape"] == (300, 400)
    assert type(unpacked["nested_offset"]) is float
    assert unpacked["nested_quant_map"].data_ptr() != state.state2.code.data_ptr()


def test_packed_bytes_nested():
    """The payload is fixed to the byte: key order, separators, and the number of bytes (159)."""
    _, state = quantised()
    state.offset = torch.tensor(0.0234375)
    packed = state.as_dict(packed=True)
    assert list(packed) == ["absmax", "quant_map", "nested_absmax", "nested_quant_map", PACKED]
    payload = packed[PACKED]
    assert (payload.dtype, payload.dim(), payload.device.type) == (torch.uint8, 1, "cpu")
    expected = (
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [300, 400], "nested_blocksize": 256, '
        '"nested_dtype": "float32", "nested_offset": 0.0234375}'
    )
    assert bytes(payload.tolist()) == expected.encode()
    assert payload.numel() == 159


def test_packed_bytes_plain():
    _, state = quantised(False, "fp4", torch.bfloat16, (128, 64))
    packed = state.as_dict(packed=True)
    assert list(packed) == ["absmax", "quant_map", "quant_state.bitsandbytes__fp4"]
    expected = b'{"quant_type": "fp4", "blocksize": 64, "dtype": "bfloat16", "shape": [128, 64]}'
    assert bytes(packed["quant_state.bitsandbytes__fp4"].tolist()) == expected
    assert len(expected) == 79


def test_eight_bit_states_have_no_packed_form():
    codes, state = F.quantize_blockwise(torch.ones(600), blocksize=256)
    unpacked = state.as_dict(packed=True)
    assert unpacked["quant_type"] is None
    assert unpacked["shape"] is None
    assert list(unpacked) == ["quant_type", "absmax", "blocksize", "quant_map", "dtype", "shape"]
    back = QuantState.from_dict(unpacked, "cpu")
    assert back == state
    assert torch.equal(F.dequantize_blockwise(codes, back), torch.ones(600))


# ---------------------------------------------------------------- read form


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("prefix", ["", "model.layers.0.q_proj.weight."])
def test_round_trip(nested, packed, quant_type, prefix):
    codes, state = quantised(nested, quant_type)
    written = {prefix + key: value for key, value in state.as_dict(packed=packed).items()}
    before = dict(written)
    read = QuantState.from_dict(written, torch.device("cpu"))
    assert list(written) == list(before)
    assert all(written[key] is before[key] for key in before)
    assert read == state
    assert read.shape == torch.Size((300, 400))
    assert isinstance(read.shape, torch.Size)
    assert torch.equal(F.dequantize_4bit(codes, read), F.dequantize_4bit(codes, state))
    if nested:
        assert (read.offset.dtype, read.offset.shape) == (torch.float32, ())
        assert read.offset == state.offset
        assert (read.state2.blocksize, read.state2.dtype) == (256, torch.float32)


def test_payload_in_any_order_and_spacing_and_on_another_device():
    _, state = quantised()
    written = state.as_dict(packed=True)
    meta = unpack_tensor_to_dict(written[PACKED])
    text = json.dumps(dict(reversed(meta.items())), indent=3)
    written[PACKED] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    assert QuantState.from_dict(dict(reversed(written.items())), "cpu") == state
    assert QuantState.from_dict(written, "meta").absmax.device.type == "meta"


META_ERRORS = [
    ("quant_type", "nf5"), ("quant_type", "fp4"), ("quant_type", None), ("quant_type", 4), ("quant_type", ["nf4"]),
    ("blocksize", -64), ("blocksize", 0), ("blocksize", "64"), ("blocksize", 64.0), ("blocksize", True),
    ("blocksize", None), ("blocksize", 128), ("blocksize", 2**70), ("dtype", "float64"), ("dtype", "torch.float16"),
    ("dtype", None), ("dtype", 16), ("dtype", {}), ("shape", [300, -400]), ("shape", [-300, -400]), ("shape", [300]),
    ("shape", [300, 4000]), ("shape", 120000), ("shape", "300x400"), ("shape", None), ("shape", [300, 400.0]),
    ("shape", [0, 2**70]), ("shape", [[300], 400]), ("nested_blocksize", 0), ("nested_blocksize", 64),
    ("nested_blocksize", "256"), ("nested_dtype", "int8"), ("nested_offset", "0.1"), ("nested_offset", None),
    ("nested_offset", True), ("nested_offset", 10**400), ("nested_offset", [0.1]),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), META_ERRORS)
def test_wrong_metadata(key, value):
    with pytest.raises(ValueError, match=rf"{key}|absmax.*expected") as caught:
        QuantState.from_dict(edited(lambda meta: meta.update({key: value})), "cpu")
    assert "expected" in str(caught.value)


@pytest.mark.parametrize("key", ["blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"])
def test_missing_metadata(key):
    with pytest.raises(KeyError, match=key):
        QuantState.from_dict(edited(lambda meta: meta.pop(key)), "cpu")


@pytest.mark.parametrize("key", ["absmax", "quant_map", "nested_quant_map"])
def test_missing_tensors(key):
    written = quantised()[1].as_dict(packed=True)
    del written[key]
    with pytest.raises(KeyError, match=key):
        QuantState.from_dict(written, "cpu")


def test_nested_metadata_without_nested_scales():
    written = quantised()[1].as_dict(packed=True)
    del written["nested_absmax"]
    with pytest.raises(ValueError, match="absmax"):
        QuantState.from_dict(written, "cpu")


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("absmax", lambda t: t[:-1]),
        ("absmax", lambda t: torch.cat([t, t[:1]])),
        ("absmax", lambda t: t.float()),
        ("absmax", lambda t: t.tolist()),
        ("quant_map", lambda t: t[:15]),
        ("quant_map", lambda t: t.half()),
        ("nested_absmax", lambda t: t[:-1]),
        ("nested_absmax", lambda t: t.double()),
        ("nested_quant_map", lambda t: t[:255]),
        ("nested_quant_map", lambda t: None),
    ],
)
def test_wrong_tensors(key, change):
    written = quantised()[1].as_dict(packed=True)
    written[key] = change(written[key])
    with pytest.raises(ValueError, match=rf"{key}.*expected"):
        QuantState.from_dict(written, "cpu")


def test_unknown_keys_are_named():
    written = quantised()[1].as_dict(packed=True)
    with pytest.raises(ValueError, match=r"'w\.scale'"):
        QuantState.from_dict({**written, "w.scale": torch.ones(1)}, "cpu")
    with pytest.raises(ValueError, match="'group_size'"):
        QuantState.from_dict(edited(lambda meta: meta.update(group_size=64)), "cpu")
    with pytest.raises(ValueError, match="'absmax'"):
        QuantState.from_dict(edited(lambda meta: meta.update(absmax=[1.0])), "cpu")


def test_metadata_must_be_there_once():
    written = quantised()[1].as_dict(packed=True)
    payload = written.pop(PACKED)
    with pytest.raises(ValueError, match="no packed metadata"):
        QuantState.from_dict(written, "cpu")
    with pytest.raises(ValueError, match=r"a\.quant_state.*b\.quant_state"):
        QuantState.from_dict({**written, f"a.{PACKED}": payload, f"b.{PACKED}": payload}, "cpu")
    for name in ("quant_state.bitsandbytes__nf5", "quant_state.nf4", "quant_state"):
        with pytest.raises(ValueError, match=name):
            QuantState.from_dict({**written, name: payload}, "cpu")
    with pytest.raises(ValueError, match="second time"):
        QuantState.from_dict({**written, PACKED: payload, "w.absmax": written["absmax"]}, "cpu")


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[1, 2]", b"null", b'{"quant_type": "nf4"', b"\xff\xfe", b'{"a": nope}', b"[" * 100_000, b'"nf4"'],
)
def test_corrupted_json(raw):
    payload = torch.tensor(list(raw), dtype=torch.uint8)
    written = {**quantised()[1].as_dict(packed=True), PACKED: payload}
    with pytest.raises(ValueError, match=PACKED):
        QuantState.from_dict(written, "cpu")
    with pytest.raises(ValueError, match="packed dictionary"):
        unpack_tensor_to_dict(payload)


def test_payload_of_another_dtype():
    written = quantised()[1].as_dict(packed=True)
    written[PACKED] = written[PACKED].int()
    with pytest.raises(ValueError, match=r"int32.*uint8"):
        QuantState.from_dict(written, "cpu")


@given(st.data())
def test_damaged_payloads_never_give_anything_but_a_state_or_a_named_error(data):
    """Any bytes changed, dropped or added: ValueError or KeyError, or a state that fits its statistics."""
    written = quantised(shape=(32, 64))[1].as_dict(packed=True)
    raw = bytearray(written[PACKED].tolist())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(("set", "drop", "cut", "insert")))
        if kind == "set":
            raw[at] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=3))
        else:
            del raw[at : at + 1 if kind == "drop" else len(raw)]
        raw = raw or bytearray(b" ")
    written[PACKED] = torch.tensor(list(raw), dtype=torch.uint8)
    try:
        state = QuantState.from_dict(written, "cpu")
    except (ValueError, KeyError):
        return
    assert state.absmax.numel() == -(-state.shape.numel() // state.blocksize)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), JSON))
def test_dictionaries_survive_packing(source):
    packed = pack_dict_to_tensor(source)
    assert (packed.dtype, packed.dim()) == (torch.uint8, 1)
    assert unpack_tensor_to_dict(packed) == source
