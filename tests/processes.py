"""Processes of their own: Triton reads when it is imported whether it interprets, and an import cannot be taken back.

They are forked from a server that has imported torch and pytest, which takes longer than most of what they run.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "pytest"])


def run_in_the_interpreter(file: str) -> None:
    """Run this test file once more with TRITON_INTERPRET=1; what it prints is the message of a failure."""
    _run(_pytest, file)


def runs_without_triton(code: str) -> None:
    """Run python code; it must not import Triton."""
    _run(_execute, code)


def _run(what: Callable[[str], int], argument: str) -> None:
    with tempfile.NamedTemporaryFile() as said:
        process = SERVER.Process(target=_child, args=(what, argument, said.name))
        process.start()
        process.join(900)  # seconds
        if process.is_alive():
            process.kill()
            process.join()
        text = Path(said.name).read_text()
        assert process.exitcode == 0, f"exit status {process.exitcode}\n{text[-8000:]}"


def _child(what: Callable[[str], int], argument: str, said: str) -> None:
    out = os.open(said, os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(ROOT)
    assert "triton" not in sys.modules
    raise SystemExit(what(argument))


def _pytest(file: str) -> int:
    import pytest

    os.environ |= {"TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # plugins take a second to load
    return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", file]))


def _execute(code: str) -> int:
    exec(code, {})
    return int("triton" in sys.modules)
