"""A prompt some kv heads at a time: what each call sees, and that no number changes."""

import pytest
import torch

from foveate import pieces, registry
from foveate.cache import LayerCache
from foveate.kv import KV
from foveate.methods.anchor_attention import GRID
from foveate.methods.base import AttnInput
from foveate.profile import Profile
from foveate.recipe import Recipe
from foveate.runtime import Info, Step, attention
from tests.drive import Rotary, Watch

APART = sorted(name for name in registry.METHODS if registry.get(name).apart)
TEXTS = {
    "anchor_attention": ("anchor_attention:block=16,step=1,theta=1", "anchor_attention:block=16,step=1,theta=1,share=group"),
    "qwen1m": (
        "qwen1m:chunk=24,local=8,threshold=16,block=8,columns=6,diagonals=4,near=4,sink=2,last_q=4,original=40",
        "qwen1m:chunk=24,local=8,threshold=16,block=8,columns=6,diagonals=4,near=4,sink=2,last_q=4,share=group",
        "qwen1m:chunk=96,local=8,threshold=16,block=8,columns=6,diagonals=4,near=4,sink=2,last_q=4",
    ),
}


def tensors(b, h, g, n, d=16, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return (torch.randn(b, heads, n, d, generator=gen) for heads in (h, g, g))


def prefill(text, q, k, v, layers=3, cuts=(), **how):
    """Output of a prompt through the runtime, in calls that begin at `cuts`."""
    cache, outs = LayerCache(), []
    info = Info(1, layers, 0.25, rope=Rotary(q.shape[-1]), backend="torch")
    for lo, hi in zip((0, *cuts), (*cuts, q.shape[2]), strict=True):
        outs.append(attention(Recipe.of(text), cache, *(t[:, :, lo:hi] for t in (q, k, v)), Step(**how), info))
    return torch.cat(outs, 2)


def call(b=1, h=8, g=4, n=32, phase="prefill"):
    q, k, v = tensors(b, h, g, n)
    return AttnInput(q, KV.dense(k, v), phase, 0, 1, 0.25)


def test_there_is_a_case_of_every_such_method():
    assert sorted(TEXTS) == APART


@pytest.mark.parametrize("text", [t for some in TEXTS.values() for t in some])
@pytest.mark.parametrize("cuts", [(), (41, 60)])
def test_no_number_changes(text, cuts, monkeypatch):
    q, k, v = tensors(2, 8, 4, 90)
    seen = []
    cls = type(Recipe.of(text).prefill)
    plan = cls.plan
    monkeypatch.setattr(cls, "plan", lambda self, x, state: seen.append(x) or plan(self, x, state))
    whole = prefill(text, q, k, v, cuts=cuts)
    assert {x.q.shape[1] for x in seen} == {8} and all(x.part is None for x in seen)
    seen.clear()
    monkeypatch.setattr(pieces, "ROWS", 60)  # a kv head has at least this many rows in every call
    torch.testing.assert_close(prefill(text, q, k, v, cuts=cuts), whole, rtol=0, atol=1e-6)
    assert {x.part for x in seen} == {(0, 8), (2, 8), (4, 8), (6, 8)}


def test_a_profile_of_the_layer_serves_the_heads_of_a_piece(tmp_path, monkeypatch):
    q, k, v = tensors(1, 8, 4, 90)
    gen = torch.Generator().manual_seed(3)
    grid = "block=16,step=1,init=1,local=1"
    method = Recipe.of(f"anchor_attention:{grid}").prefill
    options = {name: getattr(method, name) for name in GRID}
    Profile("anchor_attention", options, {"theta": 4 * torch.randn(3, 8, generator=gen)}).save(tmp_path / "a")
    sizes = {name: torch.randint(2, 9, (3, 8), generator=gen, dtype=torch.int32) for name in ("columns", "diagonals")}
    Profile("qwen1m", {}, sizes).save(tmp_path / "q")
    for text in (
        f"anchor_attention:{grid},profile={tmp_path / 'a'}",
        f"qwen1m:chunk=24,local=8,threshold=16,block=8,near=2,sink=2,last_q=4,profile={tmp_path / 'q'}",
    ):
        with monkeypatch.context() as patch:
            whole = prefill(text, q, k, v)
            patch.setattr(pieces, "ROWS", 60)
            got = prefill(text, q, k, v)
            torch.testing.assert_close(got, whole, rtol=0, atol=1e-6)
            patch.setattr(AttnInput, "own_lists", lambda self, t: t[..., : self.q.shape[1]])  # the first heads' settings
            assert (prefill(text, q, k, v) - whole).abs().max() > 1e-3


def test_calls_that_stay_whole(monkeypatch):
    monkeypatch.setattr(pieces, "ROWS", 60)
    method = Recipe.of("anchor_attention").prefill
    assert pieces.ranges(call(), method) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert pieces.ranges(call(n=16), method) == [(0, 2), (2, 4)]  # two kv heads have 64 rows
    assert pieces.ranges(call(n=7), method) == [(0, 4)]  # 56 rows
    assert pieces.ranges(call(g=1), method) == [(0, 1)]
    assert pieces.ranges(call(phase="decode"), method) == [(0, 4)]
    assert pieces.ranges(call(), None) == pieces.ranges(call(), Recipe.of("minference").prefill) == [(0, 4)]
    q, k, v = tensors(1, 8, 4, 90)
    watch = Watch()
    prefill(TEXTS["anchor_attention"][0], q, k, v, meter=watch)  # who looks on sees all heads
    assert [x.q.shape[1] for x, _, _ in watch.calls] == [8]


def test_a_piece_shares_memory_and_knows_its_heads():
    x = call(b=2)
    piece = x.only(1, 3)
    assert piece.q.data_ptr() == x.q[:, 2:].data_ptr() and piece.kv.k.data_ptr() == x.kv.k[:, 1:].data_ptr()
    assert piece.shape == (2, 4, 32, 32) and piece.groups == 2 and piece.part == (2, 8)
    assert piece.only(1, 2).part == (4, 8)  # a piece of a piece
    assert x.all_lists(8) == piece.all_lists(4) == 8 and piece.all_lists(2) == 4
    table = torch.arange(8)
    assert x.own_lists(table).tolist() == list(range(8)) and piece.own_lists(table).tolist() == [2, 3, 4, 5]
    assert piece.own_lists(torch.arange(4)).tolist() == [1, 2] and piece.own_lists(table[None])[0].tolist() == [2, 3, 4, 5]


def test_heads_of_every_storage():
    gen = torch.Generator().manual_seed(1)
    k, v = (torch.randn(2, 4, 24, 8, generator=gen) for _ in range(2))
    lens = torch.randint(3, 25, (2, 4), generator=gen, dtype=torch.int32)
    pos, bias = torch.arange(24).expand(2, 4, 24), torch.randn(2, 4, 24, generator=gen)
    table = torch.randperm(24, generator=gen).view(2, 4, 3).int()
    views = [
        KV.dense(k, v, lens, pos, bias),
        KV.paged(k.reshape(24, 8, 8), v.reshape(24, 8, 8), table, lens, pos, bias),
        KV.ragged(k.reshape(-1, 8), v.reshape(-1, 8), torch.arange(8).view(2, 4) * 24, lens, 24, pos, bias),
    ]
    for view in views:
        some, all_of = view.heads(1, 3), view.to_dense()
        assert some.shape == (2, 2, 24, 8, 8) and some.k.untyped_storage().data_ptr() == view.k.untyped_storage().data_ptr()
        cut = some.to_dense()
        for name in ("k", "v", "len", "pos", "bias"):
            assert torch.equal(getattr(cut, name), getattr(all_of, name)[:, 1:3])
