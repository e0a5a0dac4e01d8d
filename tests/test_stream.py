"""Perplexity, LongPPL and agreement on running text, on a tiny random model: every figure against a direct computation."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from foveate.adapters.transformers import use
from foveate.errors import ConfigError, ShapeError, UnsupportedError
from foveate.evals import agreement, stream
from foveate.evals.agreement import Fidelity, by_position, measure
from foveate.evals.stream import Head, documents, key_tokens, reference, short_context, short_losses
from foveate.evals.text import Source
from foveate.recipe import Recipe
from tests.tiny import Words, llama, random_prompt

N, STEPS = 160, 12
SPARSE = "prefill=streaming_llm:sink=4,window=20+decode=streaming_llm:sink=4,window=20"
QUEST = "quest:budget=32,page=8,dense_layers=0"
SNAP = "cache=snapkv:capacity=48,window=8,kernel=3"
RING = "cache=streaming_llm:sink=4,window=40"


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def ids():
    return random_prompt(N).ids


@pytest.fixture(scope="module")
def ref(model, ids):
    return reference(model, ids, steps=STEPS)


@pytest.fixture(scope="module")
def plain(model, ids):
    """Logits of the model without Foveate, `[N, V]`."""
    with torch.no_grad():
        return model(input_ids=ids).logits[0].float()


def measured(model, recipe, ids, ref):
    """Without what other tests found out on the same reference."""
    ref.measured.clear()
    return measure(model, recipe, ids, ref, steps=STEPS)


# ---------------------------------------------------------------------- dense
def test_the_references_loss_is_the_models_own(ref, ids, plain):
    want = cross_entropy(plain[:-1], ids[0, 1:], reduction="none")
    torch.testing.assert_close(ref.nll, want, atol=1e-5, rtol=1e-5)
    assert ref.cache.seen == [N - STEPS] and ref.keys is None and ref.hidden.shape == (N, 32)


@pytest.mark.parametrize("storage", ["dense", "paged"])  # the second one reads the prompt again instead of a fork
def test_dense_agrees_with_itself(model, ids, ref, plain, storage):
    got = measured(model, Recipe(prefill="dense", decode="dense", storage=storage), ids, ref)
    losses = cross_entropy(plain[:-1], ids[0, 1:], reduction="none")
    want = {"prefill": losses, "decode": losses[N - STEPS :]}
    for phase, found in got.items():
        a = found.agreement
        assert a["kl"] == pytest.approx(0, abs=1e-6) and a["kl_max"] == pytest.approx(0, abs=1e-6) and a["same"] == 1
        assert a["mass"] == pytest.approx(1, abs=1e-5) and a["mass_low"] == pytest.approx(1, abs=1e-5)
        assert a["error"] < 1e-5 and a["density"] == a["computed"] == 1
        assert found.perplexity["nll"] == pytest.approx(float(want[phase].mean()), abs=1e-5)
        assert found.perplexity["tokens"] == len(want[phase])
        assert found.notes == []


# ---------------------------------------------------------------------- what a recipe changes, and where
def test_a_sparse_recipe_differs_and_its_figures_are_those_of_its_own_logits(model, ids, ref, plain):
    got = measured(model, SPARSE, ids, ref)
    with use(model, SPARSE), torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
    p, q = plain.log_softmax(-1), logits.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    a = got["prefill"].agreement
    assert a["kl"] == pytest.approx(float(kl.mean()), abs=1e-5) and a["kl_max"] == pytest.approx(float(kl.max()), rel=1e-3)
    assert a["same"] == pytest.approx(float((plain.argmax(-1) == logits.argmax(-1)).float().mean()), abs=1e-9)
    losses = cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    assert got["prefill"].perplexity["nll"] == pytest.approx(float(losses.mean()), abs=1e-5)
    for phase in ("prefill", "decode"):
        a = got[phase].agreement
        assert a["kl"] > 1e-4 and a["kl_max"] > a["kl"] and 0 < a["mass_low"] < a["mass"] < 1 and a["error"] > 1e-3
        assert a["density"] < 0.5 and a["computed"] >= a["density"]


def test_decode_is_teacher_forced_token_by_token(model, ids, ref, plain):
    got = measured(model, SPARSE, ids, ref)["decode"]
    with use(model, SPARSE), torch.no_grad():
        out = model(input_ids=ids[:, : N - STEPS], use_cache=True)
        rows = []
        for t in range(N - STEPS, N):
            out = model(input_ids=ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[0, -1])
    logits = torch.stack(rows).float()
    p, q = plain[N - STEPS :].log_softmax(-1), logits.log_softmax(-1)
    assert got.agreement["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-5)
    want = cross_entropy(logits[:-1], ids[0, N - STEPS + 1 :])
    assert got.perplexity["nll"] == pytest.approx(float(want), abs=1e-5)
    assert got.perplexity["tokens"] == STEPS - 1


@pytest.mark.parametrize("recipe", [QUEST, SNAP, RING])
def test_recipes_that_leave_prefill_alone_differ_only_in_decode(model, ids, ref, recipe):
    dense = measured(model, "dense", ids, ref)
    got = measured(model, recipe, ids, ref)
    assert got["prefill"].perplexity == pytest.approx(dense["prefill"].perplexity, abs=1e-6)
    assert got["prefill"].agreement == pytest.approx(dense["prefill"].agreement, abs=1e-6)
    a = got["decode"].agreement
    assert a["kl"] > 1e-6 and a["mass"] < 1 - 1e-4 and a["error"] > 1e-4 and a["density"] < 0.6


def test_a_recipe_that_keeps_everything_is_dense_in_decode_too(model, ids, ref):
    """The policy runs and evicts nothing: mass and error are taken from the keys that were seen, all of them."""
    a = measured(model, "cache=snapkv:capacity=400,window=8", ids, ref)["decode"].agreement
    assert a["kl"] == pytest.approx(0, abs=1e-6) and a["mass"] == pytest.approx(1, abs=1e-5) and a["error"] < 1e-5


def test_the_prefill_of_two_recipes_with_the_same_method_is_measured_once(model, ids, ref):
    ref.measured.clear()
    first = measure(model, "prefill=streaming_llm:sink=4,window=20", ids, ref)
    ticks: list[int] = []
    second = measure(model, "prefill=streaming_llm:sink=4,window=20+" + QUEST, ids, ref, tick=ticks.append)
    assert first["prefill"] is second["prefill"] and sum(ticks) == 2 * N
    assert measure(model, "dense", ids, ref)["prefill"] is not first["prefill"]


def test_measuring_leaves_the_reference_as_it_was(model, ids, ref):
    before = measured(model, QUEST, ids, ref)["decode"]
    assert ref.cache.seen == [N - STEPS]
    assert measured(model, QUEST, ids, ref)["decode"] == before


# ---------------------------------------------------------------------- outputs of layers
class Rows(Fidelity):
    """Keeps what the meter compares, row by row."""

    def compared(self, x, rows, visible, kept, out):
        super().compared(x, rows, visible, kept, out)
        values = self._values[x.layer] if x.layer in self._values else x.kv.to_dense().v[0]
        largest = values.norm(dim=-1).amax(-1).repeat_interleave(x.q.shape[1] // values.shape[0])  # [H]
        far = (out[0][:, rows] - self.dense_rows(x, rows, visible)).norm(dim=-1)
        self.__dict__.setdefault("seen", []).append((far, 2 * (1 - kept.double()) * largest[:, None]))


def rows_of(model, ids, recipe, phase):
    """What the meter compares over a prompt and the steps after it."""
    meter = Rows(Recipe.of(recipe), phase=phase)
    with use(model, recipe) as handle, torch.no_grad():
        handle.meter = meter
        cache = model(input_ids=ids[:, : N - STEPS], use_cache=True).past_key_values
        for t in range(N - STEPS, N):
            model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
    return meter.seen


@pytest.mark.parametrize("recipe", [SPARSE, SNAP, QUEST])
def test_steps_that_are_not_looked_at_change_nothing(model, ids, recipe, monkeypatch):
    few = rows_of(model, ids, recipe, "decode")
    monkeypatch.setattr(agreement, "EVERY", 1)
    every = rows_of(model, ids, recipe, "decode")
    at = [3 * step + layer for step in range(0, STEPS, 8) for layer in range(3)]
    assert len(every) == 3 * STEPS and len(few) == len(at) < len(every)
    for (far, bound), i in zip(few, at, strict=True):
        assert torch.equal(far, every[i][0]) and torch.equal(bound, every[i][1])


@pytest.mark.parametrize("recipe, phase", [(SPARSE, "prefill"), (SPARSE, "decode"), (SNAP, "decode"), (QUEST, "decode")])
def test_the_error_of_a_row_is_bounded_by_its_lost_mass(model, ids, recipe, phase, monkeypatch):
    """||o - o_S|| <= 2 (1 - mass) max ||v||, for every row, exactly."""
    monkeypatch.setattr(agreement, "EVERY", 1)
    seen = rows_of(model, ids, recipe, phase)
    assert len(seen) == (3 if phase == "prefill" else 3 * STEPS)
    tight = 0.0
    for far, bound in seen:
        assert (far <= bound + 1e-5).all()
        tight = max(tight, float((far / bound.clamp(min=1e-3)).max()))
    assert tight > 0.05  # the errors are not all zero


def test_layer_error_against_the_models_own_probabilities(ids):
    """One layer, prefill: relative error on the sampled rows from eager attention probabilities."""
    from foveate.diagnosis import sample_rows

    model = llama(layers=1)
    recipe = Recipe.of("prefill=streaming_llm:sink=2,window=7")
    meter = Fidelity(recipe, seed=5)
    with use(model, recipe) as handle, torch.no_grad():
        handle.meter = meter
        model(input_ids=ids, use_cache=False)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(input_ids=ids, output_attentions=True, output_hidden_states=True)
        p = out.attentions[0][0]  # [H, N, N]
        layer = model.model.layers[0]
        v = layer.self_attn.v_proj(layer.input_layernorm(out.hidden_states[0]))[0].view(N, 2, -1).transpose(0, 1)
    v = v.repeat_interleave(2, 0)
    i, j = torch.arange(N)[:, None], torch.arange(N)
    s = p * ((j <= i) & ((j < 2) | (i - j < 7)))
    s = s / s.sum(-1, keepdim=True)
    rows = sample_rows(N, 5)
    a, b = (p @ v)[:, rows], (s @ v)[:, rows]
    assert meter.values()["error"] == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-4)
    kept = (p * ((j <= i) & ((j < 2) | (i - j < 7)))).sum(-1)[:, rows]
    assert meter.values()["mass_low"] == pytest.approx(float(kept.flatten().quantile(0.01)), abs=1e-5)


def test_sinks_of_the_model_belong_to_the_dense_output(ids):
    from foveate.combine import sink_logit
    from foveate.methods.base import AttnInput

    seen = {}

    class Once(Fidelity):
        def compared(self, x: AttnInput, rows, visible, kept, out):
            full = self.dense_rows(x, rows, visible)
            scores = torch.einsum("hrd,hmd->hrm", x.q[0][:, rows], x.kv.k[0].repeat_interleave(2, 0)) * x.scale
            lse = scores.masked_fill(~visible, float("-inf")).logsumexp(-1)
            sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
            want, _ = sink_logit(full[None], lse[None], sinks)
            self.sinks = {x.layer: sinks}
            seen["got"], seen["want"] = self.dense_rows(x, rows, visible), want[0]

    model = llama(layers=1)
    with use(model, "dense") as handle, torch.no_grad():
        handle.meter = Once(Recipe.of("dense"))
        model(input_ids=ids, use_cache=False)
    torch.testing.assert_close(seen["got"], seen["want"], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- losses and logits
@pytest.mark.parametrize("first, n", [(1, 159), (1, 1), (7, 3), (149, 11), (128, 64)])
def test_position_buckets_part_the_tokens_and_average_to_the_mean(first, n):
    losses = torch.rand(n, generator=torch.Generator().manual_seed(n)).double()
    got = by_position(losses, first)
    total, tokens = 0.0, 0
    for name, value in got.items():
        p = int(name.removeprefix("nll@"))
        assert p & (p - 1) == 0
        inside = [t for t in range(first, first + n) if p <= t < 2 * p]
        assert value == pytest.approx(float(torch.stack([losses[t - first] for t in inside]).mean()))
        total, tokens = total + value * len(inside), tokens + len(inside)
    assert tokens == n and total / tokens == pytest.approx(float(losses.mean()))


def test_the_head_in_pieces_is_the_whole_head(model, ids, ref, plain):
    head = Head(model)
    for rows in (1, 7, N, 1000):
        pieces = list(head.tables(ref.hidden, rows))
        assert [first for first, _ in pieces] == list(range(0, N, rows))
        torch.testing.assert_close(torch.cat([t for _, t in pieces]), plain, atol=1e-5, rtol=1e-5)


def test_measure_does_not_depend_on_how_many_rows_are_taken_at_once(model, ids, ref, monkeypatch):
    whole = measured(model, SPARSE, ids, ref)
    monkeypatch.setattr(Head.tables, "__defaults__", (7,))
    pieces = measured(model, SPARSE, ids, ref)
    for phase in whole:
        assert pieces[phase].perplexity == pytest.approx(whole[phase].perplexity, abs=1e-5)
        assert pieces[phase].agreement == pytest.approx(whole[phase].agreement, abs=1e-5)


def test_logits_are_scaled_and_capped_as_the_config_says_or_the_model_is_refused(model, ids):
    hidden = torch.randn(3, 32)
    whole = model.lm_head(hidden).float()
    config = model.config
    try:
        config.final_logit_softcapping, config.logits_scaling = 5.0, 2.0
        torch.testing.assert_close(Head(model)(hidden), 5 * torch.tanh(whole / 10))
        with pytest.raises(UnsupportedError, match="LlamaForCausalLM changes its logits in an unknown way"):
            reference(model, ids, steps=STEPS)  # this model itself does neither
    finally:
        del config.final_logit_softcapping, config.logits_scaling


# ---------------------------------------------------------------------- LongPPL
@pytest.fixture(scope="module")
def repeated():
    block = torch.randint(3, 101, (1, 60), generator=torch.Generator().manual_seed(3))
    return block.repeat(1, 4)[:, :200]


def slow_short(model, ids, short, stride):
    """Each token by itself: the last window start that leaves it at least `short` tokens; None at start 0."""
    out = []
    for t in range(1, ids.shape[1]):
        start = (t - short) // stride * stride
        if t < short or start == 0:
            out.append(float("nan"))
            continue
        assert short <= t - start < short + stride
        logits = model(input_ids=ids[:, start:t]).logits[0, -1].float()
        out.append(float(cross_entropy(logits, ids[0, t])))
    return torch.tensor(out)


def test_short_losses_and_keys_against_one_window_a_token(model, repeated, monkeypatch):
    n = repeated.shape[1]
    short, stride = short_context(n)
    assert (short, stride) == (100, 25)
    with torch.no_grad():
        want = slow_short(model, repeated, short, stride)
        full = cross_entropy(model(input_ids=repeated).logits[0, :-1].float(), repeated[0, 1:], reduction="none")
    with use(model, "dense"), torch.no_grad():
        got = short_losses(model, Head(model), repeated, short, stride)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4, equal_nan=True)
    assert not got[: short + stride - 1].isfinite().any() and got[short + stride - 1 :].isfinite().all()

    monkeypatch.setattr(stream, "GAIN", 0.01)  # a random model gains little
    monkeypatch.setattr(stream, "KNOWN", 6.0)
    monkeypatch.setattr(stream, "FEWEST", 5)
    keys = (want - full > 0.01) & (full < 6.0)
    ref = reference(model, repeated, steps=STEPS, longppl=True)
    assert 5 <= int(keys.sum()) < n - short
    assert torch.equal(ref.keys, keys)
    found = measure(model, SPARSE, repeated, ref)
    assert found["prefill"].perplexity["long_tokens"] == int(keys.sum())
    with use(model, SPARSE), torch.no_grad():
        sparse = model(input_ids=repeated, use_cache=False).logits[0, :-1].float()
    losses = cross_entropy(sparse, repeated[0, 1:], reduction="none")
    assert found["prefill"].perplexity["long_nll"] == pytest.approx(float(losses[keys].mean()), abs=1e-4)
    assert "long_nll" not in found["decode"].perplexity


def test_key_tokens_by_hand():
    full = torch.tensor([1.0, 1.0, 2.5, 1.99, 0.1])
    short = torch.tensor([3.5, 2.9, 9.0, float("nan"), 2.2])
    assert key_tokens(full, short).tolist() == [True, False, False, False, True]


def test_too_few_key_tokens_are_not_reported(model, repeated):
    ref = reference(model, repeated, steps=STEPS, longppl=True)
    assert ref.keys is None and "fewer than 50; not reported" in ref.notes[1]
    assert "long_nll" not in measure(model, "dense", repeated, ref)["prefill"].perplexity


def test_short_contexts_are_those_of_the_paper_where_there_is_room():
    assert short_context(8192) == short_context(100_000) == (4096, 1024)
    assert short_context(4000) == (2000, 500) and short_context(16) == (8, 2)


# ---------------------------------------------------------------------- documents
class Marked(Words):
    """Puts 1 in front and 2 at the end, as some tokenizers do."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [1, *super().__call__(text)["input_ids"], 2]}


