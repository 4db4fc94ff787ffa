"""Host time of one call of a small quantised layer, as a share of nn.Linear's: the median of 1000 calls."""

import statistics
import time

import pytest
import torch
from torch import nn

from bitsandbytes.nn import Linear4bit, Linear8bitLt

LIMIT = 1.2  # measured on two x86-64 cores: 0.5 to 0.6
LAYERS = {
    "4bit": lambda: Linear4bit(256, 256, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"),
    "int8": lambda: Linear8bitLt(256, 256, bias=False, has_fp16_weights=False),
    "int8-outliers": lambda: Linear8bitLt(256, 256, bias=False, has_fp16_weights=False, threshold=6.0),
}


def median_time(function, x, count=1000):
    for _ in range(100):
        function(x)
    times = []
    for _ in range(count):
        start = time.perf_counter_ns()
        function(x)
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times)


@pytest.mark.parametrize("name", LAYERS)
def test_a_call_costs_no_more_than_a_linear_layer(name):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = torch.randn(1, 256, dtype=torch.bfloat16)
        linear, layer = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16), LAYERS[name]().to("cpu")
        shares = []
        with torch.no_grad():
            for _ in range(3):  # other processes disturb a measurement, none makes it too short
                shares.append(median_time(layer, x) / median_time(linear, x))
                if shares[-1] <= LIMIT:
                    break
        assert min(shares) <= LIMIT, shares
    finally:
        torch.set_num_threads(threads)
