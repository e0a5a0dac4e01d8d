"""Training texts of the needle model, put together from tokens: many questions about each text, where a task asks one.

Templates come from the tasks' own modules, pieces are tokenized once, and a text of 32K tokens takes a few milliseconds.
What is written is what `evals.task.encode` would give for such a text, question and answer prefix, then the answer and
the end-of-text token; further questions follow after a line break. `tests/test_needle_model.py` holds both together.
"""

from __future__ import annotations

import functools
import random
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import mqar
from ..ruler import niah, tracking
from ..text import NOISE, Source
from .tokenizer import EOS, digits, piece

KINDS = ("noise", "needles", "essay", "multiquery", "multivalue", "mqar", "vt", "uuid", "echo")
# "repeat" and "echo" have something to look up at every few tokens: from them the model learns to look up at all
SHARES = {
    "noise": 0.10,
    "needles": 0.28,
    "essay": 0.10,
    "mqar": 0.26,
    "vt": 0.07,
    "uuid": 0.03,
    "repeat": 0.04,
    "echo": 0.12,
}
QUESTIONS = 40  # at most, of one text
LOOKUPS = 80  # lines at most, of a text that repeats itself
QUESTION, LOOKUP = 0.02, 0.3  # weights of the loss in a question and in a block of words that repeats itself
Ids = list[int]


def fitting(n: int) -> dict[str, float]:
    """The kinds that have room in n tokens, with their shares: binding a value to its key is learned first and alone."""
    if n < 128:
        return {"echo": 0.6, "mqar": 0.35, "repeat": 0.05}
    if n < 512:
        return {"noise": 0.05, "needles": 0.4, "mqar": 0.25, "echo": 0.27, "repeat": 0.03}
    return SHARES


def gate(n: int) -> tuple[str, ...]:
    """The kinds that must be solved at n tokens before longer texts come."""
    if n < 128:
        return ("echo", "mqar")
    return ("noise", "needles", "mqar", "echo") + (("essay",) if n >= 512 else ())


@dataclass
class Text:
    """Tokens under construction. `answers`: (first, last + 1, kind); `soft`: further spans worth
    predicting, (first, last + 1, weight of the loss)."""

    ids: Ids
    answers: list[tuple[int, int, str]] = field(default_factory=list)
    soft: list[tuple[int, int, float]] = field(default_factory=list)

    def ask(self, question: Ids, answer: Ids, kind: str) -> None:
        """Append a question up to its answer prefix, and the answer."""
        self.ids += question
        self.soft.append((len(self.ids) - len(question), len(self.ids), QUESTION))
        self.answers.append((len(self.ids), len(self.ids) + len(answer), kind))
        self.ids += answer


