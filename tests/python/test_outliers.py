"""OutlierTracer, its hook, find_outlier_dims and OutlierAwareLinear."""

import logging

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes.nn import Linear4bit, OutlierAwareLinear
from bitsandbytes.utils import OutlierTracer, find_outlier_dims, outlier_hook

WIDTH = 64


@pytest.fixture(autouse=True)
def fresh_tracer(monkeypatch):
    monkeypatch.setattr(OutlierTracer, "_instance", None)


def matrix(rows=WIDTH, columns=WIDTH, wide=(), tall=(), seed=0):
    """Normal values; the columns `wide` and the rows `tall` are thirty times as large."""
    m = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    m[:, list(wide)] *= 30
    m[list(tall)] *= 30
    return m


def linear(wide=(), **options):
    layer = nn.Linear(WIDTH, WIDTH)
    layer.weight.data = matrix(wide=wide, **options)
    return layer


# ---------------------------------------------------------------- find_outlier_dims


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_columns_and_rows(dtype):
    m = matrix(40, 50, wide=[7]).to(dtype)
    assert find_outlier_dims(m).tolist() == [7]
    assert find_outlier_dims(m).dtype == torch.int64
    assert find_outlier_dims(matrix(40, 50, tall=[9]).to(dtype), reduction_dim=1).tolist() == [9]


def test_the_criterion_is_the_z_score_of_the_standard_deviations():
    m = matrix(200, 90) * torch.linspace(0.2, 1, 90) ** 4
    spread = m.double().std(0)
    scores = (spread - spread.mean()) / spread.std()
    for zscore in (0.5, 1.0, 2.0):
        assert (scores - zscore).abs().min() > 1e-4
        assert torch.equal(find_outlier_dims(m, zscore=zscore), torch.where(scores > zscore)[0])
    # A large mean is no large deviation.
    m[:, 3] += 1000
    assert 3 not in find_outlier_dims(m, zscore=0.5)


