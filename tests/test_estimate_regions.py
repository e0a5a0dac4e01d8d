"""Lists by region and moved vectors in Triton's interpreter, and both kernels compiled for Hopper without a GPU."""

from __future__ import annotations

import os

import pytest
import torch

from tests.processes import run_in_the_interpreter

if os.environ.get("TRITON_INTERPRET") != "1":
    from tests.compiling import hopper

    def test_in_the_interpreter():
        pytest.importorskip("triton")
        run_in_the_interpreter(__file__)

    def test_probe_of_two_kinds_of_keys_compiles_for_hopper(monkeypatch, tmp_path):
        """As qwen1m asks the last of 19 chunks: with the shared memory and registers of a probe of one kind."""
        from foveate.kernels.triton import estimate_launch, estimate_probe
        from foveate.kv import KV

        meta = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="meta")  # noqa: E731
        monkeypatch.setattr(estimate_launch, "device", lambda index: (227 << 10, 132))
        k, far = meta(1, 8, 1 << 17, 128), (meta(1, 32, 64, 128), meta(1, 8, 17 * 7168, 128), 17 * 7168)
        with hopper(monkeypatch, tmp_path, estimate_probe, "row_sums", "row_mass") as built:
            for other in (None, far):
                estimate_launch.last_queries(meta(1, 32, 64, 128), KV.dense(k, k), 64, 0.1, None, other)
        sizes = [(name, done.metadata.shared) for name, done, _ in built]
        assert sizes[:2] == sizes[2:] and all(size <= 227 << 9 for _, size in sizes), sizes
        assert all(usage["STACK"] <= 32 for _, _, usage in built), built

    def test_compiles_for_hopper(monkeypatch, tmp_path):
        from foveate.kernels.triton import estimate_regions, rotate, rotate_launch
        from foveate.kernels.triton import estimate_regions_launch as launch

        meta = lambda *shape, dtype=torch.int32: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
        monkeypatch.setattr(torch.Tensor, "tolist", lambda t: [112, 112, 1800, 1000, 1000, 1000])  # meta has no numbers
        with hopper(monkeypatch, tmp_path, estimate_regions, "split_regions") as built:
            marks = meta(19, 1, 32, 2050, dtype=torch.bool)
            launch.split_regions(meta(19, 1, 32, 1000), meta(19, 1, 32), marks, 0, 2048, 64, 112)
        with hopper(monkeypatch, tmp_path, rotate, "turn") as more:
            x, tables = meta(1, 32, 1 << 17, 128, dtype=torch.bfloat16), meta(1, 1 << 17, 128, dtype=torch.float32)
            rotate_launch.turn(x, tables, tables, meta(128), torch.empty_like(x))
        assert [name for name, _, _ in built + more] == ["split_regions", "split_regions", "turn"]
        assert all(usage["STACK"] == 0 and usage["REG"] <= 128 for _, _, usage in built + more), built + more

