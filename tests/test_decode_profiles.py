"""Decode steps over caches that a rule has cut itself, and of chunks at other positions in one call."""

from __future__ import annotations

import os

import pytest
import torch

import foveate
from foveate.bench import decode
from foveate.bench.breakeven import MADE, Shape, equipped
from foveate.bench.decode import Stage, Subject
from foveate.kernels.dispatch import attend
from foveate.kv import KV
from foveate.layout import Layout
from foveate.methods.base import State
from foveate.recipe import Recipe
from foveate.registry import parse
from foveate.scores.dual_chunk import AtOnce, cut, side_by_side
from tests import decode_profile_cases as cases
from tests.drive import Drive, qkv
from tests.models import generate, tiny, tokens
from tests.processes import run_in_the_interpreter

SMALL = Shape(4, 2, 32, torch.float32, 3)

if os.environ.get("TRITON_INTERPRET") == "1":

    @pytest.mark.parametrize("text,b,h,g,m,d,lengths,softcap", [
        ("qwen1m:chunk=40,local=8,block=16,sparse=false", 1, 4, 2, 150, 16, (150,), None),
        ("qwen1m:chunk=40,local=8,block=16,sparse=false", 2, 6, 2, 130, 16, (129, 40), 3.0),  # a row of two chunks
        ("qwen1m:chunk=48,local=32,block=16,sparse=false,original=60", 3, 2, 1, 100, 16, (97, 16, 1), None),
        ("qwen1m:chunk=60,local=12,block=16,sparse=false", 1, 4, 4, 61, 16, (58,), None),  # distances are true yet
    ])  # fmt: skip
    def test_chunks_at_once(text, b, h, g, m, d, lengths, softcap):
        cases.check_chunks(text, b, h, g, m, d, lengths, softcap=softcap, tolerance=2e-5)

