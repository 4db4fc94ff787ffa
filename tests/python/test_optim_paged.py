"""Paged state as Python sees it: where it is made, saved, read and copied. A stand-in for page-locked memory serves.

What a step makes of such state: test_cuda_paged.py, and tests/c/test_pages.c.
"""

import copy
import io
import logging
import pickle

import pytest
import torch

import bitsandbytes as bnb
from bitsandbytes import paged
from bitsandbytes.optim import checkpoint
from bitsandbytes.optim.optimizer import Optimizer8bit

LEAST = 5000
CLASSES = ["PagedAdamW8bit", "PagedAdam32bit", "PagedAdEMAMix8bit", "PagedLion8bit"]


@pytest.fixture
def pages(monkeypatch):
    """CPU memory that says it is paged, for CPU parameters of LEAST elements or more; the allocations so far."""
    made = []

    def get_paged(*shape, dtype=torch.float32, device=None):
        made.append(shape)
        return paged.mark_paged(torch.zeros(shape, dtype=dtype), 0)

    monkeypatch.setattr(paged, "get_paged", get_paged)
    monkeypatch.setattr(paged, "is_paged", lambda A: getattr(A, "is_paged", False) and id(A) in live)
    live = set()
    mark = paged.mark_paged
    monkeypatch.setattr(paged, "mark_paged", lambda A, index: live.add(id(kept.append(A) or A)) or mark(A, index))
    kept = []
    monkeypatch.setattr(Optimizer8bit, "_pages", lambda self, p: self.is_paged and p.numel() >= LEAST)
    return made


def training(name, **options):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(*shape)) for shape in ((80, 90), (100,), (4, 25, 60))]
    params.append(torch.nn.Parameter(torch.randn(2, 64, 8, 8).to(memory_format=torch.channels_last)))
    optimizer = getattr(bnb.optim, name)(params, **options)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer, params


def where(optimizer, params):
    """Is each state of each parameter paged?"""
    keys = ("state1", "state2")
    return [[paged.is_paged(optimizer.state[p][k]) for k in keys if k in optimizer.state[p]] for p in params]


def expected(optimizer):
    return [[large] * optimizer._states for large in (True, False, True, True)]


@pytest.mark.parametrize("name", CLASSES)
def test_large_states_are_paged_and_equal(pages, name):
    (optimizer, params), (plain, others) = training(name), training(name.removeprefix("Paged"))
    assert where(optimizer, params) == expected(optimizer)
    assert len(pages) == 3 * optimizer._states
    assert not any(map(any, where(plain, others)))
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        for key, value in plain.state[q].items():
            own = optimizer.state[p][key]
            if isinstance(value, torch.Tensor):
                assert torch.equal(own, value)
                assert own.stride() == value.stride()


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("move", [True, False])
def test_a_checkpoint_holds_ordinary_tensors_and_is_read_into_pages(pages, name, move):
    optimizer, params = training(name)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    inner = [entries[checkpoint.layouts.WRAPPER_KEY] for entries in saved["state"].values()]
    assert not any(hasattr(t, "is_paged") for entries in inner for t in entries.values())
    other, same = training(name)
    before = len(pages)
    other.load_state_dict(saved, move_to_device=move)
    assert len(pages) == before + (3 * optimizer._states if move else 0)
    for each in (optimizer, other):
        each.step()
    assert where(other, same) == expected(other)
    for p, q in zip(params, same, strict=True):
        assert torch.equal(p, q)


def test_an_ordinary_optimizer_reads_paged_state_and_the_other_way_round(pages):
    (optimizer, params), (plain, others) = training("PagedAdamW8bit"), training("AdamW8bit")
    first, second = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(plain.state_dict())
    plain.load_state_dict(first)
    optimizer.load_state_dict(second)
    for each in (optimizer, plain):
        each.step()
    assert where(optimizer, params) == expected(optimizer)
    assert not any(map(any, where(plain, others)))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_page_their_own_state(pages, how):
    optimizer, _ = training("PagedAdamW8bit")
    params = optimizer.param_groups[0]["params"]
    twin = how(optimizer)
    others = twin.param_groups[0]["params"]
    for p, q in zip(params, others, strict=True):
        q.grad = p.grad.clone()
    for each in (optimizer, twin):
        each.step()
    assert where(twin, others) == expected(twin)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p]["state1"].data_ptr() != twin.state[q]["state1"].data_ptr()


def test_parameters_of_the_cpu_get_ordinary_state_and_one_warning(caplog):
    with caplog.at_level(logging.WARNING):
        optimizer, params = training("PagedAdamW8bit")
    assert not any(hasattr(optimizer.state[p]["state1"], "is_paged") for p in params)
    (record,) = caplog.records
    assert record.message.startswith("PagedAdamW8bit: paged state needs parameters that are whole on a GPU")
    assert "as one on cpu" in record.message


def test_page_bytes_is_an_option_of_every_class():
    optimizer, _ = training("SGD", momentum=0.9, lr=0.1, page_bytes=1 << 20)
    assert optimizer.param_groups[0]["page_bytes"] == 1 << 20
    with pytest.raises(ValueError, match="page_bytes is -1"):
        training("AdamW8bit", page_bytes=-1)
    optimizer.param_groups[0]["page_bytes"] = -5
    optimizer.param_groups[0]["params"][0].grad = torch.zeros(80, 90)
    with pytest.raises((RuntimeError, ValueError), match="page_bytes is -5"):
        optimizer.step()
