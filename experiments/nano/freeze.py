"""Write the examples that the package bundles, as its reader takes them: python experiments/nano/freeze.py"""

from __future__ import annotations

import json
import lzma
from dataclasses import fields

from firstlab.data.bundled import FOLDER, LARGEST
from firstlab.data.task import Example
from recipe.generated import GeneratedTask
from recipe.qa import GeneratedQA
from recipe.summarization import GeneratedSummarization
from recipe.translation import GeneratedTranslation

TASKS: tuple[GeneratedTask, ...] = (
    GeneratedTranslation("en-de", **LARGEST),
    GeneratedTranslation("en-zh", **LARGEST),
    GeneratedSummarization(**LARGEST),
    GeneratedQA(**LARGEST),
)


def frozen(task: GeneratedTask) -> bytes:
    """Training pool and test set, one example a line."""
    return "".join(map(_line, [*task.train_pool(), *task.test()])).encode()


def _line(example: Example) -> str:
    values = {field.name: getattr(example, field.name) for field in fields(Example)}
    return json.dumps({name: value for name, value in values.items() if value}, ensure_ascii=False) + "\n"


def main() -> None:
    """Write every file anew."""
    for task in TASKS:
        path = FOLDER / f"{task.name}.jsonl.xz"
        path.write_bytes(lzma.compress(frozen(task), preset=9 | lzma.PRESET_EXTREME))
        print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
