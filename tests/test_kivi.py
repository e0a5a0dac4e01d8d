"""KIVI as a cache policy: what a decode step attends to, when things are quantised, memory, turns and saved caches."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from foveate.cache.persist import load, save
from foveate.errors import CacheError, ConfigError
from foveate.layout import Layout
from foveate.methods.kivi import KIVI
from foveate.recipe import Recipe
from foveate.registry import parse
from tests import test_methods as table
from tests.drive import Drive, oracle, qkv
from tests.test_quantised import slow_head

SMALL = "kivi:bits=4,group=8,residual=16"
ROW = table.Row("kivi", SMALL, SMALL)


@pytest.mark.parametrize(
    "test,arguments",
    [
        (table.test_output_is_the_oracle_on_the_reported_layout, ()),
        (table.test_forced_keys, ()),
        (table.test_padding_and_batch_change_nothing, ("left",)),
        (table.test_padding_and_batch_change_nothing, ("right",)),
        (table.test_chunked_prefill, ()),
        (table.test_causality, ()),
        (table.test_bulk_append_equals_one_by_one, ()),
        (table.test_no_nan_from_finite_input, ()),
        (table.test_needle, ()),
    ],
)
def test_the_common_table_with_lossy_bits(test, arguments):
    """The table's own row is exact (16 bits); these are its tests where quantising loses something."""
    test(ROW, *arguments)


def step(drive, tensors, lo, hi=None):
    return drive(*(t[:, :, lo : hi or lo + 1] for t in tensors))


