"""Sparse drafts with dense verification lose nothing: greedy tokens, sampled distributions, caches."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import foveate
from foveate import speculate
from foveate.errors import ConfigError, UnsupportedError
from foveate.speculate.accept import match, reject
from foveate.speculate.loop import Loop
from tests.models import generate as plain
from tests.models import tiny, tokens

PILLAR = "pillar_attn:draft=4,ratio=0,least=12"


def greedy(model, ids, mask=None, new=16, **options):
    options = dict(max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None) | options
    return model.generate(ids, attention_mask=mask, **options)


# ---------------------------------------------------------------------- acceptance
def test_match():
    drafted = torch.tensor([[5, 6, 7], [5, 6, 7], [5, 6, 7], [5, 6, 7]])
    target = torch.tensor([[5, 6, 7, 8], [1, 6, 7, 8], [5, 6, 1, 8], [5, 1, 7, 8]])
    accepted, out = match(drafted, target)
    assert accepted.tolist() == [3, 0, 2, 1] and torch.equal(out, target)


def test_rejection_keeps_the_target_distribution():
    """All pairs of two tokens, by chi-square against p1(x) p2(y | x), with a draft that is far from the target."""
    torch.manual_seed(3)
    v, n = 4, 40_000
    q = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1]])
    p1, table, p3 = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.rand(v, v).softmax(-1), torch.rand(v).softmax(-1)
    drafted = torch.stack([torch.multinomial(row, n, True) for row in q], 1)
    p = torch.stack([p1.expand(n, v), table[drafted[:, 0]], p3.expand(n, v)], 1)
    accepted, out = reject(drafted, q.expand(n, 2, v), p)
    again = torch.where(accepted == 0, torch.multinomial(table[out[:, 0]], 1)[:, 0], out[:, 1])  # the target goes on
    want = (p1[:, None] * table).flatten() * n
    seen = torch.bincount(out[:, 0] * v + again, minlength=v * v)
    assert float(((seen - want) ** 2 / want).sum()) < 37.7  # 15 degrees of freedom, p = 0.001
    bonus = out[accepted == 2, 2]
    want = p3 * len(bonus)
    assert float(((torch.bincount(bonus, minlength=v) - want) ** 2 / want).sum()) < 16.3
    rate = float((accepted > 0).float().mean())
    assert abs(rate - float(torch.minimum(p1, q[0]).sum())) < 0.01


def test_rejection_where_draft_and_target_agree():
    p = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    accepted, out = reject(torch.tensor([[1]]), p[:, :1], p)
    assert accepted.tolist() == [1] and out.tolist() == [[1, 0]]


# ---------------------------------------------------------------------- greedy
CASES = [("llama", PILLAR), ("llama", "pillar_attn:draft=3,ratio=0.3,least=1,warm=true"), ("qwen3", PILLAR)]
CASES += [
    ("gemma3_text", PILLAR),
    ("llama", "streaming_llm:sink=1,window=5"),
    ("qwen3", "quest:page=4,budget=8,dense_layers=0"),
]


@pytest.mark.parametrize("family,recipe", CASES)
@torch.no_grad()
def test_greedy_is_dense_greedy(family, recipe):
    model, ids, stats = tiny(family), tokens(1, 45), speculate.Stats()
    want = greedy(model, ids)
    with foveate.use(model, f"decode={recipe}"):
        got = greedy(model, ids, custom_generate=speculate.generate, stats=stats)
        sparse = greedy(model, ids)
    assert torch.equal(got, want)
    assert stats.emitted == 16 and 16 >= stats.cycles >= 16 / 9 and stats.accepted <= stats.drafted
    if stats.rate < 0.9:
        assert not torch.equal(sparse, want)  # the drafts were wrong, and the result was right


@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize("n", [1, 2, 3, 27])
@torch.no_grad()
def test_short_prompts_and_short_answers(n, new):
    """A verification of one token would be a sparse step: one is always drafted, and nothing is one token alone."""
    model, ids = tiny(), tokens(1, n)
    want = greedy(model, ids, new=new)
    with foveate.use(model, "decode=streaming_llm:sink=0,window=1"):
        assert torch.equal(speculate.generate(model, ids, max_new_tokens=new, do_sample=False, eos_token_id=None), want)
        assert torch.equal(greedy(model, ids, new=new, custom_generate=speculate.generate, prefill_chunk_size=13), want)


@torch.no_grad()
def test_full_ratio_accepts_everything():
    model, ids, stats = tiny(), tokens(1, 45), speculate.Stats()
    with foveate.use(model, "pillar_attn:draft=4,ratio=1.0,least=1"):
        greedy(model, ids, new=20, custom_generate=speculate.generate, stats=stats)
    assert stats.rate == 1.0 and stats.cycles == 4


@torch.no_grad()
def test_batch_with_padding_and_ends():
    """Left-padded rows that end at different tokens: every row equals plain generation, pads included."""
    model, ids = tiny(), tokens(3, 41)
    mask = torch.ones_like(ids)
    mask[0, :13] = mask[2, :40] = 0  # the last row has one real token
    ids = ids * mask
    long = greedy(model, ids, mask, new=20)
    ends = [int(long[0, 47]), int(long[1, 55])]
    want = greedy(model, ids, mask, new=20, eos_token_id=ends)
    with foveate.use(model, PILLAR):
        got = greedy(model, ids, mask, new=20, eos_token_id=ends, custom_generate=speculate.generate)
    assert torch.equal(got, want)


@torch.no_grad()
def test_cache_ends_where_plain_generation_ends_and_takes_the_next_turn():
    model, ids = tiny(), tokens(1, 40)
    with foveate.use(model, PILLAR):
        out = greedy(model, ids, new=11, custom_generate=speculate.generate, return_dict_in_generate=True)
        cache = out.past_key_values
        assert cache.get_seq_length() == 50 and cache.seen == [50]
        k = cache.layers[1].cache.store.view().k[:, :, :50].clone()
        more = torch.cat([out.sequences, tokens(1, 7, seed=4)], 1)
        second = greedy(model, more, custom_generate=speculate.generate, past_key_values=cache)
    want = plain(model, ids, max_new_tokens=11, min_new_tokens=11, eos_token_id=None)
    assert torch.equal(out.sequences, want.sequences)
    keys = want.past_key_values.layers[1].keys
    torch.testing.assert_close(k, keys, atol=2e-4, rtol=2e-4)
    with foveate.use(model, PILLAR):  # the keys that drafts leave behind are other ones
        drafts = model(ids).past_key_values
        for t in range(40, 50):
            model(out.sequences[:, t : t + 1], past_key_values=drafts)
    assert float((drafts.layers[1].cache.store.view().k[:, :, :50] - keys).abs().max()) > 0.02
    assert torch.equal(second, greedy(model, more))


class Penalty(LogitsProcessor):
    """No token twice in a row of three: depends on what came before."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -3:], float("-inf"))


