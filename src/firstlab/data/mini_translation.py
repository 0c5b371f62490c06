"""Mini translation: bundled sentences with one right translation each, a stand-in for WMT without a network."""

from __future__ import annotations

from firstlab.data.bundled import BundledTask
from firstlab.data.prompts import Translation

_LANGUAGES = {"en-de": "German", "en-zh": "Chinese"}


class MiniTranslation(Translation, BundledTask):
    """Translation from English to German or Chinese.

    Level 1 is a short clause; 2 adds adjectives, numbers, prices and possessors; 3 adds time phrases that
    invert the German order, modals, perfect, future and negation; 4 has one subordinate or relative clause; 5
    nests or joins several clauses. `pair` is "en-de" or "en-zh".
    """

    def __init__(self, pair: str = "en-de", pool_size: int = 6000, test_size: int = 500) -> None:
        if pair not in _LANGUAGES:
            raise ValueError(f"pair={pair!r} is unknown; choose one of {', '.join(_LANGUAGES)}")
        super().__init__(pool_size, test_size)
        self.pair = pair
        self.name = f"mini-{pair.replace('-', '')}"
        self.target_language = pair.split("-")[1]
        self.language_names = ("English", _LANGUAGES[pair])
