"""Further work for the processes of the sharding tests: torch's state dict functions, meshes, FSDP1, overrides."""

import contextlib
import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullOptimStateDictConfig, FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import bitsandbytes as bnb
import sharding_workers as base
from bitsandbytes import optim
from bitsandbytes.optim import sharding
from sharding_workers import LR, MORE, STEPS, Net, assert_alike, decode, train, whole


def trained(rank, **options):
    """(model, optimizer) of FSDP2 after STEPS steps."""
    model, optimizer = base.sharded(**options)
    train(model, optimizer, STEPS, rank=rank, world=dist.get_world_size())
    return model, optimizer


def several(rank, folder, *functions):
    """Run some of the functions below one after the other in the same processes."""
    for function in functions:
        bnb.optim.GlobalOptimManager.get_instance().initialize()
        function(rank, folder)


# ---------------------------------------------------------------- torch.distributed.checkpoint.state_dict


def state_dict_options(rank, folder):
    """Every way through get_optimizer_state_dict and set_optimizer_state_dict resumes to the bit."""
    model, optimizer = trained(rank)
    ways = [
        ({}, {}),
        ({"flatten_optimizer_state_dict": True}, {"flatten_optimizer_state_dict": True}),
        ({"cpu_offload": True}, {}),
        ({"full_state_dict": True}, {"full_state_dict": True}),
        ({"full_state_dict": True, "cpu_offload": True}, {"full_state_dict": True, "broadcast_from_rank0": True}),
    ]
    for i, (saving, loading) in enumerate(ways):
        got = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**saving))
        twin_model, twin = base.sharded(seed=5)
        if not saving.get("full_state_dict"):
            dcp.save({"optim": got}, checkpoint_id=f"{folder}/way{i}")
            got = get_optimizer_state_dict(twin_model, twin, options=StateDictOptions(**saving))
            dcp.load({"optim": got}, checkpoint_id=f"{folder}/way{i}")
        set_optimizer_state_dict(twin_model, twin, got, options=StateDictOptions(**loading))
        assert_alike(model, optimizer, twin_model, twin)
        assert twin.param_groups[0]["betas"] == (0.9, 0.999)
    base.copy_weights(twin_model, model)
    assert train(twin_model, twin, MORE, rank=rank, world=2) == train(model, optimizer, MORE, rank=rank, world=2)


def other_direction(rank, folder):
    """State of one process, in the nested layout, into a sharded model; and errors."""
    model, optimizer = base.sharded(seed=5)
    saved = torch.load(f"{folder}/nested.pt")
    optimizer.load_state_dict(saved["optim"])
    base.check_states(model, optimizer, saved["decoded"], ("even", "norm"))
    for name, value in (("absmax1", lambda t: t[:-1]), ("state1", lambda t: t[1:]), ("absmax2", lambda t: t.double())):
        spoilt = copy.deepcopy(saved["optim"])
        inner = spoilt["state"][1]["__bnb_optimizer_quant_state__"]
        inner[name] = value(inner[name])
        before = optimizer.state_dict()["state"][0]["state1"].clone()
        with pytest.raises(ValueError, match=rf"state 1: {name}.*expected"):
            optimizer.load_state_dict(spoilt)
        assert torch.equal(optimizer.state_dict()["state"][0]["state1"].to_local(), before.to_local())


def copies(rank, folder):
    model, optimizer = trained(rank)
    optimizer.zero_grad()  # torch cannot copy the gradient of a DTensor
    twin = copy.deepcopy(optimizer)
    for p, q in zip(model.parameters(), twin.param_groups[0]["params"], strict=True):
        assert p is not q
        p.grad = q.grad = sharding.wrap(p, torch.ones_like(p._local_tensor))
    optimizer.step()
    twin.step()
    for p, q in zip(model.parameters(), twin.param_groups[0]["params"], strict=True):
        assert torch.equal(p._local_tensor, q._local_tensor)
        assert torch.equal(decode(optimizer.state[p], 1), decode(twin.state[q], 1))


