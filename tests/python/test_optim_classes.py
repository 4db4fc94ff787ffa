"""The optimizer classes and the multi-tensor operator: many tensors equal one by one, layouts, long runs."""

import numpy as np
import pytest
import torch

import bitsandbytes.functional as F
import bitsandbytes.optim as optim
import oracle
import oracle_optim as ref


def tensors(dtype, seed=0, device_shapes=((5000,), (300, 20), (1,), (64, 64), (4095,), (4097,), (0,), (10007,))):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(*shape, generator=g) * 0.1).to(oracle.TORCH[dtype]) for shape in device_shapes]


def params_of(values):
    return [torch.nn.Parameter(v.clone()) for v in values]


def state_of(opt, p):
    return {k: v for k, v in opt.state[p].items() if isinstance(v, torch.Tensor)}


def assert_same(opt_a, ps_a, opt_b, ps_b, what=""):
    for i, (a, b) in enumerate(zip(ps_a, ps_b, strict=True)):
        assert torch.equal(a.data, b.data), (what, i)
        sa, sb = state_of(opt_a, a), state_of(opt_b, b)
        assert sa.keys() == sb.keys(), (what, i)
        for key in sa:
            assert torch.equal(sa[key], sb[key]), (what, i, key)


@pytest.mark.parametrize("bits", [8, 32])
def test_many_tensors_equal_one_by_one(dtype, bits):
    values = tensors(dtype)
    together, single = params_of(values), params_of(values)
    options = {"lr": 1e-2, "weight_decay": 0.1, "optim_bits": bits}
    opt = optim.AdamW(together, **options)
    opts = [optim.AdamW([p], **options) for p in single]
    for step in range(5):
        for i, grad in enumerate(tensors(dtype, 100 + step)):
            present = (i + step) % 4 != 3  # a parameter without a gradient is skipped and keeps its own count
            together[i].grad = grad.clone() if present else None
            single[i].grad = grad.clone() if present else None
        opt.step()
        for o in opts:
            o.step()
    for i, o in enumerate(opts):
        assert torch.equal(together[i].data, single[i].data), i
        a, b = opt.state[together[i]], o.state[single[i]]
        assert a.get("step") == b.get("step"), i
        for key in b:
            if isinstance(b[key], torch.Tensor):
                assert torch.equal(a[key], b[key]), (i, key)


