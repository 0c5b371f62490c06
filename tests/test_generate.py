"""`python -m firstlab.generate` on texts and lengths that cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest

from firstlab import generate
from models import tiny_model
from tiny_tokenizer import tiny_tokenizer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["word " * 200], "max_new_tokens=2, but the model has 128 positions; shorten the text"),
        (["max_new_tokens=500", "word"], "max_new_tokens=500, but the model has 128 positions; shorten the text"),
        (["half a pair \ud83d"], "the text is not valid UTF-8"),
    ],
)
def test_what_cannot_work_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    tiny_model("gpt2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        generate.main([f"run={tmp_path}", "prompt=raw", "max_new_tokens=2", *arguments])
    assert message in capsys.readouterr().err
