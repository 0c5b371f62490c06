"""Lossless decoding: a route drafts tokens, one dense pass verifies them, and the text is the dense model's own.

Self-speculative decoding (Zhang et al. 2024; Elhoushi et al. 2024); drafts are accepted as in Leviathan et al. (2023).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

from firstlab.model.generation_options import check_score_settings, option_value
from firstlab.model.inputs import padded_on_the_left
from firstlab.model.layers import routing
from firstlab.model.routes import FixedRoutes, RoutersDecide, Routes
from firstlab.model.teacher_forcing import PromptPass

#: Longest draft.
MOST_DRAFTED = 16
# So many passes draft whatever the prompt promised, as responses are easier to foresee than prompts.
_TRIALS, _TRIAL_LENGTH = 4, 2
# Weight of what acceptance was before, against the newest pass.
_MEMORY = 0.8
_TAKEN = {
    "max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "eos_token_id", "pad_token_id",
    "streamer", "return_dict_in_generate", "use_cache", "generation_config", "logits_to_keep",
}  # fmt: skip


@dataclass
class LosslessOutput:
    """What lossless decoding gives; the lists have one entry per prompt."""

    sequences: Tensor  # [B, T + new], as transformers' `generate` returns them
    routes: Tensor  # [B, L], the route that drafted for each prompt
    new_tokens: list[int]  # with the token that ended each
    drafted: list[int]  # tokens that the route proposed
    accepted: list[int]  # of these, those that stand
    dense_passes: list[int]  # passes through all layers behind the prompt

    @classmethod
    def of(cls, sequences: Tensor, drafters: Sequence[Drafter]) -> LosslessOutput:
        routes = torch.stack([each.route for each in drafters])
        counts = [(len(each.tokens), each.drafted, each.accepted, each.dense_passes) for each in drafters]
        return cls(sequences, routes, *map(list, zip(*counts, strict=True)))


@dataclass(frozen=True)
class LosslessOptions:
    """The generation options that lossless decoding knows."""

    max_new_tokens: int
    do_sample: bool
    warpers: LogitsProcessorList
    ends: frozenset[int]
    pad: int
    streamer: Any

    @classmethod
    def of(cls, options: dict[str, Any], defaults: GenerationConfig, prompt_length: int) -> LosslessOptions:
        """From keywords of `generate`, then the model's generation config."""
        if unknown := sorted(name for name, value in options.items() if name not in _TAKEN and value is not None):
            raise ValueError(
                f"{unknown[0]}= cannot be used with lossless=True, which knows {', '.join(sorted(_TAKEN))}; drop one"
            )

        def value(name: str, default: Any) -> Any:
            given = option_value(name, options, defaults)
            return default if given is None else given

        drawn = bool(value("do_sample", False))
        check_score_settings(options.get("generation_config") or defaults, drawn)
        if (beams := value("num_beams", 1)) != 1:
            raise ValueError(f"num_beams={beams} cannot be used with lossless=True: drafts follow one text; drop one")
        limit = value("max_new_tokens", None)
        if limit is None:
            length = value("max_length", prompt_length + 20)
            if length < prompt_length:
                raise ValueError(f"max_length={length} is less than the {prompt_length} tokens of the prompt; raise it")
            limit = (length - prompt_length) or 1
        if limit < 1:
            raise ValueError(f"max_new_tokens={limit} must be at least 1")
        warpers = LogitsProcessorList()
        if (temperature := value("temperature", 1.0)) != 1:
            warpers.append(TemperatureLogitsWarper(float(temperature)))
        if top_k := value("top_k", 50):  # transformers' own default
            warpers.append(TopKLogitsWarper(top_k))
        if (top_p := value("top_p", 1.0)) < 1:
            warpers.append(TopPLogitsWarper(top_p))
        ends = frozenset(torch.as_tensor(value("eos_token_id", [])).flatten().tolist())
        return cls(
            max_new_tokens=limit,
            do_sample=drawn,
            warpers=warpers,
            ends=ends,
            pad=value("pad_token_id", min(ends, default=0)),
            streamer=options.get("streamer"),
        )

    def probabilities(self, logits: Tensor) -> Tensor:
        """[N, V] of logits [N, V]: one token's share is 1 where nothing is drawn."""
        logits = logits.float()
        if not self.do_sample:
            return torch.zeros_like(logits).scatter(1, logits.argmax(-1, keepdim=True), 1.0)
        ids: Any = torch.empty(len(logits), 0, dtype=torch.long)
        return self.warpers(ids, logits).softmax(-1)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Costs:
    """Seconds of a dense step, of a draft's step, and of the pass that verifies a draft."""

    dense: float
    draft: float
    verify: float


#: Of each model, by layers that a draft runs and its length. They serve warnings only: no text depends on a clock.
_MEASURED: WeakKeyDictionary[Any, dict[tuple[int, int], Costs]] = WeakKeyDictionary()