def states_of_two_rows(rank, folder):
    """A state [2, *shape] beside one of the parameter's shape, by hand: placements move by one dimension."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(rank)
    for shape, placement in (((37, 300), Shard(0)), ((6, 1024), Shard(1)), ((8, 1024), Replicate())):

        def fresh(shape=shape, placement=placement):
            optimizer = optim.AdEMAMix8bit([nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [placement]))])
            return optimizer.param_groups[0]["params"][0], optimizer

        p, optimizer = fresh()
        maps, n = optimizer._shared_maps(p), p._local_tensor.numel()
        state = {"step": 3}
        for i, rows in ((1, 2), (2, 0)):
            state[f"state{i}"] = sharding.new_state(p, torch.uint8, rows=rows)
            part = state[f"state{i}"]._local_tensor
            seed = generator if placement != Replicate() else torch.Generator().manual_seed(i)
            part.copy_(torch.randint(0, 256, part.shape, generator=seed))
            count = (2, -(-n // 256)) if rows else -(-n // 256)
            state[f"qmap{i}"], state[f"absmax{i}"] = maps[i - 1], torch.rand(count, generator=seed)
        optimizer.state[p] = state
        assert state["state1"].shape == (2, *shape)
        assert state["state1"].placements[0] == (Shard(placement.dim + 1) if placement != Replicate() else placement)
        name = f"{folder}/rows{len(shape)}-{shape[0]}"
        dcp.save({"optim": optimizer.state_dict()}, checkpoint_id=name)
        q, twin = fresh()
        twin.state[q] = {key: torch.zeros_like(value) if isinstance(value, torch.Tensor) else 0
                         for key, value in state.items()}  # fmt: skip
        twin.state[q] |= {"qmap1": maps[0], "qmap2": maps[1]}
        loaded = {"optim": twin.state_dict()}
        dcp.load(loaded, checkpoint_id=name)
        twin.load_state_dict(loaded["optim"])
        for key, value in state.items():
            got = twin.state[q][key]
            if key == "step":
                assert got == 3
            else:
                assert torch.equal(sharding.local(got), sharding.local(value)), key
        # all of it, in one process that shards nothing
        full = {0: {key: value.full_tensor() if isinstance(value, DTensor) else value
                    for key, value in optimizer.state_dict()["state"][0].items()}}  # fmt: skip
        plain = optim.AdEMAMix8bit([nn.Parameter(torch.ones(shape))])
        plain.load_state_dict({"state": full, "param_groups": plain.state_dict()["param_groups"]})
        got = plain.state[plain.param_groups[0]["params"][0]]
        assert got["absmax1"].shape == (2, -(-p.numel() // 256))
        expected = torch.stack([whole(p, decode(state, 1, row)) for row in range(2)])
        values = torch.stack([decode(got, 1, row) for row in range(2)])
        assert (values - expected).abs().max() <= 0.0071  # half the widest gap; scales are below 1


RULES = (
    (optim.LAMB32bit, {"max_unorm": 0.01}, 1e-5),
    (optim.LARS32bit, {"momentum": 0.9}, 1e-5),
    (optim.AdamW32bit, {"percentile_clipping": 20}, 1e-5),
    (optim.AdEMAMix32bit, {"t_beta3": 5, "t_alpha": 5}, 1e-5),
    (optim.LAMB8bit, {}, 2e-2),
    (optim.Lion8bit, {}, 2e-2),
    (optim.AdEMAMix8bit, {}, 2e-2),
    (optim.SGD8bit, {"momentum": 0.9, "percentile_clipping": 20}, 2e-2),
)


def rules(rank, folder):
    """Every kind of rule, sharded and whole: the same losses.  Norms must be those of whole parameters for that."""
    for cls, options, tolerance in RULES:
        make = lambda params, lr, cls=cls, options=options: cls(params, lr=lr, **options)  # noqa: E731
        model = base.Net()
        losses = train(model, make(model.parameters(), base.LR), STEPS)
        model, optimizer = base.sharded(cls=make)
        got = train(model, optimizer, STEPS, rank=rank, world=dist.get_world_size())
        worst = max(abs(a - b) for a, b in zip(got, losses, strict=True))
        assert worst <= tolerance * losses[0], (cls.__name__, worst, losses)
        for p in model.parameters():
            if "max_unorm" in options:  # U of the whole parameter, in every process
                seen = [torch.zeros(1) for _ in range(dist.get_world_size())]
                dist.all_gather(seen, optimizer.state[p]["unorm_vec"])
                assert all(torch.equal(each, seen[0]) for each in seen)
                assert seen[0] > 0


# ---------------------------------------------------------------- meshes and placements


def placements(rank, folder):
    """Columns sharded; gradients placed otherwise; sums over shards."""
    columns = lambda p: Shard(1) if p.shape[-1] == 128 else Shard(0)  # noqa: E731
    model, optimizer = base.sharded(placement=columns)
    losses = train(model, optimizer, STEPS, rank=rank, world=dist.get_world_size())
    expected = torch.load(f"{folder}/expected.pt")
    assert max(abs(a - b) for a, b in zip(losses, expected["losses"], strict=False)) <= expected["tolerance"]
    assert optimizer.state_dict()["state"][0]["absmax1"].shape == (64, 128, 1)
    resume_same(model, optimizer, f"{folder}/columns", placement=columns)
    model, optimizer = trained(rank)
    full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    twin_model, twin = base.sharded(seed=5, placement=columns)  # rows become columns by way of the full state
    set_optimizer_state_dict(twin_model, twin, full, options=StateDictOptions(full_state_dict=True))
    base.check_states(twin_model, twin, base.whole_states(model, optimizer), ("odd", "few", "bias", "norm"))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    value = torch.arange(6 * 1024.0).reshape(6, 1024)
    for first, second in ((Shard(0), Shard(1)), (Shard(0), Replicate()), (Replicate(), Shard(1))):
        p = nn.Parameter(distribute_tensor(value, mesh, [first]))
        p.grad = distribute_tensor(value, mesh, [first])
        g = sharding.gradient(p, distribute_tensor(value, mesh, [second]))
        assert torch.equal(g, p._local_tensor)
        sums = torch.tensor([[1.0, rank], [2.0, 3.0]], dtype=torch.float64)
        sharding.reduce_sums([p, nn.Parameter(value)], sums)
        world = dist.get_world_size() if first == Shard(0) else 1
        ranks = sum(range(world)) if world > 1 else rank
        assert torch.equal(sums, torch.tensor([[world, ranks], [2.0, 3.0]], dtype=torch.float64))


def resume_same(model, optimizer, path, **options):
    """Save, load into another optimizer on the same mesh: equal to the bit."""
    dcp.save({"optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=path)
    twin_model, twin = base.sharded(seed=5, **options)
    got = get_optimizer_state_dict(twin_model, twin)
    dcp.load({"optim": got}, checkpoint_id=path)
    set_optimizer_state_dict(twin_model, twin, got)
    assert_alike(model, optimizer, twin_model, twin)


def four(rank, folder, exact):
    """What two processes saved, and what one saved that had resumed from that; other meshes."""
    for source in ("two", "one"):
        base.resume(rank, folder, source, None, exact)
    meshes(rank, folder)


def meshes(rank, folder):
    """Four processes: two replicas of two shards; FSDP over tensor parallelism on the same dimension."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    model, optimizer = base.sharded(mesh=mesh)
    losses = train(model, optimizer, STEPS, rank=rank, world=4)
    expected = torch.load(f"{folder}/expected.pt")
    assert max(abs(a - b) for a, b in zip(losses, expected["losses"], strict=False)) <= expected["tolerance"]
    assert optimizer.state[model.even]["state1"].placements == (Replicate(), Shard(0))
    sums = torch.full((1, 2), rank + 1.0, dtype=torch.float64)
    sharding.reduce_sums([model.even], sums)
    assert sums[0, 0] == (3 if rank < 2 else 7)
    resume_same(model, optimizer, f"{folder}/replicas", mesh=mesh)
    base.load_checkpoint(model, optimizer, f"{folder}/two")  # of two processes: the same shards
    base.check_states(model, optimizer, torch.load(f"{folder}/decoded-two.pt"), tuple(base.SHAPES))
    strided(rank, folder)


