"""Real CUDA graphs: replayed decode steps give the tokens and logits of plain ones, and cost the host far less."""

from __future__ import annotations

import time

import pytest
import torch

import foveate
from foveate.profile import Profile
from tests.models import generate, tiny, tokens
from tests.profiles import folder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
RECIPES = (
    "dense",
    "quest:budget=64,dense_layers=0",
    "quest:budget=64,dense_layers=1,share=group",
    "cache=snapkv:window=16,capacity=128",
    "quest:budget=32,dense_layers=0+cache=snapkv:window=16,capacity=128",
    "minference@8k+quest:budget=64,dense_layers=0",
    "dense+cache=streaming_llm:sink=4,window=100",
    "streaming_llm:sink=4,window=100",
    "decode=s2_strided:block=16,local=2,stride=3",
    "decode=topk_exact:budget=20",
    "recycled_attention:stride=5",
    "decode=lserve:page=16,logical=8,budget=64,assign=even",
    "adamas:budget=64,dense_layers=0,theta=1",
    "tidal_decode:start=0,reselect=2,budget=64",
    "decode=token_select:sink=4,local=64,budget=64,chunk=64",
    "decode=longheads:chunk=32,attention=128,block=32",
)

DROPS = (
    "cache=h2o:heavy=60,recent=40,slack=12",
    "cache=h2o:heavy=60,recent=40,slack=12,norm=mean,reduce=max",
    "quest:budget=32,dense_layers=0+cache=h2o:heavy=60,recent=40,slack=16",
    "duo_attention:sink=4,window=60,slack=12,sparsity=1",
    "duo_attention:sink=4,window=60,slack=12,profile={gates}",
    "moa:density=0.3,sink=4,block=4,slack=12",
    "razor_attention:profile={echo},induction=0.3,sink=4,window=60,fraction=0,slack=12",
)


def model_(dtype=torch.bfloat16):
    return tiny(num_hidden_layers=4, hidden_size=256, head_dim=64, max_position_embeddings=4096).to("cuda", dtype)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_replayed_steps_are_the_steps(recipe, rows):
    model, ids = model_(torch.float32), tokens(rows, 700).cuda()
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[1, :133] = 0
    run = lambda: generate(model, ids, mask, max_new_tokens=40, min_new_tokens=40)  # noqa: E731
    with foveate.use(model, recipe):
        want = run()
    with foveate.use(model, recipe, graphs=True) as handle:
        got = run()
        assert handle.graphs.replays >= 36, handle.notes
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("recipe", DROPS)
@pytest.mark.parametrize("rows", [1, 3])
def test_steps_between_evictions_are_replayed(recipe, rows):
    """Four evictions in place, by steps that are not replayed; the graphs stay right after them."""
    gen = torch.Generator().manual_seed(0)
    draw = lambda: torch.rand(4, 2, generator=gen)  # noqa: E731
    recipe = recipe.format(
        gates=folder(Profile("duo_attention", {}, {"gates": draw()})),
        echo=folder(Profile("razor_attention", {}, {n: draw() for n in ("induction", "echo")})),
    )
    model, ids = model_(torch.float32), tokens(rows, 700).cuda()
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[1, :133] = 0
    run = lambda: generate(model, ids, mask, max_new_tokens=54, min_new_tokens=54)  # noqa: E731
    with foveate.use(model, recipe):
        want = run()
    with foveate.use(model, recipe, graphs=True) as handle:
        got = run()
        assert handle.graphs.replays >= (30 if "quest" in recipe else 44), handle.notes
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-3, rtol=1e-3)


def test_the_host_is_out_of_the_way():
    model, ids = model_(), tokens(1, 2000).cuda()
    spent = {}
    for graphs in (False, True):
        with foveate.use(model, "quest:budget=256", graphs=graphs), torch.no_grad():
            out = model(ids, use_cache=True, logits_to_keep=1)
            cache, token = out.past_key_values, out.logits.argmax(-1)
            for i in range(40):
                if i == 10:
                    torch.cuda.synchronize()
                    began = time.perf_counter()
                model(input_ids=token, past_key_values=cache, use_cache=True)
            torch.cuda.synchronize()
            spent[graphs] = (time.perf_counter() - began) / 30
    print(f"a decode step: {1e3 * spent[False]:.2f} ms plain, {1e3 * spent[True]:.2f} ms replayed")
    assert spent[True] < 0.5 * spent[False]