def expected_speedup(acceptance: float, drafted: int, draft: float, verify: float = 1.0) -> float:
    """Tokens per dense step's time, when each of d drafted tokens is accepted with probability a.

    They give (1 - a^(d + 1)) / (1 - a) tokens (Leviathan et al. 2023, equation 1) for d drafts and a verification,
    whose costs are given in dense steps.
    """
    a = min(max(acceptance, 0.0), 1 - 1e-6)
    return (1 - a ** (drafted + 1)) / (1 - a) / (drafted * draft + verify)


def best_draft(acceptance: float, skip_rate: float) -> int:
    """The length with the greatest expected speed-up; 0 where drafting does not pay."""
    return max(range(MOST_DRAFTED + 1), key=lambda drafted: expected_speedup(acceptance, drafted, 1 - skip_rate))


class Drafter:
    """Decodes one prompt [1, T] of a `RouterAugmentedLM`: drafts under a route, verifies densely.

    Of these `routes`, one prompt's, the route is taken that drafts; `tokens` are the new ones.
    """

    def __init__(self, model: Any, prompt: Tensor, routes: Routes, options: LosslessOptions) -> None:
        self._model, self._options, self._cache = model, options, DynamicCache(config=model.config)
        reading = PromptPass(model.routers, torch.ones_like(prompt).bool())
        with routing(reading):
            logits = self._dense(prompt)
        if isinstance(routes, RoutersDecide):
            self.route = model.routers.decision(reading.means, routes.skip_rate)[1][0].cpu()
        else:
            self.route = routes.first(model.num_layers)[0].cpu()
        self._runs: list[bool] = self.route.tolist()
        self._skip_rate = float((~self.route).float().mean())
        # How often the route agrees with the dense model where the prompt shows both.
        start = time.perf_counter()
        self._acceptance = float((self._draft(prompt).argmax(-1) == logits.argmax(-1)).float().mean())
        self.doubt = self._doubt(time.perf_counter() - start)
        self._first = logits[:, -1]
        self.tokens: list[int] = []
        self.drafted = self.accepted = self.dense_passes = 0

    def _dense(self, ids: Tensor) -> Tensor:
        with self._model.lora_disabled():
            return self._logits(ids, self._cache)

    def _draft(self, ids: Tensor, cache: DynamicCache | None = None) -> Tensor:
        with routing(self):
            return self._logits(ids, cache)

    def run_layer(self, index: int, hidden: Tensor, run: Callable[[], Any], skip: Callable[[], Any]) -> Any:
        return run() if self._runs[index] else skip()

    def _logits(self, ids: Tensor, cache: DynamicCache | None) -> Tensor:
        ids = ids.to(self._model.device)
        return self._model.lm(input_ids=ids, past_key_values=cache, use_cache=cache is not None).logits

    def _doubt(self, begun: float) -> str | None:
        """What to say before decoding begins, so many seconds after its start, if drafting is not expected to pay."""
        length = best_draft(self._acceptance, self._skip_rate)
        costs = self._costs(length)
        speedup = expected_speedup(self._acceptance, length, costs.draft / costs.dense, costs.verify / costs.dense)
        dense = self._options.max_new_tokens * costs.dense
        ratio = 1 / (speedup if length else 1) + begun / dense
        if ratio < 1:
            return None
        return (
            f"lossless=True will not be faster than dense decoding here but take {ratio:.2f} times as long, to all "
            f"expectation: a route that skips {100 * self._skip_rate:.0f} % of the layers agrees with the dense "
            f"model on {100 * self._acceptance:.0f} % of the prompt's tokens, and a step under it takes "
            f"{costs.draft / costs.dense:.2f} times as long as a dense one"
        )

    def _costs(self, length: int) -> Costs:
        """Measured once for each model, number of layers and length of drafts."""
        known, key = _MEASURED.setdefault(self._model, {}), (sum(self._runs), length)
        if key not in known:
            one, more = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, length + 1, dtype=torch.long)
            dense = self._seconds(lambda: self._dense(one))
            draft = self._seconds(lambda: self._draft(one, self._cache))
            known[key] = Costs(dense, draft, self._seconds(lambda: self._dense(more)) if length else dense)
        return known[key]

    def _seconds(self, run: Callable[[], Tensor]) -> float:
        """Of the faster of two runs, whose keys and values are forgotten."""
        seen, seconds = self._cache.get_seq_length(), []
        for _ in range(2):
            start = time.perf_counter()
            float(run()[0, -1, 0])  # waits for the device
            seconds.append(time.perf_counter() - start)
            _cut(self._cache, seen)
        return min(seconds)

    def decode(self) -> None:
        self._take([self._draw(self._options.probabilities(self._first))])
        while len(self.tokens) < self._options.max_new_tokens and self.tokens[-1] not in self._options.ends:
            self._take(self._step(self.tokens[-1], self._options.max_new_tokens - len(self.tokens)))

    def _take(self, new: list[int]) -> None:
        end = next((i + 1 for i, token in enumerate(new) if token in self._options.ends), len(new))
        self.tokens += new[:end]
        if self._options.streamer is not None:
            self._options.streamer.put(torch.tensor(new[:end]))

    def _step(self, last: int, room: int) -> list[int]:
        """The tokens of one draft and one dense pass, at least one."""
        seen = self._cache.get_seq_length()
        length = best_draft(self._acceptance, self._skip_rate)
        if self.dense_passes < _TRIALS:
            length = max(length, _TRIAL_LENGTH)
        length = min(length, room - 1)
        drafted: list[int] = []
        shares: list[Tensor] = []  # [V], what each was drawn from
        for _ in range(length):
            ids = torch.tensor([[last, *drafted][-1:]])
            shares.append(self._options.probabilities(self._draft(ids, self._cache)[:, -1])[0])
            drafted.append(self._draw(shares[-1]))
        _cut(self._cache, seen)
        ids = torch.tensor([[last, *drafted]])
        judged = self._options.probabilities(self._dense(ids)[0])
        self.dense_passes += 1
        new: list[int] = []
        for place, (token, share) in enumerate(zip(drafted, shares, strict=True)):
            kept = judged[place, token] / share[token]
            if torch.rand((), device=kept.device) >= kept:
                # What the draft gave too little of (Leviathan et al. 2023, algorithm 1).
                new.append(self._draw((judged[place] - share).clamp_min(0)))
                break
            new.append(token)
        else:
            new.append(self._draw(judged[len(drafted)]))
        accepted = len(new) - 1
        _cut(self._cache, seen + len(new))
        self.drafted += length
        self.accepted += accepted
        # Tokens behind the first that is refused say nothing.
        for place in range(min(accepted + 1, length)):
            self._acceptance = _MEMORY * self._acceptance + (1 - _MEMORY) * float(place < accepted)
        return new

    def _draw(self, shares: Tensor) -> int:
        if not self._options.do_sample:
            return int(shares.argmax(-1))
        return int(torch.multinomial(shares, 1))


