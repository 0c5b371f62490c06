"""Turn an example into token ids, and rows of ids into padded batches (B rows, T tokens of the longest one)."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from firstlab.data.task import Example, Task

#: The settings that bound prompt and response in training, and the prompt in generation.
LENGTHS, PROMPT_LENGTH = "data.max_length_router or data.max_length_lora", "data.max_prompt_length"

LossOn = Literal["all", "response"]
Batch = dict[str, Tensor]

# The steps in which a text is shortened: words, but single characters in scripts without spaces, and pieces
# of very long words (a text that is one address or one line of base64).
_CJK = "\u3000-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
_UNIT = re.compile(rf"[{_CJK}]|[^\s{_CJK}]{{1,32}}")


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool, markup: bool = False) -> list[int]:
    """Token ids of a text; only in `markup` does the name of a special token stand for that token."""
    options = {"add_special_tokens": add_special_tokens, "verbose": False}
    if markup or not tokenizer.is_fast:  # transformers' own Python tokenizers would leave out other added tokens, too
        ids: list[int] = tokenizer(text, **options)["input_ids"]
        return ids
    encoded = tokenizer(text, split_special_tokens=True, return_special_tokens_mask=True, **options)
    # A vocabulary of whole words may have `</s>` as one of them, without other tokens for these characters. PAD in a
    # text does no harm: masks come from lengths, and some set PAD to an ordinary token.
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id} - {tokenizer.unk_token_id}
    added = encoded["special_tokens_mask"]
    return [token for token, mask in zip(encoded["input_ids"], added, strict=True) if mask or token not in named]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, markup: bool = False) -> list[int]:
    """Token ids of a prompt as generation sees them: one BOS if the tokenizer adds it, no EOS added behind.

    Some tokenizers close every text with EOS, after which a model would have nothing to say. A chat template may have
    written BOS already; a second one would change routes and responses. For `markup` see `Task.markup`.
    """
    ids = _ids(tokenizer, prompt, True, markup)
    while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        del ids[0]
    if ids[-1:] == [tokenizer.eos_token_id]:
        bare = _ids(tokenizer, prompt, False, markup)
        return ids if bare[-1:] == ids[-1:] else ids[:-1]
    return ids


def response_ids(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int]:
    """Token ids of a response, closed with EOS and tokenised apart from its prompt."""
    return [*_ids(tokenizer, response, False), eos_id(tokenizer)]


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that ends a text; a ValueError if the tokenizer has none."""
    if not isinstance(tokenizer.eos_token_id, int):
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no EOS token, so "
            "responses could not end: set tokenizer.eos_token to one of its tokens"
        )
    return tokenizer.eos_token_id


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: PAD, or EOS where there is none. Masks and labels come from lengths, not ids."""
    return tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else eos_id(tokenizer)


def fit_prompt(
    task: Task, example: Example, tokenizer: PreTrainedTokenizerBase, max_tokens: int, option: str = LENGTHS
) -> str:
    """The prompt of `example` in at most `max_tokens` tokens; where needed, the end of its source text is cut off.

    The cut is between words, or between characters in scripts without spaces and within a first word that does not
    fit; one more would not fit. The rest of the prompt, `### Response:` above all, always stays. A ValueError names the
    `option` that bounds the prompt where not even one character fits.
    """

    def too_long(prompt: str) -> bool:
        return len(prompt_ids(tokenizer, prompt, task.markup)) > max_tokens

    def last_fitting(ends: Sequence[int]) -> int:
        fitting = bisect_left(ends, True, key=lambda end: too_long(task.prompt(example, example.source[:end])))
        return ends[fitting - 1] if fitting else 0

    whole = task.prompt(example)
    if not too_long(whole):
        return whole
    units = list(_UNIT.finditer(example.source))
    end = last_fitting([unit.end() for unit in units])
    if end == 0 and units:  # a piece of 32 emoji has more than a hundred tokens
        end = last_fitting(range(units[0].start() + 1, units[0].end()))
    if end == 0:
        frame = len(prompt_ids(tokenizer, task.prompt(example, ""), task.markup))
        raise ValueError(
            f"{option} leaves {max_tokens} tokens for the prompt of example '{example.id}', which has "
            f"{frame} tokens before any of its text is in: raise {option}"
        )
    return task.prompt(example, example.source[:end])


def encode(
    task: Task, example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[int], list[int]]:
    """Token ids of prompt and response (the first reference), together at most `max_length`.

    What is too long loses source text first. The response is cut only where it takes more than half of
    `max_length` and the prompt leaves no room; a cut response has no EOS, because it does not end there.
    """
    prompt = prompt_ids(tokenizer, task.prompt(example), task.markup)
    response = response_ids(tokenizer, example.references[0])
    if len(prompt) + len(response) > max_length:
        response = response[: max(max_length // 2, max_length - len(prompt))]
        prompt = prompt_ids(tokenizer, fit_prompt(task, example, tokenizer, max_length - len(response)), task.markup)
    return prompt, response


@dataclass(frozen=True, slots=True)
class Row:
    """One tokenised example; `index` is its position in its split. No response when it is to be generated."""

    index: int
    prompt: list[int]
    response: list[int]


@dataclass(eq=False)
class TrainingRows(Dataset[Row]):
    """Prompt and response of each example, tokenised on access (worker processes share that work)."""

    task: Task
    examples: Sequence[Example]
    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Row:
        return Row(index, *encode(self.task, self.examples[index], self.tokenizer, self.max_length))


class PromptRows(TrainingRows):
    """The prompt of each example, for generation."""

    def __getitem__(self, index: int) -> Row:
        prompt = fit_prompt(self.task, self.examples[index], self.tokenizer, self.max_length, PROMPT_LENGTH)
        return Row(index, prompt_ids(self.tokenizer, prompt, self.task.markup), [])


def collate_training(rows: Sequence[Row], pad: int, loss_on: LossOn) -> Batch:
    """Pad on the right: input_ids, attention_mask, labels (-100 outside the loss) and prompt_mask [B, T]; index [B]."""
    ids = [torch.tensor(row.prompt + row.response) for row in rows]
    in_prompt = [torch.arange(len(each)) < len(row.prompt) for each, row in zip(ids, rows, strict=True)]
    hidden = [mask & (loss_on == "response") for mask in in_prompt]
    labels = [each.masked_fill(mask, -100) for each, mask in zip(ids, hidden, strict=True)]
    return {
        "input_ids": _padded(ids, pad),
        "attention_mask": _padded([torch.ones_like(each) for each in ids], 0),
        "labels": _padded(labels, -100),
        "prompt_mask": _padded([mask.long() for mask in in_prompt], 0),
        "index": torch.tensor([row.index for row in rows]),
    }


def collate_prompts(rows: Sequence[Row], pad: int) -> Batch:
    """Pad on the left, as generation needs it: input_ids and attention_mask [B, T]; index [B]."""
    ids = [torch.tensor(row.prompt) for row in rows]
    return {
        "input_ids": _padded(ids, pad, side="left"),
        "attention_mask": _padded([torch.ones_like(each) for each in ids], 0, side="left"),
        "index": torch.tensor([row.index for row in rows]),
    }


def _padded(rows: list[Tensor], value: int, side: str = "right") -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)
