"""Host memory and a GPU: the tokens of dense, methods that remember tensors, and what the device holds."""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    import foveate
    from foveate.cache.offload import OffloadStore, fetch
    from foveate.layout import Layout
    from foveate.recipe import Recipe
    from tests.models import generate, tiny, tokens

SAME = (
    ("dense", {}),
    ("quest", {"decode": "quest:budget=2000,dense_layers=0"}),
)
RUNS = (
    {"decode": "quest:budget=64,dense_layers=0"},
    {"decode": "tidal_decode:start=0,reselect=1,budget=64"},
    {"cache": "snapkv:window=16,capacity=128"},
    {"cache": "expected_attention:ratio=0.5"},
    {"prefill": "razor_attention:induction=0,echo=0,window=64,fraction=0", "decode": "razor_attention:induction=0,echo=0,"
     "window=64,fraction=0", "cache": "razor_attention:induction=0,echo=0,window=64,fraction=0"},
)  # fmt: skip


def model_(dtype=torch.float32):
    return tiny(num_hidden_layers=3, hidden_size=256, head_dim=64, max_position_embeddings=8192).to("cuda", dtype)


@pytest.mark.parametrize("name,options", SAME)
def test_the_tokens_of_dense(name, options):
    model, ids = model_(), tokens(2, 600).cuda()
    mask = torch.ones_like(ids)
    mask[1, :133] = 0
    run = lambda: generate(model, ids, mask, max_new_tokens=30, min_new_tokens=30)  # noqa: E731
    with foveate.use(model, "dense"):
        want = run()
    with foveate.use(model, Recipe(storage="offload", **options)):
        got = run()
        assert all(layer.cache.store.k.device.type == "cpu" for layer in got.past_key_values.layers)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("options", RUNS, ids=str)
def test_methods_run_beside_the_keys(options):
    """Steps, a second turn, steps: what the plain store gives, where no method's tensors are on the wrong device."""
    model, ids, more = model_(), tokens(1, 600).cuda(), tokens(1, 40, seed=3).cuda()

    def talk():
        out = [model(ids, use_cache=True)]
        cache = out[0].past_key_values
        for i in range(20):
            now = more if i == 10 else ids[:, i : i + 1]
            out.append(model(input_ids=now, past_key_values=cache, use_cache=True))
        return torch.cat([o.logits[:, -1] for o in out])

    with torch.no_grad():
        with foveate.use(model, Recipe(**options)):
            want = talk()
        with foveate.use(model, Recipe(storage="offload", **options)):
            got = talk()
    torch.testing.assert_close(got, want, atol=5e-3, rtol=5e-3)


@torch.no_grad()
def test_dense_layers_follow_on_a_stream_of_their_own():
    """Steps over pinned pages: the logits of the plain store, and layers that were sent before they were asked for."""
    from foveate.cache import offload

    model, ids = model_(), tokens(2, 900).cuda()
    sent, lend = [], offload.Near.lend

    def counts(self, kv, device):
        sent.append(self.ahead is not None)
        return lend(self, kv, device)

    def talk():
        out = [model(ids, use_cache=True)]
        cache = out[0].past_key_values
        for i in range(200):  # the stores grow on the way
            if i == 50:
                cache.crop(-5)
            if i == 100:
                cache = cache.fork()
            out.append(model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True))
        return torch.stack([o.logits[:, -1] for o in out]), cache

    with foveate.use(model, "dense"):
        want, _ = talk()
    offload.Near.lend = counts
    try:
        with foveate.use(model, Recipe(storage="offload")):
            got, cache = talk()
    finally:
        offload.Near.lend = lend
    assert all(layer.cache.store.k.is_pinned() for layer in cache.layers)
    assert sum(sent) > 0.9 * len(sent), f"{sum(sent)} of {len(sent)} layers were sent ahead"
    torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)


@torch.no_grad()
def test_the_device_holds_what_is_named():
    """A store of 512 MB; steps that name 1,024 entries a list keep a few MB on the device and copy what changed."""
    k = torch.randn(1, 8, 1 << 16, 128, dtype=torch.bfloat16)
    store = OffloadStore.empty(k, k).append(k, k, None, [0])
    kv, h = store.view(), 32
    q = torch.randn(1, h, 1, 128, device="cuda", dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for i in range(5):
        entries = (torch.arange(0, 1 << 16, 64) + (torch.arange(1024) % 16 == i)).expand(1, 8, 1, 1024)
        layout = Layout.lists((1, h, 1, kv.capacity), block_q=1, tile_width=1, entries=entries)
        near, plan = fetch(kv, layout, "cuda", store.near)
        out = foveate.attend(q, near, plan)
    want = foveate.attend(q.cpu().float(), (k.float(), k.float()), layout)
    torch.testing.assert_close(out.cpu().float(), want, atol=2e-2, rtol=2e-2)
    assert torch.cuda.max_memory_allocated() - before < 64 << 20
    assert store.near.copied <= 8 * (1024 + 4 * 128)
