"""Block influence against hidden states taken by hooks, and against values computed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from firstlab.config.build import build_data, load_model
from firstlab.methods.shortgpt import ShortGPT, block_influence
from firstlab.model.layers import find_decoder
from firstlab.training.prompt_set import PromptSet
from support.fake_prompts import FakePrompts, skipped
from support.tiny_run import composed, overrides


def test_values_by_hand():
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    # Two batches of one and two tokens, weighed by token: layer 0 turns 1 of 3 tokens, layer 1 all, layer 2 none.
    states = [
        [x[None], y[None], x[None], x[None]],
        [torch.stack([x, y]), torch.stack([3 * x, y]), torch.stack([-x, x]), torch.stack([-x, x])],
    ]
    prompts = FakePrompts(3, states=states)
    assert block_influence(prompts).tolist() == pytest.approx([1 / 3, (1 + 2 + 1) / 3, 0])
    assert skipped(ShortGPT(0.34).routes(prompts)) == [2]
    assert skipped(ShortGPT(0.67).routes(prompts)) == [0, 2]
    assert skipped(ShortGPT(0.34, protect_last=1).routes(prompts)) == [0]
    assert skipped(ShortGPT(0.34, skip_prefill=True).routes(prompts).ran) == [2]


def test_states_of_a_model_without_padding_and_before_the_final_norm(tiny_model_dir: Path, tmp_path: Path):
    config, _ = composed(*overrides(tiny_model_dir, tmp_path))
    data, model = build_data(config), load_model(config, tiny_model_dir)
    prompts = PromptSet(model, data, data.train[:6], 3)
    found = block_influence(prompts)

    # One example at a time, so that nothing is padded; states as the layers themselves see them.
    seen: list[list[torch.Tensor]] = [[] for _ in range(model.num_layers)]
    lm = model.unwrap()
    for index, layer in enumerate(find_decoder(lm)[1]):

        def note(module, args, output, index=index):
            output = output[0] if isinstance(output, tuple) else output
            seen[index].append(1 - torch.nn.functional.cosine_similarity(args[0], output, dim=-1).flatten())

        layer.register_forward_hook(note)
    for batch in prompts.batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            with torch.no_grad():
                lm(ids[None, mask.bool()])
    expected = torch.stack([torch.cat(each).double().mean() for each in seen])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