@pytest.mark.parametrize("h,g,bits", [(2, 2, 2), (3, 1, 4), (8, 2, 8), (8, 1, 2)])
def test_a_step_attends_to_the_cards_cache(h, g, bits):
    """One softmax over [quantised; full]: every step equals attention over the slow transcription of the card."""
    q, k, v = qkv(1, h, g, 85)
    drive = Drive(f"kivi:bits={bits},group=8,residual=16")
    torch.testing.assert_close(step(drive, (q, k, v), 0, 75), oracle(q[:, :, :75], (k[:, :, :75], v[:, :, :75])))
    for t in range(75, 85):
        got = step(drive, (q, k, v), t)
        if t not in (75, 80, 81, 84):  # around a boundary of 16
            continue
        pairs = [slow_head(k[0, i, : t + 1], v[0, i, : t + 1], t, bits, 8, 16) for i in range(g)]
        heads = []
        for i in range(h):
            kk, vv = pairs[i * g // h]
            heads.append(torch.softmax(kk @ q[0, i, t] / math.sqrt(16), 0) @ vv)
        torch.testing.assert_close(got[0, :, 0], torch.stack(heads), atol=2e-5, rtol=1e-5)


def test_more_bits_are_closer_and_the_residual_helps():
    q, k, v = qkv(1, 4, 2, 201, seed=1)
    dense = oracle(q, (k, v))[:, :, 200:]
    error = {}
    for text in ("bits=2", "bits=4", "bits=8", "bits=16", "bits=2,residual=128", "bits=4,group=16"):
        drive = Drive(parse(f"kivi:residual=32,group=32,{text}" if "residual" not in text else f"kivi:group=32,{text}")
                      if "group" not in text else parse(f"kivi:residual=32,{text}"))  # fmt: skip
        step(drive, (q, k, v), 0, 200)
        error[text] = float((step(drive, (q, k, v), 200) - dense).abs().max())
    assert error["bits=2"] > error["bits=4"] > error["bits=8"] > error["bits=16"]
    assert error["bits=16"] < 1e-6
    assert error["bits=2,residual=128"] < error["bits=2"] and error["bits=4,group=16"] < error["bits=4"]


def test_keys_and_values_may_differ():
    tensors = qkv(1, 4, 2, 81, seed=6)
    for text, k_exact, v_exact in (("bits=16,value_bits=4", True, False), ("bits=4,value_bits=16", False, True)):
        drive = Drive(f"kivi:group=8,residual=16,{text}")
        step(drive, tensors, 0, 80)
        step(drive, tensors, 80)
        kv = drive.cache.store.view()
        assert torch.equal(kv.k, tensors[1]) == k_exact and torch.equal(kv.v, tensors[2]) == v_exact


def test_chunks_attend_exactly_and_end_in_the_same_cache():
    """By default nothing is quantised inside a prompt; `compress_at="chunk"` quantises after each chunk instead."""
    tensors = qkv(1, 4, 2, 101, seed=2)
    want = oracle(tensors[0], tensors[1:])
    whole, chunked = Drive(SMALL), Drive(SMALL)
    early = Drive(replace(Recipe.of(SMALL), compress_at="chunk"))
    step(whole, tensors, 0, 100)
    for lo, hi in ((0, 33), (33, 70), (70, 100)):
        out = step(chunked, tensors, lo, hi)
        torch.testing.assert_close(out, want[:, :, lo:hi], atol=1e-5, rtol=1e-5)
        other = step(early, tensors, lo, hi)
        assert torch.allclose(other, want[:, :, lo:hi], atol=1e-5) == (lo == 0)
        assert early.cache.store.keys.packed.done.host == [hi // 16 * 16]
    assert early.cache.nbytes < chunked.cache.nbytes
    last = [step(d, tensors, 100) for d in (whole, chunked, early)]
    a, b, c = (d.cache.store.state() for d in (whole, chunked, early))
    assert torch.equal(last[0], last[1]) and torch.equal(last[0], last[2])
    assert all(torch.equal(a[n], b[n]) and torch.equal(a[n], c[n]) for n in a)


def test_turns_forks_and_saved_caches(tmp_path):
    """A second prompt is exact until it is over; a fork and a loaded cache go on like the original."""
    tensors = qkv(2, 4, 2, 140, seed=3)
    drive = Drive(SMALL)
    step(drive, tensors, 0, 60)
    for t in range(60, 70):
        step(drive, tensors, t)
    quantised = drive.cache.store.keys.packed.done.host
    step(drive, tensors, 70, 120)
    assert drive.cache.store.keys.packed.done.host == quantised == [64, 64]
    x, plan, out = drive.last
    assert isinstance(plan, Layout) and torch.equal(x.kv.k[:, :, 64:], tensors[1][:, :, 64:120])
    fork, path = Drive(SMALL), tmp_path / "c"
    fork.cache = drive.cache.fork()
    for t in range(120, 130):
        assert torch.equal(step(drive, tensors, t), step(fork, tensors, t))
    assert save(path, [drive.cache], "m", SMALL) == []
    loaded = Drive(SMALL)
    (loaded.cache,) = load(path, "m")
    assert loaded.cache.store.kind == "quantised"
    for t in range(130, 140):
        assert torch.equal(step(loaded, tensors, t), step(fork, tensors, t))
    assert not drive.cache.evicted and drive.cache.store.keys.packed.done.host == [128, 128]


def test_rollback():
    """A rejected draft goes exactly; what would need lost precision is refused, and the cache stays as it was."""
    tensors = qkv(1, 4, 2, 80, seed=4)
    a, b = Drive(SMALL), Drive(SMALL)
    for d in (a, b):
        step(d, tensors, 0, 50)
        step(d, tensors, 50)
    step(a, tensors, 51, 56)
    a.cache.truncate(5)
    assert torch.equal(step(a, tensors, 60), step(b, tensors, 60))
    for t in range(61, 70):
        step(a, tensors, t)
    with pytest.raises(CacheError, match="full precision is gone"):
        a.cache.truncate(5)
    assert a.cache.seen == [61] and a.cache.store.lens == [[61, 61]]


def test_memory_of_a_long_prompt():
    """int4 at 8K, head dim 64, three kv heads as in SmolLM2: at most 0.30 of fp16 once the prompt is over."""
    q, k, v = (t.half() for t in qkv(1, 3, 3, 8193, d=64))
    drive, dense = Drive("kivi@8k", d=64, backend=None), 2 * 3 * 8192 * 64 * 2
    drive.cache.append(k[:, :, :8192], v[:, :, :8192], storage=drive.recipe.stored)
    drive.cache.pending = True
    step(drive, (q, k, v), 8192)
    assert drive.cache.nbytes <= 0.30 * dense
    assert bool(torch.isfinite(drive.last[2]).all())


def test_quest_selects_on_a_quantised_cache():
    tensors = qkv(2, 4, 2, 160, seed=5)
    drive = Drive(f"quest:budget=48,page=16+{SMALL}")
    step(drive, tensors, 0, 150)
    for t in range(150, 160):
        out = step(drive, tensors, t)
        x, plan, _ = drive.last
        torch.testing.assert_close(out, oracle(x.q, x.kv, plan), atol=1e-5, rtol=1e-5)
    assert float(plan.density()) < 1


def test_bad_hyperparameters():
    for text, message in [
        ("kivi:bits=3", "kivi: bits expected 2, 4, 8 or 16, got 3"),
        ("kivi:value_bits=1", "kivi: value_bits expected between 2 and 16, got 1"),
        ("kivi:value_bits=5", "kivi: value_bits expected 2, 4, 8 or 16, got 5"),
        ("kivi:group=0", "kivi: group expected >= 1, got 0"),
        ("kivi:group=48", "kivi: residual expected a multiple of group = 48, got 128"),
        ("kivi:residual=0", "kivi: residual expected >= 1, got 0"),
        ("kivi:bit=2", "unknown hyperparameter 'bit'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            parse(text)
    for storage in ("paged", "offload"):
        with pytest.raises(ConfigError, match=f"storage='{storage}' cannot"):
            Recipe(cache=KIVI(), storage=storage)
    assert KIVI() == KIVI(bits=2, value_bits=None, group=32, residual=128)
