"""Decode test prompts through transformers' `generate` or the decode engine, with the same settings and responses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
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

#: A prompt's place in the test set, its response up to its end, and the share of decode steps that skipped each layer.
Response = tuple[int, list[int], list[float]]

_MOVES_NO_SCORE = re.compile(r"_|output_|return_|use_cache$|transformers_version$|(bos|eos|pad)_token_id$")


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
    config: EvaluationConfig
    seed: int
    routes: Routes | None  # of all test prompts; None lets the routers decide

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Every setting that moves a score or the search; `pinned_generation` keeps the model's own ones out."""
        config = self.config
        return {
            "decoder": config.decoder,
            "max_new_tokens": self.data.max_new_tokens,  # examples may have a lower limit
            "stop_tokens": stop_tokens(self.model.lm, self.data.tokenizer),
            "do_sample": config.do_sample,
            "temperature": config.temperature if config.do_sample else 1.0,
            "top_k": config.top_k if config.do_sample else 0,
            "top_p": 1.0,
            "num_beams": config.num_beams,
            "batch_size": config.batch_size,
            "seed": self.seed,
        }

    def record(self) -> dict[str, Any]:
        """For `result.json`: the settings, and those of the model's folder that are ignored."""
        own = self.model.lm.generation_config.to_diff_dict()
        ignored = {name: value for name, value in own.items() if value is not None and not _MOVES_NO_SCORE.match(name)}
        return self.settings | {"ignored": json.loads(json.dumps(ignored, default=str))}

    @property
    def rows(self) -> PromptRows:
        return PromptRows(self.data.task, self.data.test, self.data.tokenizer, self.data.max_prompt_length)

    def text(self, tokens: Sequence[int]) -> str:
        """A response without the tokens that end it."""
        spoken = tokens[:-1] if tokens and tokens[-1] in self.settings["stop_tokens"] else tokens
        return str(self.data.tokenizer.decode(list(spoken), skip_special_tokens=True)).strip()

    def responses(self, batches: Sequence[Sequence[int]]) -> Iterator[Response]:
        """Respond to batches of test prompts, given by position; a response comes as soon as it has ended."""
        if batches:
            yield from self._by_engine(batches) if self.config.decoder == "engine" else self._by_generate(batches)

    def _by_generate(self, batches: Sequence[Sequence[int]]) -> Iterator[Response]:
        model, data, rows, stops = self.model, self.data, self.rows, self.settings["stop_tokens"]
        names = ["max_new_tokens", "num_beams", "do_sample"]
        names += ["temperature", "top_k", "top_p"] if self.config.do_sample else []
        options = {name: self.settings[name] for name in names}
        options |= {"pad_token_id": data.pad, "eos_token_id": stops or None, "return_dict_in_generate": True}

        def respond(indices: Sequence[int]) -> list[Response]:
            batch = collate_prompts([rows[i] for i in indices], pad=data.pad)
            ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
            torch.manual_seed(self.seed * 1_000_003 + indices[0])
            result = model.generate(ids, mask, routes=rows_of(self.routes, indices, model.device), **options)
            responses = [
                _until_end(tokens[: data.test[i].max_new_tokens], stops, data.pad)
                for i, tokens in zip(indices, result.sequences[:, ids.shape[1] :].tolist(), strict=True)
            ]
            skips = self._skips(result.past_key_values, [len(tokens) for tokens in responses])
            return list(zip(indices, responses, skips, strict=True))

        room = Room()
        for indices in batches:  # drawn tokens depend on the prompts beside them
            passes = [respond(indices)] if self.config.do_sample else room.passes(indices, respond)
            yield from chain.from_iterable(passes)

    def _skips(self, cache: RoutedCache, new_tokens: Sequence[int]) -> list[list[float]]:
        """Of every row, the share of its own decode steps that skipped each layer."""
        beams = self.config.num_beams
        if self.routes is not None and self.routes.decides_each_step:
            steps = torch.tensor(new_tokens).sub(1).clamp_min(0)
            return cache.layer_skips(steps.repeat_interleave(beams))[::beams].tolist()
        assert cache.routes is not None
        return (~cache.routes[::beams]).float().tolist()

    def _by_engine(self, batches: Sequence[Sequence[int]]) -> Iterator[Response]:
        data, config, rows, stops = self.data, self.config, self.rows, self.settings["stop_tokens"]
        prompts = {i: rows[i].prompt for batch in batches for i in batch}
        limits = {i: min(data.max_new_tokens, data.test[i].max_new_tokens or data.max_new_tokens) for i in prompts}
        longest = max(len(prompts[i]) + limits[i] for i in prompts)
        engine = engine_for(self.model, longest, min(config.batch_size, len(prompts)))
        # Drawn tokens depend on the prompts beside them, so a batch stays what it is, also in a resumed run. Greedy
        # tokens do not: long prompts go first, so that none is left alone at the end, beside others of their length.
        groups = batches if config.do_sample else [sorted(prompts, key=lambda i: (-len(prompts[i]), i))]
        for group in groups:
            drawn = Sampling(config.temperature, config.top_k, seed=self.seed * 1_000_003 + group[0])
            for place, out in engine.as_completed(
                [prompts[i] for i in group],
                [limits[i] for i in group],
                rows_of(self.routes, group, torch.device("cpu")),
                stops,
                sampling=drawn if config.do_sample else None,
            ):
                yield group[place], _until_end(out.tokens[0], stops, data.pad), out.layer_skips[0].tolist()


def _until_end(tokens: list[int], ends: Sequence[int], pad: int) -> list[int]:
    """A response up to the token that ends it; without one, without the padding behind it."""
    for length, token in enumerate(tokens, start=1):
        if token in ends:
            return tokens[:length]
    while tokens and tokens[-1] == pad:
        tokens = tokens[:-1]
    return tokens
