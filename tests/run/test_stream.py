"""`python -m firstlab.generate`: both decoders, and texts and lengths that cannot work."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

from firstlab import generate
from firstlab.config.command_line import parse_options
from firstlab.config.schema import GenerateConfig
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.storage import load_tokenizer
from support.models import random_routers, tiny_model
from support.texts import tiny_tokenizer


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
        (["--", "\ufeff\u200b\u2060"], "the text is empty"),
        (["temperature=0", "word"], "temperature=0.0 is not allowed: at least 0.001"),
        (["temperature=nan", "word"], "temperature=nan is not allowed: at least 0.001"),
        (["temperature=1e-300", "word"], "temperature=1e-300 is not allowed: at least 0.001"),
        (["do_sample=1", "word"], "do_sample=1 is not allowed: do_sample takes true or false"),
        (["question=Who?", "word"], "question='Who?': prompt=raw takes the text alone; leave question out"),
        (["part=mini_qa", "word"], "part='mini_qa': prompt=raw takes the text alone; leave part out"),
        (["top_k=-3", "word"], "top_k=-3 is not allowed: at least 0"),
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


def test_text_may_look_like_an_option():
    for arguments in (["seed=1", "--", "x=5", "seed=2"], ["seed=1", "the", "x=5"]):
        options, words = parse_options(GenerateConfig(), arguments)
        assert options.seed == 1 and words == (["x=5", "seed=2"] if "--" in arguments else ["the", "x=5"])


def routed_folder(base: Path, folder: Path, generation: dict[str, object] | None = None) -> Path:
    """A model folder with random routers on a copy of `base` whose generation config says more."""
    shutil.copytree(base, folder / "base")
    file = folder / "base" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (generation or {})), encoding="utf-8")
    model = RouterAugmentedLM.from_pretrained(folder / "base")
    random_routers(model)
    model.save_pretrained(folder / "routed")
    load_tokenizer(base).save_pretrained(folder / "routed")
    return folder / "routed"


@pytest.mark.parametrize("options", [[], ["do_sample=true", "seed=4"]])
def test_both_decoders_say_the_same_whatever_the_models_folder_says(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
):
    said = []
    hostile = {"repetition_penalty": 1.7, "num_beams": 4, "do_sample": True, "top_p": 0.1, "min_length": 90}
    for name, generation in (("plain", None), ("hostile", hostile)):
        folder = routed_folder(tiny_model_dir, tmp_path / name, generation)
        for decoder in ("generate", "engine"):
            generate.main(
                [f"run={folder}", "prompt=raw", "max_new_tokens=12", "a word", f"decoder={decoder}", *options]
            )
            said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2] == said[3] and len(said[0]) > 60 and "skipped" in said[0]


@pytest.mark.parametrize("decoder", ["generate", "engine"])
def test_every_stop_token_of_the_model_ends_the_text(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], decoder: str
):
    def length(name: str, generation: dict[str, object]) -> int:
        folder = routed_folder(tiny_model_dir, tmp_path / name, generation)
        generate.main([f"run={folder}", "prompt=raw", "max_new_tokens=12", "a word", f"decoder={decoder}"])
        text = capsys.readouterr().out.rsplit("layers 0", 1)[0]
        return len(load_tokenizer(tiny_model_dir)(text.strip("\n"), add_special_tokens=False)["input_ids"])

    every = list(range(3, 300))
    assert length("one", {}) > length("many", {"eos_token_id": every})


@pytest.mark.parametrize("text", ["\ufeffa word", "a \ufeffword", "<s>a word", "\ufeff<s>a word"])
def test_marks_in_front_of_a_text_change_nothing(
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: str,
):
    folder, said = routed_folder(tiny_model_dir, tmp_path), []
    for piped in ("a word", text):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{piped}\n"))
        generate.main([f"run={folder}", "prompt=raw", "max_new_tokens=5"])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
