"""The Triton kernels in Triton's interpreter, on the CPU.

The interpreter is chosen when Triton is imported, so this file runs itself once more in a process of its own with
TRITON_INTERPRET=1; the rest of the suite keeps the compiler.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.processes import run_in_the_interpreter

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_in_the_interpreter():
        run_in_the_interpreter(__file__)

    def test_reasons_without_a_device():
        from foveate.kernels import triton as kernels
        from foveate.kernels.base import Want
        from tests.kernel_cases import Maker, dense

        case = dense(Maker(8, d=16))
        assert "CUDA device" in kernels.supports(case.q, case.kv, case.layout, Want())

else:
    import foveate
    from foveate.errors import UnsupportedError
    from foveate.kernels import triton as kernels
    from foveate.kernels.base import Want
    from foveate.kv import KV
    from foveate.layout import Layout
    from tests import kernel_cases as cases
    from tests.kernel_cases import Maker, check

    named = dict(ids=lambda c: c.__name__)

    def test_a_quick_interpreter_knows_what_it_knew():
        """Of `interpreter.quicken`: types that are remembered are those of Triton itself, and refusals stay."""
        from triton.language import core
        from triton.runtime import interpreter

        assert core.block_type.__init__.__module__ == "tests.interpreter", "this Triton is not quickened: see quicken()"
        for name, shape in (("fp32", [16]), ("int8", [16]), ("fp32", [16]), ("fp32", [4, 4]), ("fp32", core.tuple([4, 4]))):
            of, size = core.dtype(name), [int(n) for n in shape]
            made = core.block_type(of, shape)
            assert made.element_ty is of and list(made.shape) == size and made.numel == 16 and name in str(made)
            assert isinstance(made.shape.type, core.tuple_type) and len(made.shape.type.types) == len(size)
            for handle in ("a", "b"):
                x = core.tensor(handle, made)
                assert (x.handle, x.type, x.dtype, x.numel.value) == (handle, made, of, 16)
                assert [n.value for n in x.shape] == size
            wide = interpreter._get_np_dtype(made)
            assert (wide.kind, wide.itemsize) == {"fp32": ("f", 4), "int8": ("i", 1)}[name]
        for shape, error, why in (([3], ValueError, "power of 2"), ([], TypeError, "0d"), ([16.0], TypeError, "constexpr")):
            for _ in range(2):
                with pytest.raises(error, match=why):
                    core.block_type(core.float32, shape)

    @pytest.mark.parametrize("make", cases.ALL, **named)
    def test_equals_the_oracle(make):
        check(kernels, make(Maker(66, d=16)).poisoned(), torch.float32)

    @pytest.mark.parametrize("make", [cases.block_lists, cases.factored, cases.decode("paged", "pages")], **named)
    def test_half_precision(make):
        check(kernels, make(Maker(66, d=16, dtype=torch.float16)).poisoned(), torch.float16)

    @pytest.mark.parametrize("h,g", [(1, 1), (3, 1), (6, 2), (16, 1)])
    def test_groups(h, g):
        for make in (cases.group_lists, cases.decode("ragged", "pages")):
            check(kernels, make(Maker(50, d=16, h=h, g=g)), torch.float32)

    @pytest.mark.parametrize("d", [24, 96, 256])
    def test_head_dims(d):
        check(kernels, cases.lists_and_rule(Maker(50, d=d, h=2, g=1)), torch.float32)

    @pytest.mark.parametrize("n", [1, 2, 31, 33])
    def test_lengths(n):
        x = Maker(n, d=16)
        check(kernels, cases.Case(x.q(), x.dense(), Layout.dense(*x.shape())), torch.float32)
        check(kernels, cases.Case(x.q(), x.dense(), x.blocks(0.7, 16, 16)), torch.float32)

    def test_many_programs_share_one_tile(monkeypatch):
        """A device with many multiprocessors splits the keys of a decode step; nothing changes but the order of sums."""
        monkeypatch.setattr(kernels, "device", lambda index: (99 * 1024, 64))
        for make in [*cases.DECODE[:4], cases.prefill_paged]:
            check(kernels, make(Maker(140, d=16)).poisoned(), torch.float32)

    def test_compacted_columns_in_pieces(monkeypatch):
        monkeypatch.setattr(kernels, "SCRATCH", 4 * 4 * 40)  # one block of four heads of 40 columns at a time
        check(kernels, cases.factored(Maker(66, d=16)), torch.float32)

    def test_scale_of_either_sign():
        x = Maker(40, d=16)
        q, kv, layout = x.q(), x.dense(), x.blocks(0.6, 16, 16)
        for scale in (-0.3, 0.0, 5.0):
            want = foveate.attend(q, kv, layout, scale=scale, backend="reference")
            torch.testing.assert_close(
                foveate.attend(q, kv, layout, scale=scale, backend="triton"), want, atol=2e-5, rtol=1e-4
            )

    def test_gradient_falls_to_the_torch_backward():
        x = Maker(40, d=16)
        layout = x.blocks(0.6, 16, 16)
        kv = x.dense()
        grads = []
        for backend in ("triton", "torch"):
            q, k, v = (t.clone().requires_grad_() for t in (x.q().fill_(0.3), kv.k, kv.v))
            foveate.attend(q, (k, v), layout, backend=backend).square().sum().backward()
            grads.append((q.grad, k.grad, v.grad))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize(
        "dtype,want,why",
        [
            (torch.float64, Want(), "float64"),
            (torch.bfloat16, Want(), "bf16"),
            (torch.float32, Want(mass=True), "mass"),
        ],
    )
    def test_reasons(dtype, want, why):
        case = cases.dense(Maker(8, d=16, dtype=dtype))
        assert why in kernels.supports(case.q, case.kv, case.layout, want)

    def test_a_head_dim_too_large_is_refused_by_name():
        x = Maker(4, d=320)
        with pytest.raises(UnsupportedError, match="head dims up to 256, not 320"):
            foveate.attend(x.q(), x.dense(), Layout.dense(*x.shape()), backend="triton")

    def test_unused_parts_are_never_read():
        """Counts of zero with poisoned rows of indices: nothing is read through them."""
        x = Maker(40, d=16)
        bad = torch.full((1, 4, 3, 5), 2**28, dtype=torch.int32)
        layout = Layout(
            x.shape(), block_q=16, tile_width=16, tiles=bad, tile_count=torch.zeros(1, 4, 3, dtype=torch.int32),
            sink=torch.tensor([[3]], dtype=torch.int32),
        )  # fmt: skip
        kv = x.dense()
        check(kernels, cases.Case(x.q(), KV.dense(kv.k, kv.v), layout), torch.float32)
