"""Generates with one model variant on the test set and measures it; resumable, the same on any number of processes."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from firstlab.config.schema import EvaluationConfig
from firstlab.data.batching import shard_batches
from firstlab.data.datamodule import PromptDataModule
from firstlab.data.encoding import PromptRows, TrainingRows, collate_prompts, collate_training, response_ids
from firstlab.data.task import Example, Task
from firstlab.engine.engine import engine_for
from firstlab.engine.llama_step import check_supported
from firstlab.engine.sampling import Sampling
from firstlab.evaluation.timing import measure_tpot
from firstlab.methods.base import routes_without, rows_of
from firstlab.metrics import (
    PRIMARY_METRIC,
    BertScoreConfig,
    CometConfig,
    MetricResult,
    evaluate_predictions,
    perplexity,
)
from firstlab.model import FixedRoutes, RoutedCache, RouterAugmentedLM, Routes
from firstlab.model.generation_options import check_score_settings
from firstlab.store import results
from firstlab.store.files import write_atomically
from firstlab.store.ranks import rank


@dataclass(frozen=True)
class Prediction:
    """What one variant said to one test example.

    Attributes:
        index: Position in the test set.
        id: The example's name.
        text: The generated response, special tokens removed.
        new_tokens: Generated tokens, the end-of-text token included.
        skipped: Layers that every decode step skipped, 0-based.
        difficulty: The example's level, 0 if unknown.
        shares: Of each layer, the share of decode steps that skipped it, where the method decides anew at each step;
            None where the route holds for all of them.
        part: The part of a mixture that the example comes from, else empty.
    """

    index: int
    id: str
    text: str
    new_tokens: int
    skipped: list[int]
    difficulty: int
    shares: list[float] | None = None
    part: str = ""

    def skip_shares(self, num_layers: int) -> list[float]:
        """Share of decode steps that skipped each of the L layers."""
        return self.shares or [float(layer in self.skipped) for layer in range(num_layers)]


def generate_predictions(
    model: RouterAugmentedLM,
    data: PromptDataModule,
    config: EvaluationConfig,
    file: Path,
    routes: Routes | None,
    seed: int,
    title: str,
    progress_bar: bool,
) -> list[Prediction]:
    """Generate a response to every test prompt.

    Finished batches are on disk at once: an interrupted call goes on behind them.

    Args:
        model: The variant, in eval mode.
        data: Gives test examples, tokenizer and lengths.
        config: Decoding options.
        file: Where this variant's predictions are collected; every process writes its own part beside it.
        routes: The method's routes of the test prompts, or None to let the routers decide.
        seed: For sampling; every batch is seeded by its first example.
        title: For the progress bar.
        progress_bar: Show one.
    """
    examples = data.test
    my_rank, world = rank()
    done = {p.index: p for part in _parts(file) for p in _read(part)}
    rows = PromptRows(data.task, examples, data.tokenizer, data.max_prompt_length, data.prompt_option)
    # Batches are cut before finished ones are left out, so that a resumed run pads and samples as an uninterrupted one.
    # What the engine says, greedy, does not depend on the batch.
    whole = config.decoder == "generate" or config.do_sample
    batches = [
        batch if whole else [i for i in batch if i not in done]
        for batch in shard_batches(len(examples), config.batch_size, my_rank, world)
        if not all(i in done for i in batch)
    ]
    part = file.with_name(f"{file.stem}.{my_rank}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    _drop_torn_line(part)
    decode = _by_engine if config.decoder == "engine" else _by_generate
    responses = decode(model, data, config, rows, batches, routes, seed)
    with part.open("a", encoding="utf-8") as out:
        quiet, count = not progress_bar or my_rank > 0, sum(map(len, batches))
        for i, tokens, shares in tqdm(responses, desc=title, unit="prompt", total=count, disable=quiet):
            text: Any = data.tokenizer.decode(tokens, skip_special_tokens=True)
            skipped = [layer for layer, share in enumerate(shares) if share == 1]
            by_step = shares if routes is not None and routes.decides_each_step else None
            example = examples[i]
            done[i] = Prediction(
                i, example.id, text.strip(), len(tokens), skipped, example.difficulty, by_step, example.part
            )
            out.write(json.dumps(asdict(done[i]), ensure_ascii=False) + "\n")
            out.flush()
    if world > 1:
        dist.barrier()
        done = {p.index: p for part in _parts(file) for p in _read(part)}
    return [done[i] for i in range(len(examples))]


#: A prompt's place in the test set, its response with the EOS token, and of each layer the share of its decode steps
#: that skipped it.
_Response = tuple[int, list[int], list[float]]


def _by_generate(
    model: RouterAugmentedLM,
    data: PromptDataModule,
    config: EvaluationConfig,
    rows: PromptRows,
    batches: Sequence[Sequence[int]],
    routes: Routes | None,
    seed: int,
) -> Iterator[_Response]:
    """Through transformers' `generate`, batch by batch."""
    options: dict[str, Any] = {
        "max_new_tokens": data.max_new_tokens,
        "do_sample": config.do_sample,
        "num_beams": config.num_beams,
        "pad_token_id": data.pad,
        "eos_token_id": data.tokenizer.eos_token_id,
        "return_dict_in_generate": True,
    }
    if config.do_sample:
        options |= {"temperature": config.temperature, "top_k": config.top_k}
    for indices in batches:
        batch = collate_prompts([rows[i] for i in indices], pad=data.pad)
        ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        torch.manual_seed(seed * 1_000_003 + indices[0])
        result = model.generate(ids, mask, routes=rows_of(routes, indices, model.device), **options)
        responses = [
            _until_end(tokens[: data.test[i].max_new_tokens], data)
            for i, tokens in zip(indices, result.sequences[:, ids.shape[1] :].tolist(), strict=True)
        ]
        skips = _skips(result.past_key_values, routes, [len(tokens) for tokens in responses], config.num_beams)
        yield from zip(indices, responses, skips, strict=True)