else:

    def test_in_the_interpreter():
        pytest.importorskip("triton")
        run_in_the_interpreter(__file__)

    # ------------------------------------------------------------------ chunks in one call
    @pytest.mark.parametrize(
        "b,g,m,length,cached", [(1, 2, 50, 16, 60), (3, 2, 48, 16, 48), (2, 1, 10, 16, 12), (1, 1, 33, 16, 40)]
    )
    def test_chunks_lie_side_by_side(b, g, m, length, cached):
        """Rows of one ragged view are the chunks that are cut one by one, of caches with room behind their entries."""
        k, v = torch.randn(b, g, cached, 8), torch.randn(b, g, cached, 8)
        pos = torch.tensor([[m - 1], [m - 20], [0]][:b]).clamp(min=0)
        held = (pos + 1).int().expand(b, g)
        kv, shared = KV.dense(k[:, :, :m], v[:, :, :m], len=held), {}
        got = side_by_side(kv, length, pos, shared)
        chunks = -(-m // length)
        assert got.kind == "ragged" and got.shape[:3] == (b * chunks, g, min(length, m))
        assert side_by_side(kv, length, pos, shared).len is got.len  # one for all layers
        dense = got.to_dense()
        for c in range(chunks):
            one = cut(kv, c * length, min(m, (c + 1) * length))
            rows = slice(c, None, chunks)
            assert torch.equal(got.len[rows].long(), one.lengths())
            there = torch.arange(one.capacity) < one.lengths()[..., None]
            for a, t in ((dense.k, one.k), (dense.v, one.v)):
                assert torch.equal(a[rows, :, : one.capacity][there], t[there])

    def test_other_storage_has_no_such_view():
        k, pos = torch.randn(2, 2, 40, 8), torch.full((2, 1), 39)
        swapped = torch.randn(2, 40, 2, 8).transpose(1, 2)  # heads of a token beside each other: no rows of one width
        for kv in (
            KV.dense(swapped, swapped), KV.dense(k, swapped), KV.dense(k, k, pos=torch.arange(40).expand(2, 2, 40)),
            KV.dense(k, k, bias=torch.zeros(2, 2, 40)), KV.dense(k.mT.contiguous().mT, k),
        ):  # fmt: skip
            assert side_by_side(kv, 16, pos, {}) is None
        assert side_by_side(KV.dense(k, k), 16, pos, {}) is not None

    def test_parts_that_one_call_computes_are_not_made():
        def never():
            raise AssertionError("the parts were made")

        q, k, v = qkv(1, 4, 2, 9)
        out, lse = torch.randn(1, 4, 1, 16), torch.randn(1, 4, 1)
        plan = AtOnce(never, lambda **how: (out * how["scale"], lse))
        got = attend(q[:, :, -1:], (k, v), plan, scale=2.0, return_lse=True)
        assert torch.equal(got[0], 2 * out) and got[1] is lse

    def test_chunks_of_a_cut_text_are_not_captured_and_the_policy_goes_on():
        """The host asks for the longest position there; a capture that failed would cost h2o its sums."""
        from tests.test_graphs import Strict

        model, ids = tiny(), tokens(1, 70)
        recipe = "decode=qwen1m:chunk=40,local=8,block=16,sparse=false+cache=h2o:heavy=16,recent=16,slack=4"
        with foveate.use(model, recipe):
            want = generate(model, ids, max_new_tokens=24, min_new_tokens=24)
        handle = foveate.apply(model, recipe)
        handle.graphs = Strict(handle)
        handle.graphs.install()
        got = generate(model, ids, max_new_tokens=24, min_new_tokens=24)
        why = "qwen1m asks the device how far a text has come of which entries were dropped"
        assert handle.graphs.replays == 0 and f"decode steps are not captured: {why}" in handle.notes
        assert torch.equal(torch.stack(got.logits), torch.stack(want.logits))
        assert got.past_key_values.layers[0].cache.store.lens == want.past_key_values.layers[0].cache.store.lens
        handle.remove()

    # ------------------------------------------------------------------ captured steps
    @pytest.mark.parametrize("text", [
        "hip:k=16,block_k=2,sink=4,window=12,refresh=4,dense_layers=1",
        "hip:stages=16x4/4x2x64,k=16,block_k=4,sink=4,window=12,refresh=3,dense_layers=0",
        "qwen1m:chunk=40,local=8,block=16,sparse=false",
    ])  # fmt: skip
    def test_a_recorded_step_is_right_at_every_later_step(text):
        from tests.test_graphs import Strict

        model, ids = tiny(), tokens(2, 70)
        mask = torch.ones_like(ids)
        mask[1, :17] = 0
        recipe = f"prefill=dense+decode={text}"
        with foveate.use(model, recipe):
            want = generate(model, ids, mask, max_new_tokens=24, min_new_tokens=24)
        handle = foveate.apply(model, recipe)
        handle.graphs = Strict(handle)
        handle.graphs.install()
        got = generate(model, ids, mask, max_new_tokens=24, min_new_tokens=24)
        assert handle.graphs.replays > 15 and not handle.notes
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=1e-4)
        handle.remove()

    # ------------------------------------------------------------------ caches that a rule has cut
    @pytest.mark.parametrize("which", [0, 1])
    @pytest.mark.parametrize("n,turn", [(150, 0), (61, 0), (90, 40), (20, 0)])
    def test_entries_counted_are_the_rule(which, n, turn):
        """Before and after drops, after a second turn, and where nothing was dropped."""
        text = cases.profiles(4, 4, 2)[which]
        drive, counted = Drive(text), 0
        q, k, v = qkv(1, 4, 2, n + turn + 60)
        cuts = [(0, n), *((i, i + 1) for i in range(n, n + 30))]
        if turn:
            cuts += [(n + 30, n + 30 + turn)]
        cuts += [(i, i + 1) for i in range(cuts[-1][1], n + turn + 60)]
        for a, b in cuts:
            drive(*(t[:, :, a:b] for t in (q, k, v)))
            if b - a == 1:
                x, state = drive.last[0], State(drive.cache.batch, {}, drive.run, drive.cache.rows)
                if (b + 12) % 12:  # not the step that has just dropped entries: its view is older than its cache
                    counted += cases.same_rule(drive.recipe.decode, x, state)
        assert counted > 40 or n == 20

    def test_another_policy_or_another_role_asks_for_positions():
        duo, moa, _ = cases.profiles(4, 4, 2)
        q, k, v = qkv(1, 4, 2, 160)
        for recipe in (
            f"decode={moa}+cache=snapkv:window=16,capacity=48",
            f"heads={duo}+cache={duo}",
            f"decode={moa}+cache={duo}",
        ):
            drive = Drive(recipe)
            with cases.by_number():
                drive(*(t[:, :, :150] for t in (q, k, v)))
                for i in range(150, 155):
                    drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
            assert drive.last[0].kv.pos is not None and isinstance(drive.last[1], Layout), recipe

    def test_a_cache_that_another_policy_cut_first_stays_that():
        """A recipe takes over: what it cuts in its turn had lost other entries before."""
        _, moa, _ = cases.profiles(4, 4, 2)
        q, k, v = qkv(1, 4, 2, 260)
        drive = Drive("cache=snapkv:window=16,capacity=48")
        for a, b, recipe in ((0, 150, None), (150, 151, None), (151, 250, moa), *((i, i + 1, moa) for i in range(250, 256))):
            if recipe and drive.recipe.cache.id != "moa":
                drive.recipe, drive.run = Recipe.of(recipe), {}
                drive.cache.forget()
            with cases.by_number():
                drive(*(t[:, :, a:b] for t in (q, k, v)))
        assert drive.last[0].kv.pos is not None and isinstance(drive.last[1], Layout)

    # ------------------------------------------------------------------ the bench
    def test_made_profiles_are_what_their_methods_read(tmp_path):
        shape = Shape(8, 4, 32, torch.float32, 16)
        duo, moa, razor = (equipped(parse(name), shape, tmp_path) for name in ("duo_attention", "moa", "razor_attention"))
        assert int(duo.streaming(16, 4).sum()) == 32  # half of 64
        beta = torch.stack([moa.rule(i, 16, 8)[1] for i in range(16)])
        assert 0.3 < float((1 - (1 - beta) ** 2).mean()) < 0.4 and all(len(set(row.tolist())) == 2 for row in beta)
        assert int(razor.retrieval(16, 4).sum()) in (9, 10)  # 14 % and one more, if it is another one
        assert set(MADE) == {"dsa", "duo_attention", "moa", "razor_attention"}

    @pytest.mark.parametrize(
        "text", ["duo_attention:sink=4,window=20,slack=12", "moa:sink=4,slack=12", "razor_attention:window=20"]
    )
    def test_caches_are_cut_before_the_first_step(text, tmp_path, monkeypatch):
        monkeypatch.setattr(decode, "DEVICES", ("cpu",))
        monkeypatch.setattr(decode, "_record", Graph)
        stage, method = Stage(300, 4, 2, 32, torch.float32, 3, torch.device("cpu")), equipped(parse(text), SMALL, tmp_path)
        with torch.inference_mode():
            whole = Subject(stage, Recipe(decode=method))
            assert whole.caches[0].store.lens[0][0] >= 300 and whole.dropping() == (0, 0.0)
            subject = Subject(stage, Recipe(decode=method, cache=method))
            lens = [n for c in subject.caches for n in c.store.lens[0]]
            assert subject.captured and min(lens) < 200 and all(c.seen[0] == 300 + decode.WARM + 8 for c in subject.caches)
            assert 1 <= subject.left <= 31
            every, ms = subject.dropping()
        fewer = [n for c in subject.caches for n in c.store.lens[0]]
        assert every == method.slack and ms > 0 and min(fewer) < min(lens)


class Graph:
    """Stands for a graph: a capture lets the host count, a replay does nothing."""

    def __init__(self, call):
        call()

    def replay(self):
        pass
