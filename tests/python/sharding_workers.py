"""What the sharding tests run in each process, and how processes are started.

run(function, world, *args) starts `world` processes on the CPU, joined by gloo over a file; each calls function(rank,
folder, *args) with a folder that all share.  A check that fails anywhere fails the test; nothing can hang for long.
"""

import os
import sys
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from bitsandbytes import optim

LIMIT = 90  # seconds for one group of processes
LR, STEPS, MORE = 3e-3, 6, 3  # steps before and after a checkpoint


def _main(rank, world, folder, store, function, args):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(store, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=LIMIT))
    function(rank, folder, *args)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # now and then a thread of a process group aborts while the interpreter shuts down


def run(function, world, folder, *args):
    """Run function(rank, folder, *args) in `world` processes; raises what the first failing one raised."""
    store = os.path.join(folder, f"store-{uuid.uuid4()}")
    context = mp.spawn(_main, (world, str(folder), store, function, args), nprocs=world, join=False)
    deadline = time.monotonic() + LIMIT
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{function.__name__}: {world} processes took more than {LIMIT} s")


class Net(nn.Module):
    """Layers whose shards end at multiples of 256 elements, elsewhere, and nowhere in some processes.

    even [64, 128]    every shard of 1, 2 or 4 holds whole blocks
    odd [131, 96]     uneven shards; a line is no multiple of a block
    few [3, 1500]     one of four processes has nothing
    bias [5003]       one dimension: a line is one element
    norm [96]         32-bit state
    """

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(0.1 * torch.randn(shape, generator=generator)))

    def forward(self, x):
        """x [batch, 64] -> [batch]; uses every parameter."""
        h = torch.tanh(x @ self.even)
        h = torch.tanh(h[:, :96] @ self.odd.t()) * self.norm.mean()
        h = h @ self.odd
        h = h + self.norm
        return h.sum(1) + (self.few * self.bias[:1500]).sum() * 0.01 + (self.bias * self.bias).sum() * 0.01


SHAPES = {"even": (64, 128), "odd": (131, 96), "few": (3, 1500), "bias": (5003,), "norm": (96,)}


def batch(step, size=8):
    """Inputs [size, 64] and targets [size] of a step, the same in every process."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, 64, generator=generator)
    return x, torch.sin(x.sum(1))


def train(model, optimizer, steps, first=0, rank=0, world=1):
    """Train on this process's part of every batch. Returns the mean loss of each step over all processes."""
    losses = []
    for step in range(first, first + steps):
        x, y = batch(step)
        x, y = x[rank::world], y[rank::world]
        optimizer.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        value = loss.detach().clone()
        if world > 1:
            dist.all_reduce(value)
        losses.append(value.item() / world)
    return losses


def decode(state, i, row=None):
    """State i of one parameter as float32, of the shard here; of a state with rows, one row."""
    part, absmax = getattr(state[f"state{i}"], "_local_tensor", state[f"state{i}"]), state.get(f"absmax{i}")
    if row is not None:
        part, absmax = part[row], absmax[row]
    if part.dtype == torch.float32:
        return part.clone()
    scale = absmax.repeat_interleave(256)[: part.numel()].reshape(part.shape)
    return state[f"qmap{i}"][part.long()] * scale


# ---------------------------------------------------------------- FSDP2


