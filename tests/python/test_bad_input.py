"""Bad input: the type of the error, the argument and the value in its text, and nothing written."""

import json
import re

import pytest
import torch

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bad_input_cases import CASES, NAN, REFUSED, Bench


@pytest.mark.parametrize("name", CASES)
def test_refusal(name):
    call, error, words = CASES[name]
    bench = Bench()
    before = {k: v.clone() for k, v in bench.tensors().items()}
    with pytest.raises(error) as caught:
        call(bench)
    text = str(caught.value)
    missing = [w for w in words if not re.search(rf"(?<!\w){re.escape(w)}(?!\w)", text)]
    assert not missing, f"{missing} are no words of: {text}"
    assert "expected" in text or "needed" in text or isinstance(caught.value, (AssertionError, NotImplementedError)), (
        text
    )
    for key, value in bench.tensors().items():
        assert torch.equal(value, before[key]), f"{key} was written"


def test_a_refusal_does_not_poison_the_next_call():
    bench = Bench()
    for call, error, _ in list(CASES.values())[::5]:
        with pytest.raises(error):
            call(bench)
        q, _ = F.quantize_blockwise(bench.x, blocksize=64)
        assert torch.equal(q, bench.q)


# ---- serialised state


def payload(**items):
    good = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [1000]}
    text = json.dumps({k: v for k, v in (good | items).items() if v is not None})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def stored(**change):
    bench = Bench()
    d = {"absmax": bench.absmax, "quant_map": bench.state.code, "quant_state.bitsandbytes__nf4": payload()}
    return {k: v for k, v in (d | change).items() if v is not None}


KEY = "quant_state.bitsandbytes__nf4"
STORED = {
    "not JSON": (stored(**{KEY: torch.tensor(list(b"{nf4 64"), dtype=torch.uint8)}), ValueError, ["quant_state"]),
    "truncated": (stored(**{KEY: payload()[:-9]}), ValueError, ["quant_state"]),
    "empty": (stored(**{KEY: payload()[:0]}), ValueError, ["quant_state"]),
    "not UTF-8": (stored(**{KEY: torch.tensor([0xFF, 0xFE, 0x00], dtype=torch.uint8)}), ValueError, ["quant_state"]),
    "a list": (stored(**{KEY: torch.tensor(list(b"[1, 2]"), dtype=torch.uint8)}), ValueError, ["quant_state"]),
    "a float tensor": (stored(**{KEY: torch.rand(30)}), ValueError, ["quant_state"]),
    "other type in the key": (stored(**{KEY: None, "quant_state.bitsandbytes__xy4": payload()}), ValueError, ["xy4"]),
    "two payloads": (stored(**{"a.quant_state.bitsandbytes__fp4": payload()}), ValueError, ["quant_state"]),
    "no payload": (stored(**{KEY: None}), ValueError, ["bitsandbytes__nf4"]),
    "unknown key": (stored(surprise=torch.zeros(1)), ValueError, ["surprise"]),
    "no absmax": (stored(absmax=None), KeyError, ["absmax"]),
    "no quant_map": (stored(quant_map=None), KeyError, ["quant_map"]),
    "no blocksize": (stored(**{KEY: payload(blocksize=None)}), KeyError, ["blocksize"]),
    "no dtype": (stored(**{KEY: payload(dtype=None)}), KeyError, ["dtype"]),
    "no shape": (stored(**{KEY: payload(shape=None)}), KeyError, ["shape"]),
    "unknown dtype": (stored(**{KEY: payload(dtype="float99")}), ValueError, ["dtype", "float99"]),
    "dtype that is no dtype": (stored(**{KEY: payload(dtype="nn")}), ValueError, ["dtype", "nn"]),
    "dtype a number": (stored(**{KEY: payload(dtype=7)}), ValueError, ["dtype", "7"]),
    "shape a text": (stored(**{KEY: payload(shape="1000")}), ValueError, ["shape", "1000"]),
    "blocksize a text": (stored(**{KEY: payload(blocksize="64")}), ValueError, ["blocksize", "64"]),
}


