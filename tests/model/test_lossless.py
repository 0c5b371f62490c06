"""Lossless decoding: the dense text token by token, and its distribution where tokens are drawn."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from firstlab.model import lossless
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.lossless import Costs, best_draft, expected_speedup
from firstlab.model.settings import LoraSettings
from support.models import LAYERS, pair, prompts, random_lora

SKIPPING = torch.tensor([True, False, True, True, False, True])


@pytest.fixture(autouse=True)
def always_drafts(monkeypatch):
    """Random weights agree too rarely for drafts to pay."""
    monkeypatch.setattr(lossless, "best_draft", lambda acceptance, skip_rate: 3)


@pytest.mark.filterwarnings("ignore:lossless")
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "phi3", "mixtral"])
def test_greedy_text_is_the_dense_models(architecture):
    _, model = pair(architecture)
    ids, mask = prompts((5, 9, 12))
    common = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": [2, 9], "pad_token_id": 0}
    dense = model.generate(ids, mask, routes=torch.ones(LAYERS, dtype=torch.bool), **common)
    out = model.generate(ids, mask, routes=SKIPPING, lossless=True, return_dict_in_generate=True, **common)
    width = dense.shape[1]
    assert torch.equal(out.sequences[:, :width], dense)
    assert (out.sequences[:, width:] == 0).all()
    assert all(drafted >= accepted >= 0 for drafted, accepted in zip(out.drafted, out.accepted, strict=True))
    assert sum(out.drafted) > 0
    routers = model.generate(ids, mask, lossless=True, **common)
    assert torch.equal(routers[:, :width], dense)


@pytest.mark.filterwarnings("ignore:lossless")
def test_lora_that_is_not_merged_drafts_only():
    lm, _ = pair("llama")
    model = RouterAugmentedLM(copy.deepcopy(lm)).eval()
    ids, mask = prompts((5, 9))
    common = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    dense = model.generate(ids, mask, routes=torch.ones(LAYERS, dtype=torch.bool), **common)
    model.add_lora(LoraSettings(rank=4))
    random_lora(model, std=0.5)
    model.eval()
    changed = model.generate(ids, mask, routes=torch.ones(LAYERS, dtype=torch.bool), **common)
    assert not torch.equal(changed, dense)
    assert torch.equal(model.generate(ids, mask, routes=SKIPPING, lossless=True, **common), dense)


@pytest.mark.filterwarnings("ignore:lossless")
@pytest.mark.parametrize("options", [{"top_k": 0}, {"temperature": 0.7, "top_k": 4}, {"top_p": 0.8, "top_k": 0}])
def test_drawn_tokens_follow_the_dense_distribution(options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=6, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    lm = LlamaForCausalLM(config).eval()
    torch.nn.init.normal_(lm.lm_head.weight, std=0.4)
    model = RouterAugmentedLM(lm).eval()
    model.lm.generation_config.eos_token_id = None
    ids = torch.tensor([[1, 4, 2]])
    route = torch.tensor([True, False, False, True])
    drawn = {"do_sample": True, "max_new_tokens": 3, "pad_token_id": 0, **options}
    count = 1500
    repeated = ids.expand(count, -1)
    torch.manual_seed(1)
    dense = model.generate(repeated, torch.ones_like(repeated), routes=torch.ones(4, dtype=torch.bool), **drawn)
    own = model.generate(
        repeated[: count // 2], torch.ones_like(repeated[: count // 2]), routes=route, lossless=True, **drawn
    )
    # Two samples, one table: the statistic of homogeneity over the 6² last two tokens.
    first, second = ((x[:, -2] * 6 + x[:, -1]).bincount(minlength=36).double() for x in (dense, own))
    share = (first + second) / (len(dense) + len(own))
    seen = share > 0
    statistic = sum(
        float(((observed - n * share)[seen].square() / (n * share)[seen]).sum())
        for observed, n in ((first, len(dense)), (second, len(own)))
    )
    degrees = int(seen.sum()) - 1
    # The 99.9 % point of chi-square by Wilson and Hilferty.
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3


@pytest.mark.filterwarnings("ignore:lossless")
def test_padding_is_no_part_of_a_prompt_without_a_mask():
    _, model = pair("llama")
    ids, mask = prompts((5, 9, 12))
    common = {"routes": SKIPPING, "lossless": True, "max_new_tokens": 8, "do_sample": False, "eos_token_id": 2}
    assert torch.equal(model.generate(ids, **common), model.generate(ids, mask, **common))


def test_drafts_are_as_long_as_pays():
    assert [best_draft(0.3, 0.25), best_draft(1.0, 0.25)] == [0, lossless.MOST_DRAFTED]
    assert expected_speedup(0.8, 2, 0.5, 1.5) == pytest.approx((1 + 0.8 + 0.64) / (2 * 0.5 + 1.5))
    assert expected_speedup(0.0, 0, 0.5) == 1.0


def test_what_does_not_go_together_is_named():
    _, model = pair("llama")
    ids, mask = prompts((5, 9))
    for options, name in (
        ({"num_beams": 2}, "num_beams"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"past_key_values": model.new_cache()}, "past_key_values"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_length": 4}, "max_length=4 is less than the 9 tokens"),
    ):
        with pytest.raises(ValueError, match=name):
            model.generate(ids, mask, lossless=True, **options)
    _, windowed = pair("gemma2")
    with pytest.raises(ValueError, match="sliding windows"):
        windowed.generate(ids, mask, lossless=True, max_new_tokens=3)


@pytest.mark.parametrize(
    ("draft", "verify", "warns"),
    [(1.1, 1.0, True), (0.2, 4.0, True), (0.2, 1.0, False), (0.2, 1.2, False)],
    ids=["slow drafts", "slow verification", "fast", "hardly slower verification"],
)
def test_it_says_once_before_it_starts_that_it_will_be_slower(monkeypatch, recwarn, draft, verify, warns):
    """By measured times: a route that always agrees and skips a third of the layers need not be faster."""
    model = RouterAugmentedLM(copy.deepcopy(pair("llama")[0])).eval()
    ids, mask = prompts((9, 7))
    monkeypatch.setattr(lossless.Drafter, "_seconds", lambda *_: next(seconds))
    for layer in model.lm.model.layers:  # every route gives the same text
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    seconds = iter([100.0, 100 * draft, 100 * verify])  # measured once, whatever the machine does meanwhile
    warnings.simplefilter("always")
    for _ in range(2):
        model.generate(ids, mask, routes=SKIPPING, lossless=True, max_new_tokens=4)
    said = [str(each.message) for each in recwarn if "will not be faster than dense" in str(each.message)]
    assert len(said) == 2 * warns
    assert list(lossless._MEASURED[model].values()) == [Costs(100.0, 100 * draft, 100 * verify)]


@pytest.mark.filterwarnings("ignore:lossless")
def test_measuring_changes_no_text(monkeypatch):
    _, model = pair("llama")
    ids, mask = prompts((7, 9))
    common = {"routes": SKIPPING, "lossless": True, "max_new_tokens": 6, "do_sample": True, "eos_token_id": None}
    found, own = [], lossless.Drafter._seconds
    for seconds in (1e-9, 1.0):
        lossless._MEASURED.clear()
        monkeypatch.setattr(
            lossless.Drafter, "_seconds", lambda self, run, seconds=seconds: seconds * (own(self, run) > 0)
        )
        torch.manual_seed(0)
        found.append(model.generate(ids, mask, **common))
    assert torch.equal(*found)
