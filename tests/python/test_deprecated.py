"""igemm(), the helpers of managed memory and the repacked CPU layout, against definitions in numpy."""

import numpy as np
import pytest
import torch

import oracle
from bitsandbytes import functional as F


def int8(*shape, seed=0):
    """The whole range, -128 included."""
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(x):
    return x.detach().numpy().astype(np.int64)


# ---------------------------------------------------------------- igemm


@pytest.mark.parametrize("tA", [False, True])
@pytest.mark.parametrize("tB", [False, True])
@pytest.mark.parametrize("ranks", ["22", "32", "33"])
@pytest.mark.parametrize("k", [1, 7, 64, 1500])
def test_igemm_is_the_exact_product(ranks, tA, tB, k):
    b, m, n = 3, 5, 9
    A, B = int8(b, m, k, seed=1), int8(b, k, n, seed=2)
    A, B = (A[0] if ranks[0] == "2" else A), (B[0] if ranks[1] == "2" else B)
    expected = np.matmul(exact(A), exact(B))
    A, B = (A.mT.contiguous() if tA else A), (B.mT.contiguous() if tB else B)
    with pytest.warns(FutureWarning, match="igemm is deprecated"):
        result = F.igemm(A, B, transposed_A=tA, transposed_B=tB)
    assert result.dtype == torch.int32
    assert np.array_equal(result.numpy(), expected)
    with pytest.warns(FutureWarning, match="check_matmul is deprecated"):
        assert F.check_matmul(A, B, None, tA, tB) == expected.shape
    if ranks == "33":
        out = torch.full(expected.shape, 7, dtype=torch.int32)
        with pytest.warns(FutureWarning, match="batched_igemm is deprecated"):
            assert F.batched_igemm(A, B, out, tA, tB) is out
        assert np.array_equal(out.numpy(), expected)


def test_a_two_dimensional_out_asks_for_the_contraction():
    A, B = int8(4, 6, 10, seed=3), int8(4, 6, 3, seed=4)
    out = torch.zeros(10, 3, dtype=torch.int32)
    with pytest.warns(FutureWarning):
        assert F.igemm(A, B, out=out) is out
    assert np.array_equal(out.numpy(), np.einsum("bsi,bso->io", exact(A), exact(B)))
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match="with a 2-D out expected"):
        F.igemm(A, B[:3], out=out)
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match="with a 2-D out expected"):
        F.igemm(A, B, out=out, transposed_A=True)


def test_igemm_takes_views_and_empty_batches():
    A, B = int8(6, 20)[::2, 1::2], int8(9, 10).t()
    assert not A.is_contiguous()
    with pytest.warns(FutureWarning):
        result = F.igemm(A, B)
    assert np.array_equal(result.numpy(), exact(A) @ exact(B))
    with pytest.warns(FutureWarning):
        assert F.igemm(int8(0, 2, 3), int8(0, 3, 4)).shape == (0, 2, 4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("call", [F.igemm, F.batched_igemm, lambda A, B, out=None: F.check_matmul(A, B, out, 0, 0)])
def test_igemm_refuses(call):
    for pair in ((normal(2, 3, 4), int8(2, 4, 5)), (int8(2, 3, 4), normal(2, 4, 5).half())):
        with pytest.raises(TypeError, match=r"has dtype torch\.float\d+, expected torch\.int8"):
            call(*pair)
    with pytest.raises(ValueError, match=r"A is \[2, 3, 4\].*B is \[2, 5, 4\].*expected equal inner dimensions"):
        call(int8(2, 3, 4), int8(2, 5, 4))
    with pytest.raises(ValueError, match="equal batches"):
        call(int8(2, 3, 4), int8(3, 4, 5))
    with pytest.raises(ValueError, match=r"out is \[2, 3, 6\]; expected out of shape \[2, 3, 5\]"):
        call(int8(2, 3, 4), int8(2, 4, 5), out=torch.zeros(2, 3, 6, dtype=torch.int32))
    with pytest.raises(ValueError, match="expected"):
        call(int8(4), int8(4, 5))
    with pytest.raises(ValueError, match="expected"):
        call(int8(3, 4), int8(2, 4, 5))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_igemm_out_and_ranks_are_checked():
    with pytest.raises(ValueError, match=r"out: dtype is torch\.float32, expected torch\.int32"):
        F.igemm(int8(3, 4), int8(4, 5), out=torch.zeros(3, 5))
    with pytest.raises(ValueError, match="an operand has 2 dimensions, expected 3"):
        F.batched_igemm(int8(3, 4), int8(4, 5))
    with pytest.raises(ValueError, match="an operand has 2 dimensions, expected 3"):
        F.batched_igemm(int8(2, 3, 4), int8(2, 3, 5), out=torch.zeros(4, 5, dtype=torch.int32))
    assert F.check_matmul(normal(3, 4), normal(4, 5), None, False, False, expected_type=torch.float32) == (3, 5)


# ---------------------------------------------------------------- managed memory


def test_singletons():
    for cls in (F.GlobalPageManager, F.CUBLAS_Context):
        with pytest.raises(RuntimeError, match="get_instance"):
            cls()
        assert cls.get_instance() is cls.get_instance()
    assert F.GlobalPageManager.get_instance() is not F.CUBLAS_Context.get_instance()
    with pytest.raises(RuntimeError, match="does not use cuBLAS"):
        F.CUBLAS_Context.get_instance().get_context(F.FIRST_CUDA_DEVICE)


def test_paged_memory():
    assert torch.device("cuda:0") == F.FIRST_CUDA_DEVICE
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"64 bytes for cuda:0: .*driver"):
            F.get_paged(4, 4)
    with pytest.raises(RuntimeError, match="device is meta"):
        F.get_paged(4, 4, device="meta")
    ordinary = F.get_paged(4, 5, dtype=torch.uint8, device="cpu")
    assert ordinary.tolist() == [[0] * 5] * 4
    assert ordinary.dtype == torch.uint8
    with pytest.raises(AssertionError, match="ordinary tensor"):
        F.prefetch_tensor(ordinary)
    marked = torch.zeros(2)
    marked.is_paged = True
    assert F.prefetch_tensor(marked) is None
    manager = F.GlobalPageManager.get_instance()
    manager.prefetch_all()
    manager.paged_tensors += [ordinary, marked]
    try:
        with pytest.raises(AssertionError, match="ordinary tensor"):
            manager.prefetch_all(to_cpu=True)
    finally:
        manager.initialize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_elementwise_functions_write_in_place(dtype):
    A, B = torch.zeros(2, 3, dtype=dtype), torch.full((2, 3), 3, dtype=dtype)
    assert F.fill(A, 5) is None
    assert A.tolist() == [[5] * 3] * 2
    assert F._mul(A, B) is None
    assert A.tolist() == [[15] * 3] * 2
    F.elementwise_func("arange", A, None, 0)
    assert A.tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(NotImplementedError, match="'sqrt'"):
        F.elementwise_func("sqrt", A, None, 0)
    with pytest.raises(NotImplementedError, match=r"torch\.float16"):
        F.fill(A.half(), 1)


