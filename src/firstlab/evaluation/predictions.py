"""Generate a variant's response to every test prompt, resuming after what is on disk; summarize what was skipped."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from firstlab.data.batching import shard_batches
from firstlab.data.files import warn
from firstlab.data.task import Example
from firstlab.evaluation.decoding import Decoder
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.lora import lora_layers
from firstlab.model.quantization import stored_tensors
from firstlab.model.routes import Routes
from firstlab.store import results
from firstlab.store.files import write_atomically
from firstlab.store.ranks import barrier, rank

#: Numbers of a tensor that `source_of` reads.
_SAMPLE = 2**17


@dataclass(frozen=True)
class Prediction:
    """What one variant said to one test example."""

    index: int  # position in the test set
    id: str
    text: str  # without special tokens
    new_tokens: int  # with the one that ended the response
    skipped: list[int]  # layers that every decode step skipped, 0-based
    difficulty: int  # 0 if unknown
    shares: list[float] | None = None  # where each step decides: of each layer, the share of steps that skipped it
    part: str = ""  # of a mixture

    def skip_shares(self, num_layers: int) -> list[float]:
        """Share of decode steps that skipped each of the L layers."""
        return self.shares or [float(layer in self.skipped) for layer in range(num_layers)]


def generate_predictions(decoder: Decoder, *, file: Path, source: str, progress_bar: bool) -> list[Prediction]:
    """Generate a response to every test prompt; each process collects its part of them beside `file`.

    Predictions of another `source` (`source_of` the model and its routes) are made again.
    """
    config, examples = decoder.config, decoder.data.test
    each_step = decoder.routes is not None and decoder.routes.decides_each_step
    my_rank, world = rank()
    key = digest([file.stem, fingerprint(examples), decoder.settings, decoder.data.max_prompt_length, source])
    part = file.with_name(f"{file.stem}.{my_rank}.part")
    done = _read_parts(file, key, complain=True)
    own = _read_lines(part, key)[0] if part.is_file() else {}
    write_atomically(part, "".join(_line(each, key) for each in own.values()))  # without what is torn or foreign
    # Batches are cut before finished ones are left out, so that a resumed run pads and samples as an uninterrupted one.
    # What the engine says, greedy, does not depend on the batch.
    whole = config.decoder == "generate" or config.do_sample
    batches = [
        batch if whole else [i for i in batch if i not in done]
        for batch in shard_batches(len(examples), config.batch_size, my_rank, world)
        if not all(i in done for i in batch)
    ]
    with part.open("a", encoding="utf-8") as out:
        quiet, count = not progress_bar or my_rank > 0, sum(map(len, batches))
        responses, title = decoder.responses(batches), f"generate ({file.stem})"
        for i, tokens, shares in tqdm(responses, desc=title, unit="prompt", total=count, disable=quiet):
            done[i] = Prediction(
                index=i,
                id=examples[i].id,
                text=decoder.text(tokens),
                new_tokens=len(tokens),
                skipped=[layer for layer, share in enumerate(shares) if share == 1],
                difficulty=examples[i].difficulty,
                shares=shares if each_step else None,
                part=examples[i].part,
            )
            out.write(_line(done[i], key))
            out.flush()
    barrier()
    if world > 1:
        done = _read_parts(file, key)
    missing = len(set(range(len(examples))) - done.keys())
    if missing:
        raise ValueError(
            f"{file.parent} holds no prediction for {missing} of {len(examples)} test prompts: all processes must "
            "write to one folder that each of them sees"
        )
    return [done[i] for i in range(len(examples))]


def fingerprint(examples: Sequence[Example]) -> str:
    """Short hash of a test set: equal where a paired test makes sense."""
    text = json.dumps([(example.id, example.source, example.references) for example in examples], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", errors="replace")).hexdigest()[:12]


def source_of(model: RouterAugmentedLM, routes: Routes | None) -> str:
    """Short hash of what responds: weights, the model's and its routers' settings, and forced routes.

    Take it before LoRA is merged, which may round otherwise on another machine. Of large tensors only every n-th number
    is read: it costs little, and no training leaves all of those as they were.
    """
    own = ("_name_or_path", "transformers_version")  # of the machine
    config = {key: value for key, value in model.lm.config.to_dict().items() if key not in own}
    forced = None if routes is None else routes.to_json()
    scales = [layer.scaling for layer in lora_layers(model.lm)]
    settings = [config, model.lm.generation_config.eos_token_id, asdict(model.routers.settings), scales, forced]
    found = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        found.update(name.encode())
        for tensor in stored_tensors(parameter):
            some = tensor.reshape(-1)[:: max(1, -(-tensor.numel() // _SAMPLE))].cpu().contiguous()
            found.update(some.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def write_predictions(file: Path, predictions: Sequence[Prediction]) -> None:
    """All predictions of a variant, a line of JSON each."""
    write_atomically(file, "".join(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in predictions))


# Parts: while predictions are made, each process appends lines that carry a checksum of themselves and of all that
# decides the responses. A line that a kill or a hand has damaged, or that belongs to another evaluation, has another.


def digest(value: Any) -> str:
    """Short hash of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _line(prediction: Prediction, key: str) -> str:
    row = asdict(prediction)
    return json.dumps({"check": digest([key, row]), **row}, ensure_ascii=False) + "\n"


