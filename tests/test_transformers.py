"""The transformers adapter on tiny random models: same numbers as eager attention, same behaviour of generate."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache

import foveate
from foveate.adapters.context import ContextCache
from foveate.errors import CacheError, ConfigError, ShapeError, UnsupportedError
from tests.models import FAMILIES, generate, tiny, tokens

STREAM = "streaming_llm:sink=3,window=17"


def use(model, recipe):
    """The adapter is judged on the oracle; the kernels have their own tests."""
    return foveate.use(model, recipe, backend="reference")


def padded(b=2, n=61, pads=(13, 0)):
    ids, mask = tokens(b, n), torch.ones(b, n, dtype=torch.long)
    for row, k in enumerate(pads):
        mask[row, :k] = 0
    return ids * mask, mask


def stream_mask(n, sink=3, window=17):
    i, j = torch.arange(n)[:, None], torch.arange(n)
    allowed = (j <= i) & ((j < sink) | (i - j < window))
    return torch.zeros(1, 1, n, n).masked_fill(~allowed, torch.finfo(torch.float32).min)


def close(a, b, tol=2e-4):
    torch.testing.assert_close(a, b, atol=tol, rtol=tol)


# ---------------------------------------------------------------------- numbers
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_dense_recipe_is_the_model(family):
    model = tiny(family)
    ids, mask = padded()
    want, steps = model(ids[1:]).logits, generate(model, ids, mask)
    with use(model, "dense"):
        close(model(ids[1:]).logits, want, 5e-4)
        close(model(ids[1:], use_cache=False).logits, want, 5e-4)
        got = generate(model, ids, mask)
    assert torch.equal(got.sequences, steps.sequences)
    for a, b in zip(got.logits, steps.logits):
        close(a, b, 5e-4)
    assert torch.equal(model(ids[1:]).logits, want)  # and the model is what it was


@pytest.mark.parametrize("family", ["llama", "qwen3", "glm4"])
@pytest.mark.parametrize("parts", ["prefill+decode", "cache"])
@torch.no_grad()
def test_streaming_generation_equals_full_forwards_under_its_mask(family, parts):
    """Every generated token's logits equal a fresh eager forward under the same boolean rule, evicting or not."""
    model = tiny(family)
    ids = tokens(1, 50)
    recipe = STREAM if parts == "cache" else f"prefill={STREAM}+decode={STREAM}"
    with use(model, recipe):
        out = generate(model, ids)
    assert out.past_key_values.evicted == (parts == "cache")
    want = model(out.sequences, attention_mask=stream_mask(out.sequences.shape[1])).logits[0, 49:-1]
    close(torch.cat(out.logits), want)


@pytest.mark.parametrize("recipe", ["dense", STREAM])
@torch.no_grad()
def test_rows_chunks_and_turns(recipe):
    model = tiny()
    ids, mask = padded()
    with use(model, recipe):
        batch = generate(model, ids, mask)
        alone = generate(model, ids[:1, 13:])
        assert torch.equal(alone.sequences[0, 48:], batch.sequences[0, 61:])
        close(torch.stack(alone.logits), torch.stack(batch.logits)[:, :1])
        chunks = generate(model, ids, mask, prefill_chunk_size=19)
        close(torch.stack(chunks.logits), torch.stack(batch.logits))
        more = torch.cat([batch.sequences, tokens(2, 9, seed=5)], 1)
        more_mask = torch.cat([mask, torch.ones(2, more.shape[1] - 61, dtype=mask.dtype)], 1)
        second = generate(model, more, more_mask, past_key_values=batch.past_key_values)
        fresh = generate(model, more, more_mask)
    if recipe == "dense":
        close(torch.stack(second.logits), torch.stack(fresh.logits))
    assert second.past_key_values.get_seq_length() == more.shape[1] + 7


