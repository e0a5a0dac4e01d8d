"""The application: transformers' routes and handlers around one loaded model."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvicorn
from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server

from .engine import CLIENT, Clients, State, Turns
from .requests import wrong, wrong_messages


class Pinned(ModelManager):
    """One model under one name, loaded by us; it is never unloaded and no other is ever loaded."""

    def __init__(self, model: Any, tokenizer: Any, name: str):
        super().__init__(device="cpu", model_timeout=-1)
        self.force_model = name
        self.model, self.tokenizer, self.since = model, tokenizer, int(time.time())

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return self.model, self.tokenizer

    def process_model_name(self, model_id: str) -> str:  # type: ignore[override]
        return model_id

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
        return [{"id": self.force_model, "object": "model", "created": self.since, "owned_by": "foveate"}]

    def shutdown(self) -> None:
        return None


class _Checked:
    """A handler that refuses what cannot be served with 400 and one sentence, and keeps the seed for its own turn."""

    model_manager: Pinned

    def check(self, body: dict[str, Any]) -> str | None:
        return None

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        model = self.model_manager.model
        if (why := wrong(body, model.config.get_text_config().vocab_size) or self.check(body)) is not None:
            raise HTTPException(400, why)
        client = CLIENT.get()
        client.seed = body.pop("seed", None)
        body["stream"] = bool(body.get("stream"))  # transformers streams responses unless told not to; OpenAI does not
        try:
            return await super().handle_request(body, request_id)  # type: ignore[misc]
        except HTTPException:
            raise
        except Exception as err:
            if client.begun:
                raise
            # Until generation begins there is nothing but the request that can be wrong: a template that refuses these
            # messages, arguments of a tool that are no JSON.
            raise HTTPException(400, f"request: cannot be read ({type(err).__name__}: {err})") from err

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        config = super()._build_generation_config(body, *args, **kwargs)  # type: ignore[misc]
        if body.get("temperature"):
            config.do_sample = True  # the model's own default may be greedy, whatever the temperature
        elif body.get("temperature") == 0:
            config.temperature = None  # greedy, and no warning at each request that it is of no use
        return config


class Chat(_Checked, ChatCompletionHandler):  # type: ignore[misc]
    def check(self, body: dict[str, Any]) -> str | None:
        if self.model_manager.tokenizer.chat_template is None:
            return "messages: this model has no chat template; send a prompt to /v1/completions"
        return wrong_messages(body.get("messages"))


class Completion(_Checked, CompletionHandler):  # type: ignore[misc]
    def check(self, body: dict[str, Any]) -> str | None:
        prompt = body.get("prompt")
        return None if isinstance(prompt, str) and prompt else "prompt: expected a text of at least one character"


class Response(_Checked, ResponseHandler):  # type: ignore[misc]
    def check(self, body: dict[str, Any]) -> str | None:
        if self.model_manager.tokenizer.chat_template is None:
            return "input: this model has no chat template; send a prompt to /v1/completions"
        given = body.get("input")
        if isinstance(given, str) and given:
            return None
        return None if isinstance(given, list) and given else "input: expected a text or a list of messages"


class Absent:
    """What transformers serves with other kinds of models."""

    async def handle_request(self, *args: Any) -> Any:
        raise HTTPException(404, "this server completes text; it serves chat/completions, completions and responses")


def build(model: Any, tokenizer: Any, name: str) -> Clients:
    """The ASGI application for a model with a recipe applied; ConfigError if there is none."""
    state, manager = State(Turns(model)), Pinned(model, tokenizer, name)
    chat, completion, response = (kind(manager, state) for kind in (Chat, Completion, Response))
    app = build_server(manager, chat, completion, response, Absent(), Absent(), state)
    # Loading on demand has no meaning here; `transformers chat` asks for it before its first message all the same.
    app.router.routes[:] = [r for r in app.router.routes if getattr(r, "path", None) not in ("/load_model", "/reset")]

    @app.post("/load_model")
    async def load_model(body: dict[str, Any]) -> StreamingResponse:
        if body.get("model") != name:
            raise HTTPException(400, f"model: this server has {name!r} and loads no other, got {body.get('model')!r}")

        async def ready() -> AsyncIterator[str]:
            yield f"data: {json.dumps({'status': 'ready', 'model': name, 'cached': True})}\n\n"

        return StreamingResponse(ready(), media_type="text/event-stream")

    @app.exception_handler(RequestValidationError)
    async def no_object(*args: Any) -> JSONResponse:  # FastAPI's own repeats the body, and fails if that is no UTF-8
        return JSONResponse({"detail": "request: expected a JSON object with content type application/json"}, 422)

    return Clients(app)


class Server(uvicorn.Server):
    """A server that is quiet but for problems and says once that it listens. Interrupted, it gives open answers two
    seconds."""

    def __init__(self, app: Clients, started: Callable[[], None]):
        super().__init__(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2))
        self._say = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._say()
