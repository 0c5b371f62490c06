"""What clients may send, and the JSON that they get: OpenAI's, with `skip_rate` and the layers that ran."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.exceptions import HTTPException

Json = dict[str, Any]
Stop = Annotated[str, Field(min_length=1, max_length=256)]

#: What many clients send at a value that changes nothing; at others it is refused.
_NEUTRAL: Json = {"n": 1, "best_of": 1, "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}}
_NEUTRAL |= {"echo": False, "logprobs": False, "tools": [], "response_format": {"type": "text"}}


class ApiError(HTTPException):
    """A refusal; `message` names the field, its value and a way out, `param` is the field."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        self.body: Json = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Sent(BaseModel):
    """Anything unknown is refused, but for what changes nothing; null is the same as nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_what_changes_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        newer = values.get("max_completion_tokens")
        values = values if newer is None else values | {"max_tokens": newer}
        return {name: value for name, value in values.items() if not _changes_nothing(name, value)}


def _changes_nothing(name: str, value: Any) -> bool:
    if value is None or name in ("user", "name", "metadata", "store", "max_completion_tokens"):
        return True
    neutral = _NEUTRAL.get(name)
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


class StreamOptions(_Sent):
    """Options of a stream."""

    include_usage: bool = False


class Asked(_Sent):
    """What both endpoints take. Without a temperature the most likely token is taken."""

    model: str = ""
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    skip_rate: float | None = Field(None, ge=0, lt=1)

    @property
    def stops(self) -> list[str]:
        """Texts that end the response."""
        return [self.stop] if isinstance(self.stop, str) else self.stop


class Completion(Asked):
    """POST /v1/completions."""

    prompt: str | list[int]


class Part(_Sent):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(_Sent):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    @property
    def text(self) -> str:
        """The content in one piece."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Chat(Asked):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)


Kind = TypeVar("Kind", bound=Asked)


def parse(kind: type[Kind], body: bytes) -> Kind:
    """The request in a body; ApiError for the first field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    first, place = errors[0], errors[0]["loc"]
    if first["type"] == "json_invalid":
        raise ApiError(400, f"the body is not valid JSON ({first['ctx']['error']}): send one JSON object")
    # Without what pydantic calls the alternatives of a field.
    field = ".".join(str(each) for each in place if isinstance(each, int) or str(each).isidentifier() and each != "str")
    if first["type"] == "missing":
        raise ApiError(400, f"{field} is missing: add it", field)
    says = " or ".join(dict.fromkeys(each["msg"] for each in errors if each["loc"][:1] == place[:1]))
    if first["type"] == "extra_forbidden":
        known = f"takes only {field}={_NEUTRAL[field]!r}" if field in _NEUTRAL else "does not know the field"
        says = f"this server {known}; leave it out"
    value = repr(first["input"])
    raise ApiError(400, f"{field or 'body'}={value[:80]}{'...' * (len(value) > 80)}: {says}", field or None)


class Reply:
    """The JSON of one answer, whole or part by part."""

    def __init__(self, chat: bool, model: str) -> None:
        self.chat = chat
        self._head: Json = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def json(self, text: str, reason: str | None = None, whole: bool = False) -> Json:
        """The body of an answer, or a part of one that is streamed; the last of these has a reason."""
        kind, said = "text_completion", Json(text=text)
        if self.chat:
            kind = "chat.completion" if whole else "chat.completion.chunk"
            said = {"message" if whole else "delta": {"role": "assistant", "content": text}}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        return {**self._head, "object": kind, "choices": [choice]}
