"""Decode test prompts through transformers' `generate` or the decode engine, with the same settings and responses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch

from firstlab.config.schema import EvaluationConfig
from firstlab.data.datamodule import PromptDataModule
from firstlab.data.encoding import PromptRows, collate_prompts
from firstlab.data.room import Room
from firstlab.engine.engine import engine_for
from firstlab.engine.llama_step import check_supported
from firstlab.engine.sampling import Sampling
from firstlab.methods.base import rows_of
from firstlab.model.cache import RoutedCache
from firstlab.model.generation_options import stop_tokens
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.routes import Routes

#: A prompt's place in the test set, its response with the token that ended it, and of each layer the share of its
#: decode steps that skipped it.
Response = tuple[int, list[int], list[float]]

_MOVES_NO_SCORE = re.compile(r"_|output_|return_|use_cache$|transformers_version$|(bos|eos|pad)_token_id$")


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Every setting that moves a score or the search; `pinned_generation` keeps the model's own ones out."""

    decoder: str
    max_new_tokens: int  # examples may have a lower limit
    stop_tokens: list[int]
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float = 1.0
    num_beams: int
    batch_size: int
    seed: int

    @classmethod
    def of(cls, model: RouterAugmentedLM, data: PromptDataModule, config: EvaluationConfig, seed: int) -> Decoding:
        """The settings of an evaluation."""
        return cls(
            decoder=config.decoder,
            max_new_tokens=data.max_new_tokens,
            stop_tokens=stop_tokens(model.lm, data.tokenizer),
            do_sample=config.do_sample,
            temperature=config.temperature if config.do_sample else 1.0,
            top_k=config.top_k if config.do_sample else 0,
            num_beams=config.num_beams,
            batch_size=config.batch_size,
            seed=seed,
        )

    def record(self, model: RouterAugmentedLM) -> dict[str, Any]:
        """For `result.json`: these settings, and those of the model's folder that are ignored."""
        own = model.lm.generation_config.to_diff_dict()
        ignored = {name: value for name, value in own.items() if value is not None and not _MOVES_NO_SCORE.match(name)}
        return asdict(self) | {"ignored": json.loads(json.dumps(ignored, default=str))}


def check_engine(model: RouterAugmentedLM, option: str, decoder: str) -> None:
    """Raises ValueError, with the option's name, if the decode engine is wanted and does not know the model."""
    if decoder == "engine":
        try:
            check_supported(model.lm)
        except ValueError as error:
            raise ValueError(f"{option}={decoder}: {error} ({option}=generate)") from error


@dataclass(frozen=True)
class Decoder:
    """Responds to test prompts: a model in eval mode, within `pinned_generation`, under one decision on its layers."""

    model: RouterAugmentedLM
    data: PromptDataModule
    settings: Decoding
    routes: Routes | None  # of all test prompts; None lets the routers decide

    @property
    def rows(self) -> PromptRows:
        """The test prompts."""
        data = self.data
        return PromptRows(data.task, data.test, data.tokenizer, data.max_prompt_length)

    def responses(self, batches: Sequence[Sequence[int]]) -> Iterator[Response]:
        """Respond to batches of test prompts, given by position; a response comes as soon as it has ended."""
        if batches:
            yield from self._by_engine(batches) if self.settings.decoder == "engine" else self._by_generate(batches)

    def _by_generate(self, batches: Sequence[Sequence[int]]) -> Iterator[Response]:
        model, data, settings, rows = self.model, self.data, self.settings, self.rows
        options: dict[str, Any] = {
            "max_new_tokens": settings.max_new_tokens,
            "do_sample": settings.do_sample,
            "num_beams": settings.num_beams,
            "pad_token_id": data.pad,
            "eos_token_id": settings.stop_tokens or None,
            "return_dict_in_generate": True,
        }
        if settings.do_sample:
            options |= {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}

        def respond(indices: Sequence[int]) -> list[Response]:
            batch = collate_prompts([rows[i] for i in indices], pad=data.pad)
            ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
            torch.manual_seed(settings.seed * 1_000_003 + indices[0])
            result = model.generate(ids, mask, routes=rows_of(self.routes, indices, model.device), **options)
            responses = [
                _until_end(tokens[: data.test[i].max_new_tokens], settings.stop_tokens, data.pad)
                for i, tokens in zip(indices, result.sequences[:, ids.shape[1] :].tolist(), strict=True)
            ]
            skips = self._skips(result.past_key_values, [len(tokens) for tokens in responses])
            return list(zip(indices, responses, skips, strict=True))

        room = Room()
        for indices in batches:  # drawn tokens depend on the prompts beside them
            passes = [respond(indices)] if settings.do_sample else room.passes(indices, respond)
            yield from chain.from_iterable(passes)

    def _skips(self, cache: RoutedCache, new_tokens: Sequence[int]) -> list[list[float]]:
        """Of every row, the share of its own decode steps that skipped each layer."""
        beams = self.settings.num_beams
        if self.routes is not None and self.routes.decides_each_step:
            steps = torch.tensor(new_tokens).sub(1).clamp_min(0)
            return cache.layer_skips(steps.repeat_interleave(beams))[::beams].tolist()
        assert cache.routes is not None
        return (~cache.routes[::beams]).float().tolist()

    def _by_engine(self, batches: Sequence[Sequence[int]]) -> Iterator[Response]:
        data, settings, rows = self.data, self.settings, self.rows
        most = settings.max_new_tokens
        prompts = {i: rows[i].prompt for batch in batches for i in batch}
        limits = {i: min(most, data.test[i].max_new_tokens or most) for i in prompts}
        longest = max(len(prompts[i]) + limits[i] for i in prompts)
        engine = engine_for(self.model, longest, min(settings.batch_size, len(prompts)))
        # Drawn tokens depend on the prompts beside them, so a batch stays what it is, also in a resumed run. Greedy
        # tokens do not: long prompts go first, so that none is left alone at the end, beside others of their length.
        groups = batches if settings.do_sample else [sorted(prompts, key=lambda i: (-len(prompts[i]), i))]
        for group in groups:
            drawn = Sampling(settings.temperature, settings.top_k, settings.top_p, settings.seed * 1_000_003 + group[0])
            for place, out in engine.as_completed(
                [prompts[i] for i in group],
                [limits[i] for i in group],
                rows_of(self.routes, group, torch.device("cpu")),
                settings.stop_tokens,
                sampling=drawn if settings.do_sample else None,
            ):
                tokens = _until_end(out.tokens[0], settings.stop_tokens, data.pad)
                yield group[place], tokens, out.layer_skips[0].tolist()


def _until_end(tokens: list[int], ends: Sequence[int], pad: int) -> list[int]:
    """A response up to the token that ends it; without one, without the padding behind it."""
    for length, token in enumerate(tokens, start=1):
        if token in ends:
            return tokens[:length]
    while tokens and tokens[-1] == pad:
        tokens = tokens[:-1]
    return tokens
