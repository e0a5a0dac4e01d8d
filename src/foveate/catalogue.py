"""What a user may want to know of a method, read off its class: `foveate methods [ID]` and the pages in docs/methods."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from dataclasses import dataclass
from typing import Any

from .methods.base import Method
from .registry import get

SERVES = {  # true of all of them, also of those that compute every pair in another way
    "prefill": "attention while a prompt is read, which decides when the first token comes",
    "decode": "attention of each new token, over a cache of which it drops nothing",
    "cache": "what is stored after the prompt and while tokens are generated, which decides how much fits into memory",
    "heads": "some of the heads, beside another method for the others",
}


@dataclass(frozen=True)
class Option:
    """A hyperparameter: its default, the values it may take, in words, and what it is."""

    name: str
    default: Any
    values: str
    help: str


@dataclass(frozen=True)
class Entry:
    """One method.

    Attributes:
        line: what it does, in one sentence. title: its name. paper: the paper in full. text: how it works and how it
        differs from the published code, paragraphs of the docstring as they are. use, avoid: sentences. The rest as on
        `Method`.
    """

    id: str
    title: str
    line: str
    paper: str
    text: str
    roles: tuple[str, ...]
    selection: str
    share: str
    needs: str
    status: str
    source: str
    presets: dict[str, dict[str, Any]]
    options: tuple[Option, ...]
    use: tuple[str, ...]
    avoid: tuple[str, ...]

    @property
    def example(self) -> str:
        """A recipe that uses it."""
        return f"{self.id}@{next(iter(self.presets))}" if self.presets else self.id

    def to_dict(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        data["options"] = {o.name: o.default for o in self.options}
        return data


def entry(name: str) -> Entry:
    """The method of this id. ConfigError if there is none."""
    cls = get(name)
    line = (sys.modules[cls.__module__].__doc__ or "").strip().split("\n")[0]
    title, _, what = line.partition(": ")
    paper, _, text = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")
    default = _default(cls)
    return Entry(
        id=name,
        title=title,
        line=what[:1].upper() + what[1:],
        paper=" ".join(paper.split()),
        text=text.strip(),
        roles=cls.roles,
        selection=cls.selection,
        share=_share(cls),
        needs=cls.needs,
        status=cls.status,
        source=cls.source,
        presets={key: dict(values) for key, values in cls.presets.items()},
        options=tuple(_options(cls)),
        use=tuple(_use(cls)),
        avoid=tuple(_avoid(cls, default)),
    )


# ---------------------------------------------------------------------- read off the class
def _default(cls: type[Method]) -> Method | None:
    """An instance with published hyperparameters; None for a method that cannot be without its profile."""
    from .errors import FoveateError

    try:
        return cls()
    except (FoveateError, TypeError):
        return None


def _share(cls: type[Method]) -> str:
    return cls.share if isinstance(cls.share, str) else "head"  # type: ignore[unreachable]  # a field in some


def _options(cls: type[Method]) -> list[Option]:
    out = []
    for f in dataclasses.fields(cls):
        low, high = f.metadata.get("range", (None, None))
        choices = f.metadata.get("choices")
        named: Any = f.type  # text, or a class in a file without `from __future__ import annotations`
        kind = named.__name__ if isinstance(named, type) else str(named)
        kind = kind.replace(" | ", " or ").replace("None", "none").replace("str", "text").replace("bool", "true or false")
        if choices:
            values = " or ".join(choices)
        elif low is not None and high is not None:
            values = f"{kind}, {low:g} to {high:g}"
        elif low is not None or high is not None:
            values = f"{kind}, at {'least' if low is not None else 'most'} {low if low is not None else high:g}"
        else:
            values = kind
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        out.append(Option(f.name, default, values, f.metadata.get("help", "")))
    return out


def _drops(cls: type[Method]) -> bool:
    """As a cache policy it removes entries."""
    return cls.compress is not Method.compress or cls.evict is not Method.evict


def _use(cls: type[Method]) -> list[str]:
    """Sentences on what it is good for; facts of the class, no praise."""
    if cls.id == "dense":
        return ["It is what every other method is measured against, through the same caches."]
    out = [f"{role}: {SERVES[role]}." for role in cls.roles]
    if cls.extends:
        out.append("Texts longer than the model's positions: it keeps every distance inside their range.")
    if cls.search is not Method.search:
        out.append(f"`foveate calibrate {cls.id}` runs the offline search of the paper and writes a profile.")
    elif cls.knob is not None:
        out.append(f"`foveate calibrate {cls.id}` finds the `{cls.knob.name}` that reaches a target on your texts.")
    if any(f.name == "share" for f in dataclasses.fields(cls)):
        out.append(
            "`share=group` gives the query heads of a kv head one list, so a GPU reads each key once for all of them."
        )
    return out


def _avoid(cls: type[Method], default: Method | None) -> list[str]:
    """Sentences on when something else is better."""
    out = []
    if cls.needs == "profile":
        made = cls.search is not Method.search or cls.knob is not None
        out.append("It wants a profile of the model" + (f": `foveate calibrate {cls.id}` makes one." if made else "."))
    if cls.needs == "weights":
        out.append("It needs weights that were trained for the model.")
    if cls.status == "research":
        out.append("It is research arithmetic: it shows what an idea loses, and saves no time.")
    if default is not None and default.min_length > 0:
        out.append(f"Below {default.min_length:,} tokens it leaves nothing out at its published settings.")
    if "prefill" in cls.roles and cls.selection == "prompt":
        out.append(
            "A row's keys may be chosen with later tokens of the prompt in sight, so a perplexity measured in one pass "
            "flatters it, and a prompt in chunks is chosen chunk by chunk."
        )
    if "prefill" in cls.roles and not cls.evicted_ok and cls.id != "dense":
        out.append("Once a cache policy has dropped entries, later prompts of the conversation run dense.")
    if "cache" in cls.roles and _drops(cls):
        out.append("What it dropped is gone: a later question about it fails, and the cache can no longer be cut back.")
    if "decode" in cls.roles and (default is None or default.phase(0) is None):
        out.append("Its decode steps are not captured as CUDA graphs, so at batch 1 a GPU waits for launches.")
    if "mass" in cls.sees and "decode" in cls.observes:
        out.append("It reads the probabilities of each decode step, which the fused kernels do not give for free.")
    return out


# ---------------------------------------------------------------------- on a terminal
def print_table(found: list[Entry]) -> None:
    """All methods, one a line."""
    from rich.table import Table

    from .report.console import stdout

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("method", "serves", "what it does", "presets", "needs"):
        table.add_column(title, overflow="fold", no_wrap=title == "method")
    for e in found:
        line = e.line if e.status == "stable" else f"{e.line} ({e.status})"
        needs = "-" if e.needs == "nothing" else e.needs
        table.add_row(e.id, ", ".join(e.roles), line, ", ".join(e.presets) or "-", needs)
    stdout().print(table)
    print("\nUse them as METHOD, METHOD@PRESET or METHOD:key=value,..., and join them with +: prefill=minference@8k+quest.")
    print("foveate methods ID shows one method with its paper, its options and when to use it.")


def print_entry(e: Entry) -> None:
    """One method, with everything about it."""
    from rich.markup import escape
    from rich.table import Table

    from .report.console import stdout

    out = stdout()
    say = lambda text="": out.print(escape(text), highlight=False)  # noqa: E731
    say(f"{e.title} ({e.id}): {e.line}\n{e.paper}")
    if e.text:
        say(f"\n{e.text}")
    say(f"\nserves: {', '.join(e.roles)}; selection: {e.selection}; lists per {e.share}; needs: {e.needs}; {e.status}\n")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("option", "default", "values", "what it is"):
        table.add_column(title, overflow="fold", no_wrap=title in ("option", "default"))
    for o in e.options:
        table.add_row(o.name, shown(o.default), escape(o.values), escape(o.help))
    if e.options:
        out.print(table)
    for preset, values in e.presets.items():
        say(f"@{preset}: {', '.join(f'{k}={shown(v)}' for k, v in values.items())}")
    say("\nUse it for")
    for text in e.use:
        say(f"  {text}")
    if e.avoid:
        say("Mind that")
    for text in e.avoid:
        say(f"  {text}")
    if e.id != "dense" and e.needs == "nothing":
        say(f"Try it\n  foveate compare --recipes 'dense; {e.example}'")


def shown(value: Any) -> str:
    """A value as it is written in a recipe."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
