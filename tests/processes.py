"""Processes of their own: Triton reads when it is imported whether it interprets, and an import cannot be taken back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_in_the_interpreter(file: str) -> None:
    """Run this test file once more with TRITON_INTERPRET=1; what it prints is the message of a failure."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def runs_without_triton(code: str) -> None:
    """Run python code; it must not import Triton."""
    code += "; import sys; assert 'triton' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
