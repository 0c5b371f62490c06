"""The pages of README and docs, cut into blocks of code and commands."""

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = ("bash", "sh", "shell")


class Command(NamedTuple):
    """One command line of a page."""

    page: str
    words: list[str]  # as a shell splits it
    piped: bool = False  # another command writes its standard input


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands(page: Path) -> Iterator[Command]:
    """Every command of a page's shell blocks."""
    for text in blocks(page, *SHELL):
        yield from commands_of(text, page.name)


def commands_of(text: str, page: str) -> Iterator[Command]:
    """The commands of a shell block, without comments, split at && and |."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;()<>")
        lexer.whitespace_split, piped = True, False
        for separator, words in itertools.groupby(lexer, lambda word: word in ("&&", "|", ";")):
            if separator:
                piped = "|" in words
            else:
                yield Command(page, list(words), piped)