def test_class_equals_the_functional_form(dtype):
    p = torch.nn.Parameter(tensors(dtype)[0])
    opt = optim.AdamW8bit([p], lr=1e-2, weight_decay=0.1)
    mine = p.data.clone()
    n = mine.numel()
    q1, q2 = torch.zeros(n, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8)
    a1, a2 = torch.zeros(-(-n // 256)), torch.zeros(-(-n // 256))
    for step in range(1, 6):
        p.grad = tensors(dtype, step)[0]
        opt.step()
        F.optimizer_update_8bit_blockwise(
            "adam", p.grad, mine, q1, q2, 0.9, 0.999, 0.0, 0.0, 1e-8, step, 1e-2,
            F.create_dynamic_map(), F.create_dynamic_map(signed=False), a1, a2, weight_decay=0.1,
        )  # fmt: skip
    state = opt.state[p]
    assert torch.equal(p.data, mine) and torch.equal(state["state1"], q1) and torch.equal(state["state2"], q2)
    assert torch.equal(state["absmax1"], a1) and torch.equal(state["absmax2"], a2) and state["step"] == 5
    assert state["state1"].dtype == torch.uint8 and state["absmax1"].shape == (-(-n // 256),)


def test_min_8bit_size_is_strict():
    small, large = torch.nn.Parameter(torch.ones(4095)), torch.nn.Parameter(torch.ones(4096))
    opt = optim.Adam8bit([small, large])
    small.grad, large.grad = torch.ones(4095), torch.ones(4096)
    opt.step()
    assert opt.state[small]["state1"].dtype == torch.float32 and opt.state[large]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("bits", [8, 32])
def test_channels_last_is_kept(dtype, bits):
    """Strides stay, and every element is updated by its own gradient. 32 bits: equal to the contiguous run."""
    g = torch.Generator().manual_seed(3)
    x = (torch.randn(16, 32, 4, 4, generator=g) * 0.1).to(oracle.TORCH[dtype])
    flat = torch.nn.Parameter(x.clone())
    last = torch.nn.Parameter(x.clone().to(memory_format=torch.channels_last))
    stride, pointer = last.stride(), last.data_ptr()
    a = optim.AdamW([flat], lr=1e-2, weight_decay=0.1, optim_bits=bits)
    b = optim.AdamW([last], lr=1e-2, weight_decay=0.1, optim_bits=bits)
    for step in range(6):
        grad = (torch.randn(x.shape, generator=g) * 0.01).to(x.dtype)
        flat.grad = grad.clone()
        last.grad = grad.clone().to(memory_format=torch.channels_last) if step % 2 == 0 else grad.clone()
        a.step()
        b.step()
        assert last.stride() == stride and last.data_ptr() == pointer
    if bits == 32:
        assert torch.equal(flat.data, last.data)
        assert torch.equal(a.state[flat]["state1"], b.state[last]["state1"])
    else:
        torch.testing.assert_close(flat.float(), last.float(), atol=2e-2, rtol=1e-2)
        assert torch.mean(torch.abs(flat.float() - last.float())) < 2e-3


def test_channels_last_8bit_is_storage_order():
    """p, g and state with one dense layout: the blocks run over the storage."""
    g = torch.Generator().manual_seed(4)
    x = torch.randn(8, 64, 4, 4, generator=g) * 0.1
    last = torch.nn.Parameter(x.to(memory_format=torch.channels_last))
    flat = torch.nn.Parameter(x.permute(0, 2, 3, 1).contiguous())
    a, b = optim.Adam8bit([last], lr=1e-2), optim.Adam8bit([flat], lr=1e-2)
    for _ in range(4):
        grad = torch.randn(8, 64, 4, 4, generator=g) * 0.01
        last.grad = grad.to(memory_format=torch.channels_last)
        flat.grad = grad.permute(0, 2, 3, 1).contiguous()
        a.step()
        b.step()
    assert torch.equal(last.data.permute(0, 2, 3, 1), flat.data)
    assert torch.equal(a.state[last]["absmax1"], b.state[flat]["absmax1"])


@pytest.mark.parametrize("bits", [8, 32])
def test_strided_parameter_and_gradient(bits):
    """A view with gaps is updated in place, and the gaps are left alone."""
    g = torch.Generator().manual_seed(5)
    base = torch.randn(80, 128, generator=g)
    before = base.clone()
    view = base[:, ::2]
    plain = view.contiguous()
    grads = [torch.randn(64, 80, generator=g).t() for _ in range(3)]
    blocks = 20
    one = [torch.zeros(80, 64, dtype=torch.uint8 if bits == 8 else torch.float32) for _ in range(2)]
    two = [t.clone() for t in one]
    scale_one, scale_two = [torch.zeros(blocks) for _ in range(2)], [torch.zeros(blocks) for _ in range(2)]
    for p, s, a in ((view, one, scale_one), (plain, two, scale_two)):
        for step, grad in enumerate(grads, 1):
            grad = grad if p is view else grad.contiguous()
            if bits == 8:
                F.optimizer_update_8bit_blockwise(
                    "adam", grad, p, *s, 0.9, 0.999, 0.0, 0.0, 1e-8, step, 1e-2,
                    F.create_dynamic_map(), F.create_dynamic_map(signed=False), *a, weight_decay=0.1,
                )  # fmt: skip
            else:
                F.optimizer_update_32bit("adam", grad, p, s[0], 0.9, 1e-8, step, 1e-2, s[1], 0.999, weight_decay=0.1)
    assert torch.equal(view, plain) and all(
        torch.equal(x, y) for x, y in zip(one + scale_one, two + scale_two, strict=True)
    )
    assert torch.equal(base[:, 1::2], before[:, 1::2])


def test_threads_do_not_matter(dtype):
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        p = torch.nn.Parameter(tensors(dtype, 1, ((300007,),))[0])
        opt = optim.AdamW8bit([p], lr=1e-2)
        for step in range(3):
            p.grad = tensors(dtype, 2 + step, ((300007,),))[0]
            opt.step()
        results.append((p.data, opt.state[p]["state1"], opt.state[p]["state2"], opt.state[p]["absmax1"]))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_multi_tensor_operator_mixes_bits():
    """_optimizer_step: 8-bit and 32-bit parameters and three steps in one call, absmax in order of the 8-bit ones."""
    shapes = [1000, 300, 257]
    bits = [8, 32, 8]
    g = torch.Generator().manual_seed(6)
    p = [torch.randn(n, generator=g) for n in shapes]
    grads = [torch.randn(n, generator=g) for n in shapes]
    s1 = [torch.zeros(n, dtype=torch.uint8 if b == 8 else torch.float32) for n, b in zip(shapes, bits, strict=True)]
    s2 = [t.clone() for t in s1]
    a1, a2 = [torch.zeros(4), torch.zeros(2)], [torch.zeros(4), torch.zeros(2)]
    steps = [1, 5, 9]
    m1, m2 = F.create_dynamic_map(), F.create_dynamic_map(signed=False)
    start = [x.numpy().copy() for x in p]
    torch.ops.bitsandbytes._optimizer_step(
        "adam", p, grads, s1, s2, a1, a2, [m1, m2], steps, 1e-2, 0.9, 0.999, 0.0, 0.0, 1e-8, 0.1, 1.0, False
    )
    s = ref.Settings(lr=1e-2, wd=0.1)
    a = iter(zip(a1, a2, strict=True))
    for i, n in enumerate(shapes):
        if bits[i] == 8:
            state = ref.State8(n, m1.numpy(), m2.numpy())
            expected, _, _ = ref.step8(start[i], grads[i].numpy(), state, steps[i], s, "f32")
            scale1, scale2 = next(a)
            assert np.array_equal(s1[i].numpy(), state.q1) and np.array_equal(s2[i].numpy(), state.q2)
            assert oracle.same_bits(scale1.numpy(), state.a1) and oracle.same_bits(scale2.numpy(), state.a2)
        else:
            zero = np.zeros(n, np.float32)
            expected, m, v = ref.step32(start[i], grads[i].numpy(), zero, zero, steps[i], s, "f32")
            assert oracle.same_bits(s1[i].numpy(), m) and oracle.same_bits(s2[i].numpy(), v)
        assert np.max(ref.ulps(p[i].numpy(), expected, "f32")) <= 1


def test_gradients_are_not_changed(dtype):
    p = torch.nn.Parameter(tensors(dtype)[0])
    p.grad = tensors(dtype, 9)[0]
    before = p.grad.clone()
    optim.Adam8bit([p], lr=1.0).step()
    assert torch.equal(p.grad, before)


def test_thousand_steps_beside_fp32_adam():
    """Drift: a noisy quadratic, 8-bit and fp32 Adam from the same start and the same noise."""
    g = torch.Generator().manual_seed(10)
    n = 8192
    target = torch.randn(n, generator=g)
    curve = 10.0 ** (torch.rand(n, generator=g) * 2 - 1)
    start = torch.randn(n, generator=g)
    eight, plain = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    opt8 = optim.AdamW8bit([eight], lr=5e-3, weight_decay=1e-2)
    opt32 = torch.optim.AdamW([plain], lr=5e-3, weight_decay=1e-2)
    for _ in range(1000):
        noise = torch.randn(n, generator=g) * 0.1
        for p, opt in ((eight, opt8), (plain, opt32)):
            p.grad = curve * (p.data - target) + noise
            opt.step()

    def loss(p):
        return (curve * (p.data - target) ** 2).mean().item()

    first = (curve * (start - target) ** 2).mean().item()
    assert loss(plain) < 0.02 * first, "the reference itself must have converged"
    assert loss(eight) < 0.02 * first
    assert torch.mean(torch.abs(eight.data - plain.data)) < 0.03
    state = opt8.state[eight]
    m = F.dequantize_blockwise(state["state1"], absmax=state["absmax1"], code=state["qmap1"], blocksize=256)
    exact = opt32.state[plain]["exp_avg"]
    assert torch.mean(torch.abs(m - exact)) < 0.1 * torch.mean(torch.abs(exact)) + 0.02
