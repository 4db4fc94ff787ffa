"""MatmulLtState as old and new clients use it, and the old names of bitsandbytes.autograd."""

import copy
import dataclasses
import pickle
import weakref

import pytest
import torch

import bitsandbytes as bnb
from bitsandbytes.autograd import GlobalOutlierPooler, MatMul4Bit, MatMul8bitFp, MatMul8bitLt
from gemm_cases import K, N, int8_state, normal, weight_4bit, weight_int8


def test_state_attributes():
    state = bnb.MatmulLtState()
    fields = [field.name for field in dataclasses.fields(state)]
    assert fields == ["force_no_igemmlt", "CB", "SB", "SCB", "SBt", "CBt", "subB", "outlier_pool", "idx"]
    for name in ("CB", "SB", "SCB", "SBt", "CBt", "subB", "outlier_pool", "idx"):
        assert getattr(state, name) is None
    for name in ("use_pool", "has_accumulated_gradients", "force_no_igemmlt", "memory_efficient_backward"):
        assert getattr(state, name) is False
    assert state.threshold == 0.0 and state.has_fp16_weights is True and state.is_training is True
    for name in ("CxB", "CxBt", "formatB", "_tile_indices"):
        with pytest.warns(FutureWarning, match=name):
            assert getattr(state, name) is None
    with pytest.raises(AttributeError, match="CyB"):
        _ = state.CyB
    assert state == bnb.MatmulLtState() and "CB=None" in repr(state)


def test_state_copies():
    state, weight, _ = int8_state(1.5)
    bnb.matmul(normal(3, K), weight, state=state)
    state.SB = "something"
    for other in (copy.copy(state), copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert torch.equal(other.idx, state.idx) and torch.equal(other.CB, state.CB) and other.threshold == 1.5
    state.reset_grads()
    assert [state.CB, state.SB, state.SCB, state.SBt, state.CBt] == [None] * 5
    state.idx = None
    assert state.idx is None
    with pytest.raises(AttributeError, match="idx"):
        state.idx = torch.tensor([1])
    del state.CB
    assert state.CB is None


def test_CxB_is_the_old_home_of_the_codes():
    """Accelerate's hook clears SCB and CxB when it offloads a layer: the codes must go then."""
    state, _, _ = int8_state()
    codes = weakref.ref(state.CB)
    state.SCB = None
    state.CxB = None
    assert state.CB is None and codes() is None
    state.CB, state.SCB, _ = weight_int8()
    with pytest.warns(FutureWarning, match="CxB"):
        state.CxB = torch.zeros(1)
    assert state.CB is not None
    with pytest.warns(FutureWarning, match="CxB"):
        assert state.CxB is None


def test_a_compiled_frozen_weight_is_quantised_without_its_gradient(monkeypatch):
    weight = normal(N, K, seed=6).requires_grad_()
    reads = []
    grad = type(weight).grad
    counted = property(lambda tensor: reads.append(tensor) or grad.__get__(tensor), grad.__set__)

    def product(x, weight):
        state = bnb.MatmulLtState()
        state.has_fp16_weights = False
        return bnb.matmul(x, weight, state=state)

    x = normal(3, K)
    expected = product(x, weight)
    assert torch.equal(torch.compile(product, backend="eager", fullgraph=True)(x, weight), expected)
    monkeypatch.setattr(torch.Tensor, "grad", counted)
    product(x, weight)
    assert reads == []


def test_old_names():
    packed, state, _ = weight_4bit()
    lt, weight, _ = int8_state()
    x, bias = normal(3, K).requires_grad_(), normal(N)
    assert torch.equal(MatMul4Bit.apply(x, packed, None, bias, state), bnb.matmul_4bit(x, packed, state, bias=bias))
    expected = bnb.matmul(x, weight, state=lt, bias=bias)
    for name in (MatMul8bitLt, MatMul8bitFp):
        y = name.apply(x, weight, None, bias, lt)
        assert torch.equal(y, expected) and y.requires_grad


def test_outlier_pooler():
    with pytest.raises(RuntimeError, match="get_instance"):
        GlobalOutlierPooler()
    pooler = GlobalOutlierPooler.get_instance()
    assert pooler is GlobalOutlierPooler.get_instance()
    pooler.initialize()
    pooler.add_outliers(torch.tensor([7, 3]), 64)
    pooler.add_outliers(torch.tensor([1]), 128)
    pooler.add_outliers(torch.tensor([3, 5]), 64)
    assert pooler.get_current_outlier_idx().tolist() == [3, 5, 7]
    assert pooler.get_current_outlier_idx().dtype == torch.int64
    pooler.initialize()
    assert pooler.get_current_outlier_idx().numel() == 0
