"""`python -m firstlab.generate`: both decoders, and texts and lengths that cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest

from firstlab.config.command_line import parse_options
from firstlab.model import RouterAugmentedLM, load_tokenizer
from firstlab.run import stream
from support.models import random_routers, tiny_model
from support.tiny_tokenizer import tiny_tokenizer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["word " * 200], "max_new_tokens=2, but the model has 128 positions; shorten the text"),
        (["max_new_tokens=500", "word"], "max_new_tokens=500, but the model has 128 positions; shorten the text"),
        (["half a pair \ud83d"], "the text is not valid UTF-8"),
        (["decoder=engine", "word"], "decoder=engine: GPT2LMHeadModel: the decode engine knows LlamaForCausalLM"),
        (["decoder=fast", "word"], "decoder='fast' is not allowed: choose one of generate, engine"),
        (
            ["max_tokens=5", "word"],
            "max_tokens is unknown: the options are run, variant, prompt, question, part, max_new",
        ),
        ([""], "the text is empty"),
        (["--", " "], "the text is empty"),
        (["temperature=0", "word"], "temperature=0.0 is not allowed: at least 0.001"),
        (["temperature=nan", "word"], "temperature=nan is not allowed: at least 0.001"),
        (["top_k=-3", "word"], "top_k=-3 is not allowed: at least 0"),
    ],
)
def test_what_cannot_work_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    tiny_model("gpt2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        stream.main([f"run={tmp_path}", "prompt=raw", "max_new_tokens=2", *arguments])
    assert message in capsys.readouterr().err


def test_text_may_look_like_an_option():
    for arguments in (["seed=1", "--", "x=5", "seed=2"], ["seed=1", "the", "x=5"]):
        options, words = parse_options(stream.GenerateConfig(), arguments)
        assert options.seed == 1 and words == (["x=5", "seed=2"] if "--" in arguments else ["the", "x=5"])


@pytest.mark.parametrize("options", [[], ["do_sample=true", "seed=4"]])
def test_both_decoders_say_the_same(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
):
    model = RouterAugmentedLM.from_pretrained(tiny_model_dir)
    random_routers(model)
    model.save_pretrained(tmp_path)
    load_tokenizer(tiny_model_dir).save_pretrained(tmp_path)
    said = []
    for decoder in ("generate", "engine"):
        stream.main([f"run={tmp_path}", "prompt=raw", "max_new_tokens=12", "a word", f"decoder={decoder}", *options])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and len(said[0]) > 60 and "skipped" in said[0]
