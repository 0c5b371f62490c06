"""Trains a small deep Llama and its tokenizer, from generated or parallel text, on a plain CPU.

    python experiments/nano/train.py                                            # the bundled model
    python experiments/nano/train.py --config-name parallel_text data_root=DIR  # a larger one, on real parallel text

The same command started again goes on where a killed one stopped, and gives the same weights. Processes share the
work of every step and add up their gradients; how many there are changes the weights by rounding only.
"""

from __future__ import annotations

from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from firstlab.config.command_line import guarded
from recipe.corpus import prepare
from recipe.finish import finish
from recipe.settings import RecipeConfig, check
from recipe.training import train_in_processes


@hydra.main(config_path=str(Path(__file__).resolve().parent / "conf"), config_name="bundled", version_base="1.3")
@guarded
def main(composed: DictConfig) -> None:
    """Prepare, train, save and score; go on where an earlier call was stopped."""
    OmegaConf.resolve(composed)
    config: RecipeConfig = OmegaConf.to_object(composed)  # type: ignore[assignment]
    check(config)
    tasks = {name: instantiate(chosen.task, _convert_="object") for name, chosen in config.tasks.items()}
    work = Path(config.work_dir)
    prepare(config, tasks, work)
    train_in_processes(config, work)
    finish(config, tasks, work)


if __name__ == "__main__":
    ConfigStore.instance().store(name="recipe_schema", node=RecipeConfig)
    main()
