"""The decode engine gives the tokens of `RouterAugmentedLM.generate`, faster: rows are decoded together whatever their
routes are, each layer for the rows that run it, and a row that ends gives its place to a waiting prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from weakref import ref

import torch
from torch import Tensor

from firstlab.engine.batching import ContinuousBatch, Request, choose_each, routes_together
from firstlab.engine.graph_step import GraphStep
from firstlab.engine.graphs import Graphs
from firstlab.engine.llama_step import LlamaStep, orders_anew
from firstlab.engine.prefill import read_through_model
from firstlab.engine.sampling import Sampling, chooser
from firstlab.model.generation_options import check_score_settings, stop_tokens
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.routes import RoutersDecide, Routes, as_asked, layer_skips

MODES = ("auto", "eager", "graphs")


@dataclass
class EngineOutput:
    """What `DecodeEngine.generate` gives."""

    tokens: list[list[int]]  # new tokens of every prompt, with the EOS token that ended it
    routes: Tensor  # [B, L] boolean, the layers that the first decode step may run
    layer_skips: Tensor  # [B, L], the share of the prompt's decode steps that skipped the layer
    kv_bytes: int  # keys and values that the prompts' layers kept, at their final lengths
    kv_bytes_dense: int  # the same if no layer were skipped
    union_layers: float  # layers that a decode step of the call ran for some row, mean until now

    @property
    def skip_rate(self) -> Tensor:
        """[B], skipped layers ÷ L of every prompt, mean over its decode steps."""
        return self.layer_skips.mean(1)


class DecodeEngine:
    """Routed decoding over static keys and values, greedy or sampled.

    Args:
        model: Llama-like, without unmerged LoRA. Its projections become views of fused ones, which saving, copying and
            further engines do not mind; a model moved or converted by `to` needs a new engine.
        max_length: Tokens of prompt and response.
        max_batch_size: Rows decoded together, and prompts prefilled together.
        mode: "eager" (`LlamaStep`), "graphs" (`GraphStep`: CUDA graphs, on a CPU the same without them) or "auto",
            which is graphs on CUDA, else eager.
        lookahead: Decode steps that the device is given before the tokens of the first of them are read; a step is in
            vain where a row ends. None: 1 on CUDA, else 0. `EarlyExit` and prompts that draw from one generator go
            without it.
        patience: How many prompts may overtake one that is prefilled and waits for a place, since their routes share
            more layers with the rows in the batch; 0: first come, first served. No token depends on it; prompts that
            draw from one generator keep their order. None: four times the rows.
        reserve: How many prompts are prefilled before they have a place, so that there is more to choose from. Their
            keys and values take memory, and the rows in the batch wait for their prefill.
    """

    # Weights that are ordered anew, keys and values outlive an inference mode that is on now.
    @torch.inference_mode(False)
    def __init__(
        self,
        model: RouterAugmentedLM,
        max_length: int,
        max_batch_size: int = 1,
        mode: str = "auto",
        lookahead: int | None = None,
        patience: int | None = None,
        reserve: int = 0,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is unknown; choose one of {', '.join(MODES)}")
        if model.has_lora:
            raise ValueError("the decode engine runs merged weights only: call model.merge_and_unload() first")
        on_cuda = model.device.type == "cuda"
        self.lookahead = int(on_cuda) if lookahead is None else lookahead
        self.patience = 4 * max_batch_size if patience is None else patience
        self.reserve = reserve
        least_sizes = {"max_length": 1, "max_batch_size": 1, "lookahead": 0, "patience": 0, "reserve": 0}
        sizes = (max_length, max_batch_size, self.lookahead, self.patience, reserve)
        for (name, least), value in zip(least_sizes.items(), sizes, strict=True):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        self.model, self.max_length, self.max_batch_size = model, max_length, max_batch_size
        self.mode = mode if mode != "auto" else "graphs" if on_cuda else "eager"
        # The batch that has the step; weak, as it knows this engine, and a cycle would keep keys and values alive.
        self._batch: Callable[[], ContinuousBatch | None] = lambda: None
        self.step: LlamaStep
        if self.mode == "eager":
            self.step = LlamaStep(model.lm, max_batch_size, max_length)
        else:
            self.step = GraphStep(model.lm, max_batch_size, max_length, Graphs(model.device))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        routes: Routes | Tensor | None = None,
        eos: Sequence[int] | None = None,
        on_step: Callable[[dict[int, int]], None] | None = None,
        sampling: Sampling | None = None,
        skip_rate: float | Tensor | None = None,
    ) -> EngineOutput:
        """Decode every prompt.

        Args:
            prompts: Token ids of each, without padding.
            max_new_tokens: At most, for all prompts or for each.
            routes: A boolean tensor [L] or [B, L], or any `Routes`; None: the routers decide.
            eos: Tokens that end a row; the model's own by default, () for none.
            on_step: Called after prefill and after each decode step, when its tokens are on the host: prompt to token.
            sampling: How tokens are drawn; None: greedy.
            skip_rate: How much routers of any rate are to skip, for all prompts or [B]; see `RouteRouter`.
        """
        found = dict(self.as_completed(prompts, max_new_tokens, routes, eos, on_step, sampling, skip_rate))
        outputs = [found[index] for index in range(len(prompts))]
        return EngineOutput(
            [output.tokens[0] for output in outputs],
            torch.cat([output.routes for output in outputs]),
            torch.cat([output.layer_skips for output in outputs]),
            sum(output.kv_bytes for output in outputs),
            sum(output.kv_bytes_dense for output in outputs),
            list(found.values())[-1].union_layers,  # of the prompt that ended last
        )

    def as_completed(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        routes: Routes | Tensor | None = None,
        eos: Sequence[int] | None = None,
        on_step: Callable[[dict[int, int]], None] | None = None,
        sampling: Sampling | None = None,
        skip_rate: float | Tensor | None = None,
    ) -> Iterator[tuple[int, EngineOutput]]:
        """As `generate`, but each prompt as soon as it has ended: its place among `prompts`, and its output (B = 1)."""
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        rule = as_asked(routes, skip_rate)
        # What cannot work is refused here, not when the first row is asked for.
        self._check(prompts, limits, rule, sampling)
        shares = sampling is not None and len(prompts) > 1  # a generator
        ends, choose = self._ends(eos), chooser(sampling, self.model.device)
        requests = [
            Request(prompt, limit, ends, None if rule is None else rule.rows([index]), choose, not shares, index)
            for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
        ]
        return self._completed(requests, 0 if shares else self.patience, on_step)

    def _completed(
        self, requests: list[Request], patience: int, on_step: Callable[[dict[int, int]], None] | None
    ) -> Iterator[tuple[int, EngineOutput]]:
        """The outputs of one call, as long as no other one has taken the places of the batch."""
        batch = self.batch(patience)
        for request in requests:
            batch.add(request)
        while batch.busy:
            progress = batch.advance()
            if on_step is not None and progress.tokens:
                on_step({request.index: token for request, token in progress.tokens.items()})
            for request in progress.ended:
                yield request.index, self.output(request)

    # -- requests that come at any time --

    def request(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        routes: Routes | Tensor | None = None,
        eos: Sequence[int] | None = None,
        sampling: Sampling | None = None,
        skip_rate: float | None = None,
    ) -> Request:
        """One prompt for a `batch`, with the arguments of `generate`; it draws from a generator of its own.

        Raises:
            ValueError: It can never be decoded.
        """
        rule = as_asked(routes, skip_rate)
        self._check([prompt], [max_new_tokens], rule, sampling)
        return Request(prompt, max_new_tokens, self._ends(eos), rule, chooser(sampling, self.model.device))

    def batch(self, patience: int | None = None) -> ContinuousBatch:
        """An empty batch, which requests may join and leave at any time; it ends what this engine decoded before."""
        if (former := self._batch()) is not None:
            former.closed = True
        choice = self.patience if patience is None else patience, self.reserve
        batch = ContinuousBatch(self.step, self._prefill, self.max_batch_size, self.lookahead, *choice)
        self._batch = ref(batch)
        return batch

    def _ends(self, eos: Sequence[int] | None) -> frozenset[int]:
        return frozenset(stop_tokens(self.model.lm, None) if eos is None else eos)

    def output(self, row: Request) -> EngineOutput:
        """What has come of a request until now."""
        rule, steps, layers = row.rule, max(0, len(row.tokens) - 1), len(row.route)
        schedule = None if rule is None else rule.window(0, steps)
        ran = row.route.expand(steps, -1) if schedule is None else schedule
        if row.depths:
            ran = torch.arange(layers) < torch.tensor(row.depths).unsqueeze(1)
        skips = 1 - row.route[None].float()
        if rule is not None and rule.decides_each_step:
            skips = layer_skips(ran[None], torch.ones(1, steps, dtype=torch.bool))
        # Above an exit every layer keeps what the token had there.
        holds = row.route if row.depths or not steps else ran[-1]
        kv_bytes = row.length * self.step.bytes_per_token
        held = int(holds.sum()) * kv_bytes
        return EngineOutput([row.tokens], row.route[None], skips, held, layers * kv_bytes, row.union_layers)

    def _check(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        routes: Routes | None,
        sampling: Sampling | None,
    ) -> None:
        check_score_settings(self.model.lm.generation_config, drawn=sampling is not None)
        if self.model.has_lora:
            raise ValueError("the model got LoRA after its engine was made; merge_and_unload() it, make a new engine")
        if not self.step.is_current():
            raise ValueError("the model was moved or converted after its engine was made; make a new DecodeEngine")
        if torch.is_autocast_enabled(self.model.device.type):
            raise ValueError("the engine computes in the model's own type: load the model in it instead of autocast")
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise ValueError("every prompt needs at least one token (for instance the BOS token)")
        if len(limits) != len(prompts):
            raise ValueError(f"max_new_tokens has {len(limits)} values for {len(prompts)} prompts; give one per prompt")
        if min(limits) < 1:
            raise ValueError(f"max_new_tokens={min(limits)} must be at least 1")
        needed, limit = max((len(prompt) + limit, limit) for prompt, limit in zip(prompts, limits, strict=True))
        if needed > self.max_length:
            raise ValueError(f"a prompt with max_new_tokens={limit} takes {needed} tokens; raise max_length")
        if routes is not None:
            routes.check(self.model.num_layers, len(prompts))
        if isinstance(routes, RoutersDecide):
            self.model.routers.checked_rate(routes.skip_rate, len(prompts))

    def _prefill(self, batch: list[Request]) -> None:
        prompts = [request.prompt for request in batch]
        rule = routes_together(batch, self.model.num_layers, self._default_rate)
        if isinstance(self.step, GraphStep) and not (rule is not None and rule.skips_prompt):
            read = self.step.read(prompts, self.model.routers, rule)
        else:
            read = read_through_model(self.model, prompts, rule)
        first = choose_each(read.logits, [request.choose for request in batch]).tolist()
        for place, route in enumerate(read.routes.cpu()):
            kv = {layer: read.keys_values(place, layer) for layer in route.nonzero()[:, 0].tolist()}
            batch[place].prefilled(first[place], route, kv)

    def _default_rate(self) -> float:
        rate = self.model.routers.checked_rate(None)
        assert rate is not None  # only a router of any rate is asked
        return float(rate)


def engine_for(model: RouterAugmentedLM, max_length: int, max_batch_size: int) -> DecodeEngine:
    """An engine that leaves the model as it is to the last bit: it gets a copy where it would order weights anew."""
    return DecodeEngine(deepcopy(model) if orders_anew(model.lm) else model, max_length, max_batch_size)