def sharded(world=None, placement=None, seed=0, cls=None, lr=LR, mesh=None):
    """(model, optimizer) of FSDP2; placement: a function of a parameter, for fully_shard."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = mesh or init_device_mesh("cpu", (world or dist.get_world_size(),))
    model = Net(seed)
    fully_shard(model, mesh=mesh, shard_placement_fn=placement)
    return model, (cls or optim.AdamW8bit)(model.parameters(), lr=lr)


def scales_of(state, i):
    """One scale per element of the shard here."""
    part = getattr(state[f"state{i}"], "_local_tensor", state[f"state{i}"])
    return state[f"absmax{i}"].repeat_interleave(256)[: part.numel()].reshape(part.shape)


def whole(p, part):
    """The tensor whose part here is `part`, placed as p is."""
    if not isinstance(p, DTensor):
        return part
    stride = torch.empty(p.shape).stride()
    spread = DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=stride)
    return spread.full_tensor()


def whole_states(model, optimizer):
    """{parameter name: {"step", "1", "2": decoded float32 state}} of all parameters, in every process."""
    result = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        result[name] = {str(i): whole(p, decode(state, i)) for i in (1, 2)} | {"step": state["step"]}
    return result


def check_states(model, optimizer, saved, exact):
    """Decoded states equal the saved ones to the bit for the names in `exact`, else within half a gap of the map."""
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        assert state["step"] == saved[name]["step"], name
        assert getattr(state["state1"], "placements", None) == getattr(p, "placements", None)
        for i in (1, 2):
            got, want = whole(p, decode(state, i)), saved[name][str(i)]
            if name in exact:
                assert torch.equal(got, want), (name, i)
                continue
            scale, qmap = whole(p, scales_of(state, i)), state[f"qmap{i}"]
            at = torch.searchsorted(qmap, (want / scale).nan_to_num()).clamp(1, 255)
            half = (qmap[at] - qmap[at - 1]) / 2
            assert ((got - want).abs() <= scale * (half + 1e-6)).all(), (name, i)
            assert not torch.equal(got, want), (name, i)  # the case is there


def assert_alike(model, optimizer, twin_model, twin):
    """All state of two optimizers is equal to the bit in this process."""
    for p, q in zip(model.parameters(), twin_model.parameters(), strict=True):
        assert list(optimizer.state[p]) == list(twin.state[q])
        for key, value in optimizer.state[p].items():
            other = twin.state[q][key]
            if not isinstance(value, torch.Tensor):
                assert value == other, key
                continue
            assert type(value) is type(other), key
            assert torch.equal(getattr(value, "_local_tensor", value), getattr(other, "_local_tensor", other)), key


def copy_weights(model, source):
    with torch.no_grad():
        for p, q in zip(model.parameters(), source.parameters(), strict=True):
            getattr(p, "_local_tensor", p).copy_(getattr(q, "_local_tensor", q))


def save_two(rank, folder):
    """Two processes: train as one does, save with DCP, resume here exactly, go on."""
    expected = torch.load(f"{folder}/expected.pt")
    model, optimizer = sharded()
    losses = train(model, optimizer, STEPS, rank=rank, world=2)
    assert max(abs(a - b) for a, b in zip(losses, expected["losses"], strict=False)) <= expected["tolerance"]
    for name, p in model.named_parameters():
        assert optimizer.state[p]["state1"].dtype == (torch.float32 if name == "norm" else torch.uint8), name
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": states}, checkpoint_id=f"{folder}/two")
    dcp.save({"optim": optimizer.state_dict()}, checkpoint_id=f"{folder}/plain")
    full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    full_weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    decoded_now = whole_states(model, optimizer)
    if rank == 0:
        torch.save({"optim": full, "model": full_weights}, f"{folder}/full.pt")
        torch.save(decoded_now, f"{folder}/decoded-two.pt")
    twin_model, twin = sharded(seed=1)
    load_checkpoint(twin_model, twin, f"{folder}/two")
    assert_alike(model, optimizer, twin_model, twin)
    load_plain(rank, folder, model, optimizer)
    later = train(model, optimizer, MORE, first=STEPS, rank=rank, world=2)
    assert train(twin_model, twin, MORE, first=STEPS, rank=rank, world=2) == later
    assert_alike(model, optimizer, twin_model, twin)
    if rank == 0:
        torch.save(later, f"{folder}/later.pt")


def load_checkpoint(model, optimizer, path):
    """What torch's documentation says: get, load in place, set."""
    weights, states = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optim": states}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)


def load_plain(rank, folder, model, optimizer):
    """The optimizer's own state dict through DCP: state must exist to be loaded into."""
    twin_model, twin = sharded(seed=2)
    train(twin_model, twin, 1, rank=rank, world=2)
    state_dict = {"optim": twin.state_dict()}
    shared = twin._maps[twin_model.even.device]
    entries = state_dict["optim"]["state"]
    for state in [entries[key] for key in entries if "qmap1" in entries[key]]:  # DCP writes into them
        assert state["qmap1"] is not shared[0]
        assert state["qmap2"] is not shared[1]
    dcp.load(state_dict, checkpoint_id=f"{folder}/plain")
    twin.load_state_dict(state_dict["optim"])
    assert_alike(model, optimizer, twin_model, twin)
    assert twin.state[twin_model.even]["qmap1"] is twin.state[twin_model.odd]["qmap1"] is shared[0]


def resume(rank, folder, source, target, exact):
    """Any number of processes: load what others saved, compare, go on, save."""
    world = dist.get_world_size()
    model, optimizer = sharded(seed=3)
    load_checkpoint(model, optimizer, f"{folder}/{source}")
    check_states(model, optimizer, torch.load(f"{folder}/decoded-{source}.pt"), exact)
    if target:
        now = whole_states(model, optimizer)
        if rank == 0:
            torch.save(now, f"{folder}/decoded-{target}.pt")
        weights, states = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optim": states}, checkpoint_id=f"{folder}/{target}")
    later = train(model, optimizer, MORE, first=STEPS, rank=rank, world=world)
    tolerance = torch.load(f"{folder}/expected.pt")["tolerance"]
    assert max(abs(a - b) for a, b in zip(later, torch.load(f"{folder}/later.pt"), strict=True)) <= tolerance