def strided(rank, folder):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

    def fresh(seed):
        layer = nn.Linear(96, 128, bias=False)
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(128, 96, generator=generator)
        layer.weight = nn.Parameter(distribute_tensor(weight, mesh["tensor"], [Shard(0)]))
        fully_shard(layer, mesh=mesh["data"])
        return layer, optim.AdamW8bit(layer.parameters(), lr=LR)

    layer, optimizer = fresh(0)
    for step in range(2):
        g = torch.randn(128, 96, generator=torch.Generator().manual_seed(step))
        p = layer.weight
        p.grad = sharding.wrap(p, sharding.part_of(p, g))
        optimizer.step()
    full = get_optimizer_state_dict(layer, optimizer, options=StateDictOptions(full_state_dict=True))
    q = nn.Parameter(torch.randn(128, 96, generator=torch.Generator().manual_seed(0)))
    plain = optim.AdamW8bit([q], lr=LR)
    for step in range(2):
        q.grad = torch.randn(128, 96, generator=torch.Generator().manual_seed(step))
        plain.step()
    # 32 rows of 96 in a shard: whole blocks, so that one process computes the same
    resumed = optim.AdamW8bit([nn.Parameter(q.detach().clone())], lr=LR)
    state = {0: full["state"]["weight"]}
    resumed.load_state_dict({"state": state, "param_groups": plain.state_dict()["param_groups"]})
    got, want = resumed.state[resumed.param_groups[0]["params"][0]], plain.state[q]
    for key in ("state1", "state2", "absmax1", "absmax2"):
        assert torch.equal(got[key], want[key]), key
    twin_layer, twin = fresh(1)
    twin.load_state_dict(plain.state_dict())
    assert_alike(layer, optimizer, twin_layer, twin)


