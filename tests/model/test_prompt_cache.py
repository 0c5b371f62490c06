"""Phase 1 behind constant prompts: the same numbers as one pass over everything, without the prompt's graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.prompt_cache import Layout
from firstlab.model.routers import Routers, RouterSettings, pool
from support.models import ARCHITECTURES, LAYERS, batch, routed_model


def phase_1(architecture: str = "llama") -> RouterAugmentedLM:
    model = routed_model(architecture)
    model.freeze_all_but("routers")
    return model.train()


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_one_pass(architecture: str, side: str) -> None:
    model = phase_1(architecture)
    ids, mask, labels, prompt_mask = batch(side)
    found = []
    for keep_logits in (True, False):
        model.zero_grad()
        arguments = {"prompt_mask": prompt_mask, "objective": "decode_consistent", "keep_logits": keep_logits}
        out = model(ids, mask, labels, **arguments)
        (out.loss + 0.1 * out.loss_terms["non_skip"]).backward()
        found.append((out, model.routers.weight.grad.clone()))
    (whole, wanted), (split, gradient) = found
    assert wanted.abs().sum(1).all()
    torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(split.loss, whole.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(split.rho, whole.rho, atol=1e-6, rtol=0)
    torch.testing.assert_close(split.token_losses, whole.token_losses, atol=1e-4, rtol=1e-4)
    assert split.loss_terms["token_count"] == whole.loss_terms["token_count"]


@pytest.mark.parametrize("gate", ["soft", "hard", "bernoulli"])
@pytest.mark.parametrize("loss_on", ["all", "response"])
def test_gates_and_labels(gate: str, loss_on: str) -> None:
    model = phase_1()
    ids, mask, labels, prompt_mask = batch()
    if loss_on == "all":
        labels = ids.masked_fill(mask == 0, -100)
    found = []
    for keep_logits in (True, False):
        model.zero_grad()
        torch.manual_seed(0)
        arguments = {"prompt_mask": prompt_mask, "objective": "decode_consistent", "gate": gate}
        out = model(ids, mask, labels, **arguments, keep_logits=keep_logits)
        out.loss.backward()
        found.append((out.loss.detach(), out.token_losses, model.routers.weight.grad.clone()))
    for whole, split in zip(*found, strict=True):
        torch.testing.assert_close(split, whole, atol=1e-4, rtol=1e-3)


@contextmanager
def saved_shapes() -> Iterator[list[torch.Size]]:
    """Shapes of everything that autograd keeps for the backward pass."""
    shapes: list[torch.Size] = []

    def note(tensor: Tensor) -> Tensor:
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield shapes


@pytest.mark.parametrize("input_norm", ["none", "rms"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_graph_holds_the_prompt(input_norm: str, checkpointing: bool) -> None:
    model = phase_1()
    model.routers.settings = RouterSettings(input_norm)
    model.gradient_checkpointing = checkpointing
    ids = torch.randint(3, 97, (2, 41))
    prompt_mask = torch.arange(41)[None].expand(2, -1) < 37
    labels = ids.masked_fill(prompt_mask, -100)
    with saved_shapes() as shapes:
        out = model(ids, None, labels, prompt_mask=prompt_mask, objective="decode_consistent", keep_logits=False)
    # States of prompt tokens have 37 (or all 41) tokens and at least the hidden size; keys and values are [.., 8] each.
    assert shapes and not [s for s in shapes if {37, 41} & set(s) and s[-1] == 32]
    with saved_shapes() as before:
        model(ids, None, labels, prompt_mask=prompt_mask, objective="decode_consistent")
    assert [s for s in before if 41 in s and s[-1] == 32]
    out.loss.backward()
    assert model.routers.weight.grad.abs().sum(1).all()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"routers.weight"}


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "bloom"])
@pytest.mark.parametrize("gate", ["soft", "bernoulli"])
def test_checkpointing_changes_nothing(architecture: str, gate: str) -> None:
    model = phase_1(architecture)
    ids, mask, labels, prompt_mask = batch()
    found = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        torch.manual_seed(0)
        options = {"prompt_mask": prompt_mask, "objective": "decode_consistent", "gate": gate, "keep_logits": False}
        out = model(ids, mask, labels, **options)
        out.loss.backward()
        found.append((out.loss.detach(), model.routers.weight.grad.clone()))
    torch.testing.assert_close(*[loss for loss, _ in found])
    torch.testing.assert_close(*[gradient for _, gradient in found], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("mixed", [False, True])
def test_bf16(mixed: bool) -> None:
    ids, mask, labels, prompt_mask = batch()
    options = {"prompt_mask": prompt_mask, "objective": "decode_consistent", "keep_logits": False}
    exact = phase_1()
    expected = exact(ids, mask, labels, **options)
    expected.loss.backward()
    model = phase_1() if mixed else phase_1().to(torch.bfloat16)
    model.gradient_checkpointing = True
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        out = model(ids, mask, labels, **options)
    out.loss.backward()
    assert out.loss.dtype == out.rho.dtype == model.routers.weight.grad.dtype == torch.float32
    torch.testing.assert_close(out.loss, expected.loss, atol=0.1, rtol=0.05)
    similarity = torch.cosine_similarity(model.routers.weight.grad.flatten(), exact.routers.weight.grad.flatten(), 0)
    assert similarity > 0.95


def test_rows_without_a_prompt_or_a_response() -> None:
    model = phase_1()
    ids, mask, labels, prompt_mask = batch()
    options = {"objective": "decode_consistent", "keep_logits": False}
    for prompts in (torch.zeros_like(prompt_mask), mask.bool()):
        out = model(ids, mask, labels, prompt_mask=prompts, **options)
        whole = model(ids, mask, labels, prompt_mask=prompts, objective="decode_consistent")
        torch.testing.assert_close(out.loss, whole.loss, atol=1e-5, rtol=1e-5)
    # A single row without a response.
    prompt_mask[1] = mask[1].bool()
    labels[1] = -100
    out = model(ids, mask, labels, prompt_mask=prompt_mask, **options)
    whole = model(ids, mask, labels, prompt_mask=prompt_mask, objective="decode_consistent")
    torch.testing.assert_close(out.loss, whole.loss, atol=1e-5, rtol=1e-5)
    out.loss.backward()
    assert model.routers.weight.grad.isfinite().all()


def test_a_prompt_that_goes_on_behind_a_response() -> None:
    model = phase_1()
    ids, mask, labels, prompt_mask = batch()
    prompt_mask[:, 7] = True
    assert Layout.of(prompt_mask, mask.bool() & ~prompt_mask) is None
    options = {"prompt_mask": prompt_mask, "objective": "decode_consistent"}
    out = model(ids, mask, labels, **options, keep_logits=False)
    torch.testing.assert_close(out.loss, model(ids, mask, labels, **options).loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("input_norm", ["none", "rms"])
def test_rho_of_constant_states_has_the_gradient_of_the_mean(input_norm: str) -> None:
    torch.manual_seed(0)
    routers = Routers(LAYERS, 8, RouterSettings(input_norm))
    hidden = torch.randn(3, 5, 8)
    pooled = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    weights = torch.tensor([1.0, 2.0, 3.0])
    expected = pool(routers.probabilities(hidden, 2), pooled)
    [wanted] = torch.autograd.grad(expected @ weights, routers.weight)
    hidden[1, 0] = torch.nan  # attention may leave it at padding
    rho = routers.rho_of_constant(hidden, pooled, 2)
    [gradient] = torch.autograd.grad(rho @ weights, routers.weight)
    torch.testing.assert_close(rho, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradient, wanted)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=4))
def test_a_split_loses_nothing_and_keeps_the_order(rows: list[tuple[int, int, int]]) -> None:
    width = max(sum(row) for row in rows) + 1
    column = torch.arange(width)[None]
    left, prompts, responses = (torch.tensor(x)[:, None] for x in zip(*rows, strict=True))
    prompt = (column >= left) & (column < left + prompts)
    response = (column >= left + prompts) & (column < left + prompts + responses)
    values = torch.arange(1, len(rows) * width + 1).reshape(len(rows), width)
    split = Layout.of(prompt, response)
    if split is None:
        assert not prompts.any() or not responses.any()
        return
    taken = split.take(values)
    for row in range(len(rows)):
        assert taken[row, split.real[row]].tolist() == values[row, (prompt | response)[row]].tolist()
        kept = split.real[row].nonzero().flatten()
        assert len(kept) == 0 or len(kept) == kept[-1] - kept[0] + 1, "no hole between prompt and response"
    assert int(split.real[:, : split.prompt_length].sum()) == int(prompt.sum())
    assert torch.equal(split.put_back(taken, width), values * (prompt | response))
