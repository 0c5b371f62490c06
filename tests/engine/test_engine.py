"""The engine's tokens are those of `generate`, whatever the routes, lengths and batch."""

from copy import deepcopy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from firstlab.engine.engine import DecodeEngine, EngineOutput
from firstlab.engine.graph_step import GraphStep, runs_of
from firstlab.engine.graphs import Graphs
from firstlab.engine.llama_step import LlamaStep
from firstlab.engine.prefill import read_through_model
from firstlab.engine.sampling import Sampling
from firstlab.model.generation_options import pinned_generation
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.routes import EarlyExit, FixedRoutes, PrunedRoutes, StepRoutes
from firstlab.model.settings import LoraSettings
from support.models import prompts as padded_prompts
from support.models import random_routers, routed_model, tiny_model
from support.tape import Tape

NEW = 8


@cache
def llama(tied: bool, biased: bool = False) -> RouterAugmentedLM:
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        attention_bias=biased,
        mlp_bias=biased,
        initializer_range=0.3,
        eos_token_id=2,
        pad_token_id=0,
    )
    lm = LlamaForCausalLM(config).eval()
    for name, parameter in lm.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model = RouterAugmentedLM(lm).eval()
    random_routers(model)
    return model


def alone(model: RouterAugmentedLM, prompt: list[int], routes: object, new: int = NEW, **options: object) -> Any:
    """What `generate` gives for one prompt, with its cache."""
    given: Any = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(torch.tensor([prompt]), routes=routes, return_dict_in_generate=True, **given)


def expected(model: RouterAugmentedLM, prompt: list[int], routes: object, new: int = NEW) -> list[int]:
    return alone(model, prompt, routes, new).sequences[0, len(prompt) :].tolist()


def recorded(model: RouterAugmentedLM, max_length: int, batch_size: int = 1, lookahead: int = 0) -> DecodeEngine:
    """The GPU's engine with a tape instead of CUDA graphs: after the first time it reads fixed memory only."""
    engine = DecodeEngine(model, max_length, batch_size, mode="graphs", lookahead=lookahead)
    assert isinstance(engine.step, GraphStep)
    engine.step._graphs = Tape()
    return engine


