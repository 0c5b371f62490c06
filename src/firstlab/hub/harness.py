"""The model `firstlab` of lm-evaluation-harness: scores and writes text through the layers that decode would run."""

from __future__ import annotations

from collections import Counter, defaultdict
from inspect import signature
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from firstlab.hub.source import is_run, open_model, open_run
from firstlab.model.routes import FixedRoutes, RoutersDecide, layer_skips

#: Options of the harness's own model that would load something else beside ours.
_NOT_OURS = ("peft", "delta", "autogptq", "gptqmodel", "parallelize", "tp_plan", "backend", "subfolder")
#: Routes that results list, the most frequent first.
_LISTED = 20

Request = tuple[tuple[str, str], list[int], list[int]]


@register_model("firstlab")
class FirstlabLM(HFLM):
    """`HFLM` with routes: they are decided on the context, and the continuation runs the layers that they keep.

    The first token of a continuation comes out of prefill and is that of the dense model, exactly as in decode.

    Args:
        pretrained: A run directory, a folder or hub id of firstlab, or any causal LM, which then runs every layer.
        skip_rate: How much to skip, of models of any rate (router.kind=routes); 0 runs every layer of any model.
        variant: Of a run: base, base_lora, router or router_lora; the most trained by default.
        device: As of the model hf.
        dtype, revision, gguf_file: As of the model hf; not of a run directory, which has its own.
        **kwargs: Other options of the model hf.

    Raises:
        ValueError: An option that does not fit the model.
    """

    def __init__(
        self,
        pretrained: str = "",
        skip_rate: float | None = None,
        variant: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        revision: str | None = None,
        gguf_file: str | None = None,
        trust_remote_code: bool | None = False,
        **kwargs: Any,
    ) -> None:
        if not pretrained:
            raise ValueError("pretrained= is missing: name a run directory, a folder or a hub id")
        if unknown := sorted(kwargs.keys() - signature(HFLM.__init__).parameters.keys()):
            name = unknown[0]
            raise ValueError(f"{name}={kwargs[name]!r} is no option of this model: did you mean skip_rate or variant?")
        if trust_remote_code:
            raise ValueError("trust_remote_code=True: firstlab runs no code from the hub; leave it out")
        for name in _NOT_OURS:
            if kwargs.get(name):
                raise ValueError(f"{name}={kwargs[name]!r} is of the model hf; firstlab's own folder says what to load")
        if skip_rate is not None and (isinstance(skip_rate, bool) or not isinstance(skip_rate, int | float)):
            raise ValueError(f"skip_rate={skip_rate!r} must be a number from 0 to below 1")
        if skip_rate is not None and not 0 <= skip_rate < 1:
            raise ValueError(f"skip_rate={skip_rate} must be at least 0 and below 1")
        given = {"dtype": dtype, "revision": revision, "gguf_file": gguf_file}
        given = {name: value for name, value in given.items() if value is not None}
        if is_run(pretrained):
            for name, value in given.items():
                if value != "auto":
                    raise ValueError(f"{name}={value!r}: the run directory {pretrained} says that itself; leave it out")
            source = open_run(pretrained, variant)
        else:
            source = open_model(pretrained, variant, **given)
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = source.model
        model, routed = model.to(where), source.model.routed
        self.asked, self.routes = skip_rate, source.routes
        if skip_rate == 0:
            self.routes = FixedRoutes(torch.ones(routed.num_layers, dtype=torch.bool))
        elif skip_rate is not None and source.routes is not None:
            raise ValueError(f"skip_rate={skip_rate}: the routes of {pretrained} are fixed; leave it out, or 0: dense")
        elif skip_rate is not None:
            routed.routers.checked_rate(skip_rate)
        self.run = source.run
        self.dense = isinstance(self.routes, FixedRoutes) and bool(self.routes.ran.all())
        self.rate = None if self.routes is not None else skip_rate
        # Of the rows at work: where their context and their tokens end.
        self._places: dict[tuple[int, ...], tuple[int, int]] = {}
        self._skips: list[Tensor] = []
        self._decoded = 0
        super().__init__(model, backend="causal", tokenizer=source.tokenizer, **kwargs)
        self.pretrained, self.revision = pretrained, revision or "main"

    # -- log-likelihood --

    def _loglikelihood_tokens(self, requests: list[Request], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        """As in `HFLM`, but that each row's context has a length, which its tokens alone do not tell."""
        if self.dense:
            self._note(torch.zeros(len(requests), self.model.routed.num_layers))
            return list(super()._loglikelihood_tokens(requests, *args, **kwargs))
        places: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
        rounds: dict[int, list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            tokens = (context + continuation)[-(self.max_length + 1) :][:-1]  # what HFLM runs
            place = (len(tokens) - len(continuation) + 1, len(tokens))
            known = places[_without_zeros(tokens)]
            if place not in known:
                known.append(place)
            rounds[known.index(place)].append(index)
        answers: dict[int, tuple[float, bool]] = {}
        # More than one round only where the same tokens are cut into context and continuation in different places.
        for turn, indices in sorted(rounds.items()):
            self._places = {key: found[turn] for key, found in places.items() if len(found) > turn}
            found = super()._loglikelihood_tokens([requests[index] for index in indices], *args, **kwargs)
            answers |= dict(zip(indices, found, strict=True))
        self._places = {}
        return [answers[index] for index in range(len(requests))]

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        """Logits [B, T, V] of padded rows: context tokens run every layer, those behind them their row's route."""
        if self.dense:
            return super()._model_call(inps)
        width = inps.shape[1]
        found = [self._places.get(_without_zeros(row), (width, width)) for row in inps.tolist()]
        contexts, ends = torch.tensor(found, device=inps.device).unsqueeze(-1).unbind(1)
        position = torch.arange(width, device=inps.device)
        context, routed = position < contexts, self.model.routed
        autocast = torch.autocast(inps.device.type, self.mixed_precision_dtype, self.mixed_precision_dtype is not None)
        with torch.no_grad(), autocast:
            # Padding stands on the right, where nothing looks at it: no mask, as in HFLM.
            out = routed(
                inps,
                torch.ones_like(inps),
                prompt_mask=context,
                objective="decode_consistent",
                gate="hard",
                routes=RoutersDecide(self.rate) if self.routes is None else self.routes.to(inps.device),
            )
        if self._places:  # not while the harness looks for a batch size
            response = (position < ends) & ~context
            if self.routes is not None and not isinstance(self.routes, FixedRoutes):
                self._note(layer_skips(out.ran, response))
            elif self.routes is not None:
                self._note((~self.routes.first(routed.num_layers)).expand(len(inps), -1))
            else:
                self._note(~routed.routers.decide(out.rho))
            self._decoded += int(response.sum())
        return out.logits

    # -- generation --

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        chosen: dict[str, Any] = {"skip_rate": self.rate} if self.rate is not None else {}
        if self.routes is not None:
            chosen["routes"] = self.routes.to(context.device)
        out: Any = super()._model_generate(context, max_length, stop, return_dict_in_generate=True, **chosen, **options)
        self._note(out.past_key_values.layer_skips())
        return out.sequences  # type: ignore[no-any-return]

    # -- what results say --

    def _note(self, skips: Tensor) -> None:
        """[B, L], the share of each row's decode steps that skipped each layer."""
        self._skips.append(skips.float().cpu())

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into `config` of its results: skip rate and routes beside the model's own facts."""
        info = dict(super().get_model_info())
        if not self._skips:
            return info
        skips = torch.cat(self._skips)
        names = ["".join("1" if run else "0" for run in row) for row in (skips < 1).tolist()]
        return info | {
            "firstlab": {
                **self._origin(),
                "skip_rate_asked": self.asked,
                "skip_rate": float(skips.mean()),
                "skip_rate_per_layer": skips.mean(0).tolist(),
                "rows": len(skips),
                # Tokens that a continuation's skipped layers had a part in; 0 where every answer is one token.
                "scored_tokens_in_decode": self._decoded,
                "routes": dict(Counter(names).most_common(_LISTED)),
                "unique_routes": len(set(names)),
            }
        }

    def _origin(self) -> dict[str, Any]:
        """Which run the model is from."""
        if self.run is None or self.run.record is None:
            return {}
        names = ("model", "data", "method", "level", "seed")
        return {"variant": self.run.variant} | {name: self.run.record.get(name) for name in names}


def _without_zeros(tokens: list[int]) -> tuple[int, ...]:
    end = len(tokens)
    while end and tokens[end - 1] == 0:
        end -= 1
    return tuple(tokens[:end])
