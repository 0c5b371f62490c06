"""The command line: what is wrong with it is said in one message before anything is composed for real."""

from __future__ import annotations

import pytest
from hydra.core.global_hydra import GlobalHydra

from firstlab.config import register
from firstlab.entry import check_command_line


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("sweep=table1", "sweep=table1 names a file of conf/sweep: write +sweep=table1"),
        ("experiment=squad_a0.01", "experiment=squad_a0.01 names a file of conf/experiment: write +experiment="),
        ("+lora.rnk=2", "lora.rnk is unknown: lora has no key 'rnk'; its keys are rank"),
    ],
)
def test_a_word_that_is_almost_right_is_answered_with_what_is_right(
    argument: str, message: str, capsys: pytest.CaptureFixture
):
    register()
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as stopped:
        check_command_line("train", [argument])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
