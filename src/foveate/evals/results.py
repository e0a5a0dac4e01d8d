"""What an evaluation leaves behind: one record a sample, appended to a file as soon as it is known, safe to resume.

A folder holds `run.json` (the facts that all its records share: model, weights, dtype, text, seed, version) and
`records.jsonl`. A run that is killed loses the sample it was at; a second start reads what is there and goes on. More
recipes, tasks, lengths and samples may be added to a folder; other facts are refused, because figures of two models,
two dtypes or two texts must not be averaged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..errors import FoveateError
from ..report.files import write_atomic

SCHEMA = 1
FIXED = ("model", "config", "weights", "tokenizer", "dtype", "device", "text", "seed", "foveate")  # what may not change
COUNTS = 0.6  # a task counts for a comparison where dense scores at least this


class ResultsError(FoveateError):
    """A folder that holds no results, damaged ones, or those of another run."""


@dataclass(frozen=True)
class Record:
    """One sample under one recipe.

    Attributes:
        recipe: as asked for. settings: with every hyperparameter (`Recipe.describe`); records are told apart by it.
        suite, task, length, protocol, index: which sample, and how it was put to the model. tokens: of the prompt.
        values: what was measured, by name; a score lies in 0 to 1. text: the answer, "" where none was generated.
        answers: the references. meta: the sample's difficulty knobs.
    """

    recipe: str
    settings: str
    suite: str
    task: str
    length: int
    protocol: str
    index: int
    tokens: int
    values: dict[str, float]
    text: str = ""
    answers: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int, str, int]:
        """What tells this record from all others of a folder."""
        return self.settings, self.task, self.length, self.protocol, self.index


@dataclass(frozen=True)
class Results:
    """All records of a folder and the facts they share."""

    facts: dict[str, Any]
    records: list[Record]

    @staticmethod
    def load(folder: str | Path) -> Results:
        """Read a folder. ResultsError if it holds none, or another schema's; a half-written last line is left out."""
        where = Path(folder)
        try:
            facts = json.loads((where / "run.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ResultsError(f"results: {where} holds no run.json; foveate eval --out {where} makes one") from None
        except (OSError, ValueError) as err:
            raise ResultsError(f"results: cannot read {where / 'run.json'}: {err}") from err
        if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
            got = facts.get("schema") if isinstance(facts, dict) else type(facts).__name__
            raise ResultsError(f"results: {where / 'run.json'} has schema {got}, expected {SCHEMA}; use another folder")
        return Results(facts, [record for record, _ in _read(where / "records.jsonl")])


def join(folder: str | Path, parts: Sequence[str | Path]) -> Results:
    """Gather folders of one evaluation (other tasks, lengths or recipes on other devices of a kind) into `folder`.

    Raises:
        ResultsError: a part that is none, or that was made with other facts. Records that are there already stay.
    """
    found = [Results.load(part) for part in parts]
    if not found:
        raise ResultsError("results: expected at least one folder to join, got none")
    with Store(folder, {k: v for k, v in found[0].facts.items() if k != "schema"}) as store:
        for part in found:
            store.check(part.facts)
        for record in (r for part in found for r in part.records):
            if record.key not in store:
                store.add(record)
        return store.results()


class Store:
    """A results folder open for writing by one process. Use as a context manager."""

    def __init__(self, folder: str | Path, facts: dict[str, Any]):
        """Open or make a folder. ResultsError if it was made with other facts (nothing is changed then)."""
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ResultsError(f"results: {self.folder} is a file; give a folder")
        records = self.folder / "records.jsonl"
        if (self.folder / "run.json").exists():
            found = Results.load(self.folder)
            self.facts = found.facts
            self.check(facts)
        elif records.exists():
            raise ResultsError(f"results: {records} has no run.json beside it; use another folder")
        else:
            self.facts = {"schema": SCHEMA, **facts}
            write_atomic(self.folder / "run.json", json.dumps(self.facts, indent=1) + "\n")
        self._file: IO[str] = open(records, "a+", encoding="utf-8")  # noqa: SIM115 (open for as long as the store is)
        self._lock()
        read = list(_read(records))
        self._file.truncate(read[-1][1] if read else 0)  # a line that a killed process did not finish
        self.records: dict[tuple[str, str, int, str, int], Record] = {record.key: record for record, _ in read}

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __contains__(self, key: object) -> bool:
        return key in self.records

    def add(self, record: Record) -> None:
        """Append a record; it is on disk when this returns."""
        self._file.write(json.dumps(dataclasses.asdict(record), allow_nan=False, ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records[record.key] = record

    def results(self) -> Results:
        return Results(self.facts, list(self.records.values()))

    def check(self, new: dict[str, Any]) -> None:
        """ResultsError if records made with these facts do not belong here."""
        old = self.facts
        wrong = [
            f"{name} {old.get(name)!r} there, {new.get(name)!r} now" for name in FIXED if old.get(name) != new.get(name)
        ]
        if wrong:
            raise ResultsError(f"results: {self.folder} was made by another run ({'; '.join(wrong)}); use another --out")

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # not on Windows, where nothing stops two processes
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            self._file.close()
            raise ResultsError(f"results: another process is writing to {self.folder}") from err


def _read(path: Path) -> Iterator[tuple[Record, int]]:
    """(record, bytes of the file up to its end), stopping at a half-written last line."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        end = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                data = json.loads(line)
                yield Record(**{**data, "answers": tuple(data["answers"])}), end
            except (ValueError, TypeError, KeyError) as err:
                raise ResultsError(f"results: {path}, line {number} is damaged ({err})") from err