def _by_engine(
    model: RouterAugmentedLM,
    data: PromptDataModule,
    config: EvaluationConfig,
    rows: PromptRows,
    batches: Sequence[Sequence[int]],
    routes: Routes | None,
    seed: int,
) -> Iterator[_Response]:
    """Through the decode engine: a prompt that waits takes the place of one that has ended."""
    if not batches:
        return
    prompts = {i: rows[i].prompt for batch in batches for i in batch}
    limits = {i: min(data.max_new_tokens, data.test[i].max_new_tokens or data.max_new_tokens) for i in prompts}
    longest = max(len(prompts[i]) + limits[i] for i in prompts)
    engine = engine_for(model, longest, min(config.batch_size, len(prompts)))
    # Drawn tokens depend on the prompts beside them: a batch stays what it is, also in a run that goes on. Greedy ones
    # do not: long prompts first, so that none is left alone at the end, and those read together are of one length.
    groups = batches if config.do_sample else [sorted(prompts, key=lambda i: (-len(prompts[i]), i))]
    for group in groups:
        drawn = Sampling(config.temperature, config.top_k, seed=seed * 1_000_003 + group[0])
        for place, out in engine.as_completed(
            [prompts[i] for i in group],
            [limits[i] for i in group],
            rows_of(routes, group, torch.device("cpu")),
            [] if data.tokenizer.eos_token_id is None else [data.tokenizer.eos_token_id],
            sampling=drawn if config.do_sample else None,
        ):
            yield group[place], _until_end(out.tokens[0], data), out.layer_skips[0].tolist()


def _skips(cache: RoutedCache, routes: Routes | None, new_tokens: Sequence[int], beams: int) -> list[list[float]]:
    """Of every row, the share of its own decode steps that skipped each layer."""
    if routes is not None and routes.decides_each_step:
        steps = torch.tensor(new_tokens).sub(1).clamp_min(0)
        return cache.layer_skips(steps.repeat_interleave(beams))[::beams].tolist()
    assert cache.routes is not None
    return (~cache.routes[::beams]).float().tolist()