@pytest.mark.parametrize("name", STORED)
def test_corrupted_state(name):
    d, error, words = STORED[name]
    keys = list(d)
    with pytest.raises(error) as caught:
        F.QuantState.from_dict(d, torch.device("cpu"))
    missing = [w for w in words if w not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    assert list(d) == keys, "the caller's dict is left alone"


@pytest.mark.parametrize(
    "change, size, words",
    [
        ({"shape": [2000]}, 500, ["absmax", "16", "32"]),
        ({"shape": [1024]}, 500, ["500", "512"]),
        ({"shape": [-1000]}, 500, ["shape", "-1000"]),
        ({"shape": [2**61 + 125, 8]}, 500, ["shape"]),
        ({"shape": [768], "blocksize": 48}, 384, ["blocksize", "48"]),
        ({"blocksize": 0}, 500, ["blocksize", "0"]),
        ({"blocksize": -64}, 500, ["blocksize", "-64"]),
        ({"blocksize": 128}, 500, ["absmax", "16", "8"]),
        ({"quant_type": "nf9"}, 500, ["quant_type", "nf9"]),
    ],
)
def test_state_that_does_not_fit_the_data(change, size, words):
    """Well-formed JSON with wrong numbers: refused at once or when the data are decoded, never decoded wrongly."""
    bench = Bench()

    def decode():
        state = F.QuantState.from_dict(stored(**{KEY: payload(**change)}), torch.device("cpu"))
        return F.dequantize_4bit(bench.packed[:size], state)

    with pytest.raises(ValueError) as caught:
        decode()
    missing = [w for w in words if w not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def test_readers_accept_any_key_order_and_whitespace():
    text = '{ "shape" :[1000],"dtype":"float32",\n "quant_type":"nf4" , "blocksize":64}'
    state = F.QuantState.from_dict(
        stored(**{KEY: torch.tensor(list(text.encode()), dtype=torch.uint8)}), torch.device("cpu")
    )
    bench = Bench()
    assert torch.equal(F.dequantize_4bit(bench.packed, state), F.dequantize_4bit(bench.packed, bench.state))


# ---- optimizer classes

CLASSES = [bnb.optim.Adam, bnb.optim.Adam8bit, bnb.optim.Adam32bit, bnb.optim.AdamW, bnb.optim.AdamW8bit]
CLASSES += [bnb.optim.AdamW32bit, bnb.optim.PagedAdam, bnb.optim.PagedAdamW8bit]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    "options, words",
    [
        ({"lr": -1.0}, ["lr", "-1"]),
        ({"lr": NAN}, ["lr", "nan"]),
        ({"eps": -1e-3}, ["eps", "-0.001"]),
        ({"eps": NAN}, ["eps", "nan"]),
        ({"betas": (1.0, 0.9)}, ["beta", "1.0"]),
        ({"betas": (0.9, -0.1)}, ["beta", "-0.1"]),
        ({"betas": (0.9, NAN)}, ["beta", "nan"]),
        ({"weight_decay": -0.5}, ["weight_decay", "-0.5"]),
    ],
)
def test_constructor(cls, options, words):
    with pytest.raises(ValueError) as caught:
        cls([torch.nn.Parameter(torch.zeros(4))], **options)
    assert all(w in str(caught.value) for w in words), str(caught.value)


@pytest.mark.parametrize("cls", CLASSES)
def test_amsgrad_is_refused_not_ignored(cls):
    named = cls.__name__ in ("Adam8bit", "PagedAdam8bit", "AdamW8bit", "PagedAdamW8bit")
    with pytest.raises(ValueError if named else (ValueError, NotImplementedError), match=r"amsgrad.*True"):
        cls([torch.nn.Parameter(torch.zeros(4))], amsgrad=True)


@pytest.mark.parametrize(
    "cls", [bnb.optim.Adam8bit, bnb.optim.AdamW8bit, bnb.optim.PagedAdam8bit, bnb.optim.PagedAdamW8bit]
)
def test_bits_of_an_8bit_class(cls):
    with pytest.raises(ValueError, match=r"optim_bits.*16"):
        cls([torch.nn.Parameter(torch.zeros(4))], optim_bits=16)


def step_with(p, grad, **options):
    opt = bnb.optim.AdamW([p], **options)
    p.grad = grad
    opt.step()


def test_steps_that_are_refused():
    def fresh():
        return torch.nn.Parameter(torch.ones(5000))

    p = fresh()
    with pytest.raises(NotImplementedError, match="16"):
        step_with(p, torch.ones(5000), optim_bits=16)
    assert torch.all(p == 1)
    with pytest.raises(REFUSED, match="sparse"):
        step_with(p, torch.ones(5000).to_sparse(), optim_bits=8)
    assert torch.all(p == 1)
    opt = bnb.optim.AdamW8bit([p])
    p.grad = torch.ones(5000)
    opt.step()
    opt.param_groups[0]["lr"] = -1.0
    before = [p.detach().clone(), opt.state[p]["state1"].clone()]
    with pytest.raises(ValueError, match=r"lr.*-1"):
        opt.step()
    assert torch.equal(p, before[0]) and torch.equal(opt.state[p]["state1"], before[1])
    p = torch.nn.Parameter(torch.ones(5000, dtype=torch.float64))
    with pytest.raises(ValueError, match="float64"):
        step_with(p, torch.ones(5000, dtype=torch.float64))
    assert torch.all(p == 1)


def test_load_state_dict_of_another_model():
    a = torch.nn.Parameter(torch.ones(5000))
    opt = bnb.optim.AdamW8bit([a])
    a.grad = torch.ones(5000)
    opt.step()
    saved = opt.state_dict()
    other = bnb.optim.AdamW8bit([torch.nn.Parameter(torch.ones(5000)), torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError):
        other.load_state_dict(saved)
    wrong = bnb.optim.AdamW8bit([torch.nn.Parameter(torch.ones(6000))])
    with pytest.raises(ValueError, match=r"6000|5000"):
        wrong.load_state_dict(saved)


def test_managers_are_singletons():
    with pytest.raises(RuntimeError):
        bnb.optim.GlobalOptimManager()


# ---- not contiguous: handled, not refused


def test_views_are_handled():
    bench = Bench()
    wide = torch.full((1000, 3), 9.0)
    F.dequantize_blockwise(bench.q, bench.q_state, out=wide[:, 1])
    assert torch.equal(wide[:, 1], F.dequantize_blockwise(bench.q, bench.q_state)) and torch.all(wide[:, ::2] == 9)
    code = torch.stack([bench.code, bench.code], 1)[:, 0]
    assert torch.equal(F.quantize_blockwise(bench.x, code=code, blocksize=64)[0], bench.q)
    column = torch.stack([bench.packed.flatten()] * 2, 1)[:, :1]
    assert torch.equal(F.dequantize_4bit(column, bench.state), F.dequantize_4bit(bench.packed, bench.state))
    absmax = torch.stack([bench.state.absmax] * 2, 1)[:, 0]
    assert torch.equal(bench.decode4(absmax=absmax), bench.decode4())


def test_empty_tensors_are_handled():
    for shape in ((0,), (0, 5), (3, 0)):
        x = torch.zeros(shape)
        q, s = F.quantize_blockwise(x)
        assert q.shape == shape and s.absmax.numel() == 0 and F.dequantize_blockwise(q, s).shape == shape
        for nested in (False, True):
            p, s = F.quantize_4bit(x, quant_type="nf4", compress_statistics=nested)
            assert p.shape == (0, 1) and F.dequantize_4bit(p, s).shape == shape
