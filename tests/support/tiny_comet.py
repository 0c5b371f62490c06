"""Builds a tiny reference-based COMET checkpoint with random weights, for the COMET environment's Python.

    .venv-comet/bin/python tests/tiny_comet.py DIRECTORY      # prints the checkpoint's path

It has the layout of a published model (`hparams.yaml` beside `checkpoints/model.ckpt`), so `comet-score`
loads it like any other, but takes a second and no network.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import yaml
from comet.models import RegressionMetric
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import XLMRobertaConfig, XLMRobertaModel, XLMRobertaTokenizerFast


def build(directory: Path) -> Path:
    """Write encoder, tokenizer and checkpoint under `directory`; return the checkpoint's path."""
    encoder = directory / "encoder"
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    letters = [chr(code) for code in range(33, 127)] + list("äöüßÄÖÜ")
    pieces = specials + letters + [f"\N{LOWER ONE EIGHTH BLOCK}{letter}" for letter in letters]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=specials.index("<unk>")))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[("<s>", specials.index("<s>")), ("</s>", specials.index("</s>"))],
    )
    XLMRobertaTokenizerFast(tokenizer_object=tokenizer, model_max_length=126).save_pretrained(encoder)

    torch.manual_seed(0)
    XLMRobertaModel(
        XLMRobertaConfig(
            vocab_size=len(pieces),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=130,
            initializer_range=0.5,
        ),
        add_pooling_layer=False,
    ).save_pretrained(encoder)

    metric = RegressionMetric(
        encoder_model="XLM-RoBERTa",
        pretrained_model=str(encoder),
        layer="mix",
        hidden_sizes=[8],
        train_data=[],
        validation_data=[],
    )
    checkpoint = directory / "checkpoints" / "model.ckpt"
    checkpoint.parent.mkdir(parents=True)
    hparams = dict(metric.hparams) | {"class_identifier": "regression_metric"}
    torch.save(
        {
            "state_dict": metric.state_dict(),
            "hyper_parameters": hparams,
            "pytorch-lightning_version": "2.0.0",
        },
        checkpoint,
    )
    (directory / "hparams.yaml").write_text(yaml.safe_dump(hparams), encoding="utf-8")
    return checkpoint


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
