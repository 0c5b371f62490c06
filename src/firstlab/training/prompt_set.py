"""Measure losses, states and routes on a set of prompts: all that a method may look at (`methods.base.Prompts`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from firstlab.data.datamodule import PromptDataModule
from firstlab.data.encoding import Row, TrainingRows, collate_training
from firstlab.data.room import go_on_with
from firstlab.data.task import Example
from firstlab.methods.base import rows_of
from firstlab.methods.early_exit import teacher_forced_skip_rates
from firstlab.model.layers import routing
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.prompt_cache import PromptReading
from firstlab.model.routes import EarlyExit, Routes, as_routes

Batch = dict[str, Tensor]
Found = TypeVar("Found")
Watch = Callable[[int, Tensor, Tensor], None]


class PromptSet:
    """N prompts, tokenised when first used.

    Args:
        model: Measures losses, states and routes; its LoRA, if any, stays switched off.
        data: Gives the task, tokenizer and lengths.
        examples: The prompts and their references.
        batch_size: Prompts in one pass.
        cache_bytes: Room for the prompts' keys and values, so that measuring losses again under other routes computes
            the responses only. The base model must stay as it is meanwhile. Prompts beyond it are read again each time.
        progress_bar: Show one.
        loss_batch_size: Prompts in one pass where losses are measured, halved where memory runs out; by default
            `batch_size`.
    """

    def __init__(
        self,
        model: RouterAugmentedLM,
        data: PromptDataModule,
        examples: Sequence[Example],
        batch_size: int,
        cache_bytes: int = 0,
        progress_bar: bool = False,
        loss_batch_size: int | None = None,
    ) -> None:
        self.model, self.data, self.examples, self.batch_size = model, data, examples, batch_size
        self.cache_bytes, self.progress_bar = cache_bytes, progress_bar
        self.loss_batch_size = loss_batch_size or batch_size
        self._readings: list[PromptReading | None] = []
        self._responses: dict[int, _Responses] = {}  # of batches whose prompts are kept
        self.num_layers, self.max_new_tokens = model.num_layers, data.max_new_tokens
        self.texts: Sequence[str] = [data.task.prompt(example) for example in examples]

    def __len__(self) -> int:
        return len(self.examples)

    def take(self, count: int) -> PromptSet:
        return self.slice(0, count)

    def slice(self, start: int, stop: int) -> PromptSet:
        """Those from `start` up to `stop`, as in a list."""
        return self.select(range(*slice(start, stop).indices(len(self))))

    def select(self, index: Iterable[int]) -> PromptSet:
        """Those at these places."""
        examples, sizes = [self.examples[i] for i in index], (self.batch_size, self.cache_bytes)
        return PromptSet(self.model, self.data, examples, *sizes, self.progress_bar, self.loss_batch_size)

    @cached_property
    def batches(self) -> list[Batch]:
        """Teacher-forced batches in the order of the examples, on the model's device."""
        return self._collate(self._rows, self.batch_size)

    @cached_property
    def _by_length(self) -> list[Batch]:
        """The same rows, those of similar length together: little of a batch is padding."""
        rows = sorted(self._rows, key=lambda row: len(row.prompt) + len(row.response))
        return self._collate(rows, self.loss_batch_size)

    @cached_property
    def _rows(self) -> list[Row]:
        if not self.examples:
            raise ValueError("there are no prompts to measure: raise data.train_size or data.val_size")
        if not all(example.references for example in self.examples):
            raise ValueError("a prompt without a reference cannot be routed by a method that measures its loss")
        rows = TrainingRows(self.data.task, self.examples, self.data.tokenizer, self.data.max_length)
        return [rows[i] for i in range(len(rows))]

    def _collate(self, rows: Sequence[Row], size: int) -> list[Batch]:
        batches = []
        for start in range(0, len(rows), size):
            batch = collate_training(rows[start : start + size], pad=self.data.pad, loss_on="response")
            batches.append({k: v.to(self.model.device) for k, v in batch.items()})
        return batches

    def losses(self, routes: Tensor) -> Tensor:
        sums, counts = self._sums(routes)
        return sums / counts

    def losses_each(self, routes: Tensor, title: str = "measure routes") -> Tensor:
        """[N, K] response cross-entropy per token of every prompt under each of [K, L] routes.

        Each prompt is read once, and layers that routes share from the bottom up are run once.
        """
        return self._with_room(lambda: self._losses_each(routes, title))

    def _losses_each(self, routes: Tensor, title: str) -> Tensor:
        order = torch.cat([batch["index"] for batch in self._by_length]).cpu()
        total, quiet = len(self._by_length) * len(routes), not self.progress_bar
        passes = tqdm(total=total, desc=title, unit="pass", leave=False, disable=quiet)
        rows = []
        with self.model.lora_disabled(), passes as bar:
            for batch, reading in zip(self._by_length, self._read(), strict=True):
                rows.append(_losses_of_batch(self.model, batch, reading, routes, bar))
        losses = torch.cat(rows)[order.argsort()]
        check_finite(losses, "losses of prompts")
        return losses

    def loss(self, routes: Tensor | Routes) -> float:
        sums, counts = self._sums(routes)
        return float(sums.sum() / counts.sum())

    def _sums(self, routes: Tensor | Routes) -> tuple[Tensor, Tensor]:
        return self._with_room(lambda: self._measured(routes))

    def _measured(self, routes: Tensor | Routes) -> tuple[Tensor, Tensor]:
        order = torch.cat([batch["index"] for batch in self._by_length]).cpu()
        with self.model.lora_disabled():
            if isinstance(routes, Tensor) and routes.ndim == 1:
                read = enumerate(zip(self._by_length, self._read(), strict=True))
                found = [self._under(routes, place, *each) for place, each in read]
                sums, counts = (torch.cat(each) for each in zip(*found, strict=True))
            else:
                forced = as_routes(routes).rows(order.tolist())
                sums, counts = losses_under_routes(self.model, self._by_length, forced, self._read())
        check_finite(sums / counts, "losses of prompts")
        back = order.argsort()
        return sums[back], counts[back]

    def _under(self, route: Tensor, place: int, batch: Batch, reading: PromptReading | None) -> tuple[Tensor, Tensor]:
        """Sums and counts of a batch under one route; keeps its states for the next route if there is room."""
        if reading is None:
            return losses_under_routes(self.model, [batch], route, [None])
        responses = self._responses.get(place) or _Responses(batch, len(route))
        sums = responses.losses(self.model, reading, route)
        if len(self._readings) == len(self._by_length):  # prompts come first
            self._responses[place] = responses
            kept = sum(each.num_bytes for each in self._readings if each is not None)
            if kept + sum(each.num_bytes for each in self._responses.values()) > self.cache_bytes:
                del self._responses[place]
        return sums, responses.counts

    def _with_room(self, measure: Callable[[], Found]) -> Found:
        """What `measure` finds, from smaller batches and with less kept from the time that memory ran out."""
        while True:
            try:
                return measure()
            except torch.OutOfMemoryError:
                if self.loss_batch_size == 1:
                    raise
            self.loss_batch_size, self.cache_bytes = self.loss_batch_size // 2, self.cache_bytes // 2
            self._readings, self._responses = [], {}
            del self._by_length
            go_on_with(self.loss_batch_size)

    def rho(self) -> Tensor:
        """[N, L], what the model's routers measure on every prompt."""
        return self._with_room(self._rho)

    def _rho(self) -> Tensor:
        order = torch.cat([batch["index"] for batch in self._by_length]).cpu()
        with self.model.lora_disabled():
            found = [self.model.prompt_rho(batch["input_ids"], batch["prompt_mask"]) for batch in self._by_length]
        return torch.cat(found).cpu()[order.argsort()]

    def _read(self) -> Iterator[PromptReading | None]:
        """The prompts of each batch by length; kept while there is room."""
        yield from self._readings
        kept = sum(reading.num_bytes for reading in self._readings if reading is not None)
        for reading in read_prompts(self.model, self._by_length[len(self._readings) :]):
            kept += 0 if reading is None else reading.num_bytes
            if kept <= self.cache_bytes:  # what follows the first that does not fit is not kept either
                self._readings.append(reading)
            yield reading

    def new_tokens(self) -> list[int]:
        return torch.cat([(self._generable(batch) != -100).sum(1) for batch in self.batches]).tolist()

    def skip_rate(self, rule: EarlyExit) -> float:
        with self.model.lora_disabled():
            rates = [
                teacher_forced_skip_rates(self.model, {**batch, "labels": self._generable(batch)}, rule)
                for batch in self.batches
            ]
        return float(torch.cat(rates).nanmean())

    def _generable(self, batch: Batch) -> Tensor:
        """Labels [B, T] without those of tokens that come after the longest response there will be."""
        limits = [self.examples[i].max_new_tokens or self.max_new_tokens for i in batch["index"].tolist()]
        labels = batch["labels"]
        most = torch.tensor(limits, device=labels.device).clamp_max(self.max_new_tokens)
        return labels.masked_fill((labels != -100).cumsum(1) > most.unsqueeze(1), -100)

    def observe(
        self, see: Callable[[Batch, int, Tensor], None], title: str, attention_mask: str = "attention_mask"
    ) -> None:
        """Call `see(batch, layer, states [B, T, D])` for the input of every layer when all of them run."""
        for batch in tqdm(self.batches, desc=title, unit="batch", disable=not self.progress_bar, leave=False):

            def watch(index: int, before: Tensor, after: Tensor, batch: Batch = batch) -> None:
                see(batch, index, before)

            self._run_all(batch, attention_mask, watch)

    def layer_states(self) -> Iterator[list[Tensor]]:
        for batch in self.batches:
            states: list[Tensor] = []
            self._run_all(batch, "attention_mask", partial(_keep, states, batch["attention_mask"].bool()))
            yield states

    @torch.no_grad()
    def _run_all(self, batch: Batch, attention_mask: str, watch: Watch) -> None:
        with self.model.lora_disabled(), routing(_Watched(watch)):
            self.model.backbone(input_ids=batch["input_ids"], attention_mask=batch[attention_mask], use_cache=False)

    @torch.no_grad()
    def routed(self) -> Tensor:
        with self.model.lora_disabled():
            routes = [self.model.route(batch["input_ids"], batch["prompt_mask"]) for batch in self.batches]
        return torch.cat(routes).cpu()


