"""From requests to prompts, and from tokens to text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from firstlab.data.encoding import prompt_ids
from firstlab.data.task import Example
from firstlab.hub.source import Source
from firstlab.serve.protocol import ApiError, Asked, Chat, Completion


def prompt_of(source: Source, asked: Asked) -> list[int]:
    """Token ids of a prompt; ApiError for one that the model cannot read."""
    if isinstance(asked, Chat):
        text, field = _chat_prompt(source, asked), "messages"
    else:
        assert isinstance(asked, Completion)
        text, field = asked.prompt, "prompt"
    ids = prompt_ids(source.tokenizer, text, markup=True) if isinstance(text, str) else text
    vocabulary = source.model.get_input_embeddings().num_embeddings
    if wrong := [token for token in ids if not 0 <= token < vocabulary]:
        raise ApiError(400, f"{field} has token {wrong[0]}: give ids from 0 to {vocabulary - 1}", field)
    if not ids:
        raise ApiError(400, f"{field} is empty: give at least one token", field)
    return ids


def _chat_prompt(source: Source, asked: Chat) -> str | list[int]:
    """By the tokenizer's chat template; of a run without one, a single message is the text of its task."""
    messages = [{"role": each.role, "content": each.text} for each in asked.messages]
    if getattr(source.tokenizer, "chat_template", None):
        try:
            text: str = source.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates refuse in their own words, such as an order of roles
            raise ApiError(400, f"messages: the model's chat template refuses them ({error})", "messages") from error
        return text
    task, wrong = source.task, "messages: this model has no chat template; "
    if task is None or task.kind == "qa" or task.parts:
        raise ApiError(400, f"{wrong}use /v1/completions", "messages")
    if [each.role for each in asked.messages] != ["user"]:
        raise ApiError(400, f"{wrong}send one of role user, the text of its task, or use /v1/completions", "messages")
    return prompt_ids(source.tokenizer, task.prompt(Example("request", messages[0]["content"], ())), task.markup)


class TextStream:
    """The text of tokens as they come, up to a stop.

    Attributes:
        stopped: Whether one of the stops has come; it is not part of the text.
    """

    def __init__(self, tokenizer: Any, ends: Collection[int], stops: Sequence[str]) -> None:
        self._tokenizer, self._ends, self._stops = tokenizer, ends, stops
        self._ids: list[int] = []
        self._start = self._read = 0  # tokens before `_read` are text already; from `_start` on they give its spacing
        self._held = ""  # text that may be the beginning of a stop
        self.stopped = False

    def feed(self, token: int | None) -> str:
        """The text that a token adds; None: no more come, and what was held back is due."""
        if token is not None and token not in self._ends:
            self._ids.append(token)
        before, now = self._decoded(self._read), self._decoded(len(self._ids))
        if token is None or not now.endswith("\N{REPLACEMENT CHARACTER}"):  # else half a character
            self._held += now[len(before) :]
            self._start, self._read = self._read, len(self._ids)
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        self.stopped = bool(found)
        begun = (n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        due = min(found) if found else len(self._held) - (0 if token is None else max(begun, default=0))
        text, self._held = self._held[:due], self._held[due:]
        return text

    def _decoded(self, end: int) -> str:
        text: str = self._tokenizer.decode(self._ids[self._start : end], skip_special_tokens=True)
        return text