@pytest.mark.parametrize("recipe", ["dense", "quest:budget=64,dense_layers=1,share=group",
                                    "decode=lserve:page=16,logical=8,budget=64,assign=even"])  # fmt: skip
@pytest.mark.parametrize("compiled", [True, "tuned"])
def test_compiled_steps_are_the_steps(recipe, compiled):
    """The logits of plain steps but for rounding, one compilation, and the model as it was afterwards."""
    torch._dynamo.reset()  # eight variants of a function are all it keeps
    model, ids = model_(torch.float32), tokens(2, 700).cuda()
    mask = torch.ones_like(ids)
    mask[1, :133] = 0
    run = lambda: generate(model, ids, mask, max_new_tokens=40, min_new_tokens=40)  # noqa: E731
    with foveate.use(model, recipe):
        want = run()
    with foveate.use(model, recipe, graphs=True, compiled=compiled) as handle:
        got = run()
        assert handle.graphs.replays >= 36 and handle.graphs.layers is not None, handle.notes
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        again = run()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    assert torch.equal(got.sequences, again.sequences)
    assert torch.equal(torch.stack(got.logits), torch.stack(again.logits))  # to the bit
    same = (got.sequences == want.sequences).long().cumprod(1).sum(1).min() - ids.shape[1]  # tokens until texts part
    assert same >= 20
    a, b = (torch.stack(x.logits)[:same] for x in (got, want))
    torch.testing.assert_close(a, b, atol=5e-3, rtol=5e-3)
    assert not any("forward" in vars(layer) for layer in model.get_decoder().layers)


def test_compiled_steps_after_changes():
    """A second question, a rollback and a fork between compiled, replayed steps with fused appends."""
    model, ids, more = model_(torch.float32), tokens(2, 300).cuda(), tokens(2, 9, seed=3).cuda()
    feed = tokens(2, 40, seed=5).cuda()
    recipe = "quest:budget=64,dense_layers=0"

    def talk():
        out = [model(ids, use_cache=True)]
        cache = out[0].past_key_values
        for i in range(40):
            if i == 8:
                out.append(model(more, past_key_values=cache, use_cache=True))
            if i == 16:
                cache.crop(-3)
            if i == 24:
                cache = cache.fork()
            if i == 32:
                cache.reorder_cache(torch.tensor([1, 0], device="cuda"))
            out.append(model(input_ids=feed[:, i : i + 1], past_key_values=cache, use_cache=True))
        return torch.stack([o.logits[:, -1] for o in out])

    with torch.no_grad():
        with foveate.use(model, recipe):
            want = talk()
        for options in (dict(graphs=True), dict(graphs=True, compiled=True)):
            with foveate.use(model, recipe, **options) as handle:
                got = talk()
                assert handle.graphs.replays >= 20, handle.notes
            torch.testing.assert_close(got, want, atol=5e-3, rtol=5e-3)


def test_a_step_appends_in_one_launch():
    """The kernels of a replayed quest step, by name: one append a layer, no update of bounds beside it."""
    from torch.profiler import ProfilerActivity, profile

    model, ids = model_(), tokens(1, 700).cuda()
    with foveate.use(model, "quest:budget=64,dense_layers=0,share=group", graphs=True), torch.no_grad():
        out = model(ids, use_cache=True, logits_to_keep=1)
        cache, token = out.past_key_values, out.logits.argmax(-1)
        step = lambda: model(input_ids=token, past_key_values=cache, use_cache=True)  # noqa: E731
        for _ in range(4):
            step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            step()
            torch.cuda.synchronize()
    count = {e.key: e.count for e in seen.key_averages()}
    number = lambda part: sum(n for name, n in count.items() if part in name)  # noqa: E731
    print(f"{sum(count.values())} kernels a step of 4 layers: {count}")
    assert number("append_token") == 4 and number("update_bounds") == 0 and number("select_pages") == 4