class Stop(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -1] % 7 == 0) & (input_ids.shape[1] > 45)


@torch.no_grad()
def test_processors_and_criteria_see_every_prefix():
    model, ids = tiny(), tokens(1, 40)

    def options():
        both = LogitsProcessorList([Penalty()]), StoppingCriteriaList([Stop()])
        return dict(zip(("logits_processor", "stopping_criteria"), both, strict=True))

    want = greedy(model, ids, new=40, **options())
    with foveate.use(model, PILLAR):
        got = greedy(model, ids, new=40, custom_generate=speculate.generate, **options())
    assert torch.equal(got, want) and got.shape[1] < 80


# ---------------------------------------------------------------------- sampling
class Chain:
    """A model whose next token depends on the last one alone: by `dense` in calls of several tokens, by `sparse` in
    single steps, so that drafts are wrong on purpose. Counts its calls and what is cached."""

    def __init__(self, dense, sparse):
        self.tables, self.length = {True: dense, False: sparse}, 0

    def _supports_logits_to_keep(self):
        return True

    def get_seq_length(self):
        return self.length

    def crop(self, n):
        self.length += n

    def __call__(self, input_ids, past_key_values, position_ids, logits_to_keep, **kwargs):
        assert input_ids.shape[1] > 1 or logits_to_keep == 1
        assert position_ids[0].tolist() == list(range(self.length, self.length + input_ids.shape[1]))
        self.length += input_ids.shape[1]
        self.logits = self.tables[input_ids.shape[1] > 1][input_ids][:, -logits_to_keep:]
        self.past_key_values = self
        return self