# ---------------------------------------------------------------- FSDP1


def flattened(seed=0, **options):
    model = FullyShardedDataParallel(Net(seed), use_orig_params=True, device_id=torch.device("cpu"), **options)
    return model, optim.AdamW8bit(model.parameters(), lr=LR)


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def fsdp1(rank, folder):
    model, optimizer = flattened()
    losses = train(model, optimizer, STEPS, rank=rank, world=2)
    expected = torch.load(f"{folder}/expected.pt")
    assert max(abs(a - b) for a, b in zip(losses, expected["losses"], strict=False)) <= expected["tolerance"]
    for name, p in model.named_parameters():
        if p.numel() and p in optimizer.state:
            small = name.endswith("norm")
            assert optimizer.state[p]["state1"].dtype == (torch.float32 if small else torch.uint8), name
    with quiet():
        check_fsdp1(rank, folder, model, optimizer)


def assert_same_states(model, optimizer, twin_model, twin):
    for p, q in zip(model.parameters(), twin_model.parameters(), strict=True):
        if p.numel() == 0:
            continue
        state, other = optimizer.state[p], twin.state[q]
        assert set(state) == set(other)
        for key, value in state.items():
            same = torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
            assert same, (key, p.shape, sharding.piece(p), sharding.piece(q), value, other[key])


