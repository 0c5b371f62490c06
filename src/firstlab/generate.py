"""Stream text from a trained run and show which layers decode ran.

    python -m firstlab.generate run=DIR "text to translate, summarise, ..."
    python -m firstlab.generate run=DIR question="Who ...?" "passage"
    echo "text" | python -m firstlab.generate run=DIR prompt=raw

The text is put into the prompt that the run was trained on, unless prompt=raw. Text that looks like an option goes
behind --. Where the run's base model has moved, model.path=FOLDER says where it is.
"""

from __future__ import annotations

import sys
from functools import partial

from firstlab.config.command_line import guarded, parse_options
from firstlab.config.schema import GenerateConfig, check_options
from firstlab.data.files import has_text, without_marks


@partial(guarded, resumes=False)
def main(arguments: list[str]) -> None:
    """Parse, load, stream, show the route."""
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\n{GenerateConfig.__doc__}")
        return
    moved = dict(each.split("=", 1) for each in arguments if each.startswith("model.path="))
    options, words = parse_options(GenerateConfig(), [each for each in arguments if not each.startswith("model.path=")])
    if not options.run:
        raise ValueError('run=DIR is missing; try: python -m firstlab.generate run=DIR "text"')
    check_options(options)
    text = without_marks(" ".join(words) if words else sys.stdin.read().strip())
    if not has_text(text):
        raise ValueError("the text is empty; give at least one word")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the text is not valid UTF-8; convert it")

    # Only now torch and the model.
    from firstlab.run.stream import stream

    stream(options, text, moved)


if __name__ == "__main__":
    main(sys.argv[1:])
