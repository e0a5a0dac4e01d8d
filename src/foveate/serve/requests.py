"""What is wrong with a request, in one sentence, before a token of it is computed."""

from __future__ import annotations

import json
from typing import Any

# Numbers by name: lowest and highest value, and whether only whole numbers make sense.
NUMBERS: dict[str, tuple[float, float, bool]] = {
    "temperature": (0, 100, False),
    "top_p": (1e-6, 1, False),
    "frequency_penalty": (-0.99, 2, False),  # transformers repeats with 1 + this as the penalty, which must be positive
    "seed": (0, 2**63 - 1, True),
    "max_tokens": (1, 2**31, True),
    "max_completion_tokens": (1, 2**31, True),
    "max_output_tokens": (1, 2**31, True),
}
OBJECTS = ("chat_template_kwargs", "logit_bias")
# Set by a client, these change what `generate` returns or which cache it builds, and the server's own code fails.
RESERVED = ("cache_implementation", "cache_config", "num_return_sequences", "return_dict_in_generate", "num_beams",
            "use_cache", "compile_config", "assistant_early_exit", "prompt_lookup_num_tokens")  # fmt: skip


def wrong(body: dict[str, Any], vocabulary: int) -> str | None:
    """The reason this body cannot be served, naming the field, what came and what was expected; None if it can.

    Args:
        body: the JSON object of a request to chat/completions, completions or responses.
        vocabulary: how many tokens the model knows (keys of logit_bias).
    """
    for key, (low, high, whole) in NUMBERS.items():
        if (value := body.get(key)) is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and (not whole or value % 1 == 0)
        if not number or not low <= value <= high:
            kind = "whole number" if whole else "number"
            return f"{key}: expected a {kind} from {_number(low)} to {_number(high)}, got {_shown(value)}"
    for key in OBJECTS:
        if not isinstance(body.get(key, {}), (dict, type(None))):
            return f"{key}: expected an object, got {_shown(body[key])}"
    for key in body.get("logit_bias") or {}:
        if not (key.isdecimal() and int(key) < vocabulary):
            return f"logit_bias: expected token numbers below {vocabulary}, got {_shown(key)}"
    if any(not isinstance(v, (int, float)) or isinstance(v, bool) for v in (body.get("logit_bias") or {}).values()):
        return "logit_bias: expected a number for every token"
    if not isinstance(body.get("stream"), (bool, type(None))):
        return f"stream: expected true or false, got {_shown(body['stream'])}"
    stop = body.get("stop")
    if stop is not None and not _texts([stop] if isinstance(stop, str) else stop):
        return f"stop: expected a text or a list of texts, got {_shown(stop)}"
    if "suffix" in body and not isinstance(body["suffix"], (str, type(None))):
        return f"suffix: expected a text, got {_shown(body['suffix'])}"
    tools = body.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
        return f"tools: expected a list of objects, got {_shown(tools)}"
    return _generation(body.get("generation_config"))


def wrong_messages(messages: Any) -> str | None:
    """The reason these chat messages cannot be read, or None."""
    if not isinstance(messages, list) or not messages:
        return f"messages: expected a list of at least one message, got {_shown(messages)}"
    for i, one in enumerate(messages):
        if not isinstance(one, dict) or not isinstance(one.get("role"), str):
            return f"messages[{i}]: expected an object with a role and content, got {_shown(one)}"
        content = one.get("content")
        if content is None and one.get("tool_calls"):
            continue
        if isinstance(content, str):
            continue
        if not isinstance(content, list) or not all(isinstance(p, dict) for p in content):
            return f"messages[{i}].content: expected a text or a list of parts, got {_shown(content)}"
        for part in content:
            if part.get("type") not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
                return f"messages[{i}].content: expected parts of text, got {_shown(part)}"
    return None


def _generation(text: Any) -> str | None:
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        found = None
    if not isinstance(found, dict):
        return f"generation_config: expected the text of a JSON object, got {_shown(text)}"
    if taken := sorted(set(found) & set(RESERVED)):
        return f"generation_config: {', '.join(taken)} cannot be set by a client of this server"
    new = found.get("max_new_tokens", 1)
    if not isinstance(new, int) or isinstance(new, bool) or new < 1:
        return f"generation_config: max_new_tokens expected a whole number from 1, got {_shown(new)}"
    return None


def _texts(found: Any) -> bool:
    return isinstance(found, list) and bool(found) and all(isinstance(s, str) and s for s in found)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _number(value: float) -> str:
    """Whole numbers digit by digit: "2147483648" and not "2.14748e+09"."""
    return str(value) if isinstance(value, int) else f"{value:g}"
