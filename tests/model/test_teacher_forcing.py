"""Teacher-forced passes against loops written by hand, and against cached decoding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from firstlab.model.teacher_forcing import TeacherForcedPass
from support.models import ARCHITECTURES, LAYERS, batch, pair, prompts, random_lora, random_routes, routed_model
from support.reference import decode_gates, gated_logits, prompt_rho, step_logits

every_architecture = pytest.mark.parametrize("architecture", list(ARCHITECTURES))


def soft_llama(model, ids: torch.Tensor, pooled: torch.Tensor):
    """h = h + rho · phi(h) written out for one unpadded Llama sequence: (logits [1, T, V], rho [L])."""
    lm = model.lm
    hidden = lm.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    rotary = lm.model.rotary_emb(hidden, positions)
    length = ids.shape[1]
    causal = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    rhos = []
    for layer, router in zip(lm.model.layers, model.routers.weight, strict=True):
        rho = torch.sigmoid(hidden[0] @ router)[pooled].mean()
        output = layer(hidden, attention_mask=causal, position_ids=positions, position_embeddings=rotary)
        hidden = hidden + rho * (output - hidden)
        rhos.append(rho)
    return lm.lm_head(lm.model.norm(hidden)), torch.stack(rhos)


@pytest.mark.parametrize("pooled_tokens", ["sequence", "prompt"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_soft_forward_equals_a_loop_written_by_hand(pooled_tokens, side):
    model = routed_model()
    ids, mask, labels, prompt_mask = batch(side)
    out = model(ids, mask, labels, pooled_tokens=pooled_tokens)
    sums, count = 0.0, 0
    for row in range(3):
        kept = mask[row].bool()
        own = ids[row, kept][None]
        pooled = prompt_mask[row, kept] if pooled_tokens == "prompt" else torch.ones_like(own[0], dtype=torch.bool)
        logits, rho = soft_llama(model, own, pooled)
        torch.testing.assert_close(out.logits[row, kept], logits[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out.rho[row], rho, atol=1e-5, rtol=0)
        targets = labels[row, kept][1:]
        sums += F.cross_entropy(logits[0, :-1], targets, ignore_index=-100, reduction="sum")
        count += int((targets != -100).sum())
    torch.testing.assert_close(out.loss, sums / count, atol=1e-5, rtol=1e-5)
    assert out.loss_terms["token_count"].item() == count == 12
    assert out.loss_terms["cross_entropy"] is out.loss
    torch.testing.assert_close(out.loss_terms["regularization"], model.routers.weight.square().sum())
    torch.testing.assert_close(out.loss_terms["non_skip"], out.rho.mean(0).sum())


@every_architecture
def test_padding_side_and_neighbours_change_no_teacher_forced_pass(architecture):
    _, model = pair(architecture)
    for objective in ("soft", "decode_consistent"):
        results = {}
        for side in ("left", "right"):
            ids, mask, labels, _ = batch(side)
            with torch.no_grad():
                results[side] = out = model(ids, mask, labels, objective=objective)
                row = mask[1].bool()
                alone = model(ids[1:2, row], None, labels[1:2, row], objective=objective)
            torch.testing.assert_close(alone.rho[0], out.rho[1], atol=1e-5, rtol=0)
            torch.testing.assert_close(alone.logits[0], out.logits[1, row], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(results["left"].rho, results["right"].rho, atol=1e-5, rtol=0)
        torch.testing.assert_close(results["left"].loss, results["right"].loss, atol=1e-4, rtol=1e-5)


def decode_logits(model, ids, mask, prompt_length, routes=None):
    """Logits of the response tokens of left-padded sequences, one cached step per token."""
    cache = model.new_cache(routes=routes)
    logits = []
    with torch.no_grad():
        for end in range(prompt_length, ids.shape[1] + 1):
            start = 0 if end == prompt_length else end - 1
            out = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
            logits.append(out.logits[:, -1])
    return torch.stack(logits, dim=1), cache


@every_architecture
@pytest.mark.parametrize("forced", [False, True], ids=["routers", "forced"])
def test_decode_consistent_equals_cached_decoding(architecture, forced):
    base, model = pair(architecture)
    ids, mask = prompts((9, 13, 16), "left")
    prompt_length = 10
    prompt_mask = mask.clone()
    prompt_mask[:, prompt_length:] = 0
    routes = random_routes(3) if forced else None
    with torch.no_grad():
        out = model(ids, mask, prompt_mask=prompt_mask, objective="decode_consistent", gate="hard", routes=routes)
    expected, cache = decode_logits(model, ids, mask, prompt_length, routes)
    if not forced:
        torch.testing.assert_close(out.rho, cache.rho, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            out.rho, prompt_rho(base, model.routers.weight, ids[:, :10], mask[:, :10]), atol=1e-5, rtol=0
        )
    assert 0 < cache.routes.float().mean() < 1
    torch.testing.assert_close(out.logits[:, prompt_length - 1 :], expected, atol=1e-4, rtol=0)
    reference = gated_logits(base, ids, mask, decode_gates(prompt_length, 16, cache.routes))
    torch.testing.assert_close(out.logits[:, prompt_length - 1 :], reference[:, prompt_length - 1 :], atol=1e-4, rtol=0)


def test_decode_consistent_prompts_of_different_length_in_right_padded_rows():
    base, model = pair("llama")
    ids, mask, labels, prompt_mask = batch("right")
    with torch.no_grad():
        out = model(ids, mask, labels, objective="decode_consistent", gate="hard")
    for row in range(3):
        kept, length = mask[row].bool(), int(prompt_mask[row].sum())
        own = ids[row, kept][None]
        routes = model.route(own[:, :length])
        gates = decode_gates(length, own.shape[1], routes)
        expected = gated_logits(base, own, torch.ones_like(own), gates)
        torch.testing.assert_close(out.logits[row, kept], expected[0], atol=1e-4, rtol=0)


def test_prompt_positions_never_depend_on_the_routers():
    base, model = pair("llama")
    ids, mask, labels, prompt_mask = batch("right")
    with torch.no_grad():
        dense = base(ids, attention_mask=mask).logits
        for gate in ("soft", "hard", "bernoulli"):
            out = model(ids, mask, labels, objective="decode_consistent", gate=gate)
            torch.testing.assert_close(out.logits[prompt_mask], dense[prompt_mask], atol=1e-5, rtol=1e-5)


@every_architecture
@pytest.mark.parametrize("objective", ["soft", "decode_consistent"])
def test_open_and_closed_gates_are_exact(architecture, objective):
    base, model = pair(architecture)
    ids, mask, labels, prompt_mask = batch("right")
    opened = torch.ones(LAYERS, dtype=torch.bool)
    with torch.no_grad():
        out = model(ids, mask, labels, objective=objective, routes=opened)
        dense = gated_logits(base, ids, mask, decode_gates(0, 12, opened.expand(3, -1)))
        torch.testing.assert_close(out.logits[mask.bool()], dense[mask.bool()], atol=1e-5, rtol=1e-5)
        closed = random_routes(3)
        out = model(ids, mask, labels, objective=objective, routes=closed)
    gates = closed[:, None, :].expand(-1, 12, -1).clone()
    if objective == "decode_consistent":
        gates[prompt_mask] = True
    expected = gated_logits(base, ids, mask, gates)
    torch.testing.assert_close(out.logits[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)


def test_prompt_is_everything_before_the_first_label_by_default():
    _, model = pair("llama")
    ids, mask, labels, prompt_mask = batch("left")
    with torch.no_grad():
        default = model(ids, mask, labels, objective="decode_consistent")
        given = model(ids, mask, labels, objective="decode_consistent", prompt_mask=prompt_mask)
        assert torch.equal(default.logits, given.logits)
        # Without labels everything is prompt, and a prompt runs every layer.
        unlabelled = model(ids, mask, objective="decode_consistent")
        torch.testing.assert_close(unlabelled.logits, model.lm(ids, attention_mask=mask).logits, atol=1e-4, rtol=1e-4)
    assert unlabelled.loss is None
    assert unlabelled.loss_terms is None


def test_labels_on_prompt_tokens_change_the_loss_but_not_the_pass():
    _, model = pair("llama")
    ids, mask, labels, prompt_mask = batch("right")
    everywhere = ids.masked_fill(~mask.bool(), -100)
    with torch.no_grad():
        a = model(ids, mask, labels, prompt_mask=prompt_mask, objective="decode_consistent")
        b = model(ids, mask, everywhere, prompt_mask=prompt_mask, objective="decode_consistent")
    assert torch.equal(a.logits, b.logits)
    assert b.loss_terms["token_count"] == mask.sum() - 3


@pytest.mark.parametrize("gate", ["hard", "bernoulli"])
def test_straight_through_gradient_is_that_of_the_gate(gate):
    model = routed_model()
    ids, mask, labels, _ = batch()
    torch.manual_seed(0)
    out = model(ids, mask, labels, objective="decode_consistent", gate=gate)
    out.loss.backward()
    routers = model.routers.weight.grad.clone()
    assert (routers.abs().sum(1) > 0).all()
    # The same loss as a function of free gates g that enter where rho did.
    torch.manual_seed(0)
    rho = out.rho.detach()
    gates = rho >= 0.5 if gate == "hard" else torch.stack([torch.bernoulli(rho[:, i]) for i in range(LAYERS)], 1)
    free = gates.float().requires_grad_()

    class Free(TeacherForcedPass):
        def _gate(self, rho):
            return free[:, len(self._rho) - 1]

    from firstlab.model.layers import routing

    prompt_mask = mask.bool() & ((labels != -100).cumsum(1) == 0)
    with routing(Free(model.routers, mask.bool(), prompt_mask, "decode_consistent")):
        logits = model.lm(ids, attention_mask=mask, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100).backward()
    # Chain rule by hand: d loss / d r_i = sum over rows of d loss / d g · d rho / d r_i at constant hidden states.
    with torch.no_grad():
        hidden = model.lm(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    # The prompt runs unmixed, so its hidden states are those of the dense model and depend on no router.
    expected = []
    for index in range(LAYERS):
        p = torch.sigmoid(hidden[index] @ model.routers.weight[index].detach())
        weights = (p * (1 - p) * prompt_mask / prompt_mask.sum(1, keepdim=True)).unsqueeze(-1)
        expected.append((free.grad[:, index, None] * (weights * hidden[index]).sum(1)).sum(0))
    torch.testing.assert_close(routers, torch.stack(expected), atol=1e-5, rtol=1e-3)


def test_bernoulli_gates_are_zero_or_one_and_follow_rho():
    model = routed_model()
    rho = torch.tensor([0.0, 0.2, 0.8, 1.0])
    current = TeacherForcedPass(model.routers, torch.ones(4, 3).bool(), torch.ones(4, 3).bool(), gate="bernoulli")
    torch.manual_seed(0)
    draws = torch.stack([current._gate(rho) for _ in range(2000)])
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(draws.mean(0), rho, atol=0.03, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("objective", ["soft", "decode_consistent"])
def test_gradient_checkpointing_changes_nothing(architecture, objective):
    ids, mask, labels, _ = batch()
    found = []
    for checkpointing in (False, True):
        model = routed_model(architecture)
        model.add_lora()
        random_lora(model, std=0.1)
        model.requires_grad_(True).train()
        model.gradient_checkpointing = checkpointing
        torch.manual_seed(4)
        out = model(ids, mask, labels, objective=objective, gate="soft")
        (out.loss + 0.1 * out.loss_terms["non_skip"]).backward()
        found.append((out.loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (loss2, gradients2) = found
    torch.testing.assert_close(loss, loss2)
    assert gradients.keys() == gradients2.keys()
    for name in gradients:
        torch.testing.assert_close(gradients[name], gradients2[name], atol=1e-6, rtol=1e-4, msg=name)


def test_a_batch_without_labels_to_learn_from_has_loss_zero():
    model = routed_model()
    ids, mask, labels, _ = batch()
    out = model(ids, mask, torch.full_like(labels, -100))
    assert out.loss.item() == 0
    out.loss.backward()


def test_output_is_a_transformers_output():
    _, model = pair("llama")
    ids, mask, labels, _ = batch()
    out = model(input_ids=ids, attention_mask=mask, labels=labels)
    assert out["loss"] is out.loss is out[0]
    assert out["logits"].shape == (3, 12, 97)
    assert out["rho"].shape == (3, LAYERS)
    assert out.rho.dtype == torch.float32
    assert out.past_key_values is None
    again = model(inputs_embeds=model.lm.get_input_embeddings()(ids), attention_mask=mask, labels=labels)
    torch.testing.assert_close(again.loss, out.loss)


@pytest.mark.parametrize("name", ["objective", "gate", "pooled_tokens"])
def test_unknown_settings_are_named(name):
    _, model = pair("llama")
    with pytest.raises(ValueError, match=f"{name}='x' is unknown; choose one of"):
        model(prompts()[0], **{name: "x"})


def test_half_precision_pass_has_fp32_rho_and_loss():
    model = routed_model().to(torch.bfloat16)
    ids, mask, labels, _ = batch()
    for objective in ("soft", "decode_consistent"):
        out = model(ids, mask, labels, objective=objective)
        assert out.logits.dtype == torch.bfloat16
        assert out.rho.dtype == out.loss.dtype == torch.float32
        out.loss.backward()
        assert model.routers.weight.grad.dtype == torch.float32


def test_passes_leave_no_trace():
    base, model = pair("llama")
    ids, mask, labels, _ = batch("left")
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    before = model.generate(ids, **options)
    with torch.no_grad():
        model(ids, mask, labels)
        model(ids, mask, labels, objective="decode_consistent", gate="hard")
    assert torch.equal(model.generate(ids, **options), before)
    with torch.no_grad():
        assert torch.equal(model.lm(ids, attention_mask=mask).logits, base(ids, attention_mask=mask).logits)


def test_an_error_inside_a_pass_leaves_no_routing_behind():
    base, model = pair("llama")
    ids, mask, labels, _ = batch("left")
    with pytest.raises((IndexError, RuntimeError)):
        model(ids + 1000, mask, labels)
    with torch.no_grad():
        assert torch.equal(model.lm(ids, attention_mask=mask).logits, base(ids, attention_mask=mask).logits)


def test_step_logits_reference_is_the_base_without_skips():
    base, _ = pair("llama")
    ids, mask = prompts()
    sequences = base.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    logits = step_logits(base, sequences, mask, torch.ones(3, LAYERS, dtype=torch.bool))
    assert torch.equal(logits.argmax(-1)[0, :1], sequences[0, 12:13])
