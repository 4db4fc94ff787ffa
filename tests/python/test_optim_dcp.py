"""Sharded optimizers and torch.distributed.checkpoint: train as one process does, resume on 1, 2 and 4 processes."""

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import fsdp_workers as workers
import sharding_workers as base
from bitsandbytes import optim

EXACT = ("even", "norm")  # shards of 1, 2 and 4 processes end at multiples of 256 elements; 32-bit state


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with what two processes saved after training, and what one process gets."""
    folder = tmp_path_factory.mktemp("dcp")
    losses = {}
    for cls in (optim.AdamW8bit, optim.AdamW32bit):
        model = base.Net()
        losses[cls] = base.train(model, cls(model.parameters(), lr=base.LR), base.STEPS + base.MORE)
    # Blocks start elsewhere in a shard, so that 8-bit errors fall differently; they must not grow.  The yardstick is
    # what 8-bit state changes at all: the largest distance of these losses from those with 32-bit state.
    tolerance = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    assert tolerance < 0.01 * losses[optim.AdamW8bit][0]
    torch.save({"losses": losses[optim.AdamW8bit], "tolerance": tolerance}, folder / "expected.pt")
    base.run(base.save_two, 2, folder)
    return folder


def test_resume_on_one_process_and_on_four(saved):
    """2 -> 1 -> 4 and 2 -> 4."""
    base.run(base.resume, 1, saved, "two", "one", EXACT)
    base.run(workers.four, 4, saved, EXACT)


@pytest.mark.parametrize("how", ["full state dict", "dcp_to_torch_save"])
def test_resume_where_nothing_is_sharded(saved, how):
    """The entries of a sharded run, gathered, fit a model of plain tensors; afterwards the layout is the nested one."""
    if how == "full state dict":
        merged = torch.load(saved / "full.pt")
    else:
        dcp_to_torch_save(saved / "two", saved / "merged.pt")
        merged = torch.load(saved / "merged.pt")
    model = base.Net()
    model.load_state_dict(merged["model"])
    optimizer = optim.AdamW8bit(model.parameters(), lr=base.LR)
    optimizer.load_state_dict(merged["optim"])
    base.check_states(model, optimizer, torch.load(saved / "decoded-two.pt"), EXACT)
    assert set(optimizer.state_dict()["state"][0]) == {"step", "__bnb_optimizer_quant_state__"}
    later, tolerance = torch.load(saved / "later.pt"), torch.load(saved / "expected.pt")["tolerance"]
    losses = base.train(model, optimizer, base.MORE, first=base.STEPS)
    assert max(abs(a - b) for a, b in zip(losses, later, strict=True)) <= tolerance