def _cut(cache: DynamicCache, length: int) -> None:
    """Keep the first tokens' keys and values; layers that a draft skipped hold no others."""
    layers: list[Any] = cache.layers
    for layer in layers:
        layer.keys, layer.values = (x[..., :length, :] for x in (layer.keys, layer.values))


def generate_lossless(
    model: Any, input_ids: Tensor | None, attention_mask: Tensor | None, routes: Routes | None, options: dict[str, Any]
) -> Tensor | LosslessOutput:
    """What a `RouterAugmentedLM` generates with lossless=True, one prompt after the other."""
    if input_ids is None:
        raise ValueError("lossless=True needs input_ids [batch, tokens]")
    if {type(each) for each in model.new_cache().layers} != {DynamicLayer}:
        raise ValueError(
            f"lossless=True takes tokens back, which the sliding windows of {type(model.lm).__name__} do not allow; "
            "drop it"
        )
    defaults = model.lm.generation_config
    mask, ids, _ = padded_on_the_left(model.prompt_mask(input_ids, attention_mask, options), input_ids, None)
    assert ids is not None
    chosen = LosslessOptions.of(options, defaults, ids.shape[1])
    # A draft may miss, so it may skip more than a text.
    forced = RoutersDecide(getattr(model.routers, "highest_rate", None)) if routes is None else routes
    if not isinstance(forced, RoutersDecide | FixedRoutes):
        raise ValueError(f"lossless=True drafts under a fixed route; routes= is {type(forced).__name__}")
    model.check_routes(forced, len(ids))
    drafters: list[Drafter] = []
    for row, (tokens, real) in enumerate(zip(ids, mask.bool(), strict=True)):
        prompt = tokens[real].unsqueeze(0)
        if chosen.streamer is not None:
            chosen.streamer.put(prompt.cpu())
        drafter = Drafter(model, prompt, forced.rows([row]), chosen)
        if drafter.doubt and not any(each.doubt for each in drafters):  # once is enough
            warnings.warn(drafter.doubt, stacklevel=4)
        drafter.decode()
        drafters.append(drafter)
    if chosen.streamer is not None:
        chosen.streamer.end()
    texts = [torch.tensor(each.tokens) for each in drafters]
    new = pad_sequence(texts, batch_first=True, padding_value=chosen.pad).to(ids.device)
    sequences = torch.cat([ids, new], 1)
    if option_value("return_dict_in_generate", options, defaults):
        return LosslessOutput.of(sequences, drafters)
    return sequences