def test_topk_and_random():
    m = matrix(40, 50, wide=[7])
    m[:, 20] *= 90
    assert find_outlier_dims(m, topk=2).tolist() == [20, 7]
    assert find_outlier_dims(m, topk=0).tolist() == []
    for topk in (0, 5, 50):
        random = find_outlier_dims(m, topk=topk, rdm=True)
        assert len(set(random.tolist())) == topk
        assert all(0 <= column < 50 for column in random)
    assert len(find_outlier_dims(m, reduction_dim=1, topk=40, rdm=True)) == 40


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(1, 30), (30, 1), (1, 1), (5, 30)])
def test_nothing_varies(shape):
    assert find_outlier_dims(torch.ones(shape)).tolist() == []
    assert find_outlier_dims(torch.zeros(shape), reduction_dim=1).tolist() == []


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"torch.uint8 \[3, 1\], expected a float matrix"):
        find_outlier_dims(torch.zeros(3, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="expected a float matrix"):
        find_outlier_dims(torch.zeros(3))
    for options in ({"topk": 5}, {"topk": -1}, {"rdm": True}, {"topk": 5, "rdm": True}):
        with pytest.raises(ValueError, match=r"topk is .*, expected 0 to 4"):
            find_outlier_dims(torch.zeros(8, 4), **options)
    assert len(find_outlier_dims(torch.zeros(8, 4), reduction_dim=1, topk=8)) == 8


# ---------------------------------------------------------------- the tracer


def test_one_tracer_under_its_known_names(caplog):
    with pytest.raises(RuntimeError, match="get_instance"):
        OutlierTracer()
    tracer = OutlierTracer.get_instance()
    assert OutlierTracer.get_instance() is tracer
    assert not tracer.is_initialized()
    with caplog.at_level(logging.WARNING):
        assert tracer.get_outliers(nn.Linear(2, 2).weight) is None
    assert [record.name for record in caplog.records] == ["bitsandbytes.utils"]
    assert "initialize(model)" in caplog.text
    caplog.clear()
    tracer.initialize(nn.Linear(2, 2))
    assert tracer.is_initialized()
    assert tracer.get_outliers(nn.Linear(3, 3).weight) is None
    assert not caplog.records
    assert bnb.utils.outlier_hook is outlier_hook


def hooks_of(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("shape", [(100, WIDTH), (5, 20, WIDTH)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_over_a_model(shape, dtype):
    model = nn.Sequential(linear(wide=[1]), nn.ReLU(), linear(wide=[11], seed=1), linear(seed=2)).to(dtype)
    tracer = OutlierTracer.get_instance()
    tracer.initialize(model)
    assert hooks_of(model) == len(tracer.hooks) == 3
    x = 0.1 * matrix(100, WIDTH, wide=[40])  # varies most
    x[3, 50] = -7.0  # one large value
    x[:, 40] = x[:, 40].clamp(-5, 5)
    model(x.reshape(shape).to(dtype))
    found = [tracer.get_outliers(model[i].weight) for i in (0, 2, 3)]
    assert [index.tolist() for index in found] == [[40, 50], [11], []]
    assert all(index.dtype == torch.int64 for index in found)
    assert hooks_of(model) == 3
    model(100 * torch.ones(1, WIDTH, dtype=dtype))
    assert hooks_of(model) == len(tracer.hooks) == 0
    assert [tracer.get_outliers(model[i].weight).tolist() for i in (0, 2, 3)] == [[40, 50], [11], []]


def test_the_input_is_judged_by_feature_and_not_by_token():
    layer = linear()
    OutlierTracer.get_instance().initialize(layer)
    layer(0.1 * matrix(100, WIDTH, tall=[77]).clamp(-50, 50))
    assert OutlierTracer.get_instance().get_outliers(layer.weight).tolist() == []


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rows", [0, 1])
def test_few_tokens(rows):
    layer = linear()
    tracer = OutlierTracer.get_instance()
    tracer.initialize(layer)
    x = torch.zeros(rows, WIDTH)
    x[:, 5] = 6.5
    x[:, 6] = 6.0
    layer(x)
    assert tracer.get_outliers(layer.weight).tolist() == [5] * rows


def test_another_model_takes_over():
    first, second = linear(wide=[3]), linear(wide=[4])
    tracer = OutlierTracer.get_instance()
    tracer.initialize(first)
    first(torch.zeros(2, WIDTH))
    tracer.initialize(second)
    assert hooks_of(first) == 0
    assert hooks_of(second) == 1
    assert tracer.get_outliers(first.weight) is None
    second(input=torch.zeros(2, WIDTH))  # not seen by a pre-hook: the weight decides
    assert tracer.get_outliers(second.weight).tolist() == [4]


def test_quantised_weights_are_refused():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Linear4bit(WIDTH, WIDTH)).to("cpu")
    OutlierTracer.get_instance().initialize(model)
    with pytest.raises(ValueError, match="expected a float matrix"):
        model(torch.zeros(2, WIDTH))


# ---------------------------------------------------------------- OutlierAwareLinear


class Coarse(OutlierAwareLinear):
    """Rounds its weight, except for outlier columns."""

    quantised = 0

    def quantize_weight(self, w, outlier_idx):
        self.quantised += 1
        rounded = w.round()
        if outlier_idx is not None:
            rounded[:, outlier_idx] = w[:, outlier_idx]
        return rounded

    def forward_with_outliers(self, x, outlier_idx):
        self.given = outlier_idx
        return nn.functional.linear(x, self.weight, self.bias)


def test_outlier_aware_linear():
    layer = Coarse(WIDTH, WIDTH)
    before = layer.weight.data.copy_(matrix()).clone()
    weight, address = layer.weight, layer.weight.data_ptr()
    OutlierTracer.get_instance().initialize(nn.Sequential(layer))
    x = torch.zeros(4, WIDTH)
    x[:, 9] = 8.0
    want = before.round()
    want[:, 9] = before[:, 9]
    for _ in range(3):
        y = layer(x)
        assert torch.equal(y, nn.functional.linear(x, want, layer.bias))
        assert layer.given is layer.outlier_dim
        assert layer.outlier_dim.tolist() == [9]
    assert (layer.quantised, layer.is_quantized) == (1, True)
    assert layer.weight is weight
    assert weight.data_ptr() == address
    y.sum().backward()
    assert weight.grad is not None


def test_outlier_aware_linear_without_a_tracer(caplog):
    layer = Coarse(WIDTH, WIDTH, bias=False)
    assert layer.bias is None
    with caplog.at_level(logging.WARNING):
        layer(torch.ones(2, WIDTH))
        layer(torch.ones(2, WIDTH))
    assert len(caplog.records) == 1
    assert layer.given is None
    assert torch.equal(layer.weight, layer.weight.round())
    told = Coarse(WIDTH, WIDTH, device="cpu")
    told.outlier_dim = torch.tensor([2])
    caplog.clear()
    told(torch.ones(2, WIDTH))
    assert told.given.tolist() == [2]
    assert not caplog.records


def test_outlier_aware_linear_is_abstract():
    layer = OutlierAwareLinear(4, 4)
    layer.outlier_dim = torch.tensor([0])
    with pytest.raises(NotImplementedError, match="define quantize_weight"):
        layer(torch.ones(1, 4))
    assert not layer.is_quantized
    layer.is_quantized = True
    with pytest.raises(NotImplementedError, match="define forward_with_outliers"):
        layer(torch.ones(1, 4))
    assert bnb.nn.modules.OutlierAwareLinear is OutlierAwareLinear
