"""What `compute-sanitizer --tool racecheck` says about the kernels: its reports read, grouped, known ones told from others.

racecheck watches shared memory. Loads and stores of TMA tiles and operands of wgmma it gives to no thread; what it sees of
the Gluon kernels are words, positions and sums that producers leave for consumers by plain stores. Their order is lanes ->
barrier of the partition -> arrive of one lane -> wait, an "indirect barrier dependency": followed by default since version
2024.4 of the tool, with an option since 2023.3, before not at all, and versions up to 2025.4 list false positives about
mbarriers among what they repaired. So two cases calibrate a run (`sanitize_run.py`): a race, which must be found, and the
same memory handed over in that way. If the second is reported, reports about the kinds in `KNOWN` are the tool's; if not,
they are ours. `tests/test_gluon_words.py` checks the order of what is handed over, of every kernel, in its PTX.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

GLUON = Path(__file__).resolve().parent.parent / "src/foveate/kernels/gluon"
BARRIERS = 64  # mbarriers of a CTA to follow: `keys_kernel` and `private_kernel` have up to 28

# What a line of source in kernels/gluon touches -> why a report about two such lines is none of ours.
HANDED = "stored by a partition's lanes, handed over by one arrive behind their barrier, read behind a wait"
KNOWN = {
    "words": (re.compile(r"\b(tile_words|step_words|words)\.index\("), HANDED),
    "places": (re.compile(r"\bplaces\.index\("), HANDED),
    "sums": (re.compile(r"\bsums\.index\("), HANDED),
    "low-bit numbers": (re.compile(r"\b(extras|units)\.index\("), HANDED),
    "exchanged halves": (re.compile(r"\bspare\.(load|store)\("), HANDED),
    "cleaned keys": (re.compile(r"\bk_buf\.(load|store)\("), "both consumers write the same values where either may read"),
}


class Access(NamedTuple):
    """One side of a race. how: Read or Write; where: file:line, or the kernel and an offset without line numbers."""

    how: str
    kernel: str
    where: str

    def kind(self) -> str | None:
        """The kind of shared memory in `KNOWN` that the line of source touches."""
        name, _, line = self.where.partition(":")
        text = _lines(name)
        if not line.isdigit() or not 0 < int(line) <= len(text):
            return None
        return next((kind for kind, (pattern, _) in KNOWN.items() if pattern.search(text[int(line) - 1])), None)


class Race(NamedTuple):
    """Accesses that racecheck found unordered, and how often."""

    first: Access
    second: Access
    hazards: int

    def kind(self) -> str | None:
        """The kind of memory if the report is known, else None: two sides of one kind, one of them a read.

        Two writes of words would be two producers, which there are not; keys are cleaned by both consumers.
        """
        kind = self.first.kind()
        reads = "Read" in (self.first.how, self.second.how)
        return kind if kind == self.second.kind() and (reads or kind == "cleaned keys") else None

    def __str__(self) -> str:
        return (
            f"{self.first.kernel}: {self.first.how} {self.first.where} and {self.second.how} {self.second.where}, "
            f"{self.hazards} hazards"
        )


@lru_cache
def _lines(name: str) -> list[str]:
    path = GLUON / Path(name).name
    return path.read_text().splitlines() if path.is_file() else []


# ---------------------------------------------------------------------- the reports
_SIDE = re.compile(r"(Read|Write) access at (.*?)(\+0x[0-9a-f]+)?(?: in (\S+:\d+))?(?: \[(\d+) hazards?\])?$")


def _access(text: str) -> tuple[Access, int] | None:
    found = _SIDE.search(text)
    if found is None:
        return None
    how, kernel, offset, where, hazards = found.groups()
    kernel = kernel.split("(")[0]
    return Access(how, kernel, where or kernel + (offset or "")), int(hazards or 1)


def read(text: str) -> list[Race]:
    """The races in the output of the tool (`--racecheck-report analysis`, its default)."""
    races: list[Race] = []
    first = None
    for line in text.splitlines():
        if not line.startswith("========="):
            continue
        if "Race reported between" in line:
            found = _access(line.split("Race reported between", 1)[1].strip())
            first = found[0] if found else None
            if first is None:
                races.append(Race(Access("?", "", line), Access("?", "", line), 1))  # not to be passed over
        elif first is not None and line.strip("= ").startswith("and ") and (found := _access(line.strip("= "))):
            races.append(Race(first, *found))
    return races


def options(usage: str) -> list[str]:
    """Options of the tool for such kernels. usage: what its `--help` prints, since they differ between versions."""
    follow = ["--racecheck-indirect-barrier-dependency", "yes"] if "--racecheck-indirect-barrier-dependency" in usage else []
    return ["--num-cuda-barriers", str(BARRIERS), *follow, "--print-limit", "1000"]


def grouped(races: Sequence[Race]) -> tuple[dict[tuple[str, str], int], list[Race]]:
    """(hazards by kernel and known kind, the races that are of none)."""
    known: dict[tuple[str, str], int] = {}
    unknown = []
    for race in races:
        kind = race.kind()
        if kind is None:
            unknown.append(race)
        else:
            at = race.first.kernel, kind
            known[at] = known.get(at, 0) + race.hazards
    return known, unknown


def excused(kinds: Sequence[str], control: str) -> bool:
    """Whether reports of known kinds may stand. control: the state of the case `handed`; if that is clean, the tool follows
    what orders the others, too, and they need another explanation."""
    return control != "clean" or set(kinds) <= {"cleaned keys"}


# ---------------------------------------------------------------------- cases that calibrate a run
if triton is not None:

    @triton.jit
    def _raced(x):
        """Each thread of two warps stores a word and loads that of a thread of the other warp, with nothing in between."""
        i = tl.arange(0, 64)
        got = tl.inline_asm_elementwise(
            """{
            .shared .align 4 .b32 raced[64];
            .reg .b32 at, own, far;
            mov.u32 at, raced;
            shl.b32 far, $1, 2;
            add.u32 own, at, far;
            sub.u32 far, at, far;
            st.shared.b32 [own], $1;
            ld.shared.b32 $0, [far+252];
            }""",
            "=&r,r", [i], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        tl.store(x + i, got)

    @triton.jit
    def _handed(x):
        """Eight rounds: a warp stores a line of words, one lane arrives; the other warp waits, loads, one lane arrives."""
        i = tl.arange(0, 64)
        got = tl.inline_asm_elementwise(
            """{
            .shared .align 8 .b64 full;
            .shared .align 8 .b64 empty;
            .shared .align 4 .b32 left[32];
            .reg .pred first, lead, own, done;
            .reg .b32 at, lane, round, phase, f, e;
            mov.u32 f, full;
            mov.u32 e, empty;
            mov.u32 at, left;
            and.b32 lane, $1, 31;
            setp.eq.u32 lead, lane, 0;
            shl.b32 lane, lane, 2;
            add.u32 at, at, lane;
            setp.eq.u32 first, $1, 0;
            @first mbarrier.init.shared::cta.b64 [f], 1;
            @first mbarrier.init.shared::cta.b64 [e], 1;
            bar.sync 0;
            mov.u32 $0, 0;
            mov.u32 round, 0;
            setp.lt.u32 own, $1, 32;
            @!own bra take;
            give:
            not.b32 phase, round;
            and.b32 phase, phase, 1;
            room:
            mbarrier.try_wait.parity.shared.b64 done, [e], phase;
            @!done bra room;
            st.shared.b32 [at], round;
            bar.warp.sync -1;
            @lead mbarrier.arrive.shared::cta.b64 _, [f];
            add.u32 round, round, 1;
            setp.lt.u32 done, round, 8;
            @done bra give;
            bra over;
            take:
            and.b32 phase, round, 1;
            ready:
            mbarrier.try_wait.parity.shared.b64 done, [f], phase;
            @!done bra ready;
            ld.shared.b32 lane, [at];
            add.u32 $0, $0, lane;
            bar.warp.sync -1;
            @lead mbarrier.arrive.shared::cta.b64 _, [e];
            add.u32 round, round, 1;
            setp.lt.u32 done, round, 8;
            @done bra take;
            over:
            bar.sync 0;
            }""",
            "=&r,r", [i], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        tl.store(x + i, got)


def raced(device: str) -> None:
    """What racecheck must find."""
    _raced[(1,)](torch.zeros(64, dtype=torch.int32, device=device), num_warps=2)


def handed(device: str) -> None:
    """What racecheck reports only if it does not follow an arrive for other lanes; also checks that the order holds."""
    x = torch.zeros(64, dtype=torch.int32, device=device)
    _handed[(1,)](x, num_warps=2)
    assert x.tolist() == [0] * 32 + [28] * 32, "a hand-over lost a word"
