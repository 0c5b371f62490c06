"""Mini translation: sentences generated from a grammar, each with exactly one right translation.

What a sentence says is drawn from a seed, then written down in English, in German and in Chinese. English carries
everything the target needs, so a perfect score is possible. A stand-in for WMT without a network.

| module | holds |
|---|---|
| lexicon | the words of the three languages |
| meaning | what a sentence says, before any language |
| phrase_sampler, sentence_sampler | draw meanings from a random stream |
| english, german, chinese | the grammars: write a meaning down |
"""

from __future__ import annotations

import random

from firstlab.data.mini_translation import MiniTranslation
from recipe.generated import LEVELS, Built, GeneratedTask, Split
from recipe.translation import chinese, english, german
from recipe.translation.sentence_sampler import SentenceSampler

_TEST_SEED = 20_240_229
_MIN_EN_WORDS, _MAX_EN_WORDS, _MAX_DE_WORDS = 3, 30, 45


class GeneratedTranslation(GeneratedTask, MiniTranslation):
    """`MiniTranslation` from its generator.

    Args:
        pair: "en-de" or "en-zh".
        pool_size: Number of examples in `train_pool`.
        test_size: Number of examples in `test`.
        seed: Seed of the training pool, the same as in `generate`; the test set does not depend on it.
    """

    def __init__(self, pair: str = "en-de", pool_size: int = 6000, test_size: int = 500, seed: int = 0) -> None:
        MiniTranslation.__init__(self, pair)
        GeneratedTask.__init__(self, pool_size, test_size, seed)

    def build(self, rng: random.Random, level: int, split: Split) -> Built | None:
        """A sentence and its translation; None where either is too short or too long."""
        sentence = SentenceSampler(rng).sentence(level)
        source = english.write(sentence)
        target = (german if self.pair == "en-de" else chinese).write(sentence)
        fits = _MIN_EN_WORDS <= len(source.split()) <= _MAX_EN_WORDS and len(target.split()) <= _MAX_DE_WORDS
        return Built(source, "", (target,)) if fits else None

    def level(self, rng: random.Random, index: int) -> int:
        """Any difficulty, all equally often."""
        return rng.randrange(LEVELS) + 1

    def stream(self, split: Split, seed: int) -> tuple[str | int, str]:
        """Seeds are used as they are, and the test set's is fixed."""
        side = "test" if split in ("test", "held-out") else "train"
        return _TEST_SEED if split == "test" else seed, f"{self.name}-{side}"