else:
    from dataclasses import replace

    from foveate.methods.base import State
    from foveate.registry import parse
    from foveate.scores import dual_chunk, fused, rotation
    from tests.drive import Rotary
    from tests.estimate_cases import draw, peaked, plain
    from tests.test_qwen1m import SMALL

    # ------------------------------------------------------------------ lists
    def votes(b, heads, ends, columns, distances, seed=0):
        """Choices of chunks that end at `ends`: ascending numbers, some rows with fewer, some with none."""
        gen = torch.Generator().manual_seed(seed)
        out = []
        for end in ends:
            four = []
            for most in (columns, distances):
                some = torch.rand(b, heads, end, generator=gen).argsort(-1)[..., :most].sort(-1).values.int()
                many = torch.randint(0, some.shape[-1] + 1, (b, heads), generator=gen).int()
                many[-1, -1] = 0
                many[0, 0] = some.shape[-1]
                four += [some, many]
            out.append(tuple(four))
        return out

    def used(index, count):
        return [row[:n].tolist() for row, n in zip(index.flatten(0, -2), count.flatten().tolist(), strict=True)]

    def check(b, heads, first, blocks, block, length, columns, distances, seed=0):
        each = length // block
        last = first + blocks
        ends = [min(last, (c + 1) * each) * block for c in range(first // each, (last - 1) // each + 1)]
        chosen = votes(b, heads, ends, columns, distances, seed)
        assert fused.regions(torch.zeros(1)) is not None
        got = dual_chunk.by_regions(chosen, first, blocks, block, length)
        with plain():
            want = dual_chunk.by_regions(chosen, first, blocks, block, length)
        for name in dual_chunk.REGIONS:
            for at in (0, 2):
                mine, theirs = got[name][at : at + 2], want[name][at : at + 2]
                assert mine[0].dtype == torch.int32 and torch.equal(mine[1], theirs[1]), name
                assert used(*mine) == used(*theirs), name
                assert mine[0].shape[-1] == max(1, theirs[0].shape[-1])
        return [int(got[name][at].sum()) for name in dual_chunk.REGIONS for at in (1, 3)]

    @pytest.mark.parametrize(
        "b,heads,first,blocks,block,length,columns,distances",
        [
            (1, 2, 0, 17, 4, 16, 9, 5),  # four chunks and a part
            (2, 3, 6, 7, 4, 16, 30, 3),  # from the middle of a chunk, over a boundary
            (1, 1, 0, 3, 4, 16, 5, 5),  # one chunk
            (1, 2, 9, 2, 5, 15, 40, 0),  # no distances
            (1, 2, 8, 9, 4, 16, 0, 7),  # no keys
            (1, 1, 0, 40, 1, 4, 33, 11),  # blocks of one
        ],
    )
    def test_lists(b, heads, first, blocks, block, length, columns, distances):
        found = check(b, heads, first, blocks, block, length, columns, distances)
        assert (found[1] + found[3] + found[5] > 0) == (columns > 5) and (found[0] + found[2] + found[4] > 0) == (
            distances > 0
        )

    def test_steps(monkeypatch):
        """Rows longer than a step."""
        from foveate.kernels.triton import estimate_regions_launch

        monkeypatch.setattr(estimate_regions_launch, "CHUNK", 8)
        assert min(check(1, 2, 0, 22, 4, 24, 50, 9, seed=3)) > 0

    # ------------------------------------------------------------------ positions
    class Other:
        """A rotation of `width` channels by angles that nothing repeats; neighbours or halves turn together."""

        def __init__(self, width, neighbours, size=1.0):
            self.width, self.neighbours, self.size = width, neighbours, size

        def turn(self, x, pos, sign, size):
            half = self.width // 2
            angle = pos[:, None, :, None].to(x.dtype) * 0.37 ** torch.arange(half).to(x.dtype)
            halves, pairs = (slice(half), slice(half, 2 * half)), (slice(0, self.width, 2), slice(1, self.width, 2))
            a, z = pairs if self.neighbours else halves
            c, s, out = angle.cos() * size, sign * angle.sin() * size, x.clone()
            out[..., a], out[..., z] = x[..., a] * c - x[..., z] * s, x[..., z] * c + x[..., a] * s
            return out

        def rotate(self, x, pos):
            return self.turn(x, pos, 1.0, self.size)

        def unrotate(self, x, pos):
            return self.turn(x, pos, -1.0, 1 / self.size)

    class Nothing:
        def rotate(self, x, pos):
            return x

        unrotate = rotate

    class Mixed:
        """No rotation of pairs."""

        def rotate(self, x, pos):
            return x.cumsum(-1)

        def unrotate(self, x, pos):
            return x

    class Mirror:
        """Pairs, but no rotation of them: both channels of a pair do not turn alike."""

        def rotate(self, x, pos):
            a, z = x.chunk(2, -1)
            c, s = (f(pos[:, None, :, None].to(x.dtype) * 0.3) for f in (torch.cos, torch.sin))
            return torch.cat((a * c + z * s, a * s - z * c), -1)

        def unrotate(self, x, pos):
            return self.rotate(x, pos)

    @pytest.fixture
    def always(monkeypatch):
        monkeypatch.setattr(rotation, "SMALL", 0)

    @pytest.mark.parametrize(
        "rope",
        [
            Rotary(24),
            Other(24, True),
            Other(24, False, 1.3),
            Other(16, True),
            Other(10, False),
            Nothing(),
            Mixed(),
            Mirror(),
        ],
    )
    @pytest.mark.parametrize("b,heads,n", [(1, 3, 50), (2, 1, 33), (1, 1, 1)])
    def test_moved(always, monkeypatch, rope, b, heads, n):
        x = draw(b, n, heads, 24).transpose(1, 2)
        old = torch.randint(0, 500, (b, n), generator=torch.Generator().manual_seed(1))
        new = old // 3 + 7
        with plain():
            want = rotation.moved(x.double(), rope, old, new)
        assert (rotation.channels(rope, x) is None) == isinstance(rope, Mixed | Mirror)
        monkeypatch.setattr(rotation, "pieces", lambda n, *_: [(i, min(n, i + 20)) for i in range(0, n, 20)])
        got = rotation.moved(x, rope, old, new)
        assert got.dtype == x.dtype
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-4)
        half = rotation.moved(x.half(), rope, old, new)
        assert half.dtype == torch.float16
        if not isinstance(rope, Mixed | Mirror):
            torch.testing.assert_close(half.double(), want, atol=1e-2, rtol=1e-2)

    def test_one_position_for_all_rows(always):
        x, rope = draw(2, 2, 30, 16), Rotary(16)
        old, new = torch.arange(30)[None], torch.full((1, 30), 9)
        with plain():
            want = rotation.moved(x, rope, old, new)
        torch.testing.assert_close(rotation.moved(x, rope, old, new), want, atol=1e-5, rtol=1e-5)

    def test_training_keeps_its_gradients(always):
        x, rope = draw(1, 1, 30, 16).requires_grad_(), Rotary(16)
        rotation.moved(x, rope, torch.arange(30)[None], torch.arange(30)[None] + 5).sum().backward()
        assert x.grad is not None and float(x.grad.abs().sum()) > 0

    def test_small_vectors_are_turned_plainly(monkeypatch):
        monkeypatch.setattr(rotation, "channels", lambda *a: pytest.fail("asked"))
        rotation.moved(draw(1, 1, 30, 16), Rotary(16), torch.arange(30)[None], torch.arange(30)[None] + 5)

    # ------------------------------------------------------------------ plans
    @pytest.mark.parametrize("share,start", [("head", 0), ("group", 130)])
    def test_plans_of_qwen1m(always, share, start):  # L = 96: three chunks and the beginning of a fourth
        """Positions, probes and lists with every kernel and with none: nearly all pairs are the same."""
        method = replace(parse("qwen1m"), **SMALL, share=share)
        x = replace(peaked(2, 1, 250, 32, start), rope=Rotary(32))
        got = method.plan(x, State())
        with plain():
            want = method.plan(x, State())
        for mine, theirs in zip(got.parts, want.parts, strict=True):
            a, b = (p.layout.to_mask(x.kv if p.kv is None else p.kv) for p in (mine, theirs))
            assert float((a != b).sum()) <= 0.01 * float(b.sum()), int((a != b).sum())
            if theirs.q is not None:
                torch.testing.assert_close(mine.q, theirs.q, atol=1e-4, rtol=1e-4)
            if theirs.kv is not None:
                torch.testing.assert_close(mine.kv.k, theirs.kv.k, atol=1e-4, rtol=1e-4)
