"""Cross-entropy at labelled positions in chunks, against the plain one over all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.loss import in_chunks, token_cross_entropy
from firstlab.model.settings import LoraSettings
from support.models import ARCHITECTURES, batch, prompts, random_lora, random_routers, routed_model, tiny_model


def plain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def trainable(architecture: str) -> RouterAugmentedLM:
    """Routers and LoRA, both with gradient, LoRA away from its start."""
    model = routed_model(architecture)
    model.add_lora(LoraSettings(rank=2, dropout=0.0))
    for name, parameter in model.lm.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            torch.manual_seed(len(name))
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def gradients(model: RouterAugmentedLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_loss_and_gradients_equal_the_plain_ones(architecture: str) -> None:
    model = trainable(architecture)
    ids, mask, labels, prompt_mask = batch()
    arguments = {"attention_mask": mask, "labels": labels, "prompt_mask": prompt_mask, "objective": "decode_consistent"}
    full = model(ids, **arguments)
    expected = plain_loss(full.logits, labels)
    torch.testing.assert_close(full.loss, expected, atol=1e-5, rtol=1e-5)
    wanted = gradients(model, expected)
    assert "routers.weight" in wanted and len(wanted) > 1
    for chunk in (5, 1000):
        model.loss_chunk = chunk
        lean = model(ids, **arguments, keep_logits=False)
        assert lean.logits is None and lean.states.shape == (12, 32)
        torch.testing.assert_close(lean.loss, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lean.token_losses, full.token_losses, atol=1e-5, rtol=1e-5)
        found = gradients(model, lean.loss)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


SCALED = {
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 5.0},
    "gemma2": {"final_logit_softcapping": 0.5},
}


@pytest.mark.parametrize("architecture", list(SCALED))
def test_scales_and_caps_of_the_head_are_kept(architecture: str) -> None:
    torch.manual_seed(0)
    small = {k: v for k, v in ARCHITECTURES["llama"].items()} | {"head_dim": 8}
    config = AutoConfig.for_model(architecture, **small, **SCALED[architecture])
    model = RouterAugmentedLM(AutoModelForCausalLM.from_config(config).eval())
    ids, mask, labels, _ = batch()
    with torch.no_grad():
        lean = model(ids, mask, labels, keep_logits=False)
        logits = model(ids, mask, labels).logits
    wanted = torch.zeros_like(labels, dtype=torch.bool)
    wanted[:, :-1] = labels[:, 1:] != -100
    torch.testing.assert_close(model.output_head()(lean.states), logits[wanted], atol=1e-6, rtol=1e-5)
    # The head is more than a matrix here.
    bare = model.lm.get_output_embeddings()(lean.states)
    assert not torch.allclose(bare, logits[wanted], atol=1e-3)


def test_token_losses_stand_at_their_labels() -> None:
    model = routed_model()
    ids, mask, labels, _ = batch()
    with torch.no_grad():
        out = model(ids, mask, labels, keep_logits=False)
        logits = model(ids, mask).logits
    expected = torch.zeros(labels.shape)
    for row, column in (labels != -100).nonzero().tolist():
        expected[row, column] = -logits[row, column - 1].log_softmax(-1)[labels[row, column]]
    # Without labels every token is prompt; the soft pass over whole sequences is the same.
    torch.testing.assert_close(out.token_losses, expected, atol=1e-5, rtol=1e-5)
    assert out.loss_terms["token_count"] == (labels != -100).sum()


def test_the_first_token_of_a_row_is_predicted_by_nothing() -> None:
    model = routed_model()
    found = []
    for side in ("left", "right"):
        ids, mask, _, prompt_mask = batch(side)
        labels = ids.masked_fill(mask == 0, -100)
        with torch.no_grad():
            found.append(model(ids, mask, labels, prompt_mask=prompt_mask, keep_logits=False))
    assert found[0].loss_terms["token_count"] == found[1].loss_terms["token_count"] == mask.sum() - 3
    torch.testing.assert_close(found[0].loss, found[1].loss)


def test_no_chunk_has_more_rows_than_asked_for() -> None:
    states = torch.randn(11, 4, requires_grad=True)
    weight = torch.randn(4, 7)
    targets = torch.randint(7, (11,))
    sizes = []

    def head(states: Tensor) -> Tensor:
        sizes.append(len(states))
        return states @ weight

    losses = token_cross_entropy(head, states, targets, 4)
    assert sizes == [4, 4, 3]
    losses.sum().backward()
    # Computed again, so nothing of a chunk was kept.
    assert sorted(sizes) == [3, 3, 4, 4, 4, 4]
    found, states.grad = states.grad, None
    F.cross_entropy(states @ weight, targets, reduction="sum").backward()
    torch.testing.assert_close(found, states.grad)


def test_one_chunk_is_computed_once() -> None:
    calls = []
    states = torch.randn(3, 2, requires_grad=True)
    in_chunks(lambda x: calls.append(len(x)) or x.sum(-1), 3, states).sum().backward()
    assert calls == [3]


def test_a_batch_with_nothing_to_learn_has_loss_zero_and_a_gradient() -> None:
    model = routed_model()
    ids, mask, labels, _ = batch()
    out = model(ids, mask, torch.full_like(labels, -100), keep_logits=False)
    assert out.loss.item() == 0 and not out.token_losses.any()
    out.loss.backward()


def test_half_precision_losses_are_fp32() -> None:
    model = routed_model().to(torch.bfloat16)
    ids, mask, labels, _ = batch()
    out = model(ids, mask, labels, keep_logits=False)
    assert out.loss.dtype == out.token_losses.dtype == torch.float32
    torch.testing.assert_close(out.loss, plain_loss(model(ids, mask, labels).logits, labels), atol=1e-2, rtol=1e-2)


def test_dense_states_are_those_of_the_base_model() -> None:
    base = tiny_model("gemma2")
    model = RouterAugmentedLM(tiny_model("gemma2"))
    random_routers(model)
    model.add_lora()
    random_lora(model, std=1.0)
    ids, mask, labels, _ = batch()
    states = model.dense_states(ids, mask, labels)
    wanted = torch.zeros_like(labels, dtype=torch.bool)
    wanted[:, :-1] = labels[:, 1:] != -100
    with torch.no_grad():
        expected = base(ids, attention_mask=mask).logits[wanted]
        torch.testing.assert_close(model.output_head()(states), expected, atol=1e-5, rtol=1e-5)


def test_logits_can_be_left_out_with_labels_only() -> None:
    with pytest.raises(ValueError, match="keep_logits=False leaves nothing to return without labels="):
        routed_model()(prompts()[0], keep_logits=False)


@pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="not in this transformers")
def test_head_of_a_model_whose_layers_may_share_keys_and_values() -> None:
    sizes = {**ARCHITECTURES["gemma3_text"], "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 97}
    sizes |= {"hidden_size_per_layer_input": 8, "global_head_dim": 8}
    model = RouterAugmentedLM(AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma4_text", **sizes)))
    ids, mask, labels, prompt_mask = batch()
    arguments = {"attention_mask": mask, "labels": labels, "prompt_mask": prompt_mask}
    full, lean = model(ids, **arguments), model(ids, **arguments, keep_logits=False)
    torch.testing.assert_close(lean.loss, full.loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ligers_kernel_gives_torchs_losses_and_gradients(dtype: torch.dtype) -> None:
    pytest.importorskip("liger_kernel")
    torch.manual_seed(0)
    head, states = torch.nn.Linear(16, 50).to(dtype), torch.randn(7, 16, dtype=dtype, requires_grad=True)
    targets, weights = torch.randint(0, 50, (7,)), torch.rand(7)
    found = {}
    for kernel in ("torch", "liger"):
        for chunk in (3, 100):
            losses = token_cross_entropy(lambda x: torch.tanh(head(x)), states, targets, chunk, kernel)
            [gradient] = torch.autograd.grad((losses * weights).sum(), states)
            found[kernel, chunk] = losses.detach(), gradient
    for each in found.values():
        assert each[0].dtype == torch.float32
        torch.testing.assert_close(each[0], found["torch", 100][0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(each[1], found["torch", 100][1])
