"""What every test module shares: thread count, the hypothesis profile, one marker."""

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(2)

settings.register_profile(
    "bitsandbytes",
    deadline=None,
    max_examples=80,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("bitsandbytes")


def pytest_configure(config):
    config.addinivalue_line("markers", "large: about a million elements or more")


@pytest.fixture(params=["f32", "f16", "bf16"])
def dtype(request):
    """The three float types that the library quantises, by the short names of oracle.py."""
    return request.param
