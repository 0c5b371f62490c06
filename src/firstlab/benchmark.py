"""Measure how fast decoding is at several skip rates, beside transformers and the memory's limit.

python -m firstlab.benchmark [model=hf model.path=ID_OR_FOLDER model.name=NAME] [skip_rates=[0.25]] [out=FOLDER]
python -m firstlab.benchmark model=llama3_8b model.random_init=true model.dtype=bfloat16 routes=paper
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from firstlab.config.command_line import command

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main(composed: DictConfig) -> None:
    """The settings, then the benchmark."""
    from firstlab.bench.benchmark import load, run

    run(load(composed))


if __name__ == "__main__":
    import firstlab.bench.benchmark  # noqa: F401  registers the schema

    command("benchmark", main, resumes=False)
