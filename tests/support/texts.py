"""Texts of tests: line-aligned files, and a tokenizer small enough to train in a test."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "### Instruction:\nTranslate the following sentences from English to German.\n\n### Input:\n",
    "### Response:\n",
    "the red house stands by the old river and the small dog sleeps",
    "das rote Haus steht am alten Fluss und der kleine Hund schläft",
]


def tiny_tokenizer(*, bos: bool = True, closes: bool = False, pad: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text, no unknown tokens. BOS is 0, EOS is 1; `closes` puts EOS behind every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", *(["<pad>"] if pad else [])]
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if bos or closes:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{'<s> ' if bos else ''}$A{' </s>' if closes else ''}", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **({"pad_token": "<pad>"} if pad else {})
    )


def write_parallel(root: Path, name: str, pairs: list[tuple[str, str]], source: str = "en", target: str = "de") -> None:
    """Two line-aligned files, as parallel text comes."""
    (root / f"{name}.{source}").write_text("".join(f"{pair[0]}\n" for pair in pairs), encoding="utf-8")
    (root / f"{name}.{target}").write_text("".join(f"{pair[1]}\n" for pair in pairs), encoding="utf-8")