@torch.no_grad()
def test_second_turn_on_an_evicted_cache_sees_what_was_kept():
    """After a ring eviction the new turn's rows see sinks, the window that was kept, and the turn itself."""
    model = tiny()
    ids = tokens(1, 60)
    with use(model, f"cache={STREAM}"):
        first = generate(model, ids)
        kept = first.past_key_values.layers[0].cache.store.view().positions()[0, 0].sort().values.tolist()
        turn = torch.cat([first.sequences, tokens(1, 6, seed=9)], 1)
        second = generate(model, turn, past_key_values=first.past_key_values, max_new_tokens=1, min_new_tokens=1)
    n = turn.shape[1]
    i, j = torch.arange(n)[:, None], torch.arange(n)
    seen = torch.zeros(n, dtype=torch.bool)
    seen[kept] = True
    stream = (j < 3) | (i - j < 17)
    # the prompt ran dense, single steps saw the ring, the new turn (from the last token on) saw what the ring held
    rule = torch.where(i < 60, True, torch.where(i < n - 7, stream, seen[None] | (j >= n - 7)))
    bias = torch.zeros(1, 1, n, n).masked_fill(~(rule & (j <= i)), torch.finfo(torch.float32).min)
    close(second.logits[0], model(turn, attention_mask=bias).logits[:, -1])


@pytest.mark.parametrize("recipe", ["dense", STREAM])
@torch.no_grad()
def test_beams_rescore_to_their_scores(recipe):
    model = tiny()
    ids = tokens(2, 40)
    with use(model, recipe):
        out = generate(model, ids, num_beams=3, output_logits=False, output_scores=True)
        for row in range(2):
            total, cache = 0.0, None
            step = model(ids[row : row + 1], use_cache=True)
            for t in out.sequences[row, 40:]:
                total += step.logits[0, -1].log_softmax(-1)[t].item()
                step = model(t.view(1, 1), past_key_values=step.past_key_values, use_cache=True)
            assert total / 8 == pytest.approx(out.sequences_scores[row].item(), abs=1e-4), cache


@torch.no_grad()
def test_rows_that_pause_in_the_middle():
    """A step in which one row has only padding leaves that row's entries alone, and the row goes on afterwards."""
    model = tiny()
    ids, mask = padded(pads=(0, 0))

    def held(out):
        return [layer.cache.store.view().k[1, :, :61].clone() for layer in out.past_key_values.layers]

    with use(model, "dense"):
        first = model(ids, attention_mask=mask, use_cache=True)
        before = held(first)
        extra = torch.cat([mask, torch.tensor([[1], [0]])], 1)
        step = model(tokens(2, 1, seed=3), attention_mask=extra, past_key_values=first.past_key_values)
        assert step.past_key_values.seen == [62, 61]
        for a, b in zip(before, held(step)):
            assert torch.equal(a, b)
        again = torch.cat([extra, torch.ones(2, 1, dtype=mask.dtype)], 1)
        last = model(tokens(2, 1, seed=4), attention_mask=again, past_key_values=step.past_key_values)
    assert last.past_key_values.seen == [63, 62]
    for a, b in zip(before, held(last)):
        assert torch.equal(a, b)


