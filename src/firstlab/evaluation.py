"""Generates with one model variant on the test set and measures it; resumable, the same on any number of processes."""

from __future__ import annotations

import json
import math
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

from firstlab.config import EvaluationConfig
from firstlab.data.batching import shard_batches
from firstlab.data.datamodule import PromptDataModule
from firstlab.data.encoding import PromptRows, TrainingRows, collate_prompts, collate_training
from firstlab.data.task import Example, Task
from firstlab.files import write_atomically
from firstlab.metrics import (
    PRIMARY_METRIC,
    BertScoreConfig,
    CometConfig,
    MetricResult,
    evaluate_predictions,
    perplexity,
)
from firstlab.model import RouterAugmentedLM
from firstlab.timing import measure_tpot


@dataclass(frozen=True)
class Prediction:
    """What one variant said to one test example.

    Attributes:
        index: Position in the test set.
        id: The example's name.
        text: The generated response, special tokens removed.
        new_tokens: Generated tokens, the end-of-text token included.
        skipped: Layers that decode skipped, 0-based.
        difficulty: The example's level, 0 if unknown.
    """

    index: int
    id: str
    text: str
    new_tokens: int
    skipped: list[int]
    difficulty: int


def rank() -> tuple[int, int]:
    """(rank, world size) of this process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def generate_predictions(
    model: RouterAugmentedLM,
    data: PromptDataModule,
    config: EvaluationConfig,
    file: Path,
    routes: Tensor | None,
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
        routes: [L] fixed routes, or None to let the routers decide.
        seed: For sampling; every batch is seeded by its first example.
        title: For the progress bar.
        progress_bar: Show one.
    """
    examples, tokenizer = data.test, data.tokenizer
    my_rank, world = rank()
    done = {p.index: p for part in _parts(file) for p in _read(part)}
    rows = PromptRows(data.task, examples, tokenizer, data.max_prompt_length, data.prompt_option)
    # Batches are cut before finished ones are left out, so that a resumed run pads and samples as an uninterrupted one.
    batches = [
        batch
        for batch in shard_batches(len(examples), config.batch_size, my_rank, world)
        if not all(i in done for i in batch)
    ]
    part = file.with_name(f"{file.stem}.{my_rank}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {
        "max_new_tokens": data.max_new_tokens,
        "do_sample": config.do_sample,
        "num_beams": config.num_beams,
        "pad_token_id": data.pad,
        "eos_token_id": tokenizer.eos_token_id,
        "return_dict_in_generate": True,
    }
    if config.do_sample:
        options |= {"temperature": config.temperature, "top_k": config.top_k}
    with part.open("a", encoding="utf-8") as out:
        for indices in tqdm(batches, desc=title, unit="batch", disable=not progress_bar or my_rank > 0):
            batch = collate_prompts([rows[i] for i in indices], pad=data.pad)
            ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
            torch.manual_seed(seed * 1_000_003 + indices[0])
            result = model.generate(ids, mask, routes=None if routes is None else routes.to(model.device), **options)
            decided = result.past_key_values.routes[:: config.num_beams].cpu()
            for i, tokens, route in zip(indices, result.sequences[:, ids.shape[1] :].cpu(), decided, strict=True):
                text, count = _decode(tokenizer, tokens, data.pad)
                skipped = [layer for layer, runs in enumerate(route.tolist()) if not runs]
                prediction = Prediction(i, examples[i].id, text, count, skipped, examples[i].difficulty)
                done[i] = prediction
                out.write(json.dumps(asdict(prediction), ensure_ascii=False) + "\n")
            out.flush()
    if world > 1:
        dist.barrier()
        done = {p.index: p for part in _parts(file) for p in _read(part)}
    return [done[i] for i in range(len(examples))]


def _decode(tokenizer: Any, tokens: Tensor, pad: int) -> tuple[str, int]:
    ids = tokens.tolist()
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id) + 1]
    else:
        while ids and ids[-1] == pad:
            ids.pop()
    return tokenizer.decode(ids, skip_special_tokens=True).strip(), len(ids)


def _parts(file: Path) -> list[Path]:
    return sorted(file.parent.glob(f"{file.stem}.*.part"))


def _read(part: Path) -> Iterator[Prediction]:
    lines = part.read_text(encoding="utf-8").split("\n")
    for line in lines[:-1]:  # a torn last line is generated again
        yield Prediction(**json.loads(line))


