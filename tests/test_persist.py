"""Saved caches: what comes back is what was there, and nothing else is ever taken for it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import foveate
from foveate.adapters.context import ContextCache
from foveate.cache import LayerCache, PagedStore, persist
from foveate.cache.dense import DenseStore
from foveate.cache.fixed import fix
from foveate.cache.persist import inspect, load, save
from foveate.errors import CacheError
from foveate.methods.base import LayerState, Selection
from tests.drive import Drive, qkv
from tests.models import tiny, tokens

RECIPES = ["dense", "quest:budget=64", "cache=streaming_llm:sink=4,window=20", "snapkv:window=16,capacity=48",
           "expected_attention:capacity=48"]  # fmt: skip


def driven(recipe, b=1, n=150, steps=3, dtype=torch.float32):
    """A drive that read a prompt (row 1 shorter by 40) and took some steps, and the tensors of the next step."""
    q, k, v = (t.to(dtype) for t in qkv(b, 4, 2, n + steps + 1))
    valid = torch.ones(b, n, dtype=torch.bool)
    valid[1:, :40] = False
    drive = Drive(recipe)
    drive(*(t[:, :, :n] for t in (q, k, v)), valid=None if b == 1 else valid)
    for i in range(n, n + steps):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
    return drive, [t[:, :, -1:] for t in (q, k, v)]


def resumed(drive, layer):
    """A drive like this one over another cache."""
    out = Drive(drive.recipe)
    out.cache = layer
    return out


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("b,steps,dtype", [(1, 3, torch.float32), (2, 3, torch.bfloat16), (2, 0, torch.float32)])
def test_a_loaded_cache_goes_on_like_the_saved_one(tmp_path, recipe, b, steps, dtype):
    """Also before the compression (no step yet): the saved queries and the tensors of the method come along."""
    drive, new = driven(recipe, b, steps=steps, dtype=dtype)
    path = tmp_path / "context.safetensors"
    lost = save(path, [drive.cache], "model-a", str(drive.recipe))
    assert lost == (["quest.bounds"] if "quest" in recipe and steps else [])
    (layer,) = load(path, "model-a")
    assert layer.store.lens == drive.cache.store.lens and layer.seen == drive.cache.seen
    assert (layer.evicted, layer.pending) == (drive.cache.evicted, drive.cache.pending)
    assert type(layer.store) is type(drive.cache.store)
    got, want = resumed(drive, layer)(*new), drive(*new)
    assert torch.equal(got, want)
    assert layer.nbytes <= drive.cache.nbytes * 1.1


def test_many_questions_on_one_context(tmp_path):
    """Forks of a loaded cache are independent: each answers like a cache of its own."""
    drive, _ = driven("snapkv:window=16,capacity=48")
    save(tmp_path / "c", [drive.cache], "m", "r")
    (layer,) = load(tmp_path / "c", "m")
    for seed in (1, 2):
        q, k, v = qkv(1, 4, 2, 3, seed=seed)
        got = resumed(drive, layer.fork())(q, k, v)
        assert torch.equal(got, resumed(drive, drive.cache.fork())(q, k, v))
    assert layer.seen == drive.cache.seen


def test_every_kind_of_store_and_an_empty_layer(tmp_path):
    k = torch.randn(1, 2, 30, 4)
    layers = [LayerCache() for _ in range(4)]
    for layer in layers[1:]:
        layer.append(k, k)
    index = torch.arange(30).expand(1, 2, 30)
    layers[2].store = layers[2].store.select(Selection(index, torch.tensor([[30, 7]]), bias=torch.randn(1, 2, 30)))
    layers[3].store = PagedStore.empty(k, k).append(k, k, None, [0])
    save(tmp_path / "c", layers, "m", "r")
    got = load(tmp_path / "c", "m")
    assert got[0].store is None and got[0].seen == []
    assert [g.store.kind for g in got[1:]] == ["dense", "ragged", "paged"]
    for a, b in zip(layers[1:], got[1:], strict=True):
        x, y = a.store.view(), b.store.view()
        assert torch.equal(x.to_dense().k, y.to_dense().k) and torch.equal(x.to_dense().v, y.to_dense().v)
        assert torch.equal(x.positions(), y.positions())
        assert (x.bias is None) == (y.bias is None) and (x.bias is None or torch.equal(x.bias, y.bias))
    assert inspect(tmp_path / "c")["recipe"] == "r"
    assert [entry["kind"] for entry in inspect(tmp_path / "c")["layers"]] == [None, "dense", "ragged", "paged"]


def test_unused_slots_are_not_saved(tmp_path):
    """Rows of different length leave slots that hold whatever memory held: the file has zeros there."""
    layer = LayerCache()
    k = torch.randn(2, 2, 30, 4)
    layer.append(k, k, torch.arange(30) < torch.tensor([[30], [7]]))
    layer.store.k[1, :, 7:], layer.store.v[1, :, 7:] = 12345.0, float("nan")
    save(tmp_path / "c", [layer], "m", "r")
    for t in load_file(tmp_path / "c").values():
        assert bool(torch.isfinite(t).all()) and not bool((t == 12345.0).any())


def test_a_fixed_store_is_saved_as_it_is_now(tmp_path):
    """Rows of different length; steps between two saves."""
    gen = torch.Generator().manual_seed(0)
    new = lambda n: torch.randn(2, 2, n, 4, generator=gen)  # noqa: E731
    store = DenseStore(new(40), new(40), [20, 12])
    layer = LayerCache()
    layer.store, layer.seen, layer.rows, layer.tails = fix(store, [20, 12]), [20, 12], [LayerState()] * 2, [None] * 2
    for _ in range(3):
        save(tmp_path / "c", [layer], "m", "r")
        (back,) = load(tmp_path / "c", "m")
        assert back.store.lens == layer.store.lens
        for a, b in zip(back.store.view().to_dense().k, layer.store.view().to_dense().k, strict=True):
            assert torch.equal(a, b[:, : a.shape[1]])
        layer.append(new(1), new(1))


def test_a_context_comes_back_on_the_device_of_its_model(tmp_path, monkeypatch):
    """What is loaded without a device lies on the CPU, whatever the model computes on."""
    model = tiny()
    with foveate.use(model, "dense"), torch.no_grad():
        model(tokens(1, 20), use_cache=True).past_key_values.save(tmp_path / "c")
        asked = []
        monkeypatch.setattr(persist, "load", lambda *args, device="cpu": asked.append(torch.device(device)) or [])
        model.to("meta")
        ContextCache.load(tmp_path / "c", model)
    assert asked == [torch.device("meta")]


def test_refusals(tmp_path):
    drive, _ = driven("snapkv:window=16,capacity=48", n=60)
    path = tmp_path / "context.safetensors"
    save(path, [drive.cache], "model-a", "snapkv")
    with pytest.raises(CacheError, match=r"'model-a', which is not this one \('model-b'\)"):
        load(path, "model-b")
    with pytest.raises(CacheError, match="no such cache file"):
        load(tmp_path / "none", "model-a")
    whole = path.read_bytes()
    for cut in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:cut])
        with pytest.raises(CacheError, match="truncated or not a safetensors file"):
            load(tmp_path / "cut", "model-a")
    (tmp_path / "text").write_text("not a cache at all" * 100)
    with pytest.raises(CacheError, match="truncated or not"):
        load(tmp_path / "text", "model-a")
    save_file({"x": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(CacheError, match="not a saved cache"):
        load(tmp_path / "other", "model-a")


def rewrite(path, out, **changes):
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        meta = f.metadata() | changes
        drop = meta.pop("drop", None)
        save_file({n: f.get_tensor(n) for n in f.keys() if n != drop}, out, meta)  # noqa: SIM118


def test_other_versions_and_incomplete_files(tmp_path):
    drive, _ = driven("dense", n=20)
    path, out = tmp_path / "c", tmp_path / "d"
    save(path, [drive.cache], "m", "r")
    rewrite(path, out, version="99")
    with pytest.raises(CacheError, match="version '99'"):
        load(out, "m")
    rewrite(path, out, drop="0.store.k")
    with pytest.raises(CacheError, match="not a complete cache file"):
        load(out, "m")
    rewrite(path, out, layers="[{")
    with pytest.raises(CacheError, match="not a complete cache file"):
        load(out, "m")
    entries = inspect(path)["layers"]
    entries[0]["kind"] = "holographic"
    rewrite(path, out, layers=json.dumps(entries))
    with pytest.raises(CacheError, match="unknown kind of store 'holographic'"):
        load(out, "m")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    drive, _ = driven("dense", n=20)
    path = tmp_path / "c"
    save(path, [drive.cache], "m", "r")
    before = path.read_bytes()

    def full(tensors, name, meta):
        with open(name, "wb") as f:
            f.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("foveate.cache.persist.save_file", full)
    with pytest.raises(CacheError, match="No space left"):
        save(path, [drive.cache], "m2", "r")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["c"]
    with pytest.raises(CacheError, match="could not write"):
        save(tmp_path / "no" / "such" / "folder", [drive.cache], "m", "r")
