"""`foveate serve`: OpenAI's own client against transformers' server with a recipe on a tiny model."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

import pytest
import torch

from foveate.adapters.context import ContextCache
from foveate.adapters.transformers import use
from foveate.cli import app
from foveate.errors import ConfigError, UnsupportedError
from foveate.models import load
from foveate.serve import address, check_extra, listen, serve
from foveate.serve.requests import wrong, wrong_messages
from tests.tiny import save_model

try:
    check_extra()
except UnsupportedError as missing:
    pytest.skip(str(missing), allow_module_level=True)

import openai

import foveate.serve.app as application
import foveate.serve.engine as engine

RECIPE = "streaming_llm:sink=2,window=12+cache=snapkv:window=4,capacity=24"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}bot: {% endif %}"
)
TEXTS = (
    "The quick brown fox jumps over the lazy dog, twice.",
    "Pack my box with five dozen liquor jugs, please; all of it.",
)


@dataclass
class Answer:
    status: int
    text: str


def ask(url: str, body: bytes | None = None) -> Answer:
    """One request, GET without a body; any status is an answer."""
    asked = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=20) as answer:
            return Answer(answer.status, answer.read().decode())
    except urllib.error.HTTPError as err:
        return Answer(err.code, err.read().decode())


class Served:
    """A server on a thread, and what its model answers without one."""

    def __init__(self, folder: str):
        self.net, self.tokenizer = load(folder, device="cpu", dtype="fp32")
        self.tokenizer.chat_template = TEMPLATE
        self.net.generation_config.eos_token_id = None  # answers of a length that the tests choose
        bound = listen("127.0.0.1", 0)
        self.url = address(bound)
        self.running: list[application.Server] = []
        make = application.Server.__init__

        def kept(server, *args):
            self.running.append(server)
            make(server, *args)

        said: list[str] = []
        args, options = (self.net, self.tokenizer, RECIPE, bound), dict(name="tiny", say=said.append)
        self.thread = threading.Thread(target=serve, args=args, kwargs=options, daemon=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(application.Server, "__init__", kept)
            self.thread.start()
            assert waits(lambda: said, 20)
        assert self.url in said[0] and "streaming_llm" in said[0]
        self.client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=20)

    def plain(self, text: str, tokens: int, recipe: str | None = None) -> str:
        """What `foveate run` prints: the same model and recipe, greedy, without a server."""
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        done = self.twin.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        return self.tokenizer.decode(done[0, ids.shape[1] :], skip_special_tokens=True)

    def post(self, path: str, body) -> Answer:
        where = self.url.replace("/v1", "/load_model") if path == "/load_model" else f"{self.url}/{path}"
        return ask(where, body if isinstance(body, bytes) else json.dumps(body).encode())

    def stop(self) -> None:
        self.running[0].should_exit = True
        self.thread.join(10)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("tiny"))
    made = Served(folder)
    made.folder = folder
    made.twin, _ = load(folder, device="cpu", dtype="fp32")
    made.twin.generation_config.eos_token_id = None
    yield made
    made.stop()
    assert not made.thread.is_alive()
    with use(made.net, "dense"):  # the recipe was taken off when the server ended
        pass


def stream(client, text: str, tokens: int) -> str:
    parts = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": text}], max_tokens=tokens, temperature=0, stream=True
    )
    return "".join(p.choices[0].delta.content or "" for p in parts)


def caches() -> int:
    return sum(type(thing) is ContextCache for thing in gc.get_objects())


def waits(until, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not (done := until()) and time.monotonic() < end:
        time.sleep(0.02)
    return bool(done)


# ---------------------------------------------------------------------- answers
def test_two_streams_at_once_answer_as_run_does(served):
    with use(served.twin, RECIPE):
        want = [served.plain(f"user: {t}\nbot: ", 40) for t in TEXTS]
    dense = [served.plain(f"user: {t}\nbot: ", 40) for t in TEXTS]
    assert want[0] != want[1] and want != dense  # the recipe changes the answers, so that equality says something
    got: dict[str, str] = {}
    threads = [threading.Thread(target=lambda t=t: got.update({t: stream(served.client, t, 40)})) for t in TEXTS]
    for t in threads:
        t.start()
    for t in threads:
        t.join(20)
    assert [got.get(t) for t in TEXTS] == want


def test_every_endpoint_gives_the_same_answer(served):
    with use(served.twin, RECIPE):
        want = served.plain(f"user: {TEXTS[0]}\nbot: ", 20)
    asked = dict(model="tiny", temperature=0)
    chat = served.client.chat.completions.create(
        messages=[{"role": "user", "content": TEXTS[0]}], max_completion_tokens=20, **asked
    )
    assert chat.choices[0].message.content == want and chat.choices[0].finish_reason == "length"
    assert chat.usage.completion_tokens == 20 and chat.model == "tiny"
    text = served.client.completions.create(prompt=f"user: {TEXTS[0]}\nbot: ", max_tokens=20, **asked)
    assert text.choices[0].text == want
    answer = served.client.responses.create(input=TEXTS[0], max_output_tokens=20, **asked)
    assert answer.output_text == want
    assert [m.id for m in served.client.models.list()] == ["tiny"]
    assert served.post("/load_model", {"model": "tiny"}).status == 200
    assert json.loads(ask(served.url.replace("/v1", "/health")).text) == {"status": "ok"}


def test_a_seed_repeats_a_sampled_answer(served):
    sampled = lambda seed: (  # noqa: E731
        served.client.completions.create(model="tiny", prompt=TEXTS[0], max_tokens=30, temperature=1.0, seed=seed)
        .choices[0]
        .text
    )
    assert sampled(5) == sampled(5) != sampled(6)


def test_an_answer_ends_at_the_positions_of_the_model(served):
    done = served.client.completions.create(model="tiny", prompt="a" * 500, max_tokens=100, temperature=0)
    assert done.usage.prompt_tokens == 500 and done.usage.total_tokens == 512


# ---------------------------------------------------------------------- clients that leave
@pytest.mark.parametrize("streaming", (True, False), ids=("stream", "whole"))
def test_a_client_that_disconnects_frees_its_memory(served, streaming, monkeypatch):
    """The generation stops long before its end, nothing keeps the cache, and the next client is served at once."""
    assert waits(lambda: not caches())
    steps, put = [], engine.Streamer.put if streaming else engine.Silent.put

    def slow(self, value):
        steps.append(1)
        time.sleep(0.02)
        put(self, value)

    monkeypatch.setattr(engine.Streamer if streaming else engine.Silent, "put", slow)
    host, port = served.url.removeprefix("http://").removesuffix("/v1").split(":")
    body = json.dumps({"model": "tiny", "prompt": TEXTS[0], "max_tokens": 400, "temperature": 0, "stream": streaming})
    with socket.create_connection((host, int(port))) as line:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        line.sendall(f"{head}\r\n\r\n{body}".encode())
        assert waits(lambda: len(steps) > 5) and caches() == 1
    assert waits(lambda: not caches(), 4.0), f"{caches()} caches are still there after {len(steps)} steps"
    assert len(steps) < 300
    monkeypatch.undo()
    assert stream(served.client, TEXTS[1], 3)


def test_who_leaves_before_his_turn_costs_nothing(served, monkeypatch):
    begun, generate = [], served.net.generate
    gate = threading.Event()

    def held(**kwargs):
        begun.append(kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else kwargs["input_ids"].shape[1])
        gate.wait(10)
        return generate(**kwargs)

    monkeypatch.setattr(served.net, "generate", held)
    first = threading.Thread(target=stream, args=(served.client, TEXTS[0], 3))
    first.start()
    assert waits(lambda: begun)
    with pytest.raises(openai.APITimeoutError):
        served.client.with_options(timeout=0.3).completions.create(model="tiny", prompt="x" * 77, max_tokens=3)
    gate.set()
    first.join(10)
    assert stream(served.client, TEXTS[0], 3) and 77 not in begun


def test_a_failed_generation_keeps_no_cache(served, monkeypatch):
    from foveate.methods.snapkv import SnapKV

    def fails(*args):
        raise RuntimeError('it says "no"')

    monkeypatch.setattr(SnapKV, "compress", fails)
    body = {"model": "tiny", "prompt": TEXTS[0], "max_tokens": 5}
    answer = served.post("completions", body)
    assert answer.status == 500 and "says" in answer.text
    lines = served.post("completions", body | {"stream": True}).text.splitlines()
    assert json.loads(lines[-2].removeprefix("data: ") if not lines[-1] else lines[-1].removeprefix("data: "))["error"]
    assert waits(lambda: not caches())
    monkeypatch.undo()
    assert stream(served.client, TEXTS[0], 3)


# ---------------------------------------------------------------------- requests that are wrong
HELLO = [{"role": "user", "content": "hello"}]
BAD = {
    "no messages": ("chat/completions", {"model": "tiny"}, "messages: expected a list"),
    "empty messages": ("chat/completions", {"messages": []}, "messages: expected a list"),
    "messages of text": ("chat/completions", {"messages": ["hello"]}, "messages[0]: expected an object"),
    "no role": ("chat/completions", {"messages": [{"content": "x"}]}, "messages[0]: expected an object"),
    "no content": ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content"),
    "an image": ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts of text"),
    "another model": ("chat/completions", {"model": "gpt", "messages": HELLO}, "gpt"),
    "unknown field": ("chat/completions", {"messages": HELLO, "fovea": 1}, "fovea"),
    "no number": ("chat/completions", {"messages": HELLO, "temperature": "hot"}, "temperature: expected a number"),
    "negative length": ("chat/completions", {"messages": HELLO, "max_tokens": -5}, "whole number from 1 to 2147483648"),
    "half a token": ("chat/completions", {"messages": HELLO, "max_tokens": 1.5}, "max_tokens: expected a whole number"),
    "top_p": ("chat/completions", {"messages": HELLO, "top_p": 0}, "top_p"),
    "seed": ("chat/completions", {"messages": HELLO, "seed": "x"}, "seed"),
    "stream": ("chat/completions", {"messages": HELLO, "stream": "yes"}, "stream: expected true or false"),
    "stop": ("chat/completions", {"messages": HELLO, "stop": [1]}, "stop: expected a text"),
    "bias": ("chat/completions", {"messages": HELLO, "logit_bias": {"500": 1}}, "logit_bias: expected token numbers below"),
    "tools": ("chat/completions", {"messages": HELLO, "tools": "hammer"}, "tools: expected a list"),
    "tool call": ("chat/completions", {"messages": [{"role": "user", "tool_calls": [3]}]}, "request: cannot be read"),
    "template": ("chat/completions", {"messages": HELLO, "chat_template_kwargs": {"tools": []}}, "request: cannot be read"),
    "cache": ("completions", {"prompt": "x", "generation_config": '{"cache_implementation": "static"}'}, "cannot be set"),
    "no JSON": ("chat/completions", {"messages": HELLO, "generation_config": "{"}, "JSON object"),
    "no prompt": ("completions", {"model": "tiny"}, "prompt: expected a text"),
    "prompt of numbers": ("completions", {"prompt": [1, 2]}, "prompt: expected a text"),
    "too long": ("completions", {"prompt": "a" * 600}, "expected less than 512 tokens, the model's positions, got 600"),
    "no input": ("responses", {}, "input: expected a text"),
    "bad input": ("responses", {"input": [3]}, "request: cannot be read"),
    "load": ("/load_model", {"model": 3}, "loads no other"),
    "no text": ("completions", {"prompt": "\ud800"}, "request: cannot be read"),
    "no route": ("embeddings", {}, "Not Found"),
    "audio": ("systemone", {}, "completes text"),
}  # fmt: skip


@pytest.mark.parametrize("stream", (False, True), ids=("whole", "stream"))
@pytest.mark.parametrize("name", BAD)
def test_malformed_requests_get_4xx(served, name, stream):
    path, body, says = BAD[name]
    if stream and path.startswith("/"):
        pytest.skip("this route does not stream")
    answer = served.post(path, {"stream": True, **body} if stream else body)
    assert 400 <= answer.status < 500, answer.text
    assert says in json.dumps(json.loads(answer.text)), answer.text


def test_what_is_no_request_gets_4xx_and_the_server_lives(served):
    assert 400 <= served.post("completions", b"{").status < 500
    assert 400 <= served.post("completions", b"[1]").status < 500
    assert 400 <= served.post("completions", b"\xff\xfe").status < 500
    deep = b'{"prompt": ' + b"[" * 100_000
    assert 400 <= served.post("completions", deep).status < 500
    assert ask(f"{served.url}/completions").status == 405
    assert stream(served.client, TEXTS[0], 3)


def test_checks_say_what_came():
    assert wrong({"temperature": True}, 10) == "temperature: expected a number from 0 to 100, got true"
    assert wrong({"max_tokens": None, "stop": "x", "logit_bias": {"9": 1}, "seed": 3}, 10) is None
    assert all(wrong({key: float(value)}, 10) for key in ("seed", "top_p", "max_tokens") for value in ("inf", "nan"))
    assert wrong_messages([{"role": "user", "content": [{"type": "text", "text": "x"}]}]) is None
    assert len(wrong_messages("x" * 500) or "") < 160


# ---------------------------------------------------------------------- the command
def test_a_port_that_is_taken_is_one_sentence():
    with listen("127.0.0.1", 0) as bound:
        bound.listen()
        with pytest.raises(ConfigError, match=r"port: cannot listen on 127\.0\.0\.1:\d+: "):
            listen("127.0.0.1", bound.getsockname()[1])


def test_a_missing_extra_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(UnsupportedError, match=r"serve: needs uvicorn; pip install 'foveate\[serve\]'"):
        check_extra()


def test_the_command_serves_until_it_is_interrupted(served, capsys, monkeypatch):
    """In this process, to save the seconds of another: Ctrl-C after an answer ends it as it ends any other command."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread only")
    monkeypatch.setattr("foveate.serve.listen", lambda host, port: bound)
    bound, answers = listen("127.0.0.1", 0), []

    def visit():
        body = json.dumps({"prompt": TEXTS[0], "max_tokens": 4}).encode()
        if waits(lambda: _refused(address(bound)) is None, 20):
            answers.append(ask(f"{address(bound)}/completions", body))
            os.kill(os.getpid(), signal.SIGINT)

    visitor = threading.Thread(target=visit)
    visitor.start()
    command = ["serve", "--model", served.folder, "-r", "streaming_llm", "--device", "cpu", "--dtype", "fp32"]
    with pytest.raises(SystemExit) as left:
        app(command, prog_name="foveate")
    visitor.join()
    assert left.value.code == 130 and answers[0].status == 200
    assert json.loads(answers[0].text)["usage"]["completion_tokens"] == 4
    assert f"serving {os.path.basename(served.folder)} under" in capsys.readouterr().err


def _refused(url: str) -> OSError | None:
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    try:
        socket.create_connection((host, int(port))).close()
    except OSError as err:
        return err
    return None