@torch.no_grad()
def response_perplexity(
    model: RouterAugmentedLM, data: PromptDataModule, routes: Tensor | None, batch_size: int
) -> float:
    """Perplexity of the first reference when its tokens decode under the routes, exp(mean nll per token)."""
    my_rank, world = rank()
    rows = TrainingRows(data.task, data.test, data.tokenizer, data.max_length)
    totals = torch.zeros(2, dtype=torch.float64)
    for indices in shard_batches(len(data.test), batch_size, my_rank, world):
        batch = collate_training([rows[i] for i in indices], pad=data.pad, loss_on="response")
        batch = {k: v.to(model.device) for k, v in batch.items() if k != "index"}
        out = model(
            **batch,
            objective="decode_consistent",
            gate="hard",
            routes=None if routes is None else routes.to(model.device),
        )
        tokens = out.loss_terms["token_count"].double().cpu()
        totals += torch.stack([out.loss.double().cpu() * tokens, tokens])
    if world > 1:
        dist.all_reduce(totals)
    return perplexity(float(totals[0]), int(totals[1]))


def skip_statistics(predictions: Sequence[Prediction], num_layers: int) -> dict[str, Any]:
    """Skip rate (skipped ÷ L, mean over prompts), per layer, by difficulty, and how adaptive the routes are."""
    skipped = np.zeros((len(predictions), num_layers))
    for row, prediction in zip(skipped, predictions, strict=True):
        row[prediction.skipped] = 1
    rates = skipped.mean(1)
    counts = np.array(list(Counter(tuple(p.skipped) for p in predictions).values()))
    shares = counts / counts.sum()
    by_difficulty = {
        str(level): {
            "n": sum(p.difficulty == level for p in predictions),
            "skip_rate": float(np.mean([r for r, p in zip(rates, predictions, strict=True) if p.difficulty == level])),
        }
        for level in sorted({p.difficulty for p in predictions})
    }
    margin = 1.96 * float(rates.std(ddof=1)) / math.sqrt(len(rates)) if len(rates) > 1 else 0.0
    return {
        "skip_rate": float(rates.mean()),
        "skip_rate_interval": [max(0.0, float(rates.mean()) - margin), min(1.0, float(rates.mean()) + margin)],
        "per_layer": skipped.mean(0).tolist(),
        "by_difficulty": by_difficulty,
        "unique_routes": len(counts),
        "route_entropy_bits": float(-(shares * np.log2(shares)).sum()) + 0.0,
    }


def score_texts(
    task: Task, examples: Sequence[Example], texts: Sequence[str], config: EvaluationConfig
) -> dict[str, MetricResult]:
    """Every metric of the task, with intervals; see `firstlab.metrics.evaluate_predictions`."""
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


def check_metrics(task: Task, config: EvaluationConfig) -> None:
    """Score one text with the metrics that need a model of their own: what is missing shows now, not after training.

    Raises:
        ValueError: A metric's model or program is not there.
    """
    if config.bertscore.path is not None or config.comet.model is not None:
        score_texts(task, [Example("probe", "a house", ("ein Haus",))], ["ein Haus"], config)


def evaluate_variant(
    model: RouterAugmentedLM,
    data: PromptDataModule,
    config: EvaluationConfig,
    directory: Path,
    name: str,
    routes: Tensor | None,
    seed: int,
    progress_bar: bool,
) -> dict[str, Any]:
    """Everything `result.json` says about one variant.

    Args:
        directory: Predictions are collected here as NAME.jsonl.
        name: The variant: base, base_lora, router, router_lora.
        Others: As in `generate_predictions`.
    """
    model.eval()
    file = directory / f"{name}.jsonl"
    predictions = generate_predictions(model, data, config, file, routes, seed, f"generate ({name})", progress_bar)
    result: dict[str, Any] = {"n": len(predictions), "skip": skip_statistics(predictions, model.num_layers)}
    result["new_tokens"] = float(np.mean([p.new_tokens for p in predictions]))
    if config.perplexity:
        result["perplexity"] = response_perplexity(model, data, routes, config.batch_size)
    if rank()[0] == 0:
        scores = score_texts(data.task, data.test, [p.text for p in predictions], config)
        result["metrics"] = {key: score.to_dict() for key, score in scores.items()}
        result["primary_metric"] = PRIMARY_METRIC[data.task.kind]
        if config.tpot_prompts:
            result["timing"] = measure_tpot(
                model,
                data,
                [p.skipped for p in predictions],
                config.tpot_prompts,
                config.tpot_tokens,
                config.tpot_repetitions,
            )
        write_atomically(file, "".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in predictions))
    return result
