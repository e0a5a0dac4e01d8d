"""Decode on a GPU of methods with profiles, of hip and of qwen1m: replayed steps are the steps, chunks in one call."""

from __future__ import annotations

import pytest
import torch

import foveate
from tests.gpu.capturing import check_model, small
from tests.models import generate, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    from foveate.bench.breakeven import Shape, equipped
    from foveate.bench.decode import Stage, Subject
    from foveate.kernels import dispatch
    from foveate.kernels.dispatch import attend
    from foveate.layout import Parts
    from foveate.methods.base import State
    from foveate.recipe import Recipe
    from foveate.registry import parse
    from tests import decode_profile_cases as cases
    from tests.drive import Drive

HIP = (
    "hip:k=32,sink=4,window=24,refresh=4,dense_layers=1",
    "hip:k=64,sink=4,window=24,refresh=8,dense_layers=0,share=group",
    "hip:stages=64x4/16x2x256/4x1x128,block_k=4,k=64,sink=4,window=24,refresh=3,dense_layers=0",
)
CHUNKS = ("qwen1m:chunk=96,local=32,block=64,sparse=false", "qwen1m:chunk=160,local=32,block=64,sparse=false,original=300")


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("n", [300, 600, 1300])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("which", range(len(HIP) + len(CHUNKS) + 3))
def test_replayed_steps_are_the_steps(which, rows, n):
    """The three with profiles cut their caches too, and drop entries every 12 steps on the way."""
    recipe = [*(f"decode={text}" for text in (*HIP, *CHUNKS)), *cases.profiles(4, 4, 2)][which]
    check_model(recipe, rows, prompt=n, new=50, eager=14)


def test_chunks_over_a_cut_cache_are_not_captured_and_say_so():
    model = small()
    recipe, ids = f"decode={CHUNKS[0]}+cache=snapkv:window=16,capacity=200", tokens(1, 500).cuda()
    with foveate.use(model, recipe):
        want = generate(model, ids)
    with foveate.use(model, recipe, graphs=True) as handle:
        got = generate(model, ids)
        assert handle.graphs.replays == 0 and "asks the device how far a text" in " ".join(handle.notes)
    assert torch.equal(got.sequences, want.sequences)


# ---------------------------------------------------------------------- qwen1m
@pytest.mark.parametrize("name,tolerance", [("bfloat16", 1e-2), ("float16", 2e-3), ("float32", 1e-4)])
@pytest.mark.parametrize("text,b,h,g,m,d,lengths", [
    ("qwen1m", 1, 32, 8, 1 << 17, 128, ((1 << 17) - 100,)),  # 19 chunks: the kernel of long dense steps
    ("qwen1m", 2, 32, 8, 70000, 128, (70000, 9000)),
    ("qwen1m@dca", 3, 8, 2, 20000, 64, (20000, 12037, 15)),  # the general kernel
    ("qwen1m:chunk=1024,local=128,block=128,sparse=false,original=4096", 1, 16, 1, 9000, 96, (8960,)),
], ids=str)  # fmt: skip
def test_chunks_at_once(text, b, h, g, m, d, lengths, name, tolerance):
    cases.check_chunks(text, b, h, g, m, d, lengths, tolerance=tolerance, dtype=getattr(torch, name), device="cuda")


def test_a_step_of_chunks_is_one_call_and_waits_for_nothing(monkeypatch):
    x, method = cases.step_of(1, 32, 8, 1 << 16, 128, ((1 << 16) - 9,), dtype=torch.bfloat16, device="cuda"), parse("qwen1m")
    run = lambda: attend(x.q, x.kv, method.plan(x, State()), scale=x.scale)  # noqa: E731
    want, calls, one = run(), [], dispatch._attend
    monkeypatch.setattr(dispatch, "_attend", lambda *a: calls.append(1) or one(*a))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, want) and len(calls) == 1  # equal bits from equal calls


# ---------------------------------------------------------------------- caches that a rule has cut
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("n", [400, 3000])
def test_entries_counted_are_the_rule(which, n):
    """Plans and outputs of decode steps by entry number, against those by position; entries are dropped on the way."""
    h, g = 8, 2
    text = cases.profiles(4, h, g)[which]
    drive, gen = Drive(text, d=64, backend=None), torch.Generator().manual_seed(0)
    draw = lambda heads, m: torch.randn(1, heads, m, 64, generator=gen).to("cuda", torch.bfloat16)  # noqa: E731
    drive(draw(h, n), draw(g, n), draw(g, n))
    for i in range(30):
        out = drive(draw(h, 1), draw(g, 1), draw(g, 1))
        x, plan, _ = drive.last
        assert isinstance(plan, Parts)
        state = State(drive.cache.batch, {}, drive.run, drive.cache.rows)
        with cases.by_position():
            law = drive.recipe.decode.plan(x, state)
        if (i + 1) % 12:  # behind a step that drops, the view that the meter kept is older than the cache
            assert cases.same_rule(drive.recipe.decode, x, state)
            want = attend(x.q, x.kv, law, scale=x.scale, backend="reference")
            torch.testing.assert_close(out.float(), want.float(), atol=1e-2, rtol=1e-2)


# ---------------------------------------------------------------------- the bench
@pytest.mark.parametrize("text", [
    "hip", "qwen1m", "duo_attention", "moa", "razor_attention:window=1000",
])  # fmt: skip
def test_the_bench_replays_what_it_measures(text, tmp_path):
    """Captured cycles of the bench leave what eager steps leave: the same entries, and the same next output."""
    shape = Shape(32, 8, 128, torch.bfloat16, 4)
    method = equipped(parse(text), shape, tmp_path)
    cuts = method if "cache" in method.default_roles else None
    with torch.inference_mode():
        stage = Stage(20000, 32, 8, 128, torch.bfloat16, 4, torch.device("cuda"))
        subject = Subject(stage, Recipe(decode=method, cache=cuts))
        assert subject.captured and subject.left >= 20
        subject.cycle()
        lens = [c.store.lens for c in subject.caches]
        subject.cycle()
        torch.cuda.synchronize()
        for cache, before in zip(subject.caches, lens, strict=True):
            assert [[n + 8 for n in row] for row in before] == cache.store.lens
            assert cache.store.view().lengths().tolist() == cache.store.lens  # the device counts as the host does
        every, ms = subject.dropping()
        assert (every, ms > 0) == ((method.slack, True) if cuts else (0, False))
