"""Translation of any line-aligned parallel text: a directory of files NAME.SOURCE and NAME.TARGET."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from firstlab.data.files import data_files, read_parallel
from firstlab.data.prompts import Translation
from firstlab.data.task import Example

#: The words that the prompt uses for a language.
LANGUAGE_NAMES = {
    "ar": "Arabic", "bg": "Bulgarian", "bo": "Tibetan", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek",
    "en": "English", "es": "Spanish", "et": "Estonian", "fi": "Finnish", "fr": "French", "he": "Hebrew", "hi": "Hindi",
    "hr": "Croatian", "hu": "Hungarian", "id": "Indonesian", "is": "Icelandic", "it": "Italian", "ja": "Japanese",
    "km": "Khmer", "ko": "Korean", "lo": "Lao", "lt": "Lithuanian", "lv": "Latvian", "my": "Burmese", "nl": "Dutch",
    "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sk": "Slovak",
    "sv": "Swedish", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip


def language_name(tag: str, option: str) -> str:
    """The name of a language, also where its tag says more: `pt_BR`, `zh-Hant-TW`; errors name the `option`."""
    name = LANGUAGE_NAMES.get(tag.replace("_", "-").partition("-")[0].lower())
    if name is None:
        raise ValueError(f"{option}={tag} is unknown: choose one of {', '.join(LANGUAGE_NAMES)}")
    return name


class ParallelText(Translation):
    """Translates the lines of `NAME.<source_language>` to those of `NAME.<target_language>`.

    Languages are codes or BCP-47 tags. Several names of training texts are joined in this order; without a validation
    text, validation is drawn from them. `drop_empty` leaves out pairs of lines one of which is empty.
    """

    def __init__(
        self,
        source_language: str,
        target_language: str,
        root: str | None,
        train: str | Sequence[str] = "train",
        validation: str | None = None,
        test: str = "test_2016_flickr",
        drop_empty: bool = False,
    ) -> None:
        self.source_language, self.target_language = source_language, target_language
        name = language_name(source_language, "data.task.source_language")
        self.language_names = (name, language_name(target_language, "data.task.target_language"))
        if name == self.language_names[1]:
            raise ValueError(
                f"data.task.source_language={source_language} and data.task.target_language={target_language} are "
                f"both {name}: change one"
            )
        self.root, self.drop_empty = root, drop_empty
        self.train_names = (train,) if isinstance(train, str) else tuple(train)
        self.validation_name, self.test_name = validation, test
        if not self.train_names:
            raise ValueError("data.task.train=[] names no training text: give at least one name")
        used = [*(("train", name) for name in self.train_names), ("test", test)]
        used += [] if validation is None else [("validation", validation)]
        seen: dict[str, str] = {}
        for option, name in used:
            # Two names, `train` and `./train`, or two links may lead to one file.
            file = os.path.realpath(os.path.expanduser(os.path.join(root or "", f"{name}.{source_language}")))
            if file in seen:
                raise ValueError(
                    f"{seen[file]} and data.task.{option}={name} are the same text, but train, validation and test "
                    "must not overlap: name another"
                )
            seen[file] = f"data.task.{option}={name}"

    def train_pool(self) -> list[Example]:
        return self._read(*self.train_names)

    def validation(self) -> list[Example] | None:
        """The validation text, or None when validation is drawn from the training text."""
        return None if self.validation_name is None else self._read(self.validation_name)

    def test(self) -> list[Example]:
        return self._read(self.test_name)

    def _file_names(self, names: Sequence[str]) -> list[str]:
        return [f"{name}.{code}" for name in names for code in (self.source_language, self.target_language)]

    def _paths(self, names: Sequence[str]) -> list[tuple[Path, Path]]:
        files = self._file_names(names)
        if self.root is None:
            raise ValueError(f"data.root is not set: set it to the directory that holds {', '.join(files)}")
        paths = data_files(self.root, files)
        return list(zip(paths[::2], paths[1::2], strict=True))

    def _read(self, *names: str) -> list[Example]:
        return [
            Example(id=f"{name}:{number}", source=text, references=(translation,))
            for name, paths in zip(names, self._paths(names), strict=True)
            for number, text, translation in read_parallel(*paths, drop_empty=self.drop_empty)
        ]