@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_sampled_chain_follows_the_target(rows):
    """1800 tokens of the loop with four drafts a cycle: transitions by chi-square, for each token they start from."""
    torch.manual_seed(1)
    v, n = 4, 1800 // rows
    dense, sparse = torch.randn(v, v), torch.randn(v, v)
    config = GenerationConfig(do_sample=True, max_length=2 + n, pad_token_id=0)
    stats = speculate.Stats()
    loop = Loop(Chain(dense, sparse), LogitsProcessorList(), config, 4, stats)
    never = StoppingCriteriaList([lambda ids, scores, **kw: torch.zeros(len(ids), dtype=torch.bool)])
    ids, cache = loop.run(torch.ones(rows, 2, dtype=torch.long), never, None, None)
    assert ids.shape == (rows, 2 + n) and cache.length == 1 + n and 0.1 < stats.rate < 0.9
    ids = ids[:, 1:]
    seen = torch.bincount((ids[:, :-1] * v + ids[:, 1:]).flatten(), minlength=v * v).view(v, v)
    want = dense.softmax(-1) * seen.sum(-1, keepdim=True)
    assert float(((seen - want) ** 2 / want).sum()) < 32.9  # 12 degrees of freedom, p = 0.001
    wrong = sparse.softmax(-1) * seen.sum(-1, keepdim=True)
    assert float(((seen - wrong) ** 2 / wrong).sum()) > 200  # what unverified drafts would look like


@torch.no_grad()
def test_sampled_tokens_follow_the_target():
    """Two sampled tokens of a tiny model, 600 draws, by chi-square against exact probabilities."""
    model, ids, n = tiny(vocab_size=8, pad_token_id=0, eos_token_id=None, bos_token_id=1), tokens(1, 12) % 7 + 1, 600
    p1 = (model(ids).logits[0, -1] / 1.5).softmax(-1)
    nexts = torch.cat([ids.expand(8, -1), torch.arange(8)[:, None]], 1)
    want = (p1[:, None] * (model(nexts).logits[:, -1] / 1.5).softmax(-1)).flatten() * n
    torch.manual_seed(0)
    with foveate.use(model, "decode=streaming_llm:sink=1,window=3"):
        out = model.generate(
            ids.expand(n, -1), custom_generate=speculate.generate, draft=1, do_sample=True, max_new_tokens=2,
            temperature=1.5, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    seen = torch.bincount(out[:, 12] * 8 + out[:, 13], minlength=64).double()
    big = want >= 5
    want, seen = (torch.cat([t[big], t[~big].sum()[None]]) for t in (want.double(), seen))
    free = len(want) - 1
    assert float(((seen - want) ** 2 / want).sum()) < free + 3.1 * (2 * free) ** 0.5 + 4  # p about 0.001


# ---------------------------------------------------------------------- refusals
def test_refusals():
    model, ids = tiny(), tokens(1, 20)
    run = lambda **o: speculate.generate(model, ids, max_new_tokens=4, **o)  # noqa: E731
    with pytest.raises(ConfigError, match="no recipe"):
        run()
    with (
        foveate.use(model, "flexprefill+quest"),
        pytest.raises(ConfigError, match=r"dense attention in prefill.*flexprefill"),
    ):
        run()
    with foveate.use(model, "cache=snapkv"), pytest.raises(ConfigError, match=r"no cache policy.*snapkv"):
        run()
    with foveate.use(model, PILLAR):
        with pytest.raises(ConfigError, match="draft: expected at least 1"):
            run(draft=0)
        with pytest.raises(UnsupportedError, match="num_beams"):
            run(num_beams=2, do_sample=False)
        with pytest.raises(UnsupportedError, match="output_scores"):
            run(output_scores=True, return_dict_in_generate=True)