def _read_lines(file: Path, key: str) -> tuple[dict[int, Prediction], list[int]]:
    """The predictions of a file by index, and the numbers of the lines that are none; the last line may be torn."""
    found, others = {}, []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
            if row.pop("check") != digest([key, row]):
                raise ValueError(line)
            found[row["index"]] = Prediction(**row)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            others.append(number)
    return found, others


def _read_parts(file: Path, key: str, complain: bool = False) -> dict[int, Prediction]:
    done: dict[int, Prediction] = {}
    for part in sorted(file.parent.glob(f"{file.stem}.*.part")):
        found, others = _read_lines(part, key)
        done |= found
        if others and complain:
            warn(
                f"{part}: {len(others)} lines, the first of them line {others[0]}, are damaged or of an evaluation of "
                "other prompts, weights or routes, or with other options; these predictions are made again"
            )
    return done


def skip_statistics(
    predictions: Sequence[Prediction], tokens: Sequence[int], num_layers: int, static: Tensor | None = None
) -> dict[str, Any]:
    """Skip rate (skipped ÷ L, mean over prompts), per layer and by group of prompts, and how adaptive the routes are.

    Args:
        tokens: Of each prompt, the length of its reference, for the rate by token.
        static: [L], a static set to compare the routes with.
    """
    all_rates, lengths = np.array([np.mean(p.skip_shares(num_layers)) for p in predictions]), np.array(tokens)
    by_token, parts = results.rate_by_token(all_rates, lengths), np.array([p.part for p in predictions])
    # Without a decode step, a method that decides at each of them decides nothing.
    predictions = [p for p in predictions if p.shares is None or p.new_tokens > 1] or predictions
    skipped = np.array([p.skip_shares(num_layers) for p in predictions])
    rates = skipped.mean(1)
    margin = 1.96 * float(rates.std(ddof=1)) / math.sqrt(len(rates)) if len(rates) > 1 else 0.0
    by_part = _by_group(skipped, [p.part for p in predictions]) if predictions[0].part else {}
    for part, group in by_part.items():
        group["skip_rate_by_token"] = results.rate_by_token(all_rates[parts == part], lengths[parts == part])
    return {
        "skip_rate": float(rates.mean()),
        "skip_rate_by_token": by_token,
        "skip_rate_interval": [max(0.0, float(rates.mean()) - margin), min(1.0, float(rates.mean()) + margin)],
        "per_layer": skipped.mean(0).tolist(),
        "by_difficulty": _by_group(skipped, [p.difficulty for p in predictions]),
        "by_part": by_part,
        **_adaptivity(predictions, skipped, static),
    }


def _by_group(skipped: np.ndarray, groups: Sequence[int | str]) -> dict[str, dict[str, Any]]:
    rows = {str(group): skipped[[each == group for each in groups]] for group in sorted(set(groups))}
    return {
        group: {
            "n": len(each),
            "skip_rate": float(each.mean()),
            "per_layer": each.mean(0).tolist(),
            "unique_routes": len(np.unique(each, axis=0)),
        }
        for group, each in rows.items()
    }


def _adaptivity(predictions: Sequence[Prediction], skipped: np.ndarray, static: Tensor | None) -> dict[str, Any]:
    """How the routes differ between prompts; nulls where each decode step decides. Agreement: share of layers alike."""
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
