"""COMET through the command-line program of its own environment, whose older transformers must not be imported here."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from firstlab.metrics.scores import MetricUnavailableError, References, Scores, Texts, check_pairs


@dataclass(frozen=True)
class CometConfig:
    """Which COMET model scores translations, and where its program is (`make comet`)."""

    #: Hub id, `.ckpt` file, or a folder that holds `checkpoints/model.ckpt`; None leaves the metric out.
    model: str | None = None
    command: str = ".venv-comet/bin/comet-score"  # a relative path starts at the working directory
    batch_size: int = 8
    gpus: int = 0  # 0 is the CPU

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("gpus", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"evaluation.comet.{name}={getattr(self, name)} is not allowed: at least {least}")


def comet(sources: Texts, predictions: Texts, references: References, config: CometConfig) -> Scores:
    """Mean COMET (Rei et al. 2020; XCOMET: Guerreiro et al. 2024) times 100, against the first reference."""
    check_pairs(predictions, references)
    if len(sources) != len(predictions):
        raise ValueError(f"{len(sources)} sources but {len(predictions)} predictions: COMET needs each source")
    program = shutil.which(config.command)
    if program is None:
        raise MetricUnavailableError(
            f"COMET is not installed: evaluation.comet.command={config.command!r} is not a program; run 'make comet', "
            "or give the path of comet-score in another environment"
        )
    assert config.model is not None
    triples = zip(sources, predictions, (accepted[0] for accepted in references), strict=True)
    lines = [[_one_line(text) for text in triple] for triple in triples]
    spoken = [texts for texts in lines if texts[1]]  # others score 0: models give silence undeserved credit
    found = iter(_run(program, config.model, spoken, config) if spoken else [])
    scores = [100.0 * next(found) if texts[1] else 0.0 for texts in lines]
    return Scores.mean(scores, f"model:{_model_name(config.model)}|refs:first|empty:0")


def _run(program: str, model: str, lines: list[list[str]], config: CometConfig) -> list[float]:
    with tempfile.TemporaryDirectory(prefix="firstlab-comet-") as folder:
        output = Path(folder, "scores.json")
        checkpoint = str(Path(model, "checkpoints", "model.ckpt")) if Path(model).is_dir() else model
        command = [program, "--only_system", "--quiet", "--model", checkpoint, "--to_json", str(output)]
        command += ["--batch_size", str(config.batch_size), "--gpus", str(config.gpus)]
        for option, segments in zip(("-s", "-t", "-r"), zip(*lines, strict=True), strict=True):
            path = Path(folder, f"texts{option}.txt")
            path.write_text("".join(f"{segment}\n" for segment in segments), encoding="utf-8")
            command += [option, str(path)]
        # The other environment must not find our packages.
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
        if done.returncode != 0 or not output.is_file():
            raise MetricUnavailableError(_failure(done, config))
        return _parse(output.read_text(encoding="utf-8"), len(lines), config)


def _parse(text: str, expected: int, config: CometConfig) -> list[float]:
    """The scores in {path of the predictions: [{"COMET": score, …}, …]}."""
    try:
        (segments,) = json.loads(text).values()
        scores = [float(segment["COMET"]) for segment in segments]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MetricUnavailableError(f"{config.command} wrote JSON of an unknown form: {text[:200]!r}") from error
    if len(scores) != expected:
        raise MetricUnavailableError(f"{config.command} returned {len(scores)} scores for {expected} segments")
    if not all(map(math.isfinite, scores)):
        raise MetricUnavailableError(f"evaluation.comet.model={config.model!r} returned a score that is not a number")
    return scores


def _failure(done: subprocess.CompletedProcess[str], config: CometConfig) -> str:
    last = "\n".join(done.stderr.strip().splitlines()[-5:]) or "no error output"
    advice = ""
    if "not supported by COMET" in done.stderr or "Invalid checkpoint path" in done.stderr:
        advice = (
            f"\nevaluation.comet.model={config.model!r} is not in the hub cache and there is no network, or it is "
            "gated: accept its licence on its hub page, then `hf auth login`; or give the path of a .ckpt file"
        )
    return f"{config.command} failed with exit status {done.returncode}:{advice}\n{last}"


def _model_name(model: str) -> str:
    path = Path(model)
    if path.suffix == ".ckpt":
        return path.parents[1].name if path.parent.name == "checkpoints" else path.name
    return path.name if path.is_dir() else model


def _one_line(text: str) -> str:
    return " ".join(text.encode("utf-8", errors="replace").decode("utf-8").split())
