"""Generate a variant's response to every test prompt; an interrupted call resumes after what is on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from firstlab.data.batching import shard_batches
from firstlab.data.datamodule import PromptDataModule
from firstlab.data.files import warn
from firstlab.data.task import Example
from firstlab.evaluation.decoding import Decoding, decode
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.routes import Routes
from firstlab.store.files import write_atomically
from firstlab.store.ranks import barrier, rank


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
    decoding: Decoding,
    *,
    file: Path,
    routes: Routes | None,
    title: str,
    progress_bar: bool,
) -> list[Prediction]:
    """Generate a response to every test prompt.

    Args:
        model: The variant, in eval mode, within `pinned_generation`.
        data: Gives test examples, tokenizer and lengths.
        decoding: How to decode; every batch of drawn tokens is seeded by its first example.
        file: Where this variant's predictions are collected; every process writes its own part beside it.
        routes: The method's routes of the test prompts, or None to let the routers decide.
        title: Of the progress bar.
        progress_bar: Show one.

    Raises:
        ValueError: A process does not see what the others wrote.
    """
    examples = data.test
    my_rank, world = rank()
    key = digest([file.stem, fingerprint(examples), asdict(decoding), data.max_prompt_length])
    part = file.with_name(f"{file.stem}.{my_rank}.part")
    done = _read_parts(file, key, complain=True)
    own = _read_part(part, key)[0] if part.is_file() else {}
    write_atomically(part, "".join(_line(each, key) for each in own.values()))  # without what is torn or foreign
    # Batches are cut before finished ones are left out, so that a resumed run pads and samples as an uninterrupted one.
    # What the engine says, greedy, does not depend on the batch.
    whole = decoding.decoder == "generate" or decoding.do_sample
    batches = [
        batch if whole else [i for i in batch if i not in done]
        for batch in shard_batches(len(examples), decoding.batch_size, my_rank, world)
        if not all(i in done for i in batch)
    ]
    with part.open("a", encoding="utf-8") as out:
        quiet, count = not progress_bar or my_rank > 0, sum(map(len, batches))
        responses = decode(model, data, decoding, batches, routes)
        for i, tokens, shares in tqdm(responses, desc=title, unit="prompt", total=count, disable=quiet):
            spoken = tokens[:-1] if tokens and tokens[-1] in decoding.stop_tokens else tokens
            text: Any = data.tokenizer.decode(spoken, skip_special_tokens=True)
            done[i] = Prediction(
                index=i,
                id=examples[i].id,
                text=text.strip(),
                new_tokens=len(tokens),
                skipped=[layer for layer, share in enumerate(shares) if share == 1],
                difficulty=examples[i].difficulty,
                shares=shares if routes is not None and routes.decides_each_step else None,
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


def _read_part(part: Path, key: str) -> tuple[dict[int, Prediction], list[int]]:
    """The predictions of a part by index, and the numbers of the lines that are none; the last line may be torn."""
    found, others = {}, []
    for number, line in enumerate(part.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], start=1):
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
        found, others = _read_part(part, key)
        done |= found
        if others and complain:
            warn(
                f"{part}: {len(others)} lines, the first of them line {others[0]}, are damaged or of an evaluation of "
                "other prompts or with other options; these predictions are made again"
            )
    return done
