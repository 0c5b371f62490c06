import os
from pathlib import Path

import pytest
import torch

# Read when transformers is imported, which the tests do later.
os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with its tokenizer, saved once per test process."""
    from support.tiny_run import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def finished(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run of FiRST with its dense counterpart beside it."""
    from firstlab.run.experiment import Experiment
    from firstlab.run.load import dense_counterpart
    from firstlab.run.report import report
    from support.tiny_run import composed, overrides

    runs = tmp_path_factory.mktemp("runs")
    config, method = composed(*overrides(tiny_model_dir, runs, "method.target_skip=0.25"))
    Experiment(*dense_counterpart(config)).run()
    run = Experiment(config, method)
    run.run()
    report(run)
    return run.directory


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` say why they do not run."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
