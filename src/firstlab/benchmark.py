"""Measure speed: decoding at several skip rates beside transformers and the memory's limit, or steps of training.

python -m firstlab.benchmark [model=hf model.path=ID_OR_FOLDER model.name=NAME] [skip_rates=[0.25]] [out=FOLDER]
python -m firstlab.benchmark model=llama3_8b model.random_init=true model.dtype=bfloat16 routes=paper
python -m firstlab.benchmark training [model=hf model.path=ID_OR_FOLDER model.name=NAME] [batch_size=4] [out=FOLDER]
"""

from __future__ import annotations

import sys
from functools import partial

import hydra
from omegaconf import DictConfig

from firstlab.bench.config import load
from firstlab.config.command_line import check_command_line, guarded
from firstlab.config.compose import conf_dir


@partial(guarded, resumes=False)
def main(composed: DictConfig) -> None:
    """Check the settings, then measure; torch is imported only now."""
    config = load(composed)
    from firstlab.bench.report import run

    run(config)


if __name__ == "__main__":
    training = sys.argv[1:2] == ["training"]
    if training:
        del sys.argv[1]
    name = "training_speed" if training else "benchmark"
    check_command_line(name, sys.argv[1:])
    hydra.main(version_base="1.3", config_path=conf_dir(), config_name=name)(main)()
