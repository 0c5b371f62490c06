"""Measure how fast decoding is at several skip rates, beside transformers and the memory's limit.

python -m firstlab.benchmark [model=hf model.path=ID_OR_FOLDER model.name=NAME] [skip_rates=[0.25]] [out=FOLDER]
python -m firstlab.benchmark model=llama3_8b model.random_init=true model.dtype=bfloat16 routes=paper
"""

from __future__ import annotations

import sys
from functools import partial

import hydra
from omegaconf import DictConfig

from firstlab.bench.benchmark import load, run
from firstlab.config.command_line import check_command_line, guarded
from firstlab.config.compose import conf_dir


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="benchmark")
@partial(guarded, resumes=False)
def main(composed: DictConfig) -> None:
    """The settings, then the benchmark."""
    run(load(composed))


if __name__ == "__main__":
    check_command_line("benchmark", sys.argv[1:])
    main()