PROMPTS = st.lists(st.lists(st.integers(3, 96), min_size=1, max_size=12), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(PROMPTS, st.booleans(), st.booleans(), st.integers(1, 4), st.data())
def test_tokens_of_generate(prompts, tied, biased, batch_size, data) -> None:
    model = llama(tied, biased)
    layer_choice = st.lists(st.booleans(), min_size=6, max_size=6)
    kind = data.draw(st.sampled_from(["routers", "shared", "rows"]))
    routes = None
    if kind == "shared":
        routes = torch.tensor(data.draw(layer_choice))
    elif kind == "rows":
        routes = torch.tensor([data.draw(layer_choice) for _ in prompts])
    out = DecodeEngine(model, 32, batch_size).generate(prompts, NEW, routes)
    for index, prompt in enumerate(prompts):
        own = routes[index] if kind == "rows" else routes
        assert out.tokens[index] == expected(model, prompt, own)
    assert out.kv_bytes <= out.kv_bytes_dense
    assert torch.equal(out.layer_skips, 1 - out.routes.float())


def test_layers_that_the_prompt_passed_by() -> None:
    model, prompts = llama(True), [list(range(3, 12)), [5, 6], [70, 8, 33]]
    routes = PrunedRoutes(torch.tensor([0, 1, 0, 0, 1, 1]).bool())
    out = DecodeEngine(model, 32, 2).generate(prompts, NEW, routes, ())
    assert out.tokens == [
        alone(model, prompt, routes, eos_token_id=None).sequences[0, len(prompt) :].tolist() for prompt in prompts
    ]
    assert out.skip_rate.tolist() == [0.5] * 3 and 2 * out.kv_bytes == out.kv_bytes_dense


@settings(max_examples=8, deadline=None)
@given(PROMPTS, st.integers(1, 4), st.integers(0, 3), st.data())
def test_tokens_from_replays(prompts, batch_size, lookahead, data) -> None:
    model = llama(True)
    layer_choice = st.lists(st.booleans(), min_size=6, max_size=6)
    engine = recorded(model, 32, batch_size, lookahead)
    for _ in range(2):  # the second call replays what the first has recorded
        routes = torch.tensor([data.draw(layer_choice) for _ in prompts])
        out = engine.generate(prompts, NEW, routes)
        assert out.tokens == [expected(model, *each) for each in zip(prompts, routes, strict=True)]


@pytest.mark.parametrize("lookahead", [0, 1, 5])
@pytest.mark.parametrize("recording", [False, True])
def test_reading_tokens_late_changes_nothing(lookahead: int, recording: bool) -> None:
    model, eos, times = llama(True), list(range(2, 97, 9)), []
    prompts = [[5 + row, 40 - row, 3] for row in range(7)]
    engine = recorded(model, 32, 3, lookahead) if recording else DecodeEngine(model, 32, 3, lookahead=lookahead)
    out = engine.generate(prompts, 20, None, eos, on_step=lambda _: times.append(1))
    for prompt, tokens in zip(prompts, out.tokens, strict=True):
        assert tokens == alone(model, prompt, None, 20, eos_token_id=eos).sequences[0, 3:].tolist()
    assert len({len(tokens) for tokens in out.tokens}) > 1
    per_token = 2 * 2 * 8 * 4
    kept = ((3 + len(tokens) - 1) * int(route.sum()) for tokens, route in zip(out.tokens, out.routes, strict=True))
    assert out.kv_bytes == sum(kept) * per_token
    one = engine.generate([prompts[0]], 6, None, (), on_step=lambda _: times.append(2))
    assert times.count(2) == len(one.tokens[0]) == 6  # as often as there are tokens


def test_one_row_ahead_reads_steps_in_order() -> None:
    steps: list[str] = []
    engine = DecodeEngine(llama(True), 32, lookahead=2)
    step = engine.step

    class Told(type(step)):  # type: ignore[misc]
        def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
            steps.append("given")
            return super().__call__(tokens)

    step.__class__ = Told
    engine.generate([[5, 6, 7]], 6, eos=(), on_step=lambda _: steps.append("read"))
    assert steps == ["read", "given", "given", "given", "read", "given", "read", "given", "read", "read", "read"]


def test_replays_over_several_windows() -> None:
    model = llama(False, True)
    prompts = [list(range(3, 60)), list(range(20, 90)), [5, 6]]
    routes = torch.rand(3, 6, generator=torch.Generator().manual_seed(0)) > 0.3
    engine = recorded(model, 128, 2)
    for each in (routes, routes.flip(0)):
        out = engine.generate(prompts, 30, each, eos=())
        for prompt, route, tokens in zip(prompts, each, out.tokens, strict=True):
            assert tokens == alone(model, prompt, route, 30, eos_token_id=None).sequences[0, len(prompt) :].tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("different", ["all", "few", "none"])
def test_rows_of_different_routes_lengths_and_ends(batch_size: int, different: str) -> None:
    model, rows = llama(True), 13  # more prompts than places
    generator = torch.Generator().manual_seed(batch_size)
    lengths = torch.randint(1, 12, (rows,), generator=generator).tolist()
    prompts = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]
    choices = torch.rand({"all": rows, "few": 4, "none": 1}[different], 6, generator=generator) > 0.35
    routes = choices[torch.arange(rows) % len(choices)]
    eos = list(range(2, 97, 9))  # so many that rows end at different steps
    out = DecodeEngine(model, 40, batch_size).generate(prompts, 20, routes, eos)
    per_token = 2 * 2 * 8 * 4  # keys and values, KV heads, head dim, bytes of fp32
    kept = 0
    for prompt, route, tokens in zip(prompts, routes, out.tokens, strict=True):
        assert tokens == alone(model, prompt, route, 20, eos_token_id=eos).sequences[0, len(prompt) :].tolist()
        kept += (len(prompt) + len(tokens) - 1) * int(route.sum()) * per_token
    assert len({len(tokens) for tokens in out.tokens}) > 3
    assert out.kv_bytes == kept