def _until_end(tokens: list[int], data: PromptDataModule) -> list[int]:
    """A response up to its EOS token; without one, without the padding behind it."""
    end = data.tokenizer.eos_token_id
    if end in tokens:
        return tokens[: tokens.index(end) + 1]
    length = len(tokens)
    while length and tokens[length - 1] == data.pad:
        length -= 1
    return tokens[:length]


def check_engine(model: RouterAugmentedLM, option: str, decoder: str) -> None:
    """Raises ValueError, with the option's name, if the decode engine is wanted and does not know the model."""
    if decoder == "engine":
        try:
            check_supported(model.lm)
            check_score_settings(model.lm.generation_config)
        except ValueError as error:
            raise ValueError(f"{option}={decoder}: {error} ({option}=generate)") from error


def _parts(file: Path) -> list[Path]:
    return sorted(file.parent.glob(f"{file.stem}.*.part"))


def _drop_torn_line(part: Path) -> None:
    """Cut off what a kill left of a last line, which would spoil the line that is appended next."""
    if part.is_file():
        whole = part.read_bytes()
        if whole and not whole.endswith(b"\n"):
            os.truncate(part, whole.rfind(b"\n") + 1)


def _read(part: Path) -> Iterator[Prediction]:
    lines = part.read_text(encoding="utf-8").split("\n")
    for line in lines[:-1]:  # a torn last line is generated again
        yield Prediction(**json.loads(line))


@torch.no_grad()
def response_nll(
    model: RouterAugmentedLM, data: PromptDataModule, routes: Routes | None, batch_size: int
) -> np.ndarray:
    """[N, 2]: nll of each test prompt's first reference when its tokens decode under the routes, and its tokens."""
    my_rank, world = rank()
    rows = TrainingRows(data.task, data.test, data.tokenizer, data.max_length)
    totals = torch.zeros(len(data.test), 2, dtype=torch.float64)
    for indices in shard_batches(len(data.test), batch_size, my_rank, world):
        batch = collate_training([rows[i] for i in indices], pad=data.pad, loss_on="response")
        batch = {k: v.to(model.device) for k, v in batch.items() if k != "index"}
        forced = rows_of(routes, indices, model.device)
        out = model(**batch, objective="decode_consistent", gate="hard", routes=forced, keep_logits=False)
        counts = (batch["labels"][:, 1:] != -100).sum(1)
        totals[indices] = torch.stack([out.token_losses.sum(1).cpu(), counts.cpu()], 1).double()
    if world > 1:
        dist.all_reduce(totals)
    return totals.numpy()


def example_columns(
    data: PromptDataModule, predictions: Sequence[Prediction], tokens: Sequence[int], num_layers: int
) -> dict[str, str]:
    """What tables need to know about each test prompt, packed (`firstlab.store.results.pack`): [N] each."""
    rows = PromptRows(data.task, data.test, data.tokenizer, data.max_prompt_length, data.prompt_option)
    return {
        "difficulty": results.pack([p.difficulty for p in predictions]),
        "prompt_tokens": results.pack([len(rows[i].prompt) for i in range(len(predictions))]),
        "response_tokens": results.pack(tokens),
        "skip_rate": results.pack([float(np.mean(p.skip_shares(num_layers))) for p in predictions]),
    }


