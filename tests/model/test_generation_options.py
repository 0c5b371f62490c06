"""Routed decoding through transformers' `generate`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

from firstlab.model.cache import RoutedCache
from firstlab.model.generation_options import stop_tokens
from support.models import ARCHITECTURES, LAYERS, pair, prompts, random_routes, routed_model, with_logits
from support.reference import prompt_rho, slow_generate, step_logits

every_architecture = pytest.mark.parametrize("architecture", list(ARCHITECTURES))
GREEDY = {"do_sample": False, "max_new_tokens": 7}
ALL_TRUE = torch.ones(LAYERS, dtype=torch.bool)
ALL_FALSE = torch.zeros(LAYERS, dtype=torch.bool)


@every_architecture
@pytest.mark.parametrize(
    "options",
    [
        GREEDY,
        {"do_sample": True, "temperature": 0.8, "top_k": 10, "max_new_tokens": 5},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 5},
    ],
    ids=["greedy", "sampling", "beams"],
)
def test_all_true_routes_are_the_base_model(architecture, options):
    base, model = pair(architecture)
    ids, mask = prompts()
    torch.manual_seed(11)
    expected = base.generate(ids, attention_mask=mask, **options)
    torch.manual_seed(11)
    assert torch.equal(model.generate(ids, attention_mask=mask, routes=ALL_TRUE, **options), expected)


@every_architecture
def test_forced_routes_per_row_equal_the_slow_reference(architecture):
    base, model = pair(architecture)
    ids, mask = prompts()
    routes = random_routes(3)
    sequences, logits, cache = with_logits(model, ids, mask, routes=routes)
    assert torch.equal(cache.routes, routes)
    assert cache.rho is None
    assert torch.equal(sequences, slow_generate(base, ids, mask, routes, 7))
    torch.testing.assert_close(logits, step_logits(base, sequences, mask, routes), atol=1e-4, rtol=0)
    dense = step_logits(base, sequences, mask, ALL_TRUE.expand(3, -1))
    torch.testing.assert_close(logits[:, 0], dense[:, 0], atol=1e-4, rtol=0)
    assert (logits[:, 1:] - dense[:, 1:]).abs().max() > 1e-2


@every_architecture
@pytest.mark.parametrize("routes", [ALL_FALSE, torch.arange(LAYERS) > 0], ids=["none", "all but the first"])
def test_no_layer_and_all_but_the_first(architecture, routes):
    base, model = pair(architecture)
    ids, mask = prompts((4, 9))
    sequences, logits, cache = with_logits(model, ids, mask, routes=routes, eos_token_id=None)
    assert sequences.shape == (2, 16)
    assert cache.get_seq_length() == 15
    torch.testing.assert_close(logits, step_logits(base, sequences, mask, routes.expand(2, -1)), atol=1e-4, rtol=0)


@every_architecture
def test_routers_decide_as_the_reference_says(architecture):
    base, model = pair(architecture)
    ids, mask = prompts()
    expected = prompt_rho(base, model.routers.weight, ids, mask)
    routes = model.route(ids, mask)
    assert 0 < routes.float().mean() < 1
    sequences, logits, cache = with_logits(model, ids, mask)
    torch.testing.assert_close(cache.rho, expected, atol=1e-5, rtol=0)
    assert torch.equal(cache.routes, expected >= 0.5)
    assert torch.equal(cache.routes, routes)
    torch.testing.assert_close(model.prompt_rho(ids, mask), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, step_logits(base, sequences, mask, routes), atol=1e-4, rtol=0)


@every_architecture
def test_padding_side_and_neighbours_change_nothing(architecture):
    _, model = pair(architecture)
    lengths = (5, 9, 12)
    left, left_mask = prompts(lengths, "left")
    right, right_mask = prompts(lengths, "right")
    rho = model.prompt_rho(left, left_mask)
    torch.testing.assert_close(model.prompt_rho(right, right_mask), rho, atol=1e-5, rtol=0)
    together, _, cache = with_logits(model, left, left_mask)
    from_right, _, right_cache = with_logits(model, right, right_mask)
    assert torch.equal(from_right, together)
    torch.testing.assert_close(right_cache.rho, cache.rho, atol=1e-5, rtol=0)
    for row, length in [(0, 5), (2, 12)]:
        alone, _, alone_cache = with_logits(model, left[row : row + 1, -length:], None)
        torch.testing.assert_close(alone_cache.rho[0], rho[row], atol=1e-5, rtol=0)
        new = alone[0, length:]
        assert torch.equal(new, together[row, 12 : 12 + len(new)])
        assert (together[row, 12 + len(new) :] == 0).all()


@pytest.mark.parametrize(
    ("architecture", "chunk"), [*((a, 3) for a in ARCHITECTURES), ("llama", 1), ("gemma2", 1), ("gpt2", 20)]
)
def test_chunked_prefill_changes_nothing(architecture, chunk):
    _, model = pair(architecture)
    ids, mask = prompts()
    whole, whole_logits, cache = with_logits(model, ids, mask)
    chunked, logits, chunked_cache = with_logits(model, ids, mask, prefill_chunk_size=chunk)
    torch.testing.assert_close(chunked_cache.rho, cache.rho, atol=1e-5, rtol=0)
    assert torch.equal(chunked_cache.routes, cache.routes)
    assert torch.equal(chunked, whole)
    torch.testing.assert_close(logits, whole_logits, atol=1e-4, rtol=0)


@every_architecture
def test_a_second_turn_keeps_the_routes(architecture):
    base, model = pair(architecture)
    ids, mask = prompts((6, 10))
    first = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, eos_token_id=None, **GREEDY)
    cache = first.past_key_values
    routes, rho = cache.routes.clone(), cache.rho.clone()
    question = torch.randint(3, 97, (2, 4), generator=torch.Generator().manual_seed(0))
    ids2 = torch.cat([first.sequences, question], dim=1)
    mask2 = torch.cat([mask, mask.new_ones(2, ids2.shape[1] - mask.shape[1])], dim=1)
    sequences, logits, same = with_logits(model, ids2, mask2, past_key_values=cache, eos_token_id=None)
    assert same is cache
    assert torch.equal(cache.routes, routes)
    assert torch.equal(cache.rho, rho)
    assert torch.equal(sequences[:, : ids2.shape[1]], ids2)
    expected = step_logits(base, sequences, mask, routes)[:, -7:]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert torch.equal(expected.argmax(-1), sequences[:, -7:])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mistral"])
def test_a_second_turn_in_chunks(architecture):
    _, model = pair(architecture)
    ids, mask = prompts((6, 10))
    caches = []
    for _ in range(2):
        first = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, eos_token_id=None, **GREEDY)
        caches.append(first.past_key_values)
    ids2 = torch.cat([first.sequences, first.sequences[:, :5]], dim=1)
    mask2 = torch.cat([mask, mask.new_ones(2, 12)], dim=1)
    options = {"attention_mask": mask2, "eos_token_id": None, **GREEDY}
    whole = model.generate(ids2, past_key_values=caches[0], **options)
    assert torch.equal(model.generate(ids2, past_key_values=caches[1], prefill_chunk_size=2, **options), whole)


@every_architecture
def test_interleaved_generations_never_mix(architecture):
    base, model = pair(architecture)
    lengths = (6, 11, 5, 9, 12, 8)
    rows, mask = prompts(lengths, seed=1)
    routes = model.route(rows, mask)
    other = next(i for i in range(1, 6) if not torch.equal(routes[0], routes[i]))
    runs = []
    for row in (0, other):
        ids = rows[row : row + 1, -lengths[row] :]
        runs.append({"ids": ids, "length": lengths[row], "cache": model.new_cache(), "next": ids, "logits": []})
    for _ in range(6):
        for run in runs:
            with torch.no_grad():
                out = model(run["next"], past_key_values=run["cache"])
            run["logits"].append(out.logits[:, -1])
            run["next"] = out.logits[:, -1:].argmax(-1)
            run["ids"] = torch.cat([run["ids"], run["next"]], dim=1)
    for run in runs:
        prompt = run["ids"][:, : run["length"]]
        assert torch.equal(run["cache"].routes, model.route(prompt))
        expected = step_logits(base, run["ids"], torch.ones_like(prompt), run["cache"].routes)
        torch.testing.assert_close(torch.stack(run["logits"], 1), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "gemma3_text", "bloom"])
def test_beams_carry_routes(architecture):
    base, model = pair(architecture)
    ids, mask = prompts()
    routes = model.route(ids, mask)
    options = {"num_beams": 4, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 6}
    out = model.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, output_scores=True, eos_token_id=None, **options
    )
    assert torch.equal(out.past_key_values.routes, routes.repeat_interleave(4, dim=0))
    # The score of a beam is the mean log-probability of its tokens; recompute it with the slow reference.
    logits = step_logits(base, out.sequences, mask.repeat_interleave(2, dim=0), routes.repeat_interleave(2, dim=0))
    new = out.sequences[:, mask.shape[1] :]
    expected = logits.log_softmax(-1).gather(-1, new.unsqueeze(-1)).squeeze(-1).mean(1)
    torch.testing.assert_close(out.sequences_scores, expected, atol=1e-4, rtol=1e-4)


def test_several_samples_per_prompt_carry_routes():
    base, model = pair("llama")
    ids, mask = prompts()
    torch.manual_seed(0)
    sequences, logits, cache = with_logits(
        model, ids, mask, do_sample=True, num_return_sequences=3, temperature=2.0, eos_token_id=None
    )
    routes = model.route(ids, mask).repeat_interleave(3, dim=0)
    assert torch.equal(cache.routes, routes)
    assert len({tuple(row.tolist()) for row in sequences}) > 3
    torch.testing.assert_close(
        logits, step_logits(base, sequences, mask.repeat_interleave(3, dim=0), routes), atol=1e-4, rtol=0
    )


def test_forced_routes_go_with_every_sample_of_their_prompt():
    _, model = pair("llama")
    ids, mask = prompts()
    routes = random_routes(3)
    options = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 2}
    _, _, cache = with_logits(model, ids, mask, routes=routes, **options)
    assert torch.equal(cache.routes, routes.repeat_interleave(2, dim=0))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma"])
def test_inputs_embeds_equal_input_ids(architecture):
    _, model = pair(architecture)
    for side in ("left", "right"):
        ids, mask = prompts(side=side)
        embeds = model.lm.get_input_embeddings()(ids)
        sequences, _, cache = with_logits(model, ids, mask)
        out = model.generate(inputs_embeds=embeds, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
        torch.testing.assert_close(out.past_key_values.rho, cache.rho, atol=1e-5, rtol=0)
        assert torch.equal(out.sequences, sequences[:, mask.shape[1] :])


def test_embeds_cannot_be_cut_into_chunks():
    _, model = pair("llama")
    embeds = model.lm.get_input_embeddings()(prompts((4,))[0])
    with pytest.raises(ValueError, match="prefill_chunk_size=2 cannot be used with inputs_embeds"):
        model.generate(inputs_embeds=embeds, prefill_chunk_size=2)


def test_input_ids_beside_embeds_are_only_a_prefix_of_the_output():
    _, model = pair("llama")
    ids, mask = prompts()
    embeds = model.lm.get_input_embeddings()(ids)
    expected = model.generate(ids, attention_mask=mask, **GREEDY)[:, ids.shape[1] :]
    right, right_mask = prompts(side="right")
    right_embeds = model.lm.get_input_embeddings()(right)
    for given, given_mask in ((embeds, mask), (right_embeds, right_mask)):
        out = model.generate(ids[:, -2:], inputs_embeds=given, attention_mask=given_mask, **GREEDY)
        assert torch.equal(out[:, :2], ids[:, -2:])
        assert torch.equal(out[:, 2:], expected)


class Recorder:
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.extend(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_streamer():
    _, model = pair("llama")
    ids, _ = prompts((7,))
    streamer = Recorder()
    out = model.generate(ids, streamer=streamer, **GREEDY)
    assert streamer.ended
    assert streamer.tokens == out[0].tolist()


class StopAfterThree(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 15)


class Ban(LogitsProcessor):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        scores[:, self.token] = -float("inf")
        return scores


def test_stopping_criteria_and_logits_processors():
    _, model = pair("llama")
    ids, mask = prompts()
    plain = model.generate(ids, attention_mask=mask, **GREEDY)
    for criterion in (StopAfterThree(), MaxLengthCriteria(15)):
        stopped = model.generate(
            ids, attention_mask=mask, stopping_criteria=StoppingCriteriaList([criterion]), **GREEDY
        )
        assert torch.equal(stopped, plain[:, :15])
    token = plain[0, 12].item()
    banned = model.generate(ids, attention_mask=mask, logits_processor=LogitsProcessorList([Ban(token)]), **GREEDY)
    assert token not in banned[:, 12:]


def test_generation_config_object_equals_keywords():
    _, model = pair("llama")
    ids, mask = prompts()
    config = GenerationConfig(max_new_tokens=6, do_sample=False, repetition_penalty=1.3, no_repeat_ngram_size=2)
    expected = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, repetition_penalty=1.3, no_repeat_ngram_size=2
    )
    assert torch.equal(model.generate(ids, attention_mask=mask, generation_config=config), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"min_new_tokens": 7},
        {"bad_words_ids": [[5], [6, 7]]},
        {"suppress_tokens": [10, 11]},
        {"exponential_decay_length_penalty": (2, 1.5)},
        {"max_new_tokens": None, "max_length": 20},
        {"do_sample": True, "top_p": 0.7, "min_p": 0.05},
        {"do_sample": True, "typical_p": 0.8},
        {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
        {"num_beams": 3, "do_sample": True},
        {"watermarking_config": {"greenlist_ratio": 0.3, "bias": 3.0}},
        {"prefix_allowed_tokens_fn": lambda batch, ids: list(range(3, 40))},
        {"use_cache": True, "num_beam_groups": 1, "penalty_alpha": None, "guidance_scale": 1.0},
        {"disable_compile": True, "cache_implementation": None},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_options_act_as_on_the_base_model(options):
    base, model = pair("llama")
    ids, mask = prompts()
    options = {**GREEDY, **options}
    torch.manual_seed(5)
    expected = base.generate(ids, attention_mask=mask, **options)
    torch.manual_seed(5)
    assert torch.equal(model.generate(ids, attention_mask=mask, routes=ALL_TRUE, **options), expected)


def test_output_scores_and_hidden_states_of_all_layers():
    base, model = pair("llama")
    ids, mask = prompts()
    options = {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True, **GREEDY}
    expected = base.generate(ids, attention_mask=mask, **options)
    out = model.generate(ids, attention_mask=mask, routes=ALL_TRUE, **options)
    for ours, theirs in zip(out.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs)
    skipping = model.generate(ids, attention_mask=mask, routes=ALL_FALSE, **options)
    for step in skipping.hidden_states:
        assert len(step) == LAYERS + 1
    last = skipping.hidden_states[-1]
    assert torch.equal(last[0], last[LAYERS - 1])


UNSUPPORTED = {
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 2,
    "speculation_type": "dflash",
    "use_mtp": True,
    "is_assistant": True,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "num_beam_groups": 2,
    "constraints": [object()],
    "force_words_ids": [[5]],
    "token_healing": True,
    "guidance_scale": 2.0,
    "cache_config": {"backend": "quanto"},
    "use_cache": False,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.parametrize("where", ["keyword", "generation_config", "model"])
def test_unsupported_options_are_named(name, where):
    model = routed_model()
    ids, _ = prompts((4,))
    options = {}
    if where == "keyword":
        options = {name: UNSUPPORTED[name]}
    elif where == "generation_config":
        options = {"generation_config": GenerationConfig()}
        setattr(options["generation_config"], name, UNSUPPORTED[name])
    else:
        if name == "use_cache":
            return  # see `test_a_model_whose_own_config_turns_the_cache_off`
        setattr(model.lm.generation_config, name, UNSUPPORTED[name])
    with pytest.raises(ValueError, match=f"{name}=.*drop the option"):
        model.generate(ids, max_new_tokens=2, **options)


LOOP = "custom_generate=.* cannot be used with routed decoding"
CACHES = ("static", "offloaded", "offloaded_static", "quantized", "paged", "dynamic")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"cache_implementation": kind}, f"cache_implementation='{kind}' cannot be used") for kind in CACHES),
        ({"assistant_model": pair("llama")[0]}, "assistant_model=LlamaForCausalLM cannot be used with routed decoding"),
        ({"custom_generate": "someone/repository"}, LOOP),
        ({"custom_generate": lambda model, **kwargs: None}, LOOP),
        ({"generation_config": {}}, "generation_config must be a transformers GenerationConfig; got dict"),
        ({"past_key_values": DynamicCache()}, "past_key_values is a DynamicCache"),
        ({"input_ids": None}, "generate needs input_ids"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "a prompt has no tokens"),
    ],
)
def test_what_cannot_be_honoured_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        pair("llama")[1].generate(**{"input_ids": prompts((4,))[0]} | options)


def test_hybrid_of_older_hub_configs_is_read_as_dynamic():
    model = routed_model("gemma2")
    ids, mask = prompts()
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    model.lm.generation_config.cache_implementation = "hybrid"
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)


def test_a_keyword_overrules_the_models_own_default():
    model = routed_model()
    model.lm.generation_config.cache_implementation = "static"
    assert model.generate(prompts((4,))[0], cache_implementation=None, max_new_tokens=2).shape == (1, 6)


def test_a_model_whose_own_config_turns_the_cache_off():
    """Checkpoints saved after training with gradient checkpointing often carry use_cache=false."""
    model = routed_model()
    ids, mask = prompts()
    expected = model.generate(ids, mask, **GREEDY)
    model.lm.generation_config.use_cache = False
    assert torch.equal(model.generate(ids, mask, **GREEDY), expected)
    given = GenerationConfig(max_new_tokens=GREEDY["max_new_tokens"], do_sample=False)
    assert torch.equal(model.generate(ids, mask, generation_config=given), expected)


def test_every_generation_option_has_been_thought_of():
    """A new transformers release may bring options that change the cache or draft tokens: then look at it."""
    known = {
        *UNSUPPORTED,
        "cache_implementation",
        # Length, stopping, choice of tokens: they read or change scores only.
        *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "early_stopping", "max_time"),
        *("stop_strings", "do_sample", "num_beams", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p"),
        *("epsilon_cutoff", "eta_cutoff", "repetition_penalty", "encoder_repetition_penalty", "length_penalty"),
        *("no_repeat_ngram_size", "bad_words_ids", "renormalize_logits", "forced_bos_token_id"),
        *("forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
        *("begin_suppress_tokens", "sequence_bias", "watermarking_config", "diversity_penalty"),
        *("encoder_no_repeat_ngram_size", "num_return_sequences", "low_memory"),
        # Output and special tokens.
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
        # Only read together with an assistant, a static cache or continuous batching.
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"),
        *("max_cache_len", "compile_config", "disable_compile", "continuous_batching_config"),
        # Tested.
        "prefill_chunk_size",
    }
    options = {name for name in GenerationConfig().to_dict() if not name.startswith("_")} - {"transformers_version"}
    assert options <= known


def test_foreign_caches_and_rows_without_tokens_are_refused_everywhere():
    _, model = pair("llama")
    ids, mask = prompts((4, 6))
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache"):
        model(ids, past_key_values=DynamicCache(config=model.config))
    mask[0] = 0
    for call in (model.generate, model.route, model.prompt_rho):
        with pytest.raises(ValueError, match="a prompt has no tokens"):
            call(ids, attention_mask=mask)
        with pytest.raises(ValueError, match=r"attention_mask must be \[batch, tokens\]"):
            call(ids, attention_mask=mask[:, 1:])


@pytest.mark.parametrize(
    "routes",
    [
        torch.ones(LAYERS),
        torch.ones(LAYERS, dtype=torch.long),
        torch.ones(LAYERS + 1, dtype=torch.bool),
        torch.ones(1, 1, LAYERS, dtype=torch.bool),
        torch.tensor(True),
    ],
)
def test_routes_of_wrong_type_or_shape_are_refused(routes):
    _, model = pair("llama")
    ids, _ = prompts((4,))
    for call in (
        lambda: model.generate(ids, routes=routes),
        lambda: model.new_cache(routes=routes),
        lambda: model(ids, routes=routes),
    ):
        with pytest.raises(ValueError, match=rf"routes must be a boolean tensor \[({LAYERS}|layers)\] or"):
            call()


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_routes_must_have_one_row_per_prompt(rows):
    _, model = pair("llama")
    ids, mask = prompts((4, 6, 6, 6))
    routes = torch.ones(rows, LAYERS, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"routes has {rows} rows for 4 prompts"):
        model.generate(ids, attention_mask=mask, routes=routes)
    with pytest.raises(ValueError, match=f"routes has {rows} rows for 4 prompts"):
        model(ids, attention_mask=mask, routes=routes)


def test_a_cache_serves_only_its_own_rows_and_routes():
    _, model = pair("llama")
    ids, mask = prompts((4, 6))
    cache = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY).past_key_values
    with pytest.raises(ValueError, match="past_key_values holds 2 rows and the batch has 3"):
        model(torch.full((3, 1), 5), past_key_values=cache)
    longer = torch.full((2, cache.get_seq_length() + 3), 5)
    with pytest.raises(ValueError, match="already carries routes"):
        model.generate(longer, past_key_values=cache, routes=ALL_TRUE)
    mask = torch.ones_like(longer)
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="padded on the right"):
        model.generate(longer, attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("chunk", [None, 3])
def test_an_empty_cache_of_the_user_is_filled_as_our_own(chunk):
    _, model = pair("llama")
    ids, mask = prompts(side="right")
    expected, _, own = with_logits(model, ids, mask)
    cache = model.new_cache()
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, prefill_chunk_size=chunk, **GREEDY)
    assert torch.equal(out, expected)
    assert torch.equal(cache.routes, own.routes)
    cache.reset()
    shorter, short_mask = prompts((3, 5))
    out = model.generate(shorter, attention_mask=short_mask, past_key_values=cache, **GREEDY)
    assert torch.equal(out, model.generate(shorter, attention_mask=short_mask, **GREEDY))
    routes = random_routes(3)
    cache = model.new_cache()
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, routes=routes, **GREEDY)
    assert torch.equal(out, model.generate(ids, attention_mask=mask, routes=routes, **GREEDY))


def test_one_prompt_token_and_one_new_token():
    base, model = pair("llama")
    ids = torch.tensor([[5]])
    assert torch.equal(model.generate(ids, max_new_tokens=1), base.generate(ids, max_new_tokens=1))
    sequences, logits, cache = with_logits(model, ids, None, eos_token_id=None)
    torch.testing.assert_close(
        logits, step_logits(base, sequences, torch.ones_like(ids), cache.routes), atol=1e-4, rtol=0
    )


def test_boolean_masks_work():
    _, model = pair("llama")
    ids, mask = prompts(side="right")
    assert torch.equal(
        model.generate(ids, attention_mask=mask.bool(), **GREEDY), model.generate(ids, attention_mask=mask, **GREEDY)
    )
    assert torch.equal(model.route(ids, mask.bool()), model.route(ids, mask))


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("llama", torch.float16), *((a, torch.bfloat16) for a in ("llama", "gpt2", "gemma2", "mixtral"))],
)
def test_half_precision_models_generate(architecture, dtype):
    model = routed_model(architecture).to(dtype)
    assert model.routers.weight.dtype == torch.float32
    ids, mask = prompts()
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    assert out.past_key_values.rho.dtype == torch.float32
    assert torch.equal(out.past_key_values.routes, model.route(ids, mask))
    assert out.sequences.shape[1] > 12
    base = deepcopy(model.lm)
    assert torch.equal(
        model.generate(ids, attention_mask=mask, routes=ALL_TRUE, **GREEDY),
        base.generate(ids, attention_mask=mask, **GREEDY),
    )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(implementation):
    base, model = pair("llama")
    other = deepcopy(model)
    other.lm.set_attn_implementation(implementation)
    ids, mask = prompts()
    sequences, _, cache = with_logits(model, ids, mask, prefill_chunk_size=2)
    again, _, other_cache = with_logits(other, ids, mask, prefill_chunk_size=2)
    assert torch.equal(sequences, again)
    torch.testing.assert_close(cache.rho, other_cache.rho, atol=1e-5, rtol=0)


def test_threads_do_not_mix():
    _, model = pair("llama")
    batches = [prompts((4 + i, 9), seed=i) for i in range(3)]
    expected = [model.generate(ids, attention_mask=mask, **GREEDY) for ids, mask in batches]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda b: model.generate(b[0], attention_mask=b[1], **GREEDY), batches))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_the_wrapped_model_alone_stays_dense():
    base, model = pair("llama")
    ids, mask = prompts()
    assert torch.equal(
        model.lm.generate(ids, attention_mask=mask, **GREEDY), base.generate(ids, attention_mask=mask, **GREEDY)
    )
    assert not isinstance(model.lm(ids).past_key_values, RoutedCache)


def test_padding_is_recognised_without_a_mask_as_transformers_does():
    base, routed = pair("llama")
    ids = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    every = torch.ones(routed.num_layers, dtype=torch.bool)
    assert torch.equal(routed.generate(ids, routes=every, **options), base.generate(ids, **options))
    mask = (ids != 0).long()
    torch.testing.assert_close(routed.prompt_rho(ids), routed.prompt_rho(ids, mask))


def test_the_eos_token_of_the_call_decides_what_is_padding():
    base, model = pair("llama")
    ids, _ = prompts((9,))
    ids[0, :3] = 2
    options = {"pad_token_id": 2, "eos_token_id": 5, "max_new_tokens": 6}
    found = model.generate(ids, routes=torch.ones(LAYERS, dtype=torch.bool), **options)
    assert torch.equal(found, base.generate(ids, **options))


def test_input_ids_beside_embeds_are_moved_with_their_padding():
    _, model = pair("llama")
    ids, mask = prompts(side="right")
    left, _ = prompts()
    embeds = model.lm.get_input_embeddings()(ids)
    found = model.generate(ids, attention_mask=mask, inputs_embeds=embeds, max_new_tokens=3)
    assert torch.equal(found[:, : ids.shape[1]], left)


@pytest.mark.parametrize(
    ("config", "tokenizer", "expected"),
    [(None, None, []), (2, None, [2]), ([9, 2], 2, [2, 9]), ([9], 2, [2, 9]), (None, 0, [0]), (0, 5, [0, 5])],
)
def test_every_stop_token_counts(config, tokenizer, expected):
    lm = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=config))
    assert stop_tokens(lm, SimpleNamespace(eos_token_id=tokenizer)) == expected