@pytest.mark.parametrize("rule", [None, StepRoutes(torch.ones(2, 6, dtype=torch.bool)), EarlyExit(0.3)])
def test_prompts_are_given_as_they_end_each_with_its_own_limit(rule: Any) -> None:
    engine = DecodeEngine(llama(True), 40, 2, patience=0)
    prompts, limits = [[5 + row, 3] for row in range(5)], [9, 1, 4, 2, 30]
    read: dict[int, list[int]] = {place: [] for place in range(5)}
    order = []

    def take(tokens: dict[int, int]) -> None:
        for place, token in tokens.items():
            read[place].append(token)

    whole = engine.generate(prompts, limits, rule, eos=())
    for place, out in engine.as_completed(prompts, limits, rule, (), take):
        order.append(place)
        assert out.tokens == [read[place]] == [whole.tokens[place]] and len(read[place]) == limits[place]
        assert torch.equal(out.layer_skips[0], whole.layer_skips[place])
        assert torch.equal(out.routes[0], whole.routes[place])
    assert order == [1, 2, 3, 0, 4]
    for prompt, limit, tokens in zip(prompts, limits, whole.tokens, strict=True):
        assert tokens == alone(llama(True), prompt, rule, limit, eos_token_id=None).sequences[0, 2:].tolist()


def test_a_caller_may_stop_listening() -> None:
    engine = DecodeEngine(llama(True), 40, 2)
    prompts = [[5 + row, 3] for row in range(5)]
    before = engine.generate(prompts, 6, eos=()).tokens
    place, _ = next(engine.as_completed(prompts, [9, 2, 9, 9, 9], eos=()))
    assert place == 1
    assert engine.generate(prompts, 6, eos=()).tokens == before
    with pytest.raises(ValueError, match="at least one token"):
        engine.as_completed([[]], 4)  # before anything is asked for


def test_a_layer_holds_the_rows_that_run_it_and_no_others() -> None:
    step = DecodeEngine(llama(True), 16, 3).step
    kv = {layer: torch.full((2, 2, 5, 8), float(layer)) for layer in range(6)}
    step.join({layer: kv[layer] for layer in (0, 2)}, 5)
    step.join({layer: kv[layer] + 10 for layer in (0, 3)}, 5)
    step.join({layer: kv[layer] + 20 for layer in (2, 3)}, 5)
    held = [[] if each is None else each[:, 0, 0, 0].tolist() for each in step.kv]
    assert held == [[0, 10, 0], [], [2, 22, 0], [13, 23, 0], [], []]
    step.leave(0)  # the last row is number 0 now, and its keys and values close the gap
    assert step._slots == [[1], [], [0], [1, 0], [], []]
    assert [step.kv[layer][0, 0, 0, 0].item() for layer in (0, 2, 3)] == [10, 22, 13]
    assert step.lengths == [5, 5]


def test_more_rows_than_tokens() -> None:
    prompts = [[5 + row] for row in range(8)]
    routes = torch.ones(6, dtype=torch.bool)
    out = DecodeEngine(llama(True), 4, 8).generate(prompts, 3, routes)
    assert out.tokens == [expected(llama(True), prompt, routes, 3) for prompt in prompts]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "phi3"])
def test_other_tiny_models(architecture: str) -> None:
    model = routed_model(architecture)
    if architecture == "qwen3":
        for layer in model.lm.model.layers:  # all ones in a fresh model
            torch.nn.init.uniform_(layer.self_attn.q_norm.weight, 0.5, 3)
            torch.nn.init.uniform_(layer.self_attn.k_norm.weight, 0.5, 3)
    prompts = [[5, 6, 7], [9], list(range(30, 41))]
    before = [expected(model, prompt, None) for prompt in prompts]
    for engine in (DecodeEngine(model, 32, 3), recorded(model, 32, 3), DecodeEngine(model, 32)):
        assert engine.generate(prompts, NEW).tokens == before
    same_as_alone(engine.generate(prompts, NEW, EarlyExit(0.3)), model, prompts, EarlyExit(0.3))
    assert [expected(model, prompt, None) for prompt in prompts] == before  # sharing weights changes nothing


