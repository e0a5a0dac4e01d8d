"""LongHeads: chunk keys, choices and outputs against a slow transcription of its card."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.errors import ConfigError, UnsupportedError
from foveate.methods import longheads
from foveate.methods.base import State
from foveate.methods.longheads import KEYS, LongHeads
from foveate.recipe import Recipe
from foveate.registry import parse
from foveate.scores import chunk_keys
from tests.drive import Drive, Rotary, oracle, qkv
from tests.fidelity import CASES, planned
from tests.models import tiny, tokens
from tests.prompts import call, listed
from tests.test_graphs import dry, said

SMALL = "longheads:chunk=16,attention=64,block=16"
ROW = "longheads:chunk=16,attention=64,block=1"


def turn(x, at, freq):
    """Vectors `[n, D]` rotated from positions 0 to `at` `[n]`."""
    a = torch.as_tensor(at, dtype=torch.float64)[:, None] * freq.double()
    x1, x2 = x.double().chunk(2, -1)
    return torch.cat([x1 * a.cos() - x2 * a.sin(), x2 * a.cos() + x1 * a.sin()], -1)


class Text:
    """q, k, v `[1, heads, M, D]` of one text, before rotation and in fp64."""

    def __init__(self, q, k, v, freq, w, m):
        at = -torch.arange(q.shape[2])
        flat = lambda t: torch.stack([turn(one, at, freq) for one in t[0]])  # noqa: E731
        self.q, self.k, self.v, self.freq, self.w, self.m = flat(q), flat(k), v[0].double(), freq, w, m
        self.r, self.scale = q.shape[1] // k.shape[1], q.shape[3] ** -0.5

    def key(self, a, i, first=0):
        """c_i of head a: the card's step 2. Queries before place `first` of the chunk are unknown."""
        span, local = slice(i * self.w, (i + 1) * self.w), torch.arange(self.w)
        q, k = turn(self.q[a, span], local, self.freq), turn(self.k[a // self.r, span], local, self.freq)
        out = (q @ k.T * self.scale).softmax(-1) @ self.v[a // self.r, span]
        return (out[first:].mean(0) @ k.T * self.scale).softmax(-1) @ k

    def chosen(self, heads, r0, r1):
        """The chunks that rows r0..r1, all of one chunk, read in common; heads share a list by their highest score."""
        t = r0 // self.w
        score = {i: max(float(self.q[a, r0:r1].mean(0) @ self.key(a, i)) for a in heads) for i in range(1, t - 1)}
        free = sorted(score, key=lambda i: (-score[i], i))[: self.m - 3]
        return sorted({0, max(0, t - 1), t, *free})

    def out(self, a, i, chunks):
        """The output of row i of head a: chunks joined in order, positions 0.. along them."""
        tokens_ = [j for c in chunks for j in range(c * self.w, (c + 1) * self.w) if j <= i]
        assert len(tokens_) <= self.m * self.w and tokens_[-1] == i
        k = turn(self.k[a // self.r, tokens_], list(range(len(tokens_))), self.freq)
        q = turn(self.q[a, i : i + 1], [len(tokens_) - 1], self.freq)[0]
        return (k @ q * self.scale).softmax(0) @ self.v[a // self.r, tokens_]


def text_of(q, k, v, method, d=16, base=1e4):
    return Text(q, k, v, Rotary(d, base).freq, method.chunk, method.keep)


def chunks(layout, a, block):
    return [n // layout.tile_width for n in listed(layout.tiles[0, a, block], layout.tile_count[0, a, block])]


# ---------------------------------------------------------------------- the card
@pytest.mark.parametrize("share", ["head", "group"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_selection(case, share):
    q, k, v, rope = case.make()
    h, g = q.shape[1], k.shape[1]
    recipe = f"longheads:chunk=32,attention=160,block=16,share={share}"
    layout, text = planned(recipe, case), Text(q, k, v, rope.freq, 32, 5)
    layout.validate()
    for block in (0, 9, 10, 13, 18):
        for a in range(layout.tiles.shape[1]):
            heads = [a] if share == "head" else range(a * h // g, (a + 1) * h // g)
            assert chunks(layout, a, block) == text.chosen(heads, block * 16, min(300, block * 16 + 16))


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("diagonal", "smollm2-17")], ids=str)
def test_selection_of_chunked_prompts(case):
    """Calls that end inside chunks give the chunk keys of the whole prompt; a cut block has the mean of its rows here."""
    q, k, v, rope = case.make()
    cuts = (0, 200, 233, 240, 300)
    layouts = planned("longheads:chunk=32,attention=160,block=16", case, chunks=cuts[1:-1])
    text = Text(q, k, v, rope.freq, 32, 5)
    for layout, a, b in zip(layouts, cuts, cuts[1:], strict=False):
        for i, block in enumerate(range(a // 16, -(-b // 16))):
            r0, r1 = max(a, block * 16), min(b, block * 16 + 16)
            assert chunks(layout, 1, i) == text.chosen([1], r0, r1)


@pytest.mark.parametrize("h,g", [(2, 2), (3, 1), (8, 1), (4, 2)])
def test_outputs_count_positions_inside_the_choice(h, g):
    """Prompt rows and decode steps, on both sides of a chunk's end."""
    q, k, v = qkv(1, h, g, 115)
    method, drive = parse(SMALL), Drive(Recipe.of(SMALL))
    text = text_of(q, k, v, method)
    out = drive(*(t[:, :, :110] for t in (q, k, v)))
    for i in (5, 63, 64, 79, 80, 95, 109):
        for a in range(h):
            block = i // 16 * 16
            want = text.out(a, i, text.chosen([a], block, min(110, block + 16)))
            torch.testing.assert_close(out[0, a, i].double(), want, atol=1e-5, rtol=1e-4)
    for i in range(110, 115):  # the row at 111 ends its chunk
        out = drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
        for a in range(h):
            chosen = text.chosen([a], i, i + 1)
            assert chunks(drive.last[1], a, 0) == chosen
            torch.testing.assert_close(out[0, a, 0].double(), text.out(a, i, chosen), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", ["rank", "text"])
@pytest.mark.parametrize("h,g", [(2, 2), (3, 1), (8, 1)])
def test_up_to_the_attention_length_all_is_dense(h, g, positions):
    """As a whole, as the first rows of a longer prompt, and as the shorter row of a batch in decode."""
    q, k, v = qkv(2, h, g, 92)
    want = oracle(q, (k, v))
    drive = Drive(Recipe.of(f"{SMALL},positions={positions}"))
    torch.testing.assert_close(drive(*(t[:, :, :64] for t in (q, k, v))), want[:, :, :64], atol=1e-5, rtol=1e-5)
    drive = Drive(Recipe.of(f"{SMALL},positions={positions}"))
    valid = torch.ones(2, 90, dtype=torch.bool)
    valid[1, :40] = False
    out = drive(*(t[:, :, :90] for t in (q, k, v)), valid=valid)
    torch.testing.assert_close(out[:1, :, :64], want[:1, :, :64], atol=1e-5, rtol=1e-5)
    for i in (90, 91):
        out = drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
        short = oracle(q[1:, :, 40 : i + 1], (k[1:, :, 40 : i + 1], v[1:, :, 40 : i + 1]))
        torch.testing.assert_close(out[1:], short[:, :, -1:], atol=1e-5, rtol=1e-5)


def test_no_position_reaches_the_attention_length():
    class Spy(Rotary):
        top = 0

        def rotate(self, x, pos):
            self.top = max(self.top, int(pos.max()))
            return super().rotate(x, pos)

    spy, (q, k, v) = Spy(16), qkv(1, 4, 2, 180)
    drive = Drive(Recipe.of(SMALL))
    object.__setattr__(drive.info, "rope", spy)
    drive(*(t[:, :, :150] for t in (q, k, v)))
    for i in range(150, 180):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
        assert drive.last[1].tile_count.tolist() == [[[4]] * 4]
    assert spy.top == 63
    assert Recipe.of("longheads").extends and not Recipe.of("longheads:positions=text").extends


def test_rows_with_their_own_choice_are_causal():
    """block=1, as in the paper: later tokens change nothing, bit for bit, and prompt rows equal decode steps."""
    q, k, v = qkv(1, 4, 2, 120)
    q2, k2, v2 = (torch.cat([t[:, :, :97], t[:, :, 97:] + 3.0], 2) for t in (q, k, v))
    a, b = Drive(Recipe.of(ROW)), Drive(Recipe.of(ROW))
    first, second = a(q, k, v), b(q2, k2, v2)
    assert torch.equal(first[:, :, :97], second[:, :, :97])
    assert torch.equal(a.last[1].to_mask()[:, :, :97], b.last[1].to_mask()[:, :, :97])
    steps = Drive(Recipe.of(ROW))
    steps(*(t[:, :, :90] for t in (q, k, v)))
    for i in range(90, 120):
        out = steps(*(t[:, :, i : i + 1] for t in (q, k, v)))
        torch.testing.assert_close(out, first[:, :, i : i + 1], atol=1e-5, rtol=1e-5)


def test_the_own_key_is_seen():
    """The published prefill cuts the query's own key off; a value that only the own token has must come through."""
    q, k, v = qkv(1, 2, 2, 100)
    v[...] = 0
    v[:, :, 99] = 1.0
    k[:, :, 99] = 30 * q[:, :, 99]
    out = Drive(Recipe.of(SMALL))(q, k, v)
    assert (out[:, :, 99] > 0.99).all() and (out[:, :, :99] == 0).all()


def test_a_chunk_whose_keys_all_point_like_the_query_is_chosen():
    q, k, v = (0.1 * t for t in qkv(1, 4, 2, 180))
    q[..., 7] = k[..., 7] = 0  # the axis that turns slowest
    k[:, :, 48:64, 7] = 5.0
    q[:, :, 170:, 7] = 5.0
    drive = Drive(Recipe.of(SMALL))
    drive(*(t[:, :, :179] for t in (q, k, v)))
    assert all(3 in chunks(drive.last[1], a, 11) for a in range(4))
    drive(*(t[:, :, 179:] for t in (q, k, v)))
    assert all(3 in chunks(drive.last[1], a, 0) for a in range(4))


# ---------------------------------------------------------------------- chunk keys and the cache
def complete(drive, q, k, v, length):
    """Compare the keys of complete chunks with those from scratch."""
    text = text_of(q, k, v, drive.recipe.decode)
    data = drive.cache.batch[KEYS].data
    for i in range(length // 16):
        for a in range(q.shape[1]):
            torch.testing.assert_close(data[0, a, i].double(), text.key(a, i), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("prefill", ["", "prefill=dense+decode=", "prefill=minference:columns=200+decode="])
def test_chunk_keys_grow_with_the_text(prefill):
    """Prompts in calls of any length, then steps; whoever serves the prompt, the queries are seen."""
    q, k, v = qkv(1, 4, 2, 130)
    drive = Drive(Recipe.of(prefill + SMALL))
    for a, b in ((0, 21), (21, 30), (30, 77), (77, 95)):
        drive(*(t[:, :, a:b] for t in (q, k, v)))
    for i in range(95, 130):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
    complete(drive, q, k, v, 130)


@pytest.mark.parametrize("lens", [(120, 71), (112, 96)])
def test_keys_of_rows_of_any_length(lens):
    """Where only the device knows whose chunk ends, a key is there before the chunk after its own has ended."""
    (q, k, v), steps, most = qkv(2, 4, 2, 170), 45, max(lens)
    drive = Drive(Recipe.of(f"prefill=dense+decode={SMALL}"))
    valid = torch.arange(most) >= most - torch.tensor(lens)[:, None]
    drive(*(t[:, :, :most] for t in (q, k, v)), valid=valid)
    for i in range(most, most + steps):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
        for b, n in enumerate(lens):
            length = i + 1 - most + n
            text = text_of(*(t[b : b + 1, :, most - n : i + 1] for t in (q, k, v)), drive.recipe.decode)
            c = length // 16 - 2  # the newest chunk that is not chosen anyway
            got = drive.cache.batch[KEYS].data[b, :, c].double()
            torch.testing.assert_close(got, torch.stack([text.key(a, c) for a in range(4)]), atol=1e-5, rtol=1e-4)


def test_rollback_fork_and_reorder():
    """Up to a chunk back, keys are those of a text that never had the tokens."""
    q, k, v = qkv(1, 4, 2, 150)
    drive = Drive(Recipe.of(SMALL))
    drive(*(t[:, :, :90] for t in (q, k, v)))
    for i in range(90, 101):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
    drive.cache.truncate(14)
    other = Drive(drive.recipe)
    other.cache = drive.cache.fork()
    text = [torch.cat([t[:, :, :87], t[:, :, 110:150]], 2) for t in (q, k, v)]
    for i in range(87, 127):
        drive(*(t[:, :, i : i + 1] for t in text))
    complete(drive, *text, 127)
    other(*(t[:, :, 87:120] for t in text))  # a fork takes another prompt
    other.cache.reorder(torch.tensor([0]))
    for i in range(120, 127):
        out = other(*(t[:, :, i : i + 1] for t in text))
    complete(other, *text, 127)
    torch.testing.assert_close(out, drive.last[2], atol=1e-5, rtol=1e-5)


def test_a_prompt_part_that_is_taken_back_and_replaced():
    """Another part of the same length at the same place is another part."""
    q, k, v = qkv(1, 4, 2, 140)
    drive = Drive(Recipe.of(SMALL))
    drive(*(t[:, :, :60] for t in (q, k, v)))
    drive(*(t[:, :, 60:90] for t in (q, k, v)))
    drive.cache.truncate(30)
    text = [torch.cat([t[:, :, :60], t[:, :, 100:140]], 2) for t in (q, k, v)]
    drive(*(t[:, :, 60:90] for t in text))
    for i in range(90, 100):
        drive(*(t[:, :, i : i + 1] for t in text))
    for i in (2, 4, 5):
        got = drive.cache.batch[KEYS].data[0, 3, i].double()
        torch.testing.assert_close(got, text_of(*text, parse(SMALL)).key(3, i), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("more", [0, 3])
def test_queries_of_a_prompt_part_that_is_taken_back(more):
    """Decode steps replace its tokens: the next part of the prompt does not take their old queries for the new ones."""
    q, k, v = qkv(1, 4, 2, 125)
    drive = Drive(Recipe.of(SMALL))
    drive(*(torch.cat([t[:, :, :70], t[:, :, 100:120]], 2) for t in (q, k, v)))
    drive.cache.truncate(20)
    for lo, hi in ([70, 70 + more], *([i, i + 1] for i in range(70 + more, 95)), [95, 124], [124, 125]):
        if lo < hi:
            drive(*(t[:, :, lo:hi] for t in (q, k, v)))
    text = text_of(q, k, v, parse(SMALL))
    for a in range(4):
        got = drive.cache.batch[KEYS].data[0, a, 5].double()
        torch.testing.assert_close(got, text.key(a, 5, first=15), atol=1e-5, rtol=1e-4)


def test_queries_nobody_saw():
    """A cache that another recipe filled: chunks have the mean of their keys until their own queries come."""
    q, k, v = qkv(2, 4, 2, 130)
    drive = Drive(Recipe.of("dense"))
    drive(*(t[:, :, :100] for t in (q, k, v)))
    drive.recipe = Recipe.of(SMALL)
    for i in range(100, 130):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
    text, data = text_of(q, k, v, parse(SMALL)), drive.cache.batch[KEYS].data
    for i in (0, 5):
        mean = turn(text.k[1, i * 16 : i * 16 + 16], torch.arange(16), text.freq).mean(0)
        torch.testing.assert_close(data[0, 2, i].double(), mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(data[0, 2, 6].double(), text.key(2, 6, first=4), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(data[0, 2, 7].double(), text.key(2, 7), atol=1e-5, rtol=1e-4)
    more = [t[:, :, :40] for t in qkv(2, 4, 2, 40, seed=9)]  # a second prompt; its tokens' queries are known
    drive(*more)
    drive(*(t[:, :, :1] for t in more))
    both = [torch.cat([a, b], 2) for a, b in zip((q, k, v), more, strict=True)]
    text, data = text_of(*both, parse(SMALL)), drive.cache.batch[KEYS].data
    torch.testing.assert_close(data[0, 2, 9].double(), text.key(2, 9), atol=1e-5, rtol=1e-4)


def test_steps_that_nobody_watched():
    """Steps below a length gate run without the method: chunks that they ended have mean keys, the prompt its own."""
    q, k, v = qkv(1, 4, 2, 110)
    drive = Drive(Recipe.of(SMALL))
    drive(*(t[:, :, :40] for t in (q, k, v)))
    drive.recipe = Recipe.of("dense")
    for i in range(40, 100):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
    drive.recipe = Recipe.of(SMALL)
    for i in range(100, 110):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
    text, data = text_of(q, k, v, parse(SMALL)), drive.cache.batch[KEYS].data
    mean = turn(text.k[1, 64:80], torch.arange(16), text.freq).mean(0)
    torch.testing.assert_close(data[0, 2, 4].double(), mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(data[0, 2, 1].double(), text.key(2, 1), atol=1e-5, rtol=1e-4)


def test_steps_that_nobody_watched_after_a_rollback():
    """What an earlier turn's steps knew is of a text that is no more, though the step that would begin anew ran without
    the method."""
    old, new = qkv(1, 4, 2, 110), qkv(1, 4, 2, 110, seed=1)
    mixed = [torch.cat([a[:, :, :32], b[:, :, 32:]], 2) for a, b in zip(old, new, strict=True)]
    a, b = Drive(Recipe.of(SMALL)), Drive(Recipe.of(SMALL))
    a(*(t[:, :, :100] for t in old))
    a(*(t[:, :, 100:101] for t in old))
    a.cache.truncate(101 - 32)
    b(*(t[:, :, :32] for t in mixed))
    for drive in (a, b):
        drive(*(t[:, :, 32:40] for t in mixed))
        drive.recipe = Recipe.of("dense")
        for i in range(40, 96):
            drive(*(t[:, :, i : i + 1] for t in mixed))
        drive.recipe = Recipe.of(SMALL)
    for i in range(96, 110):
        outs = [drive(*(t[:, :, i : i + 1] for t in mixed)) for drive in (a, b)]
        assert torch.equal(*outs), i


def test_padding_and_unknown_queries_have_no_part_in_a_chunk_key():
    """Zeros in their place would still draw mass in an attention without causal mask."""
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 1, 8, 4, generator=gen, dtype=torch.float64) for _ in range(3))
    there = torch.arange(8) < 5
    known = (torch.arange(8) % 2 == 0) & there
    bad = [t.masked_fill(~m[None, None, None, :, None], float("nan")) for t, m in ((q, known), (k, there), (v, there))]
    got = chunk_keys.summarise(*bad, known[None, None], there[None, None], scale=0.5, softcap=None)
    for a in range(2):
        keys, values = k[0, a, 0, :5], v[0, a, 0, :5]
        mean = ((q[0, a, 0, :5:2] @ keys.T * 0.5).softmax(-1) @ values).mean(0)
        torch.testing.assert_close(got[0, a, 0], (mean @ keys.T * 0.5).softmax(-1) @ keys)


def test_pieces_change_nothing(monkeypatch):
    q, k, v = qkv(1, 4, 2, 150)

    def plan():
        x = call(q, k, v)
        x.rope = Rotary(16)
        return parse(SMALL).plan(x, State()).to_mask()

    whole = plan()
    for module in (longheads, chunk_keys):
        monkeypatch.setattr(module, "pieces", lambda total, *_: ((i, i + 1) for i in range(total)))
    assert torch.equal(plan(), whole)


def test_captured_steps():
    model, ids = tiny(), tokens(2, 50)
    with foveate.use(model, "longheads:chunk=8,attention=24,block=8"):
        want = said(model, ids)
    handle = dry(model, "longheads:chunk=8,attention=24,block=8")
    assert torch.equal(said(model, ids), want) and handle.graphs.replays >= 4 and not handle.notes
    handle.remove()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="needs a cache that keeps every entry"):
        Recipe.of("longheads+cache=snapkv")
    assert Recipe.of("prefill=longheads+cache=snapkv").evicts  # what a prompt reads is still all there
    with pytest.raises(UnsupportedError, match="needs the model's rotation"):
        LongHeads().plan(call(*qkv(1, 4, 2, 60)), State())
    with pytest.raises(UnsupportedError, match=r"expected values as wide as keys \(16\), got 8"):
        Drive(Recipe.of(SMALL))(*qkv(1, 4, 2, 100, dv=8))


@pytest.mark.parametrize(
    "text,message",
    [
        ("longheads:attention=1000", "attention expected a multiple of chunk = 256"),
        ("longheads:attention=512", "at least three of them, got 512"),
        ("longheads:block=100", "block expected a divisor of chunk = 256, got 100"),
        ("longheads:chunk=0", "chunk expected >= 1, got 0"),
        ("longheads:positions=page", "positions expected one of rank, text"),
        ("longheads:share=vote", "share expected one of head, group"),
        ("longheads:chunks=4", "did you mean 'chunk'"),
    ],
)
def test_bad_options(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)