def test_training_gradients_equal_eager():
    model = tiny()
    ids, mask = padded()
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 13] = -100  # predicted from the last pad, whose output means nothing

    def grads():
        model.zero_grad()
        model(ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    want = grads()
    with foveate.use(model, "dense"):
        got = grads()
        model.gradient_checkpointing_enable()
        model.train()
        again = grads()
        model.eval()
        model.gradient_checkpointing_disable()
    for name in want:
        close(got[name], want[name])
        close(again[name], want[name])


@torch.no_grad()
def test_compiled_model_gives_the_same():
    model = tiny(num_hidden_layers=1)
    ids = tokens(1, 40)
    with use(model, STREAM):
        want = generate(model, ids)
        compiled = torch.compile(model, backend="eager")
        first = compiled(ids, use_cache=True)
        close(first.logits[:, -1], want.logits[0])
        step = compiled(want.sequences[:, 40:41], past_key_values=first.past_key_values, use_cache=True)
        close(step.logits[:, -1], want.logits[1])


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gemma2"])
@torch.no_grad()
def test_rope_is_the_models_own(family):
    """Rotating the projected keys with the handle's rope gives the stored keys, and unrotating takes it back."""
    model = tiny(family)
    ids = tokens(1, 33)
    raw = {}
    with use(model, "dense") as handle:
        for module in handle.layers:
            rope = handle.ropes[module.layer_idx]
            x, pos = torch.randn(1, 2, 33, module.head_dim), torch.arange(33)[None]
            close(rope.unrotate(rope.rotate(x, pos), pos), x, 1e-5)
            if hasattr(module, "k_proj") and not hasattr(module, "k_norm"):
                module.k_proj.register_forward_hook(lambda m, i, o, at=module.layer_idx: raw.update({at: o}))
        cache = model(ids, use_cache=True).past_key_values
        for at, k in raw.items():
            k = k.view(1, 33, 2, -1).transpose(1, 2)
            close(handle.ropes[at].rotate(k, torch.arange(33)[None]), cache.layers[at].cache.store.view().k, 1e-5)


# ---------------------------------------------------------------------- caches
@pytest.mark.parametrize("recipe", ["dense", STREAM])
@torch.no_grad()
def test_fork_and_save(recipe, tmp_path):
    """One context, several questions: forks do not disturb each other; a saved context answers the same."""
    model = tiny()
    ids = tokens(1, 60)
    with use(model, recipe):
        context = model(ids, use_cache=True).past_key_values.compress()
        assert context.evicted == (recipe != "dense")
        ask = [torch.cat([ids, tokens(1, 5, seed=s)], 1) for s in (1, 2)]
        first = generate(model, ask[0], past_key_values=context.fork())
        other = generate(model, ask[1], past_key_values=context.fork())
        assert not torch.equal(first.logits[0], other.logits[0])
        context.save(tmp_path / "context.safetensors")
        back = ContextCache.load(tmp_path / "context.safetensors", model)
        again = generate(model, ask[0], past_key_values=back)
        assert back.nbytes > 0
    for a, b in zip(first.logits, again.logits):
        assert torch.equal(a, b)
    stranger = tiny(num_hidden_layers=2)
    with use(stranger, recipe), pytest.raises(CacheError, match="model"):
        ContextCache.load(tmp_path / "context.safetensors", stranger)
    with pytest.raises(ConfigError, match="no recipe"):
        ContextCache.load(tmp_path / "context.safetensors", stranger)


@torch.no_grad()
def test_eviction_frees_memory():
    model = tiny()
    ids = tokens(1, 400)
    with use(model, "dense"):
        dense = generate(model, ids).past_key_values.nbytes
    with use(model, STREAM):
        ring = generate(model, ids).past_key_values.nbytes
    assert ring < dense / 10


@torch.no_grad()
def test_assisted_decoding():
    model = tiny()
    ids = tokens(1, 40)
    for recipe in ("dense", f"prefill={STREAM}+decode={STREAM}"):
        with use(model, recipe):
            greedy = generate(model, ids, max_new_tokens=12)
            looked = generate(model, ids, max_new_tokens=12, prompt_lookup_num_tokens=3)
        assert torch.equal(greedy.sequences, looked.sequences)
    with use(model, f"cache={STREAM}"):
        with pytest.raises(CacheError, match="assisted"):
            generate(model, ids, max_new_tokens=24, min_new_tokens=24, prompt_lookup_num_tokens=3)
        cache = generate(model, ids).past_key_values
        assert not cache.is_croppable
        with pytest.raises(CacheError, match="evicted"):
            cache.crop(-2)
    with use(model, "dense"):
        cache = generate(model, ids).past_key_values
        seen = cache.get_seq_length()
        cache.crop(-2)
        assert cache.get_seq_length() == seen - 2 and cache.seen == [seen - 2]


@torch.no_grad()
def test_a_cache_outside_its_recipe_is_refused():
    model = tiny()
    ids = tokens(1, 40)
    with use(model, "dense"):
        cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(CacheError, match=r"foveate\.apply"):
        model(ids[:, :1], past_key_values=cache)
    with use(model, STREAM):  # under another recipe it goes on
        model(ids[:, :1], past_key_values=cache)


@torch.no_grad()
def test_a_forward_that_failed_half_way_breaks_its_cache():
    model = tiny()
    ids = tokens(1, 40)
    with use(model, "dense") as handle:
        cache = model(ids, use_cache=True).past_key_values

        class Bad:
            def planned(self, x, plan, seconds):
                if x.layer == 1:
                    raise RuntimeError("stop here")

            def attended(self, x, plan, out):
                pass

        handle.meter = Bad()
        with pytest.raises(RuntimeError, match="stop here"):
            model(ids[:, :1], past_key_values=cache)
        handle.meter = None
        with pytest.raises(CacheError, match="half-way"):
            model(ids[:, :1], past_key_values=cache)
        assert model(ids).logits.shape[1] == 40  # the model itself is fine


# ---------------------------------------------------------------------- in and out
def test_apply_remove_use():
    model, other = tiny(), tiny(seed=1)
    before = model.config._attn_implementation
    handle = foveate.apply(model, "dense")
    with pytest.raises(ConfigError, match="applied already"):
        foveate.apply(model, STREAM)
    foveate.apply(other, STREAM)
    assert str(handle.recipe) == "dense"
    foveate.remove(model)
    assert model.config._attn_implementation == before and not model.get_decoder()._forward_pre_hooks
    assert other.config._attn_implementation == "foveate"
    foveate.remove(other)
    with pytest.raises(ConfigError, match="no recipe"):
        foveate.remove(model)
    with pytest.raises(KeyError), use(model, "dense"):
        raise KeyError("inside")
    assert model.config._attn_implementation == before


@torch.no_grad()
def test_two_models_and_threads():
    models = [tiny(seed=0), tiny(seed=1)]
    recipes = ["dense", STREAM]
    ids = tokens(1, 60)
    want = []
    for model, recipe in zip(models, recipes):
        with use(model, recipe):
            want.append(generate(model, ids).sequences)
    for model, recipe in zip(models, recipes):
        foveate.apply(model, recipe)
    got, errors = {}, []

    def work(key, model):
        try:
            got[key] = generate(model, ids).sequences
        except Exception as err:
            errors.append(err)

    threads = [threading.Thread(target=work, args=((i, r), models[i])) for i in range(2) for r in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    for (i, _), sequences in got.items():
        assert torch.equal(sequences, want[i])
    for model in models:
        foveate.remove(model)


# ---------------------------------------------------------------------- what it refuses
SMALL = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)


def deepseek():
    config = AutoConfig.for_model(
        "deepseek_v3", **SMALL, num_key_value_heads=2, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1, moe_intermediate_size=16,
        first_k_dense_replace=1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def t5():
    return AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("t5", vocab_size=50, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    )


def mamba():
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mamba", vocab_size=50, hidden_size=16, num_hidden_layers=1)
    )


@pytest.mark.parametrize(
    "make,match",
    [(deepseek, "MLA"), (t5, "cross-attention"), (mamba, "attention interface"), (lambda: torch.nn.Linear(2, 2), "Linear")],
    ids=["mla", "encoder-decoder", "no-attention", "not-a-model"],
)
def test_models_it_cannot_serve(make, match):
    model = make()
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    with pytest.raises(UnsupportedError, match=match):
        foveate.apply(model, "dense")
    assert getattr(getattr(model, "config", None), "_attn_implementation", None) == before


@torch.no_grad()
def test_calls_it_cannot_serve():
    model = tiny()
    ids = tokens(1, 20)
    with use(model, "dense"):
        with pytest.raises(UnsupportedError, match="2-D padding mask"):
            model(ids, attention_mask=torch.zeros(1, 1, 20, 20))
        with pytest.raises(ShapeError, match="20 new tokens"):
            model(ids, attention_mask=torch.ones(1, 19))
        with pytest.raises(UnsupportedError, match="packed"):
            model(ids, position_ids=torch.cat([torch.arange(10), torch.arange(10)])[None], use_cache=False)
        full = DynamicCache(config=model.config)
        full.update(torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 16), 0)
        with pytest.raises(UnsupportedError, match="DynamicCache with 5 tokens"):
            model(ids, past_key_values=full)
        with pytest.raises(UnsupportedError, match="cache_implementation"):
            model.generate(ids, max_new_tokens=2, cache_implementation="static", pad_token_id=0)
    with pytest.raises(ConfigError, match="did you mean 'dense'"):
        foveate.apply(model, "dens")
    with pytest.raises(ConfigError, match="backend"):
        foveate.apply(model, "dense", backend="tritn")
    assert model.config._attn_implementation == "eager"


def test_dropout_is_refused():
    model = tiny(attention_dropout=0.1).train()
    with use(model, "dense"), pytest.raises(UnsupportedError, match="dropout"):
        model(tokens(1, 8), use_cache=False)


@torch.no_grad()
def test_longer_than_the_model_is_noted():
    model = tiny(max_position_embeddings=32)
    with use(model, "dense") as handle:
        model(tokens(1, 40))
        assert any("more than the model's 32 positions" in note for note in handle.notes)