@settings(max_examples=10, deadline=None)
@given(PROMPTS, st.integers(1, 4), st.lists(st.integers(1, 6), min_size=6, max_size=6))
def test_schedules(prompts, batch_size, leave) -> None:
    # Layer i leaves after step leave[i]: nested by construction.
    schedule = StepRoutes(torch.tensor([[step < last for last in leave] for step in range(7)]))
    model = llama(True)
    for engine in (DecodeEngine(model, 32, batch_size), recorded(model, 32, batch_size, 2)):
        same_as_alone(engine.generate(prompts, NEW, schedule), model, prompts, schedule)


def same_as_alone(out: EngineOutput, model: RouterAugmentedLM, prompts: list[list[int]], rule: object) -> None:
    for prompt, tokens, skips in zip(prompts, out.tokens, out.layer_skips, strict=True):
        one = alone(model, prompt, rule)
        assert tokens == one.sequences[0, len(prompt) :].tolist()
        steps = torch.tensor([len(tokens) - 1])
        assert torch.equal(skips, one.past_key_values.layer_skips(steps)[0])
    assert torch.equal(out.skip_rate, out.layer_skips.mean(1))


@settings(max_examples=15, deadline=None)
@given(PROMPTS, st.integers(1, 4), st.data())
def test_early_exit(prompts, batch_size, data) -> None:
    confidence = data.draw(st.sampled_from(["softmax", "gap", "cosine"]))
    # Nobody leaves above 1; everybody leaves at or below -1.
    threshold = data.draw(st.floats(0.1, 0.7) | st.sampled_from([-1.0, 1.1]))
    decay = data.draw(st.sampled_from([None, 4.0]))
    rule = EarlyExit(threshold, confidence, data.draw(st.integers(1, 6)), decay, None if decay is None else NEW)
    model = llama(True)
    out = DecodeEngine(model, 32, batch_size).generate(prompts, NEW, rule)
    same_as_alone(out, model, prompts, rule)
    assert out.routes.all() and out.kv_bytes == out.kv_bytes_dense


def test_early_exit_of_rows_at_different_layers_in_a_biased_model() -> None:
    model, rule = llama(False, True), EarlyExit(0.3)
    prompts = [[5 + row, 40 - row, 3] for row in range(6)]
    out = DecodeEngine(model, 32, 6).generate(prompts, NEW, rule)
    same_as_alone(out, model, prompts, rule)
    assert len(set(out.skip_rate.tolist())) > 2 and 0 < out.skip_rate.mean() < 1


@pytest.mark.parametrize("given", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.9}])
def test_one_row_is_sampled_as_generate_samples(given: dict[str, Any]) -> None:
    model, prompt, route = llama(True), [5, 6, 7], torch.tensor([True, True, False, True, False, True])
    engine = DecodeEngine(model, 32)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, **given}
    found = []
    for seed in range(4):
        out = engine.generate([prompt], NEW, route, sampling=Sampling(**given, seed=seed))
        torch.manual_seed(seed)
        assert out.tokens[0] == alone(model, prompt, route, **options).sequences[0, 3:].tolist()
        found.append(out.tokens[0])
    assert len(set(map(tuple, found))) > 1


def test_rows_are_sampled_from_their_distribution() -> None:
    model, rows = llama(True), 400
    out = DecodeEngine(model, 8, 100).generate([[5, 6, 7]] * rows, 1, sampling=Sampling(top_k=3, seed=1))
    with torch.no_grad():
        top = model.lm(torch.tensor([[5, 6, 7]])).logits[0, -1].topk(3)
    drawn = torch.tensor(out.tokens)
    shares = (drawn == top.indices).float().mean(0)
    assert shares.sum() == 1
    torch.testing.assert_close(shares, top.values.softmax(-1), atol=0.1, rtol=0)  # 4 standard deviations


