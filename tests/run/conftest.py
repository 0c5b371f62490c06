from pathlib import Path

import pytest

from firstlab.run.experiment import Experiment
from firstlab.run.load import dense_counterpart
from firstlab.run.report import report
from support.tiny_run import composed, overrides


@pytest.fixture(scope="session")
def finished(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run of FiRST with its dense counterpart beside it."""
    runs = tmp_path_factory.mktemp("runs")
    config, method = composed(*overrides(tiny_model_dir, runs, "method.target_skip=0.25"))
    Experiment(*dense_counterpart(config)).run()
    run = Experiment(config, method)
    run.run()
    report(run)
    return run.directory
