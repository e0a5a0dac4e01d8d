"""What every kind of cache must stand: one table of kinds x demands, each in its ordinary form and under replayed steps.

A batch of two rows of different length talks to a tiny model; what it hears must be what each row hears alone, without
padding, in the ordinary form and straight on. Replays are those of tests/test_graphs.py, so that fixed stores, what lies
beside them and what the host counts are in it without a device.
"""

from __future__ import annotations

import copy
import threading
from contextlib import contextmanager

import pytest
import torch

import foveate
from foveate.adapters.context import ContextCache
from foveate.cache.fixed import Fixed, fix
from foveate.errors import CacheError, ShapeError
from foveate.recipe import Recipe
from tests.models import generate, tiny, tokens
from tests.test_fixed_stores import quantised, same
from tests.test_graphs import Dry, Strict

KINDS = {  # recipe, and how many tokens can be taken back in the middle of an answer (0: none, after an eviction)
    "dense": ("dense", 3),
    "bounds": ("quest:page=4,budget=16,dense_layers=0", 3),
    "paged": (Recipe(decode="dense", storage="paged"), 3),
    "offload": (Recipe(decode="dense", storage="offload"), 3),
    "evicted": ("dense+cache=snapkv:window=8,capacity=24", 0),
    "evicting": ("dense+cache=h2o:heavy=8,recent=8,slack=6", 0),  # also in the middle of an answer
    "ragged": ("dense+cache=adakv:window=4,capacity=16", 0),
    "folding": ("razor_attention:induction=0,echo=0,window=8,fraction=0,slack=6", 0),
    "streaming": ("duo_attention:sparsity=1,sink=2,window=8,slack=6", 0),
    "expected": ("dense+cache=expected_attention:capacity=24", 0),
    "ring": ("dense+cache=streaming_llm:sink=4,window=20", 0),
    "quantised": ("dense+cache=kivi:bits=4,group=4,residual=8", 1),
    "quantised_keys": ("dense+cache=kivi:bits=4,value_bits=16,group=4,residual=8", 2),
    "quantised_values": ("dense+cache=kivi:bits=16,value_bits=4,group=4,residual=8", 1),
    "channels": ("dense+cache=think:window=16,tail_size=8", 3),
    "evicted_channels": ("dense+cache=think:window=8,tail_size=8,capacity=30", 0),
}
STORES = dict(
    bounds="dense",
    evicting="dense",
    folding="dense",
    streaming="dense",
    expected="dense",
    evicted="dense",
    quantised_keys="quantised",
    quantised_values="quantised",
    evicted_channels="channels",
)
FIXED = [kind for kind in KINDS if kind not in ("paged", "offload")]
CASES = [(kind, "ordinary") for kind in KINDS] + [(kind, "replayed") for kind in FIXED]
every = pytest.mark.parametrize("kind,form", CASES)

PADS, N = 5, 44  # the quantised kinds quantise keys in the middle of an answer
PROMPT, MASK = tokens(2, N), torch.ones(2, N, dtype=torch.long)
MASK[0, :PADS] = 0
LATE = torch.ones(2, 5, dtype=torch.long)  # the second turn of row 1 is shorter
LATE[1, :2] = 0
SAID = {name: tokens(2, n, seed=i) for i, (name, n) in enumerate(dict(steps=7, other=5, turn=5, late=5, more=5).items(), 1)}
SAID["cross"] = SAID["other"][[1, 0]]


@pytest.fixture(scope="module")
def model():
    return tiny(num_hidden_layers=2)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


class Placed(Strict):
    """And a graph reads the memory of its capture: every tensor of a store is where it was then."""

    def record(self, cache, held):
        replay, logits = super().record(cache, held)
        run, then = replay.replay, []

        def check():
            now = [own(layer.cache.store) for layer in cache.layers]
            then.append(now)
            assert now == then[0], "a replayed step would read memory that has moved"
            run()

        replay.replay = check
        return replay, logits


def own(store):
    parts = [p for p in vars(store).values() if isinstance(p, tuple)]
    named = [(n, t) for part in (store, *sum(parts, ())) if hasattr(part, "__dict__") for n, t in vars(part).items()]
    return [(n, t.data_ptr()) for n, t in named if isinstance(t, torch.Tensor) and n != "_said"]