@pytest.mark.parametrize("given", [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}])
def test_sampling_out_of_range(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Sampling: {next(iter(given))}="):
        Sampling(**given)


def test_a_schedule_keeps_only_the_layers_it_still_runs() -> None:
    schedule = StepRoutes(torch.tensor([[True] * 6, [True] * 6, [True, False, True, True, False, True]]))
    out = DecodeEngine(llama(True), 16, 2).generate([[5, 6, 7], [8]], 4, schedule, eos=())
    assert torch.equal(out.routes, schedule.schedule[:1].expand(2, -1))
    torch.testing.assert_close(out.skip_rate, torch.full((2,), (0 + 0 + 2 / 6) / 3))
    per_token = 2 * 2 * 8 * 4
    assert (out.kv_bytes, out.kv_bytes_dense) == ((6 + 4) * 4 * per_token, (6 + 4) * 6 * per_token)


def test_skipped_layers_have_no_keys_and_values() -> None:
    engine = DecodeEngine(llama(True), 16)
    routes = torch.tensor([True, False, True, True, False, True])
    out = engine.generate([[5, 6, 7]], 4, routes, eos=())
    assert [kv is None for kv in engine.step.kv] == [False, True, False, False, True, False]
    per_token = 2 * 2 * 8 * 4  # keys and values, KV heads, head dim, bytes of fp32
    assert (out.kv_bytes, out.kv_bytes_dense) == (4 * 6 * per_token, 6 * 6 * per_token)
    assert engine.step.allocated_bytes() == 4 * 16 * per_token


@pytest.mark.parametrize(
    ("prompts", "new", "routes", "message"),
    [
        ([], 4, None, "at least one token"),
        ([[5], []], 4, None, "at least one token"),
        ([[5]], 0, None, "max_new_tokens=0"),
        ([[5]] * 2, 40, None, "raise max_length"),
        ([[5]] * 2, [3, 40], None, "max_new_tokens=40 takes 41 tokens; raise max_length"),
        ([[5]] * 2, [3], None, "max_new_tokens has 1 values for 2 prompts"),
        ([[5]] * 2, [3, 0], None, "max_new_tokens=0"),
        ([[5]], 4, torch.ones(5, dtype=torch.bool), "boolean tensor"),
        ([[5]], 4, torch.ones(2, 6, dtype=torch.bool), "2 rows for 1 prompts"),
        ([[5]], 4, EarlyExit(0.5, min_layers=7), "min_layers=7"),
    ],
)
def test_bad_input(prompts, new, routes, message) -> None:
    with pytest.raises(ValueError, match=message):
        DecodeEngine(llama(True), 16).generate(prompts, new, routes)


def test_autocast_is_refused() -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="instead of autocast"):
        DecodeEngine(llama(True), 16).generate([[5]], 4)


def test_unsupported_models() -> None:
    with pytest.raises(ValueError, match="GPT2LMHeadModel.*RouterAugmentedLM.generate"):
        DecodeEngine(RouterAugmentedLM(tiny_model("gpt2")), 16)
    with pytest.raises(ValueError, match="sliding window"):
        DecodeEngine(RouterAugmentedLM(tiny_model("mistral")), 16)
    lora = RouterAugmentedLM(tiny_model("llama"))
    lora.add_lora(LoraSettings())
    with pytest.raises(ValueError, match="merge_and_unload"):
        DecodeEngine(lora, 16)
    with pytest.raises(ValueError, match="max_batch_size=0"):
        DecodeEngine(llama(True), 16, 0)
    with pytest.raises(ValueError, match="mode='fast' is unknown; choose one of auto, eager, graphs"):
        DecodeEngine(llama(True), 16, mode="fast")
    with pytest.raises(ValueError, match="lookahead=-1"):
        DecodeEngine(llama(True), 16, lookahead=-1)
    partial = SimpleNamespace(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5})
    with pytest.raises(ValueError, match=r"partial_rotary_factor=0\.5"):
        LlamaStep(type("Phi3ForCausalLM", (), {"config": partial})(), 1, 8)
    changing = SimpleNamespace(rope_parameters={"rope_type": "dynamic"})
    with pytest.raises(ValueError, match="rope_type='dynamic'"):
        LlamaStep(type("LlamaForCausalLM", (), {"config": changing})(), 1, 8)


def test_saved_model_is_whole(tmp_path: Path) -> None:
    model = routed_model()
    before = {name: weight.clone() for name, weight in model.lm.state_dict().items()}
    DecodeEngine(model, 16)
    model.save_pretrained(tmp_path, save_base=True)
    again = RouterAugmentedLM.from_pretrained(tmp_path).lm.state_dict()
    assert set(again) == set(before)
    assert all(torch.equal(again[name], weight) for name, weight in before.items())


