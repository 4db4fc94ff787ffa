"""Optimizers of sharded models: DDP, FSDP1, FSDP2 and other meshes, on CPU processes."""

import pytest
import torch

import fsdp_workers as workers
import sharding_workers as base
from bitsandbytes import optim


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What one process gets: losses, how far 8-bit state moves them (see test_optim_dcp.py), and its state."""
    folder = tmp_path_factory.mktemp("sharding")
    losses = {}
    for cls in (optim.AdamW32bit, optim.AdamW8bit):
        model = base.Net()
        optimizer = cls(model.parameters(), lr=base.LR)
        losses[cls] = base.train(model, optimizer, base.STEPS)
    tolerance = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    torch.save({"losses": losses[optim.AdamW8bit], "tolerance": tolerance}, folder / "expected.pt")
    states = {}
    for name, p in model.named_parameters():
        states[name] = {str(i): base.decode(optimizer.state[p], i) for i in (1, 2)} | {"step": base.STEPS}
    torch.save({"optim": optimizer.state_dict(), "decoded": states}, folder / "nested.pt")
    return folder


def test_two_processes(folder):
    """FSDP2: options of the state dict functions, unsharded state, copies, placements; DDP; overrides."""
    functions = (workers.state_dict_options, workers.other_direction, workers.copies, workers.states_of_two_rows)
    functions += (workers.placements, workers.data_parallel, workers.overrides)
    base.run(workers.several, 2, folder, *functions)


def test_rules(folder):
    """Trust clipping, percentile clipping, two averages in one state, 8 and 32 bits, sharded and whole."""
    base.run(workers.rules, 2, folder)


def test_fsdp1(folder):
    base.run(workers.several, 2, folder, workers.fsdp1, workers.flat_parameter)
    merged = torch.load(folder / "merged.pt")
    model = base.Net()
    optimizer = optim.AdamW8bit(model.parameters(), lr=base.LR)
    optimizer.load_state_dict(merged)
    for p, q in zip(model.parameters(), base.SHAPES.values(), strict=True):
        assert optimizer.state[p]["state1"].shape == q
        assert optimizer.state[p]["step"] == base.STEPS
    base.train(model, optimizer, 1)