def _keep(states: list[Tensor], real: Tensor, index: int, before: Tensor, after: Tensor) -> None:
    states += [each[real.to(each.device)] for each in ([after] if index else [before, after])]


@dataclass
class _Watched:
    """Routing that runs every layer and shows its index, input and output."""

    watch: Watch

    def run_layer(self, index: int, hidden: Tensor, run: Callable[[], Any], skip: Callable[[], Any]) -> Any:
        output = run()
        self.watch(index, hidden, output[0] if isinstance(output, tuple) else output)
        return output


@torch.no_grad()
def losses_under_routes(
    model: RouterAugmentedLM,
    batches: Sequence[Batch],
    routes: Tensor | Routes,
    readings: Iterable[PromptReading | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Response cross-entropy of every prompt when decode runs exactly `routes`.

    Args:
        model: The model.
        batches: Teacher-forced batches, N rows in all.
        routes: [L] boolean, or [N, L] with one row per prompt, or other `Routes`.
        readings: The prompts of each batch as the model read them earlier; by default they are read here.

    Returns:
        (summed over response tokens [N], number of response tokens [N]), on the CPU.
    """
    sums, counts, seen = [], [], 0
    if as_routes(routes).skips_prompt:
        readings = [None] * len(batches)
    elif readings is None:
        readings = read_prompts(model, batches)
    for batch, reading in zip(batches, readings, strict=True):
        rows = range(seen, seen + len(batch["input_ids"]))
        seen = rows.stop
        labels = batch["labels"].masked_fill(batch["prompt_mask"].bool(), -100)
        forced = rows_of(routes, rows, labels.device)
        if reading is not None:
            out = model.respond(reading, labels, routes=forced)
        else:
            out = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                labels=labels,
                prompt_mask=batch["prompt_mask"],
                objective="decode_consistent",
                routes=forced,
                keep_logits=False,
            )
        assert out.token_losses is not None
        sums.append(out.token_losses.sum(1).cpu())
        counts.append((labels[:, 1:] != -100).sum(1).cpu())
    return torch.cat(sums), torch.cat(counts)


class _Responses:
    """A batch of responses under one route after another: layers below the first that differs do not run again."""

    def __init__(self, batch: Batch, num_layers: int) -> None:
        self.labels = batch["labels"].masked_fill(batch["prompt_mask"].bool(), -100)
        self.counts = (self.labels[:, 1:] != -100).sum(1).cpu()
        self._states: list[Tensor | None] = [None] * num_layers
        self._route: Tensor | None = None

    @torch.no_grad()
    def losses(self, model: RouterAugmentedLM, reading: PromptReading, route: Tensor) -> Tensor:
        """[B] summed over the tokens of each response."""
        known, last = 0, self._route
        if last is not None:
            # The input of the first layer that differs is the same, too.
            known = 1 + next((i for i in range(len(route)) if route[i] != last[i]), len(route) - 1)
        self._route = None  # until the states are this route's
        out = model.respond(reading, self.labels, routes=route.to(self.labels.device), states=self._states, known=known)
        self._route = route
        assert out.token_losses is not None
        return out.token_losses.sum(1).cpu()

    @property
    def num_bytes(self) -> int:
        return sum(each.nbytes for each in self._states if each is not None)


@torch.no_grad()
def _losses_of_batch(
    model: RouterAugmentedLM, batch: Batch, reading: PromptReading | None, routes: Tensor, bar: Any
) -> Tensor:
    """[B, K] loss per response token of a batch under each of [K, L] routes."""
    losses: list[Tensor] = [torch.empty(0)] * len(routes)
    responses = _Responses(batch, routes.shape[1])
    # In this order neighbours have most layers in common.
    for place in sorted(range(len(routes)), key=lambda k: routes[k].tolist()):
        if reading is None:
            sums, _ = losses_under_routes(model, [batch], routes[place], [None])
        else:
            sums = responses.losses(model, reading, routes[place])
        losses[place] = sums / responses.counts
        bar.update()
    return torch.stack(losses, 1)


@torch.no_grad()
def read_prompts(model: RouterAugmentedLM, batches: Iterable[Batch]) -> Iterator[PromptReading | None]:
    """The prompts of each batch, read when they are asked for; None where they cannot be read alone."""
    for batch in batches:
        yield model.read_prompts(batch["input_ids"], batch["attention_mask"], batch["prompt_mask"])


def check_finite(values: Tensor, what: str) -> None:
    """Refuse to decide by values that are infinite or no numbers: a comparison with NaN is false."""
    if broken := int((~values.isfinite()).sum()):
        raise ValueError(
            f"{broken} of {values.numel()} {what} are infinite or not a number; check the weights of model.path, or "
            "use model.dtype=float32 or bfloat16, which overflow less than float16"
        )