def test_weights_in_the_order_that_products_are_fast_in() -> None:
    model = routed_model()
    layer = DecodeEngine(model, 16).step.layers[0]
    for maps in (layer.qkv, layer.gate_up, layer.down):
        assert maps.weight.stride() == (1, len(maps.weight))
        storages = {each.weight.untyped_storage().data_ptr() for each in maps.linears}
        assert storages == {maps.weight.untyped_storage().data_ptr()}  # nothing is stored twice
    assert all(weight.is_contiguous() for weight in model.lm.state_dict().values())
    halved = DecodeEngine(model.to(torch.bfloat16), 16).step.layers[0]
    assert halved.qkv.weight.is_contiguous() and halved.down.weight.is_contiguous()
    assert torch.equal(halved.qkv.weight, torch.cat([each.weight for each in halved.qkv.linears]))


def test_engines_of_one_model_share_its_weights() -> None:
    model = routed_model()
    first, second = DecodeEngine(model, 32), DecodeEngine(model, 32)
    for one, other in zip(first.step.layers, second.step.layers, strict=True):
        for mine, theirs in ((one.qkv.weight, other.qkv.weight), (one.gate_up.weight, other.gate_up.weight)):
            assert mine.data_ptr() == theirs.data_ptr() and torch.equal(mine, theirs)
    with torch.no_grad():
        for parameter in model.lm.parameters():
            parameter.mul_(1.1)
    tokens = [expected(model, [5, 6, 7], None)]
    assert first.generate([[5, 6, 7]], NEW).tokens == second.generate([[5, 6, 7]], NEW).tokens == tokens


def test_converted_model_needs_a_new_engine() -> None:
    model = routed_model()
    engine = DecodeEngine(model, 32)
    model.double()
    with pytest.raises(ValueError, match="make a new DecodeEngine"):
        engine.generate([[5, 6, 7]], NEW)
    assert DecodeEngine(model, 32).generate([[5, 6, 7]], NEW).tokens == [expected(model, [5, 6, 7], None)]


@cache
def on_gpu(architecture: str = "llama") -> RouterAugmentedLM:
    torch.manual_seed(0)
    model = deepcopy(llama(True)) if architecture == "llama" else routed_model(architecture)
    return model.to("cuda")


def gpu_tokens(model: RouterAugmentedLM, prompt: list[int], rule: object, new: int) -> list[int]:
    routes: Any = rule.cuda() if isinstance(rule, torch.Tensor) else rule
    ids = torch.tensor([prompt], device="cuda")
    out: Any = model.generate(ids, routes=routes, max_new_tokens=new, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


@cache
def gpu_cases(architecture: str) -> tuple[list[list[int]], list[tuple[Any, list[list[int]]]]]:
    """Prompts, and rules with the tokens that `generate` gives under them, once for all engines."""
    model, generator = on_gpu(architecture), torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in (57, 3, 70, 1, 30, 61, 5)]
    choices = torch.rand(4, 6, generator=generator) > 0.3
    routes = choices[torch.arange(len(prompts)) % 4]
    cases: list[tuple[Any, list[list[int]]]] = []
    for rule in (routes, routes.flip(0), None):
        each = [None] * len(prompts) if rule is None else rule
        cases.append((rule, [gpu_tokens(model, *pair, 12) for pair in zip(prompts, each, strict=True)]))
    return prompts, cases


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "graphs"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3"])
def test_gpu_tokens_of_generate(mode: str, architecture: str) -> None:
    """Mixed routes, lengths and ends over several windows, replayed and captured in turn."""
    prompts, cases = gpu_cases(architecture)
    for batch_size in (1, 4):
        engine = DecodeEngine(on_gpu(architecture), 88, batch_size, mode=mode)
        for rule, expected in cases:
            assert engine.generate(prompts, 12, rule).tokens == expected