class Writer:
    """Makes texts of at most n tokens with questions and answers. One object a process; `rng` is its only state."""

    def __init__(self, tokenizer: Any, source: Source, rng: random.Random) -> None:
        self.rng, self.tokenizer = rng, tokenizer
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids(EOS)

        @functools.cache  # the same few parts again and again
        def cut(text: str) -> Ids:
            return piece(tokenizer, text)

        self.cut, self.nl = cut, cut("\n")
        self.sign = {c: cut("0" + c)[-1] for c in string.ascii_uppercase}
        self.digits = {d: cut(" " + d)[-1] for d in (*string.digits, *digits())}
        self.space, self.comma, self.dot = cut(" 1")[:1], cut(","), cut(".")
        self.adjectives = {w: cut(" " + w) for w in source.adjectives}
        self.nouns = {w: cut("-" + w) for w in source.nouns}
        self.adjective_list, self.noun_list = list(source.adjectives), list(source.nouns)
        self.short = [cut(" " + w) for w in mqar._short(source.adjectives)]
        self.verbs = [cut("-" + w) for w in mqar._short(source.verbs)]
        self.partners = [cut(" " + w) for w in mqar._short(source.nouns)]
        self.sentences = [
            cut(s if s[:1].isascii() and s[:1].isalpha() else " " + s) for s in source.sentences(len(source.prose))
        ]
        self.noise = [cut(s) for s in NOISE]
        self.words = sorted({i for ids in [*self.partners, *self.short] for i in ids})
        parts = {t: niah.NEEDLE.format(type=t, key="\0", value="\0").split("\0") for t in ("numbers", "uuids")}
        self.around = {t: [cut(p.rstrip()) for p in three] for t, three in parts.items()}  # a needle without key and value
        self.forms = {many: _forms(many) for many in (False, True)}

    def text(self, kind: str, n: int) -> Text:
        """A text of this kind (a key of `SHARES`) with at most n tokens; "repeat" where the kind has no room."""
        for _ in range(8):  # in a short text long words may leave no room
            made = self._made(kind, n)
            if len(made.ids) <= n:
                return made
        return self._repeat(n)

    def _made(self, kind: str, n: int) -> Text:
        if kind == "repeat":
            return self._repeat(n)
        if kind == "echo":
            return self._echo(n)
        if kind == "mqar":
            return self._recall(n)
        return self._chain(n) if kind == "vt" else self._needles(kind, n)

    # ------------------------------------------------------------------ parts
    def _number(self, length: int) -> Ids:
        told = str(self.rng.randrange(10 ** (length - 1), 10**length))
        return [*self.space, *(self.digits[told[i : i + 3]] for i in range(0, length, 3))]

    def _uuid(self) -> Ids:
        return piece(self.tokenizer, f" {uuid.UUID(int=self.rng.getrandbits(128), version=4)}")

    def _key(self) -> tuple[int, ...]:
        adjective, noun = self.rng.choice(self.adjective_list), self.rng.choice(self.noun_list)
        return (*self.adjectives[adjective], *self.nouns[noun])

    def _listed(self, parts: Sequence[Sequence[int]], last: str, comma: bool = True) -> Ids:
        """a, b, c, and d (or "a, b and c" without the last comma)."""
        out = list(parts[0])
        for i, part in enumerate(parts[1:], 2):
            out += (self.comma if i < len(parts) or comma else []) + (self.cut(last) if i == len(parts) else []) + list(part)
        return out

    def _budget(self, n: int) -> int:
        """Tokens for questions: half of a short text, little more than a tenth of a long one."""
        return min(int(0.5 * n), max(1800, n // 9), 3600)

    # ------------------------------------------------------------------ RULER's needles
    def _needles(self, hay: str, n: int) -> Text:
        """Needles in "noise", in "needles", in an "essay", or "uuid"s among uuids (or in an essay)."""
        rng, ids = self.rng, hay == "uuid"
        value = self._uuid if ids else lambda: self._number(7)
        uuid_keys = ids and rng.random() < 0.5
        fresh = (lambda: tuple(self._uuid())) if uuid_keys else self._key
        where = hay if not ids else ("needles" if uuid_keys else "essay")
        type_ = "uuids" if ids else "numbers"
        before, between, after = self.around[type_]
        asked, keys = self._plan(n, ids, fresh)
        held: dict[tuple[int, ...], list[Ids]] = {key: [] for key in keys}
        order = [key for key, times in keys.items() for _ in range(times)]
        rng.shuffle(order)
        planted = []
        for key in order:  # the values of a key are told in the order of the text
            held[key].append(value())
            planted.append(before + list(key) + between + held[key][-1] + after)

        head, _, _ = (self.cut(t) for t in self._form(rng.random() < 0.5, type_))
        tail = Text([])
        for group in asked:
            answers = [v for key in group for v in held[key]]
            many = len(answers) > 1
            _, question, prefix = self.forms[many]
            q, p = (t.format(type=type_ if many else type_[:-1], query="\0").split("\0") for t in (question, prefix))
            query = self._listed(group, " and")
            words = (
                self.nl
                + self.cut(q[0].rstrip())
                + query
                + self.cut(q[1])
                + self.cut("\n" + p[0].rstrip())
                + query
                + self.cut(p[1])
            )
            name = "uuid" if ids else hay if not many else "multiquery" if len(group) > 1 else "multivalue"
            answer = self._listed(answers, " and") + self.dot + [self.eos]
            tail.ask(words, answer, name)
        room = n - 1 - len(head) - len(tail.ids) - sum(map(len, planted)) - len(planted)
        joint: Ids = [] if where == "essay" else self.nl
        if where == "needles":
            filler, taken = [], set(held)
            while True:
                key = fresh()
                line = before + list(key) + between + value() + after
                room -= len(line) + 1
                if room < 0:
                    break
                if key not in taken:
                    filler.append(line)
        else:
            filler = self._prose(room) if where == "essay" else self._noise(room)
        body = self._mixed(filler, planted, joint)
        return self._joined([self.bos, *head, *body], tail)

    def _plan(self, n: int, ids: bool, fresh: Callable[[], tuple[int, ...]]) -> tuple[list[list[tuple[int, ...]]], dict]:
        """Groups of keys asked together, and how many values each key has; some more keys that nobody asks for."""
        rng = self.rng
        asked: list[list[tuple[int, ...]]] = []
        keys: dict[tuple[int, ...], int] = {}
        each = 75 if ids else 12  # tokens of a value and its share of the question
        room, most = self._budget(n), rng.randrange(1, QUESTIONS + 1) if rng.random() < 0.3 else QUESTIONS
        while len(asked) < most:
            form = rng.random() * (0.6 if n < 192 else 1)  # a very short text asks for one value at a time
            many = rng.randrange(2, 5) if form >= 0.6 and not ids else 1
            group = [fresh() for _ in range(many if form < 0.8 else 1)]
            room -= 22 + 2 * len(group) * (40 if ids else 5) + many * each
            if room < 0 and asked:
                break
            if any(key in keys for key in group):
                continue
            keys.update({key: many if form >= 0.8 else 1 for key in group})
            asked.append(group)
        if n >= 1024 and not ids:
            keys.update({fresh(): rng.randrange(1, 4) for _ in range(rng.randrange(4))} | keys)
        return asked, keys

    def _form(self, many: bool, type_: str) -> tuple[str, str, str]:
        head, question, prefix = self.forms[many]
        kind = type_ if many else type_[:-1]
        return head.format(type=kind), question, prefix

    def _noise(self, room: int) -> list[Ids]:
        lines, used = [], 0
        whole = [i for s in self.noise for i in s]
        while used + len(whole) + 1 <= room:
            lines.append(whole)
            used += len(whole) + 1
        return lines

    def _prose(self, room: int) -> list[Ids]:
        found, used, at = [], 0, self.rng.randrange(len(self.sentences))
        while used + len(sentence := self.sentences[at % len(self.sentences)]) <= room:
            found.append(sentence)
            used, at = used + len(sentence), at + 1
        return found

    def _mixed(self, filler: list[Ids], planted: list[Ids], joint: Ids) -> Ids:
        """Filler with the planted parts at random places in their order; `joint` between all."""
        places = sorted(self.rng.randrange(len(filler) + 1) for _ in planted)
        out: Ids = []
        done = 0
        for place, part in zip(places, planted):
            for line in filler[done:place]:
                out += line + joint
            out += part + joint
            done = place
        for line in filler[done:]:
            out += line + joint
        return out[: len(out) - len(joint)]

    @staticmethod
    def _joined(front: Ids, tail: Text) -> Text:
        k = len(front)
        moved = [(a + k, b + k, kind) for a, b, kind in tail.answers]
        return Text(front + tail.ids, moved, [(a + k, b + k, w) for a, b, w in tail.soft])

    # ------------------------------------------------------------------ the other tasks
    def _recall(self, n: int) -> Text:
        """Pairs of a word and its partner; four keys a question, as a rule."""
        rng = self.rng
        head, ask = self.cut(mqar.HEAD), mqar.ASK.split("{keys}")
        end = ask[1].split("{n}")
        words = sum(len(self.cut(t)) for t in (ask[0], *end, "\n" + mqar.PREFIX)) + 4  # of a question, without the keys
        most = self._budget(n) // (words + 18)
        keys = rng.sample(self.short, min(len(self.short), max(4, (n - 80) // 3)))
        tail, groups = Text([]), []
        for _ in range(max(1, min(most, QUESTIONS))):
            four = rng.random() < (0.3 if n <= 512 else 0.8)  # as the task asks; fewer are learned sooner
            groups.append(rng.sample(range(len(keys)), 1 if n < 96 else 4 if four else rng.randrange(1, 5)))
        cost = sum(words + 5 * len(g) for g in groups) + len(head) + 1
        pairs = {}
        room = n - cost
        needed = dict.fromkeys(i for g in groups for i in g)
        for i in [*needed, *(i for i in range(len(keys)) if i not in needed)]:
            if room < 4 and i not in needed:
                break
            pairs[i] = rng.choice(self.partners)
            room -= len(keys[i]) + len(pairs[i]) + 1
        lines = [keys[i] + partner for i, partner in pairs.items()]
        made: set[tuple[int, ...]] = set()
        while room >= 8:
            key = (*rng.choice(self.short), *rng.choice(self.verbs))
            if key not in made:
                made.add(key)
                lines.append([*key, *rng.choice(self.partners)])
                room -= len(lines[-1]) + 1
        rng.shuffle(lines)
        for group in groups:
            asked = self._listed([keys[i] for i in group], " and", comma=False)
            question = [
                *self.cut(ask[0].rstrip()),
                *asked,
                *self.cut(end[0].rstrip()),
                *self.cut(f" {len(group)}"),
                *self.cut(end[1]),
            ]
            answer = self._listed([pairs[i] for i in group], "", comma=True) if len(group) > 1 else list(pairs[group[0]])
            tail.ask(question + self.cut("\n" + mqar.PREFIX), answer + self.dot + [self.eos], "mqar")
        body = self._mixed(lines, [], self.nl)
        return self._joined([self.bos, *head, *body], tail)

    def _chain(self, n: int) -> Text:
        """One to six chains of assignments in noise, after RULER's worked example or without it."""
        rng = self.rng
        front: Ids = [self.bos]
        if n >= 1500 and rng.random() < 0.7:
            example = self._tracked(1, 3, tracking.VT.example_lines * 26 + 90, tracking.VT.hops, "")
            front += example.ids[: example.answers[0][1] - 1] + self.cut("\n\n")
        chains = max(1, min(6, (n - len(front)) // 260))
        text = self._tracked(chains, 5, n - len(front), tracking.VT.hops if n >= 512 else rng.randrange(1, 5))
        return self._joined(front, text)

    def _tracked(self, chains: int, letters: int, n: int, hops: int, between: str = "\n") -> Text:
        """Chains in noise and the questions about them. RULER's example has nothing `between` question and answer prefix."""
        rng = self.rng
        head, question = tracking.TEMPLATE.split("{context}")
        var, equals = self.cut("VAR"), self.cut(" =")
        planted: list[tuple[float, Ids]] = []
        tail, values = Text([]), []
        for _ in range(chains):
            names = [
                [*self.space, *(self.sign[c] for c in rng.choices(string.ascii_uppercase, k=letters))]
                for _ in range(hops + 1)
            ]
            value = self._number(5)
            lines = [var + names[0] + equals + value]
            lines += [var + b + equals + var + a + self.space for a, b in zip(names, names[1:])]
            planted += zip(sorted(rng.random() for _ in lines), lines)
            values.append((value, names))
        for value, names in values:
            q = question.split("{query}")
            p = tracking.PREFIX.format(num_v=hops + 1, query="{query}").split("{query}")
            words = (
                self.cut(q[0].rstrip()) + value + self.cut(q[1]) + self.cut(between + p[0].rstrip()) + value + self.cut(p[1])
            )
            tail.ask(words, [i for name in names for i in name] + [self.eos], "vt")
        told = self.cut(head)
        parts = [line for _, line in sorted(planted)]
        room = n - len(told) - len(tail.ids) - sum(len(p) + 1 for p in parts)
        body = self._mixed(self._noise(room), parts, self.nl)
        return self._joined([*told, *body], tail)

    def _repeat(self, n: int) -> Text:
        """A random block of words, again and again: what an induction head is for, at every token."""
        block = int(min(n // 2, 2 ** self.rng.uniform(4, 14)))
        words = self.rng.choices(self.words, k=block)
        ids = [self.bos, *(words * (n // block))][:n]
        start = self.rng.randrange(1 + block, max(2 + block, len(ids) - 8 * LOOKUPS))
        return Text(ids, [], [(start, min(len(ids), start + 8 * LOOKUPS), LOOKUP)])

    def _echo(self, n: int) -> Text:
        """Lines of keys and values, then the same lines in other orders, to the end: a key says which value comes."""
        rng = self.rng
        pairs = rng.random() < 0.5
        before, between, after = ([], [], []) if pairs else self.around["numbers"]
        size = 4 if pairs else len(before) + len(between) + len(after) + 8
        most = max(2, (n - 1) // (2 * size))
        few = 2 if n <= 512 else most // 4  # a short text has few lines and says them often: the easiest there is
        count = int(min(most, few * (most / few) ** rng.random() + 0.5))
        lines: dict[tuple[int, ...], Ids] = {}
        while len(lines) < count:
            key = tuple(rng.choice(self.short)) if pairs and len(lines) < len(self.short) // 2 else self._key()
            lines[key] = list(rng.choice(self.partners)) if pairs else self._number(7)
        made, ends, first = Text([self.bos]), [], True
        while True:
            for key in rng.sample(list(lines), len(lines)):
                line = [*before, *key, *between, *lines[key], *after, *self.nl]
                if len(made.ids) + len(line) > n:
                    break
                made.ids += line
                if not first:
                    end = len(made.ids) - len(after) - 1
                    ends.append((end - len(lines[key]), end, "echo"))
            else:
                first = False
                continue
            break
        asked = LOOKUPS if n < 128 else min(LOOKUPS, n // 24)  # no more than its share beside the questions
        start = rng.randrange(max(1, len(ends) - asked + 1))
        made.answers = ends[start : start + asked]
        return made


def _forms(many: bool) -> tuple[str, str, str]:
    """(head, question, answer prefix) with RULER's own edits for a single answer; {type} and {query} are open."""
    template, prefix = niah.TEMPLATE, niah.PREFIX
    if not many:
        template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
        prefix = prefix.replace("are", "is")
    head, question = template.split("{context}\n")
    return head, question, prefix
