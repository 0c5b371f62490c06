"""Settings of the metrics that have a model of their own, as the options of an evaluation have them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BertScoreConfig:
    """Which encoder BERTScore of summaries compares with.

    Attributes:
        path: Hub id or folder of the encoder; None leaves the metric out.
        num_layers: Layer whose states are compared; None: bert-score's choice for the encoder, else its last.
    """

    path: str | None = None
    num_layers: int | None = None

    def __post_init__(self) -> None:
        if self.num_layers is not None and self.num_layers < 1:
            raise ValueError(f"evaluation.bertscore.num_layers={self.num_layers} is not allowed: at least 1, or null")


@dataclass(frozen=True)
class CometConfig:
    """Which COMET model scores translations, and where its program is (`make comet`).

    Attributes:
        model: Hub id, path of a `.ckpt` file, or a folder that holds `checkpoints/model.ckpt`; None leaves the metric
            out.
        command: The `comet-score` program; a relative path starts at the working directory.
        batch_size: Segments per forward pass.
        gpus: Number of GPUs; 0 is the CPU.
    """

    model: str | None = None
    command: str = ".venv-comet/bin/comet-score"
    batch_size: int = 8
    gpus: int = 0

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("gpus", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"evaluation.comet.{name}={getattr(self, name)} is not allowed: at least {least}")