@pytest.mark.gpu
def test_gpu_captures_each_run_of_layers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, engine = on_gpu(), DecodeEngine(on_gpu(), 64)
    assert engine.mode == "graphs" and engine.lookahead == 1 and isinstance(engine.step, GraphStep)
    engine.generate([[5, 6, 7]], NEW, torch.ones(6, dtype=torch.bool))
    assert len(engine.step._graphs) == 1 + 3  # one run, begin and end, and the prompt
    known = {tuple(range(6))}
    for seed in (*range(6), *range(6)):
        route = torch.rand(6, generator=torch.Generator().manual_seed(seed)) > 0.4
        assert engine.generate([[5, 6, 7]], NEW, route).tokens == [gpu_tokens(model, [5, 6, 7], route, NEW)]
        known |= set(map(tuple, runs_of(route.nonzero().flatten().tolist())))
        assert len(engine.step._graphs) == len(known) + 3
    monkeypatch.setattr("firstlab.engine.graph_step.OFTEN", 2)
    for _ in range(2):
        assert engine.generate([[5, 6, 7]], NEW, route).tokens == [gpu_tokens(model, [5, 6, 7], route, NEW)]
        assert len(engine.step._graphs) == len(known) + 4  # and the whole of the last route


@pytest.mark.gpu
def test_gpu_schedules_early_exit_and_sampling() -> None:
    model, prompts = on_gpu(), [[5, 6, 7], [8], list(range(10, 30))]
    schedule = StepRoutes(torch.tensor([[step < last for last in (7, 2, 7, 4, 1, 7)] for step in range(7)]))
    engine = DecodeEngine(model, 64, 3)
    for rule in (schedule, EarlyExit(0.3), schedule):
        assert engine.generate(prompts, NEW, rule).tokens == [gpu_tokens(model, each, rule, NEW) for each in prompts]
    drawn = [engine.generate(prompts, NEW, sampling=Sampling(top_k=20, seed=seed)).tokens for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_half_precision(kernels: bool, dtype: torch.dtype) -> None:
    """Logits along the same tokens, hardly further from float64 than plain torch in the same type."""
    lm = deepcopy(on_gpu().lm).to(dtype)
    exact = LlamaStep(deepcopy(lm).double(), 4, 96)
    eager, other = LlamaStep(lm, 4, 96), GraphStep(lm, 4, 96, Graphs(torch.device("cuda")), kernels)
    routes = [[0, 1, 2, 3, 4, 5], [0, 2, 5], [0, 1, 2, 3, 4, 5]]
    generator = torch.Generator("cuda").manual_seed(0)
    kv = [torch.randn(2, 2, 62, 8, device="cuda", dtype=dtype, generator=generator) for _ in routes]
    for route, each in zip(routes, kv, strict=True):
        for step in (exact, eager, other):
            step.join(dict.fromkeys(route, each), 62)
    logits: list[list[torch.Tensor]] = [[], [], []]
    for token in range(8):  # over the edge of a window
        tokens = torch.tensor([10 + token, 20, 30], device="cuda")
        for step, kept in zip((exact, eager, other), logits, strict=True):
            kept.append(step(tokens).double())
    # All steps together: in a single one plain torch may be right by chance.
    assert_hardly_further(*map(torch.stack, logits))


def assert_hardly_further(wanted: torch.Tensor, plain: torch.Tensor, found: torch.Tensor) -> None:
    assert (found - wanted).norm() < 1.5 * (plain - wanted).norm() < 0.2 * wanted.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_chunks", [False, True])
def test_gpu_half_precision_of_prompts(dtype: torch.dtype, in_chunks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above for what the engine's own prefill reads."""
    if in_chunks:
        monkeypatch.setattr("firstlab.engine.prefill.REPLAYED", 0)
        monkeypatch.setattr("firstlab.engine.prefill.MOST", 48)
    lm = deepcopy(on_gpu().lm).to(dtype)
    model, exact = RouterAugmentedLM(lm), RouterAugmentedLM(deepcopy(lm).double())
    step, rule = GraphStep(lm, 3, 128, Graphs(torch.device("cuda"))), FixedRoutes(torch.ones(6, dtype=torch.bool))
    for seed in range(2):  # captured, replayed
        generator = torch.Generator().manual_seed(seed)
        prompts = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in (9, 110, 30)]
        found = step.read(prompts, model.routers, rule)
        wanted, plain = (read_through_model(each, prompts, rule) for each in (exact, model))
        assert_hardly_further(*(each.logits.double() for each in (wanted, plain, found)))
        assert_hardly_further(*(each.keys_values(1, 5).double() for each in (wanted, plain, found)))


def test_what_happens_to_the_model_after_its_engine_was_made() -> None:
    prompts = [[5, 6, 7, 8], [9, 10, 11]]
    model = deepcopy(llama(False, True))
    engine, other = (DecodeEngine(model, 40, 2) for _ in range(2))
    state = {
        name: torch.randn_like(value) * 0.3 if "bias" in name else value for name, value in model.state_dict().items()
    }
    model.load_state_dict(state)  # in place: the engines see it
    for each in (engine, other):
        assert each.generate(prompts, NEW, eos=()).tokens == [expected(model, prompt, None) for prompt in prompts]
    model.lm.generation_config.repetition_penalty = 1.5
    with pytest.raises(ValueError, match=r"repetition_penalty=1.5.*lm.generation_config.repetition_penalty = None"):
        engine.generate(prompts, NEW)
    model.lm.generation_config.repetition_penalty = None
    model.add_lora(LoraSettings(dropout=0.0))
    with pytest.raises(ValueError, match="got LoRA after its engine was made"):
        engine.generate(prompts, NEW)


@pytest.mark.parametrize("mode", ["eager", "graphs"])
def test_what_an_inference_mode_leaves_can_be_used_after_it(mode: str) -> None:
    model, prompts, routes = deepcopy(llama(True)), [[5, 6, 7], [8, 9]], torch.tensor([True, False, True] * 2)
    with torch.inference_mode():
        engine = DecodeEngine(model, 40, 2, mode=mode)
        inside = engine.generate(prompts, NEW, routes, ()).tokens
    assert engine.generate(prompts, NEW, ~routes, ()).tokens == [
        alone(model, prompt, ~routes, eos_token_id=None).sequences[0, len(prompt) :].tolist() for prompt in prompts
    ]
    assert engine.generate(prompts, NEW, routes, ()).tokens == inside
    ids = torch.tensor(prompts[:1])
    model.requires_grad_(True)(ids, labels=ids).loss.backward()


def test_one_call_at_a_time() -> None:
    engine, prompts = DecodeEngine(llama(False), 40, 1), [[5, 6, 7], [8, 9], [3, 4]]
    former = engine.as_completed(prompts, NEW, eos=())
    next(former)
    tokens = engine.generate(prompts, NEW, eos=()).tokens
    assert tokens == [out.tokens[0] for _, out in engine.as_completed(prompts, NEW, eos=())]
    with pytest.raises(ValueError, match="another call of this engine began"):
        next(former)


@pytest.mark.parametrize("sampled", [False, True])
def test_pinned_generation_is_what_the_engine_does(sampled: bool) -> None:
    model = routed_model()
    ids, _ = padded_prompts((9,))
    drawn = {"do_sample": True, "temperature": 0.7, "top_k": 1} if sampled else {"do_sample": False}
    sampling = Sampling(temperature=0.7, top_k=1) if sampled else None
    expected = model.generate(ids, max_new_tokens=8, **drawn)[0, 9:].tolist()
    own = model.lm.generation_config
    own.update(repetition_penalty=1.9, top_p=0.1, min_p=0.5, no_repeat_ngram_size=1, num_beams=4)
    assert model.generate(ids, max_new_tokens=8, **drawn)[0, 9:].tolist() != expected
    with pytest.raises(ValueError, match=r"repetition_penalty=1\.9"):
        DecodeEngine(model, 32).generate([ids[0].tolist()], 8, sampling=sampling)
    with pinned_generation(model.lm):
        assert model.generate(ids, max_new_tokens=8, **drawn)[0, 9:].tolist() == expected
        assert DecodeEngine(model, 32).generate([ids[0].tolist()], 8, sampling=sampling).tokens == [expected]
    assert model.lm.generation_config is own
    own.update(repetition_penalty=1.0, no_repeat_ngram_size=0)
    if sampled:
        with pytest.raises(ValueError, match=r"min_p=0\.5"):
            DecodeEngine(model, 32).generate([ids[0].tolist()], 8, sampling=sampling)
    else:  # min_p is for drawn tokens
        assert DecodeEngine(model, 32).generate([ids[0].tolist()], 8).tokens == [expected]