@contextmanager
def under(model, kind, form="ordinary", replays=Placed):
    """The recipe of a kind on the model. Under "replayed" there must have been replays, and no reason against them."""
    handle = foveate.apply(model, KINDS[kind][0])
    try:
        if form == "replayed":
            handle.graphs = replays(handle)
            handle.graphs.install()
        yield handle
        if form == "replayed":
            assert handle.graphs.replays > 0 and not handle.notes
    finally:
        handle.remove()


class Talk:
    """A context and what was said since."""

    def __init__(self, model, ids=PROMPT, mask=MASK):
        self.model, self.mask, self.cache = model, torch.ones(len(ids), 0, dtype=torch.long), None
        self.say(ids, mask)

    def say(self, ids, mask=None):
        """All tokens `[B, n]` at once: logits `[B, V]` behind the last."""
        new = torch.ones_like(ids) if mask is None else mask
        self.mask = torch.cat([self.mask, new], 1)
        at = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = self.model(
            input_ids=ids, attention_mask=self.mask, position_ids=at, past_key_values=self.cache, use_cache=True
        )
        self.cache = out.past_key_values
        return out.logits[:, -1]

    def each(self, ids):
        """Token by token: `[n, B, V]`."""
        return torch.stack([self.say(ids[:, i : i + 1]) for i in range(ids.shape[1])])

    def hear(self, name):
        """`[n, B, V]`: steps one by one, turns (n = 1) at once."""
        if name in ("turn", "late"):
            return self.say(SAID[name], LATE if name == "late" else None)[None]
        return self.each(SAID[name])

    def take_back(self, n):
        self.cache.crop(-n)
        self.mask = self.mask[:, :-n]

    def on(self, cache):
        """The same talk over another cache."""
        out = object.__new__(Talk)
        out.model, out.mask, out.cache = self.model, self.mask, cache
        return out


HEARD = {}


def alone(model, kind, row, script):
    """name -> `[n, V]`: what a row hears by itself, without padding. Scripts are few and kept."""
    if (kind, row, script) not in HEARD:
        here, heard = slice(row, row + 1), {}
        with under(model, kind):
            talk = Talk(model, PROMPT[here, PADS * (row == 0) :], None)
            for name in script.split():
                said = SAID[name][here]
                if name in ("turn", "late"):
                    heard[name] = talk.say(said[:, 2:] if name == "late" and row == 1 else said)
                else:
                    heard[name] = talk.each(said)[:, 0]
        HEARD[kind, row, script] = heard
    return HEARD[kind, row, script]


def check(model, kind, got, script, name, rows=(0, 1)):
    """got `[n, B, V]` is what these rows hear alone."""
    for i, row in enumerate(rows):
        torch.testing.assert_close(got[:, i], alone(model, kind, row, script)[name], atol=2e-4, rtol=1e-4)


STRAIGHT, SECOND, CROSSED = "steps other turn", "steps late more", "steps cross"


# ---------------------------------------------------------------------- rows and turns
@every
def test_rows_of_different_length_over_two_turns(model, kind, form):
    with under(model, kind, form):
        talk = Talk(model)
        got = {name: talk.hear(name) for name in SECOND.split()}
        stores = [layer.cache.store for layer in talk.cache.layers]
        assert {s.kind for s in stores} == {STORES.get(kind, kind)}
        assert all(isinstance(s, Fixed) == (form == "replayed") for s in stores)
        assert talk.cache.seen == [N - PADS + 17, N + 15] and talk.cache.get_seq_length() == N + 17
    for name, heard in got.items():
        check(model, kind, heard, SECOND, name)


@every
def test_a_row_that_ends_early_disturbs_nobody(model, kind, form):
    options = dict(max_new_tokens=9, min_new_tokens=0)
    if (kind, "free") not in HEARD:
        with under(model, kind):
            rows = (PROMPT[:1, PADS:], PROMPT[1:])
            HEARD[kind, "free"] = [generate(model, r, eos_token_id=None, **options).sequences[0, -9:] for r in rows]
    short, long = HEARD[kind, "free"]
    end = next(int(t) for t in short if t not in long)
    with under(model, kind, form):
        out = generate(model, PROMPT, MASK, eos_token_id=end, **options).sequences[:, N:]
    stop = short.tolist().index(end) + 1
    assert torch.equal(out[1], long) and torch.equal(out[0, :stop], short[:stop]) and not out[0, stop:].any()


