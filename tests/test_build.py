"""What a configuration asks of a model is checked as soon as the model is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from firstlab.build import check_lengths
from models import pair
from tiny_run import composed, overrides


@pytest.mark.parametrize(
    ("architecture", "positions"), [("gpt2", 128), ("opt", 128), ("gptj", 128), ("llama", None), ("mistral", None)]
)
def test_absolute_positions_are_limited(architecture: str, positions: int | None):
    assert pair(architecture)[1].max_positions == positions


def test_lengths_beyond_the_models_positions_are_named(tmp_path: Path):
    config, _ = composed(*overrides(tmp_path, tmp_path))
    check_lengths(config, None)
    check_lengths(config, 256)
    for option, value, message in (
        ("data.max_length_router", 257, "data.max_length_router=257 exceeds the 256 positions"),
        ("data.max_length_lora", 257, "data.max_length_lora=257 exceeds the 256 positions"),
        ("data.max_prompt_length", 251, r"data.max_prompt_length plus new tokens=257 exceeds the 256 positions"),
    ):
        config, _ = composed(*overrides(tmp_path, tmp_path, f"{option}={value}"))
        with pytest.raises(ValueError, match=message):
            check_lengths(config, 256)
