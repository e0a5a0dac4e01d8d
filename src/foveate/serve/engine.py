"""Generation for one request at a time, which ends as soon as its client is gone.

A request's `Client` is a context variable, set where the connection is served (`Clients`), so the handlers of
transformers in between need not know of it. A generation ends by an exception inside `generate`: its frames, and the
cache with them, are freed before the next request begins, and nothing of it is kept in a future or a traceback.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from fastapi import HTTPException
from transformers.cli.serving.utils import (
    DirectStreamer,
    GenerateManager,
    GenerationState,
    _GenerationCancelled,
    _StreamError,
)
from transformers.generation.streamers import BaseStreamer

from ..adapters.transformers import handle_of
from ..errors import FoveateError

Message = MutableMapping[str, Any]


# ---------------------------------------------------------------------- who asks
@dataclass
class Client:
    """One request. gone: nobody waits for its answer any more. seed: of its random draws. begun: it is well-formed and
    waits for its turn, or is being answered."""

    gone: threading.Event = field(default_factory=threading.Event)
    seed: int | None = None
    begun: bool = False


CLIENT: ContextVar[Client] = ContextVar("foveate.client")


class Clients:
    """ASGI: gives each request its `Client` and watches the connection, whatever the application is doing."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        client, messages = Client(), asyncio.Queue[Message]()
        before = CLIENT.set(client)

        async def watch() -> None:
            while not client.gone.is_set():
                message = await receive()
                if message["type"] == "http.disconnect":
                    client.gone.set()
                messages.put_nowait(message)

        async def pull() -> Message:
            message = await messages.get()
            if message["type"] == "http.disconnect":
                messages.put_nowait(message)  # for whoever asks next
            return message

        watching = asyncio.create_task(watch())
        try:
            await self.app(scope, pull, send)
        finally:
            client.gone.set()
            watching.cancel()
            CLIENT.reset(before)


# ---------------------------------------------------------------------- what they get
class Streamer(DirectStreamer):
    """The text of one answer as it comes, for as long as its client is there."""

    def __init__(self, client: Client, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.client = client

    def put(self, value: torch.Tensor) -> None:
        if self.client.gone.is_set():
            self.cancel()
        super().put(value)


class Silent(BaseStreamer):  # type: ignore[misc]
    """No text, only the question whether the client is still there: for answers sent whole."""

    def __init__(self, client: Client):
        self.client = client

    def put(self, value: torch.Tensor) -> None:
        if self.client.gone.is_set():
            raise _GenerationCancelled

    def end(self) -> None:
        return None


class Turns(GenerateManager):
    """One answer at a time under the applied recipe, on one thread (captured decode steps belong to theirs)."""

    def __init__(self, model: Any):
        super().__init__()
        handle = handle_of(model)
        limit = getattr(model.get_decoder().config, "max_position_embeddings", None)
        self._limit: int | None = None if handle.recipe.extends else limit

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], DirectStreamer]:
        client = self._begin(inputs, gen_config)
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        streamer = Streamer(client, processor._tokenizer, loop, queue, response_parser=response_parser)

        def run() -> None:
            problem = self._generate(client, model, processor, inputs, gen_config, streamer)[1]
            if problem is not None:  # transformers writes the text between quotes as it is
                last = _StreamError(json.dumps(problem.detail)[1:-1])
            elif client.gone.is_set():
                last = None
            else:
                return  # the streamer has put the end
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, last)

        self.submit(run)
        return queue, streamer

    async def generate_non_streaming(  # type: ignore[override]  # theirs declares a list and returns a tensor, too
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, torch.Tensor]:
        client = self._begin(inputs, gen_config)
        streamer = Silent(client)
        found = await self.async_submit(self._generate, client, model, processor, inputs, gen_config, streamer)
        ids, problem = found
        if problem is not None:
            raise problem
        length = inputs["input_ids"].shape[-1]
        made = inputs["input_ids"][0, :0] if ids is None else ids[0, length:]  # None: gone, and nobody reads this
        return processor.decode(made, skip_special_tokens=True), length, made

    def _begin(self, inputs: Any, gen_config: Any) -> Client:
        """Check the lengths, and cut what may be generated to the model's positions. HTTPException if nothing fits."""
        tokens = inputs["input_ids"].shape[-1]
        if not tokens:
            raise HTTPException(400, "prompt: expected at least one token, got none")
        if self._limit is not None:
            room = self._limit - tokens
            if room < 1:
                raise HTTPException(
                    400, f"prompt: expected less than {self._limit} tokens, the model's positions, got {tokens}"
                )
            gen_config.max_new_tokens = min(gen_config.max_new_tokens or room, room)
        client = CLIENT.get()
        client.begun = True
        return client

    def _generate(
        self, client: Client, model: Any, processor: Any, inputs: Any, gen_config: Any, streamer: Any
    ) -> tuple[torch.Tensor | None, HTTPException | None]:
        """Runs on the thread of generation: (tokens, None), or (None, None) for a client that went away, or (None, what
        went wrong). Exceptions end here, so that no traceback keeps a cache alive."""
        if client.gone.is_set():
            return None, None
        try:
            if client.seed is not None:
                torch.manual_seed(client.seed)
            return model.generate(**inputs, streamer=streamer, generation_config=gen_config, tokenizer=processor), None
        except _GenerationCancelled:
            return None, None
        except FoveateError as err:
            return None, HTTPException(400, str(err))
        except torch.OutOfMemoryError:
            return None, HTTPException(503, "out of memory: send a shorter prompt")
        except Exception as err:
            return None, HTTPException(500, f"{type(err).__name__}: {err}")


class State(GenerationState):
    """The state the handlers share: one manager for the one model."""

    def __init__(self, turns: Turns):
        super().__init__()
        self._turns = turns

    def get_manager(self, model_id: str, use_cb: bool = False) -> Turns:
        return self._turns
