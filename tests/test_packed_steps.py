"""Which decode steps over packed entries put dense keys and values together: a table over all methods that decode.

Steps run as captured ones do, over fixed stores, and read every layer's view as plan and attention of a step do. What must
unpack stands here with its reason; a method that learns to do without has to say so here too. On a GPU plans are made by
kernels: tests/gpu/test_packed_steps.py.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import pytest
import torch

from foveate.cache import LayerCache
from foveate.cache.fixed import Fixed, fix
from foveate.errors import ConfigError
from foveate.kernels import packed
from foveate.packed import PackedKV
from foveate.recipe import Recipe
from foveate.registry import METHODS, get
from foveate.runtime import Info, Step, attention
from tests.drive import Rotary
from tests.indexers import dsa_profile

LAYERS, STEPS = 3, 4
STORES = ("kivi:bits=4,group=16,residual=32", "think:window=16,tail_size=16")


@dataclass(frozen=True)
class Row:
    text: str  # of a method that decodes
    layers: tuple[int, ...] = (0,)  # that unpack, of each step in turn
    why: str = ""
    first: int = 0  # the number of the first layer
    role: str = "decode="

    @property
    def id(self) -> str:
        return self.text.partition(":")[0]


ALL = (LAYERS,)
TABLE = [
    Row("dense"),
    Row("streaming_llm:sink=4,window=20"),
    Row("streaming_llm:sink=4,window=20,positions=cache"),
    Row("quest:page=16,budget=64,dense_layers=0"),
    Row("quest:page=16,budget=64,dense_layers=1,share=group"),
    Row("quest:page=16,budget=64,dense_layers=0+heads=duo_attention:sparsity=1,sink=4,window=20"),
    Row("hip:k=32,block_k=16,sink=4,window=20,dense_layers=0,refresh=2"),
    Row("duo_attention:sparsity=1,sink=4,window=20"),
    Row("act", ALL, "attention without a head's hidden sinks gives each head its own weights over dense keys", 2, ""),
    Row("topk_exact:budget=20,dense_layers=0", ALL, "exact scores need every key"),
    Row("s2_strided:block=16,local=2,stride=12,sink=4"),
    Row("moa:density=0.3,sink=4,block=16"),
    Row("lserve:assign=even,page=16,logical=4,budget=48,refresh=2,sink=16,window=32,sparsity=0.5"),
    Row("lserve:page=16,logical=4,budget=48,sink=8,window=40,sparsity=1"),
    Row("razor_attention:induction=1"),
    Row(f"dsa:profile={dsa_profile()},budget=20"),
    Row("double_sparsity:budget=20,dense_layers=0"),
    Row("double_sparsity:budget=20,dense_layers=0,share=group,bits=16,group_factor=4"),
    Row("adamas:budget=20,unit=std,theta=0.5,dense_layers=0"),
    Row("adamas:budget=20,dense_layers=0,share=group"),
    Row("tidal_decode:budget=20,start=1,reselect=2", (2,), "layers that choose for others score every key"),
    Row("recycled_attention:budget=20,stride=2", (LAYERS, 0), "every `stride`-th step weighs every key"),
    Row("token_select:sink=4,local=20,budget=20,chunk=16", ALL, "scores are over keys before rotation, made of all keys"),
    Row("longheads:attention=64,chunk=16,block=16"),
    Row("longheads:attention=64,chunk=16,block=16,positions=text"),
    Row("qwen1m:chunk=64,local=16,block=16,threshold=1000000", ALL, "a view of each chunk is cut from dense keys"),
    Row("pillar_attn:least=20,ratio=0,draft=2,warm=true", (LAYERS, 0, 0), "one step in `draft` + 1 weighs every key"),
    Row(
        "retrieval_attention:index=flat,sink=4,recent=16,budget=10,update=8",
        ALL,
        "the search is over one row's keys on the host; no step is captured",
    ),
]  # fmt: skip
REFUSED = {"deltallm": "references follow the keys as they came, so it wants no cache policy"}


def test_every_method_that_decodes_has_a_row():
    decode = {name for name in METHODS if "decode" in get(name).roles}
    assert decode == {row.id for row in TABLE} | set(REFUSED)
    for name, why in REFUSED.items():
        with pytest.raises(ConfigError, match="references"):
            Recipe.of(f"decode={name}+cache={STORES[0]}")
        assert why
    assert all(bool(row.why) == any(row.layers) for row in TABLE)


def drive(text, unpacked, first=0, rows=(150, 131), steps=STEPS):
    """Outputs of steps over fixed stores; unpacked gets, for each step, the layers that made dense keys and values."""
    recipe, run, notes, seen = Recipe.of(text), {}, {}, []
    caches = [LayerCache() for _ in range(LAYERS)]
    gen, d, b = torch.Generator().manual_seed(0), 16, len(rows)

    def forward(n, valid=None):
        counts = [n] * b if valid is None else valid.sum(-1).tolist()
        step, out = Step(valid, counts, run=run, notes=notes), []
        for i, cache in enumerate(caches):
            q, k, v = (torch.randn(b, h, n, d, generator=gen) for h in (4, 2, 2))
            out.append(
                attention(
                    recipe, cache, q, k, v, step, Info(first + i, LAYERS + 2 * first, 1 / math.sqrt(d), rope=Rotary(d))
                )
            )
        return torch.stack(out)

    n = max(rows)
    forward(n, None if min(rows) == n else torch.arange(n) >= torch.tensor([[n - r] for r in rows]))
    for _ in range(2):
        forward(1)
    for cache in caches:
        cache.store = fix(cache.store, list(cache.seen))
    make = PackedKV.__getattr__

    def touched(self, name):
        if name in ("k", "v") and not self.made:
            seen.append(name)
        return make(self, name)

    out = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedKV, "__getattr__", touched)
        for _ in range(steps):
            before = len(seen)
            out.append(forward(1))
            unpacked.append(len(seen) - before)
    assert all(isinstance(cache.store, Fixed) for cache in caches)
    return torch.stack(out)


@pytest.mark.parametrize("store", STORES, ids=["kivi", "think"])
@pytest.mark.parametrize("row", TABLE, ids=lambda row: re.sub("profile=[^,+]*,?", "", row.text)[:50])
@torch.no_grad()
def test_steps(row, store, monkeypatch):
    """As many layers as the table says unpack, and outputs are those over dense copies."""
    text, got = f"{row.role}{row.text}+cache={store}", []
    out = drive(text, got, row.first)
    assert got == [row.layers[i % len(row.layers)] for i in range(STEPS)]
    if any(row.layers):
        return
    monkeypatch.setattr(packed, "supports", lambda *a: "not now")
    want = drive(text, [], row.first)
    torch.testing.assert_close(out, want, atol=2e-5, rtol=2e-5)