class Beams(Strict):
    """Beams change places at every step, so that none is ever replayed: counts steps over fixed stores instead."""

    def _run(self, cache, ids, at):
        self.replays += all(isinstance(layer.cache.store, Fixed) for layer in cache.layers)
        return super()._run(cache, ids, at)


@every
def test_beams_rescore_to_their_scores(model, kind, form):
    options = dict(num_beams=3, output_logits=False, output_scores=True, max_new_tokens=5, min_new_tokens=5)
    with under(model, kind, form, Beams):
        out = generate(model, PROMPT, MASK, **options)
    with under(model, kind):
        talk = Talk(model)
        talk.cache = None
        talk.mask = talk.mask[:, :0]
        logits = torch.cat([talk.say(PROMPT, MASK)[None], talk.each(out.sequences[:, N:-1])]).log_softmax(-1)
    score = logits.gather(2, out.sequences[:, N:].T[..., None])[..., 0].mean(0)
    torch.testing.assert_close(score, out.sequences_scores, atol=2e-4, rtol=1e-4)


@every
def test_rows_that_are_picked_go_on(model, kind, form):
    """Contrastive and sampled decoding repeat rows and drop others in the middle of an answer; twins share nothing."""
    with under(model, kind, form):
        talk = Talk(model)
        talk.hear("steps")
        talk.cache.batch_repeat_interleave(2)
        talk.cache.batch_select_indices(torch.tensor([3, 0, 2]))
        talk.mask = talk.mask[[1, 0, 1]]
        got = talk.each(SAID["other"][[1, 0, 0]])
    check(model, kind, got[:, :2], STRAIGHT, "other", rows=(1, 0))
    check(model, kind, got[:, 2:], CROSSED, "cross", rows=(1,))


# ---------------------------------------------------------------------- back, beside, away and home again
@every
def test_going_on_after_a_rollback(model, kind, form):
    """Tokens taken back leave nothing behind; what cannot be taken back exactly is refused and the talk goes on."""
    back, other, more = KINDS[kind][1], SAID["other"], SAID["more"]
    with under(model, kind, form):
        talk = Talk(model)
        talk.hear("steps")
        seen = talk.cache.seen
        if back == 3:  # a whole turn
            talk.say(SAID["turn"])
            talk.take_back(5)
        got = [talk.each(other[:, :3])]
        for i, n in ((3, back), (4, 1)):
            if back:
                talk.each(more[:, :n])
                talk.take_back(n)
            if kind not in ("dense", "bounds", "paged", "offload"):
                with pytest.raises(CacheError):
                    talk.take_back(14)
            assert talk.cache.seen == [s + i for s in seen] and talk.cache.get_seq_length() == N + 7 + i
            assert not talk.cache.broken
            got.append(talk.each(other[:, i : i + 1]))
        heard = {"other": torch.cat(got), "turn": talk.hear("turn")}
    for name in heard:
        check(model, kind, heard[name], STRAIGHT, name)


@every
def test_a_copy_does_not_move_with_its_original(model, kind, form):
    """Two talks, step by step in turns, each as if it were the only one."""
    with under(model, kind, form):
        talk = Talk(model)
        talk.hear("steps")
        other = talk.on(talk.cache.fork())
        pairs = [
            (t.say(SAID["other"][:, i : i + 1]), o.say(SAID["cross"][:, i : i + 1]))
            for t, o in [(talk, other)]
            for i in range(5)
        ]
    check(model, kind, torch.stack([a for a, _ in pairs]), STRAIGHT, "other")
    check(model, kind, torch.stack([b for _, b in pairs]), CROSSED, "cross")


@every
def test_a_saved_context_goes_on(model, kind, form, tmp_path):
    """Saved before its first step and in the middle of an answer; what is loaded is saved again under another form."""
    path = tmp_path / "context.safetensors"
    with under(model, kind, form):
        talk = Talk(model)
        talk.cache.save(path)
        talk = talk.on(ContextCache.load(path, model))
        got = {"steps": talk.hear("steps")}
        talk.cache.save(path)
        home = talk.on(ContextCache.load(path, model))
        assert home.cache.seen == talk.cache.seen and home.cache.evicted == talk.cache.evicted
        got |= {name: home.hear(name) for name in ("other", "turn")}
    for name, heard in got.items():
        check(model, kind, heard, STRAIGHT, name)


