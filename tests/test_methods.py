"""One table over all methods. A method's row says how to make it keep everything and how to make it small."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from foveate.layout import Layout
from foveate.recipe import Recipe
from foveate.registry import METHODS, get
from tests.drive import Drive, oracle, qkv
from tests.indexers import dsa_profile
from tests.profiles import seer_profile


@dataclass(frozen=True)
class Row:
    id: str
    full: str  # text of a recipe part with a budget that keeps everything of a prompt of up to 200 tokens
    small: str  # one that drops something of 150 tokens
    sink: int = 0  # first positions that every query must see
    local: int = 1  # newest positions that every query must see
    needle: bool = True  # finds a key that the last queries all point at
    options: tuple[str, ...] = ()


TABLE = [
    Row("dense", "dense", "dense", sink=1, needle=False),
    Row("streaming_llm", "streaming_llm:window=200", "streaming_llm:sink=4,window=20", sink=4, local=20, needle=False),
    Row(
        "minference",
        "minference:columns=200,diagonals=200",
        "minference:columns=10,diagonals=50,sink=4,local=50",
        sink=4,
        local=50,
    ),
    Row(
        "flexprefill",
        "flexprefill:gamma=1.0,block=16,min_budget=16",
        "flexprefill:gamma=0.3,block=16,min_budget=16",
        sink=16,
    ),
    Row("xattention", "xattention:threshold=1.0,block=16,stride=4", "xattention:threshold=0.4,block=16,stride=4", sink=16),
    Row(
        "anchor_attention",
        "anchor_attention:theta=inf,block=16,step=2",
        "anchor_attention:theta=0.5,block=16,step=2",
        sink=16,
        local=17,
    ),
    Row("quest", "quest:budget=256", "quest:budget=64"),
    Row("snapkv", "snapkv:capacity=256", "snapkv:window=16,capacity=48", sink=4),
    Row("expected_attention", "expected_attention:capacity=256", "expected_attention:capacity=48", sink=4),
    Row(
        "hip",
        "hip:k=200,dense_layers=0",
        "hip:k=64,block_k=16,sink=4,window=20,dense_layers=0,refresh=1",
        sink=4,
        local=20,
    ),
    Row(
        "spargeattn",
        "spargeattn:cdf=1.0,theta=-1,block_q=16,block_k=16",
        "spargeattn:cdf=0.3,theta=-1,block_q=16,block_k=16",
        sink=16,
    ),
    Row("deltallm", "deltallm:theta=0,window=8", "deltallm:theta=0,window=8", needle=False),
    Row(
        "duo_attention",
        "duo_attention:sparsity=0",
        "duo_attention:sparsity=1,sink=4,window=20,slack=4",
        sink=4,
        local=20,
        needle=False,
    ),
    Row("sale", "sale:tau=0.0", "sale:tau=0.9,sink=32,window=16,segment=32", sink=32, local=16),
    Row(  # prompts of the table fit in one chunk; tests/test_qwen1m.py covers several
        "qwen1m",
        "qwen1m:chunk=512,local=64,threshold=0,columns=300",
        "qwen1m:chunk=512,local=64,threshold=0,columns=10,diagonals=20,sink=4,near=20,block=16",
        sink=4,
        local=20,
    ),
    Row("act", "act:beta=1.0", "act:beta=1.0", sink=1, needle=False),  # a layout of every pair: tests/test_act.py
    Row("topk_exact", "topk_exact:budget=256", "topk_exact:budget=20"),
    Row(
        "s2_strided",
        "s2_strided:block=16,stride=1",
        "s2_strided:block=16,local=2,stride=3,sink=4",
        sink=4,
        local=17,
        needle=False,
    ),
    Row(
        "hyperattention",
        "hyperattention:min_seq_len=256",
        "hyperattention:min_seq_len=32,block=16,samples=16",
        needle=False,
    ),
    Row(
        "seerattention",
        f"seerattention:profile={seer_profile()},block=16,threshold=0.0",
        f"seerattention:profile={seer_profile()},block=16,budget=48,last_block_dense=false",
        sink=16,
    ),
    Row("moa", "moa:density=1.0", "moa:density=0.3,sink=4,block=16,slack=2", sink=4, local=16, needle=False),
    Row(
        "lserve",
        "lserve:sparsity=0,budget=256",
        "lserve:assign=even,page=16,logical=4,budget=48,refresh=1,sink=16,window=32,prefill_window=40",
        needle=False,
    ),
    Row("h2o", "h2o:heavy=200,recent=56", "h2o:heavy=24,recent=16,slack=2", local=16),
    Row("pyramidkv", "pyramidkv:capacity=256", "pyramidkv:window=16,capacity=48,beta=4", sink=4, local=16),
    Row("adakv", "adakv:capacity=256", "adakv:window=16,capacity=48,floor=1", sink=4, local=16),  # ragged: its own tests
    Row(  # with compensation its plans are parts: tests/test_razor_attention.py
        "razor_attention",
        "razor_attention:induction=1",
        "razor_attention:induction=0,echo=0,window=20,fraction=0,slack=4,compensate=false",
        sink=4,
        local=20,
        needle=False,
    ),
    Row("dsa", f"dsa:profile={dsa_profile()},budget=256", f"dsa:profile={dsa_profile()},budget=20"),
    Row("kivi", "kivi:bits=16,residual=32", "kivi:bits=16,residual=32"),  # drops nothing; lossy bits: tests/test_kivi.py
    Row("think", "think:ratio=0", "think:window=16,tail_size=8,capacity=48", sink=4),
    Row("double_sparsity", "double_sparsity:budget=256", "double_sparsity:budget=20"),
    Row("adamas", "adamas:budget=256", "adamas:budget=20,unit=std,theta=0.5"),
    Row("tidal_decode", "tidal_decode:budget=20", "tidal_decode:budget=20"),  # one layer alone: tests/test_tidal_decode.py
    Row(  # the first decode step is dense: tests/test_recycled_attention.py
        "recycled_attention",
        "recycled_attention:budget=20,stride=1,tau=none",
        "recycled_attention:budget=20,stride=1,tau=none",
    ),
    Row(  # positions inside the list change the arithmetic: tests/test_token_select.py
        "token_select",
        "token_select:budget=256,local=16,chunk=16",
        "token_select:sink=4,local=20,budget=20,chunk=16,positions=text",
        sink=4,
        local=4,
    ),
    Row(
        "longheads",
        "longheads:attention=256,chunk=16,block=16",
        "longheads:attention=64,chunk=16,block=16,positions=text",
        sink=16,
        local=17,
    ),
    Row(
        "speckv",
        "speckv:capacity=256",
        "speckv:capacity=48,window=16,columns=20,band=64",
        sink=4,
        local=16,
    ),
    Row(  # warm and one row: step by step and all at once then select from the same query
        "pillar_attn",
        "pillar_attn:least=256",
        "pillar_attn:least=20,ratio=0,draft=1,rows=1,warm=true",
    ),
    Row(  # the graph needs faiss: tests/test_retrieval_attention.py
        "retrieval_attention",
        "retrieval_attention:index=flat,budget=256",
        "retrieval_attention:index=flat,sink=4,recent=16,budget=10,update=8",
        sink=4,
        local=16,
    ),
]
IDS = [r.id for r in TABLE]
rows = pytest.mark.parametrize("row", TABLE, ids=IDS)


def roles(row: Row, role: str) -> bool:
    return role in get(row.id).roles


def part(row: Row, role: str, text: str) -> Recipe:
    return Recipe.of(f"{role}={text}")


def test_every_method_has_a_row():
    assert sorted(IDS) == sorted(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_every_option_says_what_it_is(name):
    for f in dataclasses.fields(get(name)):
        text = f.metadata.get("help", "")
        assert len(text.split()) >= 3 and len(text) <= 80 and text == text.strip() and not text.endswith("."), (f.name, text)


@rows
@pytest.mark.parametrize("h,g", [(2, 2), (3, 1), (4, 1), (8, 1), (6, 2)])
@pytest.mark.parametrize("n", [1, 37, 150])
def test_full_budget_is_dense(row, h, g, n):
    q, k, v = qkv(1, h, g, n + 3)
    drive = Drive(Recipe.of(row.full))
    want = oracle(q, (k, v))
    got = drive(q[:, :, :n], k[:, :, :n], v[:, :, :n])
    torch.testing.assert_close(got, want[:, :, :n], atol=1e-5, rtol=1e-5)
    for t in range(n, n + 3):
        step = drive(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1])
        torch.testing.assert_close(step, want[:, :, t : t + 1], atol=1e-5, rtol=1e-5)


@rows
def test_output_is_the_oracle_on_the_reported_layout(row):
    drive = Drive(Recipe.of(row.small))
    q, k, v = qkv(1, 6, 2, 155)
    drive(q[:, :, :150], k[:, :, :150], v[:, :, :150])
    for t in range(150, 155):
        drive(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1])
    for x, plan, out in drive.watch.calls:
        if isinstance(plan, Layout):
            plan.validate()
            torch.testing.assert_close(out, oracle(x.q, x.kv, plan), atol=1e-5, rtol=1e-5)


@rows
def test_forced_keys(row):
    """The sink, the newest tokens and the token itself are seen by every row, in prefill and in decode."""
    drive = Drive(Recipe.of(row.small))
    q, k, v = qkv(1, 6, 2, 153)
    drive(q[:, :, :150], k[:, :, :150], v[:, :, :150])
    for t in range(150, 153):
        drive(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1])
    for x, plan, _ in drive.watch.calls:
        if not isinstance(plan, Layout):
            continue
        mask = plan.to_mask(x.kv)
        pos = x.kv.positions()[:, :1]
        for i in range(x.q.shape[2]):
            t = int(x.q_pos[0, i])
            seen = pos[0, 0][mask[0].all(0)[i]].tolist()
            assert len(seen) == len(set(seen))
            need = set(range(min(row.sink, t + 1))) | set(range(max(0, t + 1 - row.local), t + 1))
            assert need <= set(seen)


@rows
def test_small_budget_drops_something(row):
    if row.small == row.full:
        pytest.skip("this method has no budget")
    drive = Drive(Recipe.of(row.small))
    q, k, v = qkv(1, 4, 2, 151)
    drive(q[:, :, :150], k[:, :, :150], v[:, :, :150])
    drive(q[:, :, 150:], k[:, :, 150:], v[:, :, 150:])
    whole = 150 * 151 // 2 * 4 + 151 * 4
    named = sum(int(plan.to_mask(x.kv).sum()) for x, plan, _ in drive.watch.calls)
    assert named < whole


@rows
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_change_nothing(row, side):
    """Row 1 is shorter; whichever side the padding lies on, each row equals itself alone, and padding returns zeros."""
    lens = (150, 101)
    q, k, v = qkv(2, 4, 2, 152)
    valid = torch.zeros(2, 150, dtype=torch.bool)
    for b, n in enumerate(lens):
        if side == "left":
            valid[b, 150 - n :] = True
        else:
            valid[b, :n] = True
    batch = Drive(Recipe.of(row.small))
    bad = [t[:, :, :150].masked_fill(~valid[:, None, :, None], float("nan")) for t in (q, k, v)]
    got = batch(*bad, valid=valid)
    steps = [batch(*(t[:, :, i : i + 1] for t in (q, k, v))) for i in (150, 151)]
    for b, n in enumerate(lens):
        alone = Drive(Recipe.of(row.small))
        real = [t[b : b + 1, :, :150][:, :, valid[b]] for t in (q, k, v)]
        torch.testing.assert_close(got[b : b + 1, :, valid[b]], alone(*real), atol=1e-5, rtol=1e-5)
        assert (got[b][:, ~valid[b]] == 0).all()
        for i, step in zip((150, 151), steps, strict=True):
            one = alone(*(t[b : b + 1, :, i : i + 1] for t in (q, k, v)))
            torch.testing.assert_close(step[b : b + 1], one, atol=1e-5, rtol=1e-5)


@rows
def test_chunked_prefill(row):
    """Causal selectors: chunks that are multiples of the query block give the whole. Others: finite, right shape."""
    q, k, v = qkv(1, 4, 2, 300)
    whole = Drive(Recipe.of(row.small))(q, k, v)
    drive = Drive(Recipe.of(row.small))
    cuts = (0, 128, 256, 300)
    pieces = [drive(*(t[:, :, a:b] for t in (q, k, v))) for a, b in zip(cuts, cuts[1:], strict=False)]
    got = torch.cat(pieces, 2)
    if get(row.id).selection == "causal":
        torch.testing.assert_close(got, whole, atol=1e-5, rtol=1e-5)
    else:
        assert got.shape == whole.shape and bool(torch.isfinite(got).all())


@rows
def test_causality(row):
    """Perturbing the future changes no output up to t, bit for bit; layouts neither, for causal selectors."""
    q, k, v = qkv(1, 4, 2, 150)
    t = 97
    q2, k2, v2 = (x.clone() for x in (q, k, v))
    for x in (q2, k2, v2):
        x[:, :, t:] += 3.0
    first, second = Drive(Recipe.of(row.small)), Drive(Recipe.of(row.small))
    a, b = first(q, k, v), second(q2, k2, v2)
    if get(row.id).selection == "causal":
        assert torch.equal(a[:, :, :t], b[:, :, :t])
        mask = [d.last[1].to_mask(d.last[0].kv)[:, :, :t] for d in (first, second)]
        assert torch.equal(*mask)
    else:  # the layout frozen: the arithmetic itself must be causal
        plan = first.last[1]
        assert torch.equal(oracle(q, (k, v), plan)[:, :, :t], oracle(q2, (k2, v2), plan)[:, :, :t])


@rows
def test_bulk_append_equals_one_by_one(row):
    """A prompt fed token by token leaves the same entries as a prompt in one piece, and the same next decode step."""
    if get(row.id).selection == "prompt" and "cache" in get(row.id).roles:
        pytest.skip("its choice depends on where the prompt ends, by definition")
    q, k, v = qkv(1, 4, 2, 60)
    bulk, single = Drive(Recipe.of(row.small)), Drive(Recipe.of(row.small))
    bulk(*(t[:, :, :59] for t in (q, k, v)))
    for i in range(59):
        single(*(t[:, :, i : i + 1] for t in (q, k, v)))
    last = [d(*(t[:, :, 59:] for t in (q, k, v))) for d in (bulk, single)]
    torch.testing.assert_close(*last, atol=1e-5, rtol=1e-5)


@rows
def test_rollback(row):
    """Truncating equals never having appended; after an eviction it raises instead."""
    from foveate.errors import CacheError

    q, k, v = qkv(1, 4, 2, 70)
    a, b = Drive(Recipe.of(row.small)), Drive(Recipe.of(row.small))
    for d in (a, b):
        d(*(t[:, :, :50] for t in (q, k, v)))
    for i in range(50, 56):
        a(*(t[:, :, i : i + 1] for t in (q, k, v)))
    if a.cache.evicted:
        with pytest.raises(CacheError, match="evicted"):
            a.cache.truncate(6)
        return
    a.cache.truncate(6)
    step = [d(*(t[:, :, 60:61] for t in (q, k, v))) for d in (a, b)]
    torch.testing.assert_close(*step, atol=1e-6, rtol=1e-6)


@rows
def test_no_nan_from_finite_input(row):
    q, k, v = qkv(1, 4, 2, 131)
    for scale in (0.0, 1e-20, 1e3):
        drive = Drive(Recipe.of(row.small))
        out = drive(*(t[:, :, :130] * scale for t in (q, k, v)))
        step = drive(*(t[:, :, 130:] * scale for t in (q, k, v)))
        assert bool(torch.isfinite(out).all()) and bool(torch.isfinite(step).all())


@rows
def test_needle(row):
    """The last 64 queries all point at one key far back: each role must keep it for every head."""
    if not row.needle:
        pytest.skip("this method looks at no content")
    q, k, v = (t * 0.1 for t in qkv(1, 4, 2, 151))
    at, axis = 37, 7  # the axis that the rotation of `Drive` turns slowest: the same key before and after it
    q[..., axis] = k[..., axis] = 0
    q[:, :, 150 - 64 :, axis] = k[:, :, at, axis] = 8.0
    for role in get(row.id).roles:
        drive = Drive(part(row, role, row.small))
        drive(*(t[:, :, :150] for t in (q, k, v)))
        drive(*(t[:, :, 150:] for t in (q, k, v)))
        x, plan, _ = drive.watch.calls[0 if role == "prefill" else -1]
        assert isinstance(plan, Layout)
        here = (x.kv.positions() == at) & x.kv.exists()
        seen = plan.to_mask(x.kv)[0, :, -1] & here[0].repeat_interleave(4 // here.shape[1], 0)
        assert seen.any(-1).all(), f"{role}: heads {(~seen.any(-1)).nonzero().flatten().tolist()} lost the key"