def source(words):
    prose = tuple(f"w{i}." if i % 10 == 9 else f"w{i}" for i in range(words))
    return Source((), (), (), prose, "test")


class Numbers(Words):
    """One token a word: its number."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [int(w.strip("w.")) for w in text.split()]}


def test_documents_are_exact_reproducible_and_different():
    got = documents(Numbers(), source(1000), 100, 4, 7)
    assert all(d.shape == (1, 100) and d.dtype == torch.int64 for d in got) and got.notes == []
    for d in got:
        assert torch.equal(d[0], (d[0, 0] + torch.arange(100)) % 1000) and d[0, 0] % 10 == 0  # prose, from a sentence on
    starts = sorted(int(d[0, 0]) for d in got)
    assert all(b - a >= 100 for a, b in zip(starts, starts[1:]))  # no two share a word
    more = documents(Numbers(), source(1000), 100, 6, 7)
    assert all(torch.equal(a, b) for a, b in zip(got, more))  # asking for more changes none
    assert not torch.equal(got[0], documents(Numbers(), source(1000), 100, 1, 8)[0])


def test_short_text_is_repeated_and_says_so():
    got = documents(Numbers(), source(60), 100, 1, 0)
    assert torch.equal(got[0][0], (got[0][0, 0] + torch.arange(100)) % 60)
    assert "has 60 words" in got.notes[0] and "repeated within a document" in got.notes[0]
    assert "overlap" in documents(Numbers(), source(250), 100, 4, 0).notes[0]


def test_special_tokens_in_front_stay_and_those_at_the_end_go():
    got = documents(Marked(), source(500), 50, 2, 0)
    assert all(d.shape == (1, 50) and d[0, 0] == 1 and 2 not in d[0] for d in got)


def test_a_text_without_sentences_and_a_tokenizer_that_cuts():
    words = Source((), (), (), tuple(f"w{i}" for i in range(300)), "test")
    assert documents(Numbers(), words, 100, 2, 0)[1].shape == (1, 100)

    class Cuts(Numbers):
        def __call__(self, text, add_special_tokens=True, verbose=True):
            return {"input_ids": super().__call__(text)["input_ids"][:64]}

    with pytest.raises(ConfigError, match="it seems to cut long texts"):
        documents(Cuts(), words, 100, 1, 0)


# ---------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m, i, r: documents(Words(), source(10), 1, 1, 0), ConfigError, "length: expected at least 2, got 1"),
        (lambda m, i, r: documents(Words(), source(10), 9, 0, 0), ConfigError, "samples: expected at least 1, got 0"),
        (lambda m, i, r: documents(Words(), source(0), 9, 1, 0), ConfigError, "source: expected some prose"),
        (lambda m, i, r: reference(m, i[0], steps=4), ShapeError, r"ids: expected int64 \[1, tokens\]"),
        (lambda m, i, r: reference(m, i.int(), steps=4), ShapeError, "got torch.int32"),
        (lambda m, i, r: reference(m, i, steps=1), ConfigError, "steps: expected 2 to 158"),
        (lambda m, i, r: reference(m, i, steps=159), ConfigError, "steps: expected 2 to 158"),
        (lambda m, i, r: reference(m, i[:, :12], steps=4, longppl=True), ConfigError, "LongPPL expects at least 16"),
        (lambda m, i, r: measure(m, "dense", i + 1, r), ShapeError, "ids: expected the reference's"),
        (lambda m, i, r: measure(m, "dense", i[:, 1:], r), ShapeError, "ids: expected the reference's"),
        (lambda m, i, r: measure(m, "dense", i, r, steps=5), ConfigError, "steps: expected the reference's 12, got 5"),
        (lambda m, i, r: measure(m, "nope", i, r), ConfigError, "unknown id 'nope'"),
        (lambda m, i, r: measure(m, "dense", i, r, backend="nope"), ConfigError, "unknown name 'nope'"),
    ],
)
def test_bad_input(model, ids, ref, call, error, message):
    before = model.config._attn_implementation
    ref.measured.clear()
    with pytest.raises(error, match=message):
        call(model, ids, ref)
    assert model.config._attn_implementation == before


def test_figures_that_are_not_finite_are_left_out_and_said(model, ids, ref, monkeypatch):
    ref.measured.clear()
    monkeypatch.setattr(Fidelity, "values", lambda self: {"mass": None, "error": float("nan"), "density": 1.0})
    found = measure(model, "dense", ids, ref)["prefill"]
    ref.measured.clear()
    assert found.agreement.keys() == {"kl", "kl_max", "same", "density"}
    assert found.notes == ["prefill: not measured or not finite: mass, error"]