def check_fsdp1(rank, folder, model, optimizer):
    kinds = FullyShardedDataParallel
    own = copy.deepcopy(optimizer.state_dict())
    for kind in (StateDictType.FULL_STATE_DICT, StateDictType.SHARDED_STATE_DICT):
        twin_model, twin = flattened(seed=5)
        config = None
        if kind == StateDictType.FULL_STATE_DICT:  # "offloaded" CPU tensors of FSDP1 share one buffer: torch's fault
            config = FullOptimStateDictConfig(offload_to_cpu=False)
        context = [kinds.state_dict_type(each, kind, None, config) for each in (model, twin_model)]
        with context[0], context[1]:
            saved = kinds.optim_state_dict(model, optimizer)
            twin.load_state_dict(kinds.optim_state_dict_to_load(twin_model, twin, saved))
        assert_same_states(model, optimizer, twin_model, twin)
        if kind == StateDictType.FULL_STATE_DICT and rank == 0:
            torch.save(saved, f"{folder}/merged.pt")
        if kind == StateDictType.FULL_STATE_DICT:
            into_fsdp2(saved)
    for options in ({}, {"full_state_dict": True}, {"flatten_optimizer_state_dict": True}):
        options = StateDictOptions(**options)
        saved = get_optimizer_state_dict(model, optimizer, options=options)
        twin_model, twin = flattened(seed=5)
        set_optimizer_state_dict(twin_model, twin, saved, options=options)
        assert_same_states(model, optimizer, twin_model, twin)
    twin_model, twin = flattened(seed=5)
    twin.load_state_dict(own)  # each process its own
    assert_same_states(model, optimizer, twin_model, twin)
    from_fsdp2(rank)
    # one process's state in the nested layout, keyed by name as FSDP1 wants it
    saved = torch.load(f"{folder}/nested.pt")
    names = list(base.SHAPES)
    named = {"state": {names[i]: entries for i, entries in saved["optim"]["state"].items()},
             "param_groups": [{**saved["optim"]["param_groups"][0], "params": names}]}  # fmt: skip
    twin.load_state_dict(kinds.optim_state_dict_to_load(twin_model, twin, named))
    for name, p in twin_model.named_parameters():
        found, name = sharding.piece(p), name.rpartition(".")[2]
        assert found.numel == saved["decoded"][name]["1"].numel()
        if p.numel():
            want = saved["decoded"][name]["1"].flatten()[found.start : found.stop]
            got = decode(twin.state[p], 1)
            assert (got - want).abs().max() <= 0.0071 * want.abs().max()  # half the widest gap
            assert torch.equal(got, want) or found.start % 256


def into_fsdp2(merged):
    """What FSDP1 merged, into an optimizer of FSDP2: through its own load_state_dict and through torch's function."""
    for through_torch in (False, True):
        model, optimizer = base.sharded(seed=5)
        if through_torch:
            set_optimizer_state_dict(model, optimizer, merged, options=StateDictOptions(full_state_dict=True))
        else:
            optimizer.load_state_dict(merged)
        for name, p in model.named_parameters():
            entries, state = merged["state"][name], optimizer.state[p]
            assert state["step"] == STEPS
            for i in (1, 2):
                want, got = entries[f"state{i}"], whole(p, decode(state, i))
                if name != "norm":
                    want = state[f"qmap{i}"][want.long()] * entries[f"absmax{i}"]
                assert (got - want).abs().max() <= 0.0071 * want.abs().max()  # half the widest gap
                assert torch.equal(got, want) or name not in ("even", "norm")


def from_fsdp2(rank):
    """The full state of FSDP2: into each process's optimizer directly; FSDP1's functions cannot cut it."""
    source_model, source = trained(rank)
    full = get_optimizer_state_dict(source_model, source, options=StateDictOptions(full_state_dict=True))
    states = base.whole_states(source_model, source)
    model, optimizer = flattened(seed=5)
    optimizer.load_state_dict(copy.deepcopy(full))
    for name, p in model.named_parameters():
        found, want = sharding.piece(p), states[name.rpartition(".")[2]]
        for i in (1, 2):
            part, got = want[str(i)].flatten()[found.start : found.stop], decode(optimizer.state[p], i)
            assert got.numel() == p.numel() == part.numel()
            if p.numel():
                assert (got - part).abs().max() <= 0.0071 * part.abs().max()  # half the widest gap
                assert torch.equal(got, part) or not name.endswith(("even", "norm"))
    with pytest.raises(ValueError, match=r"state \d: .*expected"):
        optimizer.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, full))


