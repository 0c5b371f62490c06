"""Measure speed: decoding at several skip rates beside transformers and the memory's limit, or steps of training.

python -m firstlab.benchmark [model=hf model.path=ID_OR_FOLDER model.name=NAME] [skip_rates=[0.25]] [out=FOLDER]
python -m firstlab.benchmark model=llama3_8b model.random_init=true model.dtype=bfloat16 routes=paper
python -m firstlab.benchmark training [model=hf model.path=ID_OR_FOLDER model.name=NAME] [batch_size=4] [out=FOLDER]
python -m firstlab.benchmark preset=gpu [parts=[tests,decode,mixed,prefill,train,run,quantize]] [out=FOLDER]
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from firstlab.config.command_line import command

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main(composed: DictConfig) -> None:
    """Check the settings, then measure; torch is imported only now."""
    from firstlab.bench.config import load

    config = load(composed)
    from firstlab.bench.report import run

    run(config)


def main_of_parts(composed: DictConfig) -> None:
    """Check the settings, then measure every part."""
    from firstlab.bench.gpu import load, run

    run(load(composed))


if __name__ == "__main__":
    import firstlab.bench.config
    import firstlab.bench.gpu  # noqa: F401  registers the schemas, as the line above

    if any(each.startswith("preset=") for each in sys.argv[1:]):
        command("gpu_benchmark", main_of_parts)
    else:
        training = sys.argv[1:2] == ["training"]
        if training:
            del sys.argv[1]
        command("training_speed" if training else "benchmark", main, resumes=False)
