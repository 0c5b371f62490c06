"""Settings of the metrics that have a model of their own; each is a group of options of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BertScoreConfig:
    """Which encoder BERTScore of summaries compares with."""

    path: str | None = None  # hub id or folder; None leaves the metric out
    num_layers: int | None = None  # whose states are compared; None: bert-score's choice for the encoder, else the last

    def __post_init__(self) -> None:
        if self.num_layers is not None and self.num_layers < 1:
            raise ValueError(f"evaluation.bertscore.num_layers={self.num_layers} is not allowed: at least 1, or null")


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