def flat_parameter(rank, folder):
    """use_orig_params=False: one flat parameter, which keeps one precision."""
    model = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"))
    optimizer = optim.AdamW8bit(model.parameters(), lr=LR)
    train(model, optimizer, 2, rank=rank, world=2)
    with quiet():
        saved = FullyShardedDataParallel.optim_state_dict(model, optimizer)
        assert saved["state"]["odd"]["state1"].shape == base.SHAPES["odd"]
        twin_model = FullyShardedDataParallel(Net(5), device_id=torch.device("cpu"))
        twin = optim.AdamW8bit(twin_model.parameters(), lr=LR)
        twin.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(twin_model, twin, saved))
    (p,), (q,) = model.parameters(), twin_model.parameters()
    n = sum(torch.Size(shape).numel() for shape in base.SHAPES.values())
    kept = min(p.numel(), n - rank * p.numel())  # behind it: padding
    for key, value in optimizer.state[p].items():
        if key.startswith("state"):
            assert torch.equal(value[:kept], twin.state[q][key][:kept])
    assert twin.state[q]["step"] == 2


# ---------------------------------------------------------------- overrides


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.stable = bnb.nn.StableEmbedding(80, 64)
        self.plain = bnb.nn.Embedding(80, 64)
        self.registered = nn.Embedding(80, 64)
        self.before = nn.Linear(64, 80)
        self.listed = nn.Linear(64, 80)
        self.after = nn.Linear(64, 80)
        self.eight = nn.Linear(64, 80)

    def forward(self, tokens):
        h = self.stable(tokens) + self.plain(tokens) + self.registered(tokens)
        return sum(layer(h).sum() for layer in (self.before, self.listed, self.after, self.eight))


def wrap_ddp(model):
    return DistributedDataParallel(model)


def wrap_fsdp1(model):
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def wrap_fsdp2(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for child in model.children():
        fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def overrides(rank, folder):
    manager = bnb.optim.GlobalOptimManager.get_instance()
    for wrapping in (wrap_ddp, wrap_fsdp1, wrap_fsdp2):
        manager.initialize()
        torch.manual_seed(0)
        words = Words()
        manager.register_module_override(words.registered, "weight", {"optim_bits": 32})
        manager.override_config(words.before.weight, "optim_bits", 32)
        manager.override_config([words.listed.weight], key_value_dict={"optim_bits": 32, "lr": 0.5})
        model = wrapping(words)
        manager.override_config(words.after.weight, "optim_bits", 32)
        optimizer = optim.AdamW8bit(model.parameters(), lr=LR)
        tokens = torch.arange(40).reshape(1, 40) + 40 * rank
        model(tokens).backward()
        optimizer.step()
        for name, child in words.named_children():
            state = optimizer.state.get(child.weight, {})
            if sharding.local(child.weight).numel() == 0:
                continue
            want = torch.uint8 if name == "eight" else torch.float32
            assert state["state1"].dtype == want, (wrapping.__name__, name)
        assert optimizer._overrides[words.listed.weight]["lr"] == 0.5


def data_parallel(rank, folder):
    """DDP: the same numbers in every process; saved and resumed through DCP in the nested layout."""
    model = DistributedDataParallel(Net())
    optimizer = optim.AdamW8bit(model.parameters(), lr=LR)
    losses = train(model, optimizer, STEPS, rank=rank, world=2)
    expected = torch.load(f"{folder}/expected.pt")
    assert max(abs(a - b) for a, b in zip(losses, expected["losses"], strict=False)) <= expected["tolerance"]
    dcp.save({"optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=f"{folder}/ddp")
    twin_model = DistributedDataParallel(Net(5))
    twin = optim.AdamW8bit(twin_model.parameters(), lr=LR)
    got = get_optimizer_state_dict(twin_model, twin)
    dcp.load({"optim": got}, checkpoint_id=f"{folder}/ddp")
    set_optimizer_state_dict(twin_model, twin, got)
    assert_alike(model, optimizer, twin_model, twin)
    plain = twin.state_dict()
    dcp.save({"optim": optimizer.state_dict()}, checkpoint_id=f"{folder}/ddp-plain")
    dcp.load({"optim": plain}, checkpoint_id=f"{folder}/ddp-plain")
    twin.load_state_dict(plain)
    assert_alike(model, optimizer, twin_model, twin)
