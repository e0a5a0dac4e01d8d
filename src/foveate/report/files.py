"""Files appear whole or not at all: written beside their place, flushed, then moved over the old one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from ..errors import FoveateError


def write_atomic(path: str | Path, text: str) -> Path:
    """Write text to path. On any failure (a full disk) the old file stays and a FoveateError says so."""
    target = Path(path)
    work = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, work = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(work, 0o644)  # mkstemp makes private files
        os.replace(work, target)
    except OSError as err:
        if work is not None:
            with contextlib.suppress(OSError):
                os.unlink(work)
        kept = "; the file that was there is unchanged" if target.is_file() else ""
        raise FoveateError(f"cannot write {target}: {err.strerror or err}{kept}") from err
    return target