def test_files_hold_the_sums_of_h2o(model, tmp_path):
    """In the middle of an answer: the next eviction drops what it would have dropped without the file."""
    path = tmp_path / "context.safetensors"
    with under(model, "evicting") as handle:
        talk = Talk(model)
        talk.say(SAID["steps"][:, :1])
        assert talk.cache.save(path) == []
        home = talk.on(ContextCache.load(path, model))
        for t in (talk, home):
            t.hear("other")
        assert not handle.notes and home.cache.evicted
        for a, b in zip(talk.cache.layers, home.cache.layers, strict=True):
            assert a.cache.store.lens == b.cache.store.lens
            assert torch.equal(a.cache.store.view().positions(), b.cache.store.view().positions())


@pytest.mark.parametrize("kind", FIXED)
def test_another_recipe_takes_over(model, kind):
    """What a recipe left behind, fixed or not, serves the next ones alike, captured or not."""
    said = {}
    for form in ("ordinary", "replayed"):
        with under(model, kind, form):
            talk = Talk(model)
            talk.hear("steps")
        for recipe in ("quest:page=8,budget=24,dense_layers=0", "dense"):
            with foveate.use(model, recipe) as handle:
                if form == "replayed":
                    handle.graphs = Dry(handle)
                    handle.graphs.install()
                said[form, recipe] = talk.hear("other")
                assert form == "ordinary" or handle.graphs.replays
        with foveate.use(model, "dense"):
            said[form, "turn"] = talk.hear("turn")
    for (form, what), heard in said.items():
        torch.testing.assert_close(heard, said["ordinary", what], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bounds", "ring", "quantised", "channels"])
def test_two_threads_with_a_cache_each(model, kind):
    got = {}

    def run(name):
        with torch.no_grad():
            talk = Talk(model)
            talk.hear("steps")
            got[name] = talk.hear(name)

    with under(model, kind, "replayed", Dry):
        threads = [threading.Thread(target=run, args=(name,)) for name in ("other", "cross")]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    check(model, kind, got["other"], STRAIGHT, "other")
    check(model, kind, got["cross"], CROSSED, "cross")


# ---------------------------------------------------------------------- what was once wrong
@pytest.mark.parametrize("rule", [(4, 16, 4, 8), (16, 16, 4, 8)])
@pytest.mark.parametrize("order", ["fix, then roll back", "roll back, then fix"])
def test_rollback_of_a_side_that_keeps_its_precision(rule, order):
    """Entries of 16 bits that the rule would still hold back are in codes already after a rollback."""
    store, new = quantised(rule, (21, 13))
    seen = [21, 13]

    def steps(stores, n):
        for _ in range(n):
            k, v = new(1)
            stores = [s.append(k, v, None, seen) for s in stores]
            seen[:] = [s + 1 for s in seen]
        return stores

    (store,) = steps([store], 6)
    twin = store.fork()
    twin = fix(twin, seen) if order.startswith("fix") else twin
    store.truncate(3)
    twin.truncate(3)
    seen[:] = [s - 3 for s in seen]
    twin = fix(twin, seen)
    assert isinstance(twin, Fixed)
    for _ in range(12):
        same(store.view(), twin.view())
        same(store.view(), twin.fork().view())
        store, twin = steps([store, twin], 1)


def test_steps_without_positions(model):
    """transformers then counts columns, padding included; so must captured steps."""

    def run():
        cache, mask, out = None, MASK, []
        for ids in (PROMPT, *SAID["steps"].split(1, 1)):
            mask = MASK if cache is None else torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
            got = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            cache = got.past_key_values
            out.append(got.logits[:, -1])
        return torch.stack(out)

    with under(model, "dense"):
        want = run()
    with under(model, "dense", "replayed"):
        torch.testing.assert_close(run(), want, atol=1e-4, rtol=1e-4)


def test_steps_of_another_batch_are_refused(model):
    with under(model, "dense", "replayed"):
        talk = Talk(model)
        talk.hear("steps")
        with pytest.raises(CacheError, match="expected 2 batch rows like the cache, got 1"):
            model(input_ids=PROMPT[:1, :1], past_key_values=talk.cache, use_cache=True)


def test_a_call_without_a_new_token_is_refused(model):
    """What `generate` leaves of a question that does not begin with the tokens of its document."""
    with under(model, "dense"):
        talk = Talk(model)
        talk.hear("steps")
        seen = talk.cache.get_seq_length()
        with pytest.raises(ShapeError, match=f"input_ids: expected the {seen} tokens of past_key_values and more"):
            model(input_ids=PROMPT[:, :0], past_key_values=talk.cache, use_cache=True)
        assert talk.cache.get_seq_length() == seen


def test_tuples_are_tuples(model):
    with under(model, "dense", "replayed") as handle:
        talk = Talk(model)
        talk.hear("steps")
        out = model(input_ids=PROMPT[:, :1], past_key_values=talk.cache, use_cache=True, return_dict=False)
        assert handle.notes == ["decode steps are not captured: the call asks for a tuple"]
        handle.note_store.clear()
    assert isinstance(out, tuple) and out[0].shape == (2, 1, 101)


def test_a_deep_copy_is_a_fork(model):
    """As recipes of transformers' documentation reuse a prompt: the model is not copied with it, nor are graphs."""
    with under(model, "bounds", "replayed"):
        talk = Talk(model)
        talk.hear("steps")
        other = talk.on(copy.deepcopy(talk.cache))
        assert other.cache.handle is talk.cache.handle and other.cache.captured is None and talk.cache.captured is not None
        got = other.hear("other")
    check(model, "bounds", got, STRAIGHT, "other")


def test_padding_is_taken_back_as_padding(model):
    """Columns, as transformers counts: those of padding hold nothing to take back."""
    with under(model, "dense"):
        talk = Talk(model)
        talk.hear("steps")
        talk.hear("late")
        with pytest.raises(CacheError, match=r"rows have \[0, 2\] tokens of padding among the last 5"):
            talk.cache.crop(-5)
        assert talk.cache.seen == [N - PADS + 12, N + 10] and not talk.cache.broken
        talk.take_back(3)  # behind the padding
        assert talk.cache.seen == [N - PADS + 9, N + 7]
        talk.say(SAID["late"][:, 2:])
        got = talk.hear("more")
        both = torch.tensor([[0, 0, 1], [0, 0, 1]])
        talk.say(SAID["turn"][:, :3], both)
        talk.take_back(3)
        assert talk.cache.seen == [N - PADS + 17, N + 15] and talk.cache.get_seq_length() == N + 17
        talk.cache.batch_select_indices(torch.tensor([0]))
        talk.take_back(10)  # the row without padding there is alone now
        assert talk.cache.seen == [N - PADS + 7] and talk.cache.get_seq_length() == N + 7
        with pytest.raises(CacheError, match="truncate"):
            talk.cache.fork().crop(-N - 8)
    check(model, "dense", got, SECOND, "more")


def test_a_saved_cache_keeps_its_columns(model, tmp_path):
    """Rows that paused in different calls: there are more columns than tokens in any row."""
    path = tmp_path / "context.safetensors"
    with under(model, "dense"):
        talk = Talk(model)
        talk.hear("steps")
        talk.hear("late")
        assert talk.cache.get_seq_length() == N + 12 > max(talk.cache.seen)
        talk.cache.save(path)
        home = talk.on(ContextCache.load(path, model))
        assert home.cache.get_seq_length() == N + 12
        for (first, real), (then, was) in zip(home.cache.padding, talk.cache.padding, strict=True):
            assert first == then and torch.equal(real, was)
        with pytest.raises(CacheError, match=r"rows have \[0, 2\] tokens of padding"):
            home.cache.crop(-5)
        got = home.hear("more")
    check(model, "dense", got, SECOND, "more")


def test_a_cache_that_was_reset_is_new(model):
    with under(model, "bounds", "replayed"):
        talk = Talk(model)
        talk.hear("steps")
        talk.cache.run["left"] = talk.cache.broken = True
        talk.cache.reset()
        assert not talk.cache.run and not talk.cache.broken and talk.cache.get_seq_length() == 0
        talk.mask = talk.mask[:, :0]
        talk.say(PROMPT, MASK)
        got = talk.hear("steps")
    check(model, "bounds", got, STRAIGHT, "steps")


def test_what_another_recipe_remembered_is_not_loaded(model, tmp_path):
    path = tmp_path / "context.safetensors"
    with under(model, "dense"):
        talk = Talk(model)
        talk.hear("steps")
        for layer in talk.cache.layers:
            layer.cache.batch["tensor"] = torch.ones(2, 3)
        talk.cache.save(path)
        assert "tensor" in ContextCache.load(path, model).layers[1].cache.batch
    with under(model, "bounds"):
        assert not ContextCache.load(path, model).layers[1].cache.batch
