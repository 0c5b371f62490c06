"""Evaluate one variant of a model on the test set: generate, score, time, and put the record together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from firstlab.config.schema import EvaluationConfig
from firstlab.data.batching import shard_batches
from firstlab.data.datamodule import PromptDataModule
from firstlab.data.encoding import TrainingRows, collate_training, response_ids
from firstlab.data.files import warn
from firstlab.data.room import Room
from firstlab.evaluation.decoding import Decoder, check_engine
from firstlab.evaluation.predictions import fingerprint, generate_predictions, skip_statistics, write_predictions
from firstlab.evaluation.scoring import primary_metric, score_texts
from firstlab.evaluation.timing import measure_tpot
from firstlab.methods.base import routes_without, rows_of
from firstlab.metrics import perplexity
from firstlab.model.generation_options import pinned_generation
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.route_router import RouteRouter
from firstlab.model.routes import FixedRoutes, RoutersDecide, Routes
from firstlab.store import results
from firstlab.store.ranks import rank


def evaluate_variant(
    model: RouterAugmentedLM,
    data: PromptDataModule,
    config: EvaluationConfig,
    directory: Path,
    name: str,
    routes: Routes | None,
    source: str,
    seed: int,
    progress_bar: bool,
    static: Tensor | None = None,
) -> dict[str, Any]:
    """Everything `result.json` says about one variant; `rates` in it, about each of `config.skip_rates`.

    Args:
        directory: Predictions are collected here as NAME.jsonl.
        name: The variant: base, base_lora, router, router_lora.
        routes: The method's routes of the test prompts, or None to let the routers decide.
        source: `source_of` the model, before its LoRA was merged, and the routes.
        static: See `skip_statistics`.
    """
    check_engine(model, "evaluation.decoder", config.decoder)
    highest = _highest_rate(model) if config.skip_rates and routes is None else 0.0
    model.eval()
    decoder, file = Decoder(model, data, config, seed, routes), directory / f"{name}.jsonl"
    record: dict[str, Any] = {"n": len(data.test), "source": source, "decoding": decoder.record()}
    with pinned_generation(model.lm):
        predictions = generate_predictions(decoder, file=file, source=source, progress_bar=progress_bar)
        if config.tpot_prompts and rank()[0] == 0:
            own = [FixedRoutes(routes_without(model.num_layers, p.skipped)) for p in predictions]
            got = own if routes is None else [routes.rows([p.index]) for p in predictions]
            record["timing"] = measure_tpot(decoder, got, config)
    nll = _response_nll(model, data, routes, config.batch_size) if config.perplexity else None
    if nll is not None:
        tokens = nll[:, 1].astype(int).tolist()
    else:
        tokens = [len(response_ids(data.tokenizer, example.references[0])) for example in data.test]
    record["skip"] = skip_statistics(predictions, tokens, model.num_layers, static)
    record["new_tokens"] = float(np.mean([p.new_tokens for p in predictions]))
    rows = decoder.rows
    examples: dict[str, Any] = {
        "test_set": fingerprint(data.test),
        "difficulty": results.pack([p.difficulty for p in predictions]),
        "prompt_tokens": results.pack([len(rows[i].prompt) for i in range(len(predictions))]),
        "response_tokens": results.pack(tokens),
        "skip_rate": results.pack([float(np.mean(p.skip_shares(model.num_layers))) for p in predictions]),
    }
    if nll is not None:
        record["perplexity"] = perplexity(float(nll[:, 0].sum()), int(nll[:, 1].sum()))
        examples["nll"] = results.pack(nll[:, 0])
        for part, group in record["skip"]["by_part"].items():
            total, count = nll[[example.part == part for example in data.test]].sum(0)
            group["perplexity"] = perplexity(float(total), int(count))
    if rank()[0] == 0:
        scores = score_texts(data.task, data.test, [p.text for p in predictions], config)
        record["metrics"] = {key: score.to_dict() for key, score in scores.items()}
        record["primary_metric"] = primary_metric(data.task)
        examples["scores"] = {key: results.pack(score.rows) for key, score in scores.items() if score.rows is not None}
        record["examples"] = examples
        write_predictions(file, predictions)
    if config.skip_rates and routes is None:
        if max(config.skip_rates) > highest + 1e-6:
            said = f"evaluation.skip_rates={config.skip_rates}"
            warn(f"{said}: the routers reach {highest:.3g} at most, which is evaluated in place of higher ones")
        again = partial(evaluate_variant, model, data, replace(config, skip_rates=[]), directory, seed=seed)
        rates = {f"{rate:.4g}": rate for rate in sorted({min(rate, highest) for rate in config.skip_rates})}
        record["rates"] = {
            text: again(
                f"{name}-skip{text}", RoutersDecide(rate), f"{source}-{text}", progress_bar=progress_bar, static=static
            )
            for text, rate in rates.items()
        }
    return record


def _highest_rate(model: RouterAugmentedLM) -> float:
    if not isinstance(model.routers, RouteRouter):
        raise ValueError("evaluation.skip_rates needs a model with router.kind=routes; leave it out")
    return model.routers.highest_rate


@torch.no_grad()
def _response_nll(
    model: RouterAugmentedLM, data: PromptDataModule, routes: Routes | None, batch_size: int
) -> np.ndarray:
    """[N, 2]: nll of each test prompt's first reference under the routes, and how many tokens it has."""
    my_rank, world = rank()
    rows = TrainingRows(data.task, data.test, data.tokenizer, data.max_length)
    totals = torch.zeros(len(data.test), 2, dtype=torch.float64)

    def measure(indices: Sequence[int]) -> None:
        batch = collate_training([rows[i] for i in indices], pad=data.pad, loss_on="response")
        batch = {k: v.to(model.device) for k, v in batch.items() if k != "index"}
        forced = rows_of(routes, indices, model.device)
        out = model(**batch, objective="decode_consistent", gate="hard", routes=forced, keep_logits=False)
        counts = (batch["labels"][:, 1:] != -100).sum(1)
        totals[indices] = torch.stack([out.token_losses.sum(1).cpu(), counts.cpu()], 1).double()

    room = Room()
    for indices in shard_batches(len(data.test), batch_size, my_rank, world):
        for _ in room.passes(indices, measure):
            pass
    if world > 1:
        dist.all_reduce(totals)
    return totals.numpy()
