"""The bundled tasks' files are what their generators give."""

import lzma

import pytest

from firstlab.data.bundled import FOLDER
from freeze import TASKS, frozen
from recipe.generated import GeneratedTask


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_generator_still_gives_the_frozen_file(task: GeneratedTask) -> None:
    assert lzma.decompress((FOLDER / f"{task.name}.jsonl.xz").read_bytes()) == frozen(task)


def test_every_frozen_file_has_a_generator() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{task.name}.jsonl.xz" for task in TASKS}