# ---------------------------------------------------------------- the repacked layout


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nested", [False, True])
def test_the_repacked_layout(storage, nested):
    n, k, block = 64, 192, 64
    weight = normal(n, k, dtype=torch.float16)
    packed, state = F.quantize_4bit(weight, None, None, block, nested, "nf4", storage)
    repacked, new = F._convert_weight_packed_for_cpu(packed, state)
    assert (repacked.dtype, repacked.shape) == (torch.uint8, (n, k // 2))
    nibbles = oracle.unpack(packed.view(torch.uint8).numpy().ravel(), n * k).reshape(n, k)
    stored = repacked.numpy().ravel()
    at = 0
    for row in range(0, n, 32):
        for column in range(0, k, 2):
            group = nibbles[row : row + 32, column : column + 2].ravel()
            assert np.array_equal(stored[at : at + 32], group[:32] + 16 * group[32:])
            at += 32
    scales = F.quantize_4bit(weight, None, None, block, False, "nf4")[1].absmax.view(n, k // block).t()
    assert (new.absmax.dtype, new.absmax.shape, new.dtype) == (torch.bfloat16, scales.shape, torch.bfloat16)
    assert torch.allclose(new.absmax.float(), scales, rtol=0.02)
    assert not new.nested
    assert new.packing_format_for_cpu
    assert (new.original_dtype, new.original_nested, new.original_storage_type) == (torch.float16, nested, storage)
    assert (state.nested, state.dtype, "original_dtype" in vars(state)) == (nested, torch.float16, False)
    back, old = F._convert_weight_packed_for_cpu_inverse(repacked, new)
    assert back.dtype == storage
    assert torch.equal(back.view(torch.uint8), packed.view(torch.uint8))
    assert old is state


def test_repacking_refuses():
    for shape, text in (((2, 32, 64), "3 dimensions"), ((33, 64), "33 rows"), ((32, 32), "32 elements")):
        packed, state = F.quantize_nf4(normal(*shape))
        with pytest.raises(AssertionError, match=text):
            F._convert_weight_packed_for_cpu(packed, state)
    packed, state = F.quantize_nf4(normal(32, 64))
    with pytest.raises(AssertionError, match="block_n is 16"):
        F._convert_weight_packed_for_cpu(packed, state, block_n=16)
    with pytest.raises(AssertionError, match="not one of a repacked weight"):
        F._convert_weight_packed_for_cpu_inverse(packed, state)
    assert F.has_avx512bf16() is False