def fingerprint(examples: Sequence[Example]) -> str:
    """Short hash of a test set: equal where a paired test makes sense."""
    text = json.dumps([(example.id, example.source, example.references) for example in examples], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", errors="replace")).hexdigest()[:12]


def skip_statistics(
    predictions: Sequence[Prediction], tokens: Sequence[int], num_layers: int, static: Tensor | None = None
) -> dict[str, Any]:
    """Skip rate (skipped ÷ L, mean over prompts), per layer, by difficulty, and how adaptive the routes are.

    Args:
        predictions: One per prompt.
        tokens: Of each prompt, the length of its reference, for the rate by token.
        num_layers: L.
        static: [L], a static set to compare the routes with.

    Returns:
        Besides rates, also by difficulty and by part of a mixture, for routes that prompts get: the number of different
        ones, the entropy of their distribution, and the agreement (share of layers decided alike, mean over prompts)
        with the most frequent route and with the static set. None of it where each decode step decides.
    """
    all_rates = np.array([np.mean(p.skip_shares(num_layers)) for p in predictions])
    by_token = results.rate_by_token(all_rates, np.array(tokens))
    # Without a decode step, a method that decides at each of them decides nothing.
    predictions = [p for p in predictions if p.shares is None or p.new_tokens > 1] or predictions
    skipped = np.array([p.skip_shares(num_layers) for p in predictions])
    rates = skipped.mean(1)
    margin = 1.96 * float(rates.std(ddof=1)) / math.sqrt(len(rates)) if len(rates) > 1 else 0.0
    return {
        "skip_rate": float(rates.mean()),
        "skip_rate_by_token": by_token,
        "skip_rate_interval": [max(0.0, float(rates.mean()) - margin), min(1.0, float(rates.mean()) + margin)],
        "per_layer": skipped.mean(0).tolist(),
        "by_difficulty": _by_group(skipped, [p.difficulty for p in predictions]),
        "by_part": _by_group(skipped, [p.part for p in predictions]) if predictions[0].part else {},
        **_adaptivity(predictions, skipped, static),
    }


def _by_group(skipped: np.ndarray, groups: Sequence[int | str]) -> dict[str, dict[str, Any]]:
    """Skip rate, overall and per layer, and number of different routes in each group of prompts; skipped is [N, L]."""
    found = {}
    for group in sorted(set(groups)):
        rows = skipped[[each == group for each in groups]]
        found[str(group)] = {
            "n": len(rows),
            "skip_rate": float(rows.mean()),
            "per_layer": rows.mean(0).tolist(),
            "unique_routes": len(np.unique(rows, axis=0)),
        }
    return found


def _adaptivity(predictions: Sequence[Prediction], skipped: np.ndarray, static: Tensor | None) -> dict[str, Any]:
    """How the routes [N, L] differ between prompts; see `skip_statistics`."""
    names = ("unique_routes", "route_entropy_bits", "mode_agreement", "static_agreement")
    if predictions[0].shares is not None:
        return dict.fromkeys(names)
    routes = Counter(tuple(p.skipped) for p in predictions)
    [(mode, _)] = routes.most_common(1)
    shares = np.array(list(routes.values())) / len(predictions)
    same_as_mode = skipped == np.isin(np.arange(skipped.shape[1]), mode)
    same_as_static = None if static is None else float((skipped == ~static.numpy()).mean())
    entropy = float(-(shares * np.log2(shares)).sum()) + 0.0
    return dict(zip(names, (len(routes), entropy, float(same_as_mode.mean()), same_as_static), strict=True))


def _routes_of(predictions: Sequence[Prediction], routes: Routes | None, num_layers: int) -> list[Routes]:
    """What each prompt's tokens ran: the method's rule, or the route that the prompt got."""
    if routes is not None:
        return [routes.rows([p.index]) for p in predictions]
    return [FixedRoutes(routes_without(num_layers, p.skipped)) for p in predictions]


def score_texts(
    task: Task, examples: Sequence[Example], texts: Sequence[str], config: EvaluationConfig
) -> dict[str, MetricResult]:
    """Every metric of the task, with intervals; see `firstlab.metrics.evaluate_predictions`.

    Of a mixture each part's metrics as PART/NAME, and "mean", the mean of the parts' headline metrics.
    """
    if task.parts:
        found: dict[str, MetricResult] = {}
        for name, part in task.parts.items():
            own = [i for i, example in enumerate(examples) if example.part == name]
            if own:
                scores = score_texts(part, [examples[i] for i in own], [texts[i] for i in own], config)
                found |= {f"{name}/{metric}": score for metric, score in scores.items()}
        headline = [
            found[key] for name, part in task.parts.items() if (key := f"{name}/{primary_metric(part)}") in found
        ]
        return {"mean": mean_score(headline)} | found
    bertscore, comet = config.bertscore, config.comet
    return evaluate_predictions(
        task.kind,
        texts,
        [example.references for example in examples],
        [example.source for example in examples],
        task.target_language,
        confidence=config.confidence,
        resamples=config.resamples,
        bertscore=None
        if bertscore.path is None
        else BertScoreConfig(encoder=bertscore.path, num_layers=bertscore.num_layers),
        comet=None
        if comet.model is None
        else CometConfig(command=comet.command, model=comet.model, batch_size=comet.batch_size, gpus=comet.gpus),
    )


def primary_metric(task: Task) -> str:
    """The headline metric of a task."""
    return "mean" if task.parts else PRIMARY_METRIC[task.kind]


def mean_score(parts: Sequence[MetricResult]) -> MetricResult:
    """The mean of scores on different examples; as these are independent, half-widths of intervals add in squares."""
    count = len(parts)
    value = sum(part.value for part in parts) / count
    below = math.hypot(*(part.value - part.low for part in parts)) / count
    above = math.hypot(*(part.high - part.value for part in parts)) / count
    return MetricResult(value, value - below, value + above, sum(part.n for part in parts))


def check_metrics(task: Task, config: EvaluationConfig) -> None:
    """Score one text with the metrics that need a model of their own: what is missing shows now, not after training.

    Raises:
        ValueError: A metric's model or program is not there.
    """
    if config.bertscore.path is not None or config.comet.model is not None:
        for each in task.parts.values() or [task]:
            score_texts(each, [Example("probe", "a house", ("ein Haus",))], ["ein Haus"], config)


def evaluate_variant(
    model: RouterAugmentedLM,
    data: PromptDataModule,
    config: EvaluationConfig,
    directory: Path,
    name: str,
    routes: Routes | None,
    seed: int,
    progress_bar: bool,
    static: Tensor | None = None,
) -> dict[str, Any]:
    """Everything `result.json` says about one variant.

    Args:
        directory: Predictions are collected here as NAME.jsonl.
        name: The variant: base, base_lora, router, router_lora.
        static: See `skip_statistics`.
        Others: As in `generate_predictions`.
    """
    check_engine(model, "evaluation.decoder", config.decoder)
    model.eval()
    file = directory / f"{name}.jsonl"
    predictions = generate_predictions(model, data, config, file, routes, seed, f"generate ({name})", progress_bar)
    nll = response_nll(model, data, routes, config.batch_size) if config.perplexity else None
    if nll is None:
        tokens = [len(response_ids(data.tokenizer, example.references[0])) for example in data.test]
    else:
        tokens = nll[:, 1].astype(int).tolist()
    skip = skip_statistics(predictions, tokens, model.num_layers, static)
    result: dict[str, Any] = {"n": len(predictions), "skip": skip}
    result["new_tokens"] = float(np.mean([p.new_tokens for p in predictions]))
    examples: dict[str, Any] = {"test_set": fingerprint(data.test)}
    examples |= example_columns(data, predictions, tokens, model.num_layers)
    if nll is not None:
        result["perplexity"] = perplexity(float(nll[:, 0].sum()), int(nll[:, 1].sum()))
        examples["nll"] = results.pack(nll[:, 0])
        for part, group in skip["by_part"].items():
            total, count = nll[[example.part == part for example in data.test]].sum(0)
            group["perplexity"] = perplexity(float(total), int(count))
    if rank()[0] == 0:
        scores = score_texts(data.task, data.test, [p.text for p in predictions], config)
        result["metrics"] = {key: score.to_dict() for key, score in scores.items()}
        result["primary_metric"] = primary_metric(data.task)
        if config.tpot_prompts:
            result["timing"] = measure_tpot(
                model,
                data,
                _routes_of(predictions, routes, model.num_layers),
                config.tpot_prompts,
                config.tpot_tokens,
                config.tpot_repetitions,
                config.decoder == "engine",
            )
        examples["scores"] = {key: results.pack(score.rows) for key, score in scores.items() if len(score.rows)}
        result["examples"] = examples
        write_atomically(file, "".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in predictions))
    return result
