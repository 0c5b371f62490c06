"""A byte-level BPE tokenizer small enough to train in a test: any text, no unknown tokens."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "### Instruction:\nTranslate the following sentences from English to German.\n\n### Input:\n",
    "### Response:\n",
    "the red house stands by the old river and the small dog sleeps",
    "das rote Haus steht am alten Fluss und der kleine Hund schläft",
]


def tiny_tokenizer(*, bos: bool = True, closes: bool = False, pad: bool = False) -> PreTrainedTokenizerFast:
    """Adds BOS (0) in front by default and, with `closes`, EOS (1) behind every text; PAD only where asked."""
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
