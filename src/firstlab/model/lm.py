"""`RouterAugmentedLM`: any decoder-only transformers model with routers, LoRA and routed decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from firstlab.model import storage
from firstlab.model.arguments import (
    assumed_mask,
    check_forward,
    check_mask,
    check_not_wrapped,
    check_prompt,
    check_rows,
    own_cache,
)
from firstlab.model.cache import RoutedCache
from firstlab.model.exit_rule import EarlyExit
from firstlab.model.generation_options import CHUNKS_REPEAT_THE_CACHE, check_generation_options, option_value
from firstlab.model.layers import (
    IntermediateHead,
    check_decoder,
    find_cache,
    find_decoder,
    make_dense,
    make_routable,
    routing,
)
from firstlab.model.lora import LoraSettings, add_lora, lora_layers, merge_lora
from firstlab.model.loss import OutputHead, predicting, token_cross_entropy
from firstlab.model.prompt_cache import PromptCache, PromptReading, Split
from firstlab.model.quantization import is_quantized
from firstlab.model.routers import Routers, RouterSettings
from firstlab.model.routes import Routes, check_routes
from firstlab.model.teacher_forcing import ConstantPromptPass, PromptPass, ResponsePass, TeacherForcedPass

# Half a GiB of fp32 logits for a vocabulary of 128k.
LOSS_CHUNK = 1024


@dataclass
class RouterAugmentedOutput(CausalLMOutputWithPast):
    """The output of the wrapped model plus what routing adds.

    Attributes:
        rho: [B, L] fp32, with gradient in a teacher-forced pass.
        loss_terms: Scalars `cross_entropy` (mean over label tokens), `regularization` (Σ ||r_i||²), `non_skip`
            (Σ_i batch mean of rho_i), and the label `token_count`; None without labels.
        token_losses: [B, T] fp32, the cross-entropy of every labelled token and 0 elsewhere; None without labels.
        states: [N, D], the decoder's output where it predicts a labelled token, row by row; only with
            `keep_logits=False`.
        ran: [B, T, L] boolean, the layers each token ran; only for teacher-forced `StepRoutes`, `EarlyExit` and
            `PrunedRoutes`.
        aux_loss, router_logits: Of a mixture of experts that was asked for them.
    """

    rho: Tensor | None = None
    # ModelOutput leaves out fields that are None; with labels it is always there.
    loss_terms: dict[str, Tensor] = None  # type: ignore[assignment]
    token_losses: Tensor | None = None
    states: Tensor | None = None
    ran: Tensor | None = None
    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


_OUTPUT_FIELDS = frozenset(field.name for field in fields(RouterAugmentedOutput))


class RouterAugmentedLM(nn.Module):
    """A causal LM whose prompt decides which layers decode skips.

    Wraps `lm` in place: its parameters, module names and state-dict keys stay as they are.

    Args:
        lm: A loaded transformers decoder-only model.
        settings: How the routers read hidden states and decide.

    Attributes:
        gradient_checkpointing: Recompute layer activations in the backward pass.
        loss_chunk: Positions whose logits exist at a time with `forward(keep_logits=False)`.

    Raises:
        ValueError: The model's layers cannot be routed.
    """

    def __init__(self, lm: PreTrainedModel, settings: RouterSettings | None = None) -> None:
        super().__init__()
        check_not_wrapped(lm)
        decoder, layers = find_decoder(lm)
        if not isinstance(lm, GenerationMixin):
            raise ValueError(
                f"{type(lm).__name__} has no language-model head; load it with AutoModelForCausalLM.from_pretrained"
            )
        check_decoder(lm, decoder)
        self.lm: PreTrainedModel = lm
        hidden_size = lm.config.get_text_config(decoder=True).hidden_size
        # Weights that accelerate has moved to a disk are on no device.
        device = next((each.device for each in layers.parameters() if each.device.type != "meta"), None)
        self.routers = Routers(len(layers), hidden_size, settings).to(device)
        # A cache that cannot carry routes is refused now, not after training.
        caches = {type(each) for each in RoutedCache(lm.config, self.routers).layers}
        self._reads_prompts_apart = caches <= {DynamicLayer, DynamicSlidingWindowLayer}
        self.gradient_checkpointing = False
        self.loss_chunk = LOSS_CHUNK
        self._takes_positions = "position_ids" in signature(lm.forward).parameters
        self._decoder_name = next(name for name, module in lm.named_modules() if module is decoder)
        make_routable(layers)
        if not hasattr(decoder, "routing_hooks"):  # the model may have been wrapped before
            decoder.routing_hooks = [  # type: ignore[assignment]
                decoder.register_forward_pre_hook(_begin_pass, with_kwargs=True),
                decoder.register_forward_hook(_end_pass, with_kwargs=True),
            ]
        self.train(lm.training)

    # -- loading and saving --

    @classmethod
    def from_pretrained(
        cls, path: str | Path, settings: RouterSettings | None = None, **kwargs: Any
    ) -> RouterAugmentedLM:
        """Load a hub id, a local transformers folder, or a folder written by `save_pretrained`.

        Args:
            path: Hub id or folder.
            settings: Of fresh routers; a folder written by `save_pretrained` brings its own.
            **kwargs: For transformers' `from_pretrained`: dtype, device_map, revision, attn_implementation, ...

        Raises:
            ModelUnavailableError: Nothing can be loaded from `path`; the message says what to do.
        """
        saved = storage.read_config(path)
        if saved is None:
            return cls(storage.load_base(str(path), **kwargs), settings)
        base = storage.load_base(storage.base_location(path, saved), **kwargs)
        model = cls(base, RouterSettings(**saved["router"]))
        storage.load_trained(model, path, saved)
        return model

    def save_pretrained(self, path: str | Path, save_base: bool = False) -> None:
        """Write config.json, routers.safetensors, the PEFT adapter if there is one, and, if asked, the base model.

        Raises:
            ValueError: The base is asked for and is quantized or has unmerged LoRA, is not asked for and could not be
                found again, or there are several adapters.
        """
        if save_base and is_quantized(self.lm):
            raise ValueError("save_base=True: the base is quantized, for decoding alone; save it before quantizing")
        storage.save(self, path, save_base)

    # -- properties --

    @property
    def config(self) -> Any:
        """The wrapped model's config."""
        return self.lm.config

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.lm.device

    @property
    def max_positions(self) -> int | None:
        """Tokens that a table of absolute positions has room for; None where positions are relative."""
        config = self.config.get_text_config(decoder=True)
        rotary = getattr(config, "rope_parameters", None) is not None
        return None if rotary else getattr(config, "max_position_embeddings", None)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers L."""
        return self.routers.num_layers

    @property
    def backbone(self) -> nn.Module:
        """The model without its head: tokens to the decoder's output."""
        base = self.lm.base_model
        return self._decoder if base is self.lm else base

    @property
    def _decoder(self) -> nn.Module:
        return self.lm.get_submodule(self._decoder_name)

    def train(self, mode: bool = True) -> RouterAugmentedLM:
        """Training mode for routers and LoRA; the base is frozen in use, so its own dropout stays off."""
        super().train(mode)
        self.lm.eval()
        for layer in lora_layers(self.lm):
            layer.lora_dropout.train(mode)
        return self

    def unwrap(self) -> PreTrainedModel:
        """Give the transformers model back as it came (LoRA layers stay if there are any)."""
        _, layers = find_decoder(self.lm)
        make_dense(layers)
        for hook in self._decoder.__dict__.pop("routing_hooks", ()):
            hook.remove()
        return self.lm

    def _check_wrapped(self) -> None:
        if not hasattr(self._decoder, "routing_hooks"):
            raise ValueError("the model was unwrapped: use it as transformers does, or wrap it again")

    # -- LoRA --

    def add_lora(self, settings: LoraSettings | None = None) -> None:
        """Inject fresh LoRA layers into every linear map of the decoder layers (§4.2, A.4)."""
        add_lora(self.lm, settings or LoraSettings())
        self.train(self.training)

    @property
    def has_lora(self) -> bool:
        """Whether unmerged LoRA layers are present."""
        return any(True for _ in lora_layers(self.lm))

    @contextmanager
    def lora_disabled(self) -> Iterator[None]:
        """Run the model as if it had no LoRA."""
        layers = list(lora_layers(self.lm))
        # PEFT's switch also flips requires_grad; what is trainable is not its business here.
        trainable = [(parameter, parameter.requires_grad) for parameter in self.lm.parameters()]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            for parameter, flag in trainable:
                parameter.requires_grad_(flag)

    def merge_and_unload(self) -> RouterAugmentedLM:
        """Fold LoRA into the base weights; returns self."""
        merge_lora(self.lm)
        return self

    def freeze_all_but(self, *trainable: str) -> None:
        """Freeze every parameter except those of "routers" (phase 1), "lora" (phase 2), or both."""
        if unknown := sorted(set(trainable) - {"routers", "lora"}):
            raise ValueError(f"trainable={unknown[0]!r} is unknown; choose from routers, lora")
        self.requires_grad_(False)
        if "routers" in trainable:
            self.routers.requires_grad_(True)
        if "lora" in trainable:
            for name, parameter in self.lm.named_parameters():
                parameter.requires_grad_("lora_" in name)

    # -- teacher-forced and cached forward --

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        prompt_mask: Tensor | None = None,
        objective: str = "soft",
        gate: str = "soft",
        pooled_tokens: str = "sequence",
        routes: Routes | None = None,
        keep_logits: bool = True,
        past_key_values: RoutedCache | None = None,
        **kwargs: Any,
    ) -> RouterAugmentedOutput:
        """One pass: teacher-forced without a cache, routed inference with one.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], or [B, seen + T] with a cache; 0 on padding.
            labels: [B, T], -100 where no loss is wanted; what follows no token has none either.
            prompt_mask: [B, T], true on prompt tokens. Default: the tokens before the first label, or all of them
                without labels.
            objective, gate, pooled_tokens, routes: See `TeacherForcedPass`.
            keep_logits: False, with labels, leaves out all logits but those that predict a labelled token, and has
                these `loss_chunk` at a time only: less time and much less memory, `logits` is None.
            past_key_values: A cache from `new_cache`.

        Returns:
            `logits` [B, T, V] (None with `keep_logits=False`), `loss` (mean cross-entropy), `rho` and `loss_terms`.

        Raises:
            ValueError: Arguments that do not go together or do not fit the batch.
        """
        self._check_wrapped()
        shape_source = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
        if shape_source is None:
            raise ValueError("forward needs input_ids [batch, tokens] or inputs_embeds")
        check_forward(self.lm, shape_source, labels, routes, keep_logits, past_key_values is not None, kwargs)
        if past_key_values is not None:
            if attention_mask is not None and "position_ids" not in kwargs:
                positions = self._positions(attention_mask)
                kwargs |= {name: value[:, -shape_source.shape[1] :] for name, value in positions.items()}
            out = self.lm(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=own_cache(past_key_values),
                use_cache=True,
                **kwargs,
            )
            return RouterAugmentedOutput(**_known(out), rho=past_key_values.rho)
        if attention_mask is None:
            attention_mask = torch.ones(shape_source.shape[:2], dtype=torch.long, device=shape_source.device)
        check_mask(shape_source, attention_mask)
        attended = attention_mask.bool()
        if prompt_mask is None:
            prompt_mask = attended if labels is None else attended & ((labels != -100).cumsum(1) == 0)
        prompt_mask = prompt_mask.bool() & attended
        if routes is not None:
            check_routes(routes, self.num_layers)
        current = TeacherForcedPass(
            self.routers,
            attended,
            prompt_mask,
            objective,
            gate,
            pooled_tokens,
            routes,
            self._exit_head(routes),
            self.gradient_checkpointing,
        )
        constant_prompt = current.decode_consistent and routes is None and not keep_logits and not kwargs
        if constant_prompt and torch.is_grad_enabled() and not any(p.requires_grad for p in self.lm.parameters()):
            assert input_ids is not None and labels is not None
            reading = self.read_prompts(input_ids, attention_mask, prompt_mask)
            if reading is not None:
                return self.respond(reading, labels, gate)
        run = self.lm if keep_logits else self.backbone
        with routing(current):
            out = run(
                input_ids=input_ids,
                attention_mask=attention_mask,
                use_cache=False,
                **self._positions(attention_mask) | kwargs,
            )
        rho = current.rho
        if labels is None:
            return RouterAugmentedOutput(**_known(out), rho=rho, ran=current.ran)
        if keep_logits:
            return RouterAugmentedOutput(
                **_known(out), **self._losses(out.logits, _same, labels, attended, rho), ran=current.ran
            )
        found = self._losses(out.last_hidden_state, self.output_head(), labels, attended, rho)
        return RouterAugmentedOutput(**found, ran=current.ran)

    def read_prompts(self, input_ids: Tensor, attention_mask: Tensor, prompt_mask: Tensor) -> PromptReading | None:
        """Prompts alone, as prefill runs them, without a graph but that from rho to the routers; for `respond`.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 0 on padding.
            prompt_mask: [B, T], true on prompt tokens.

        Returns:
            None where prompts and responses cannot be told apart (see `Split.of`), or the model's cache holds more than
            keys and values.
        """
        attended = attention_mask.bool()
        prompt = prompt_mask.bool() & attended
        split = Split.of(prompt, attended & ~prompt) if self._reads_prompts_apart else None
        if split is None:
            return None
        ids, real, length = split.take(input_ids), split.real, split.prompt_length
        cache = PromptCache()
        prompts = ConstantPromptPass(self.routers, real[:, :length])
        with torch.no_grad(), routing(prompts):
            out = self.backbone(
                input_ids=ids[:, :length],
                attention_mask=real[:, :length].long(),
                past_key_values=cache,
                use_cache=True,
                **{name: value[:, :length] for name, value in self._positions(real).items()},
            )
        cache.frozen = True
        return PromptReading(split, ids, cache, out.last_hidden_state, prompts.rho)

    def respond(
        self, reading: PromptReading, labels: Tensor, gate: str = "hard", routes: Tensor | None = None
    ) -> RouterAugmentedOutput:
        """The decode-consistent pass over the responses behind prompts that were read before.

        Backward goes through the response tokens only. The model must be as it was when it read, but for the routers
        where `routes` are forced.

        Args:
            reading: From `read_prompts`.
            labels: [B, T], as the ids that were read; -100 where no loss is wanted.
            gate: See `TeacherForcedPass`.
            routes: [L] or [B, L] boolean, or None for the routers' own.
        """
        split, length, rho = reading.split, reading.split.prompt_length, reading.rho
        real = split.real
        responses = ResponsePass(self.routers, rho, real[:, length:], gate, self.gradient_checkpointing, routes)
        with routing(responses):
            out = self.backbone(
                input_ids=reading.ids[:, length:],
                attention_mask=real.long(),
                past_key_values=reading.cache,
                use_cache=True,
                **{name: value[:, length:] for name, value in self._positions(real).items()},
            )
        states = torch.cat([reading.states, out.last_hidden_state], 1)
        found = self._losses(states, self.output_head(), split.take(labels).masked_fill(~real, -100), real, rho)
        found["token_losses"] = split.put_back(found["token_losses"], labels.shape[1])
        return RouterAugmentedOutput(**found)

    def _losses(
        self, found: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, attended: Tensor, rho: Tensor
    ) -> dict[str, Any]:
        """The fields of an output that labels give, from what [B, T, ...] `head` makes logits of."""
        wanted = predicting(labels, attended).to(found.device)
        states = found[:, :-1][wanted]
        losses = token_cross_entropy(head, states, labels[:, 1:].to(found.device)[wanted], self.loss_chunk)
        token_losses = losses.new_zeros(labels.shape)
        token_losses[:, 1:][wanted] = losses.detach()
        count = wanted.sum()
        loss = losses.sum() / count.clamp_min(1)
        terms = {
            "cross_entropy": loss,
            "regularization": self.routers.squared_norm(),
            "non_skip": rho.mean(0).sum(),
            "token_count": count,
        }
        return {
            "loss": loss,
            "states": None if head is _same else states,
            "rho": rho,
            "loss_terms": terms,
            "token_losses": token_losses,
        }

    def output_head(self) -> OutputHead:
        """Logits [N, V] of decoder outputs [N, D], as they come in `RouterAugmentedOutput.states`."""
        return OutputHead(self.lm, self._decoder_name)

    @torch.no_grad()
    def dense_states(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """The `states` [N, D] that the base model alone, every layer run and without LoRA, has where labels are."""
        with self.lora_disabled():
            out = self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                use_cache=False,
                **self._positions(attention_mask),
            )
        return out.last_hidden_state[:, :-1][predicting(labels, attention_mask.bool())]

    def _exit_head(self, routes: Routes | None) -> IntermediateHead | None:
        return IntermediateHead(self.lm) if isinstance(routes, EarlyExit) else None

    def _positions(self, attention_mask: Tensor) -> dict[str, Tensor]:
        if not self._takes_positions:
            return {}
        return {"position_ids": (attention_mask.long().cumsum(-1) - 1).clamp_min(0)}

    # -- routed inference --

    @torch.no_grad()
    def prompt_rho(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """rho of every layer as prefill measures it: [B, T] prompts -> [B, L] fp32."""
        self._check_wrapped()
        if attention_mask is None:
            defaults = self.lm.generation_config
            attention_mask = assumed_mask(input_ids, defaults.pad_token_id, defaults.eos_token_id)
        check_prompt(input_ids, attention_mask)
        # What stands behind every prompt's last token, such as responses, cannot matter.
        end = int(attention_mask.any(0).nonzero()[-1]) + 1
        input_ids, attention_mask = input_ids[:, :end], attention_mask[:, :end]
        current = PromptPass(self.routers, attention_mask.bool())
        with routing(current):
            self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                use_cache=False,
                **self._positions(attention_mask),
            )
        return current.rho

    def route(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Which layers decode will run for these prompts.

        Args:
            input_ids: [B, T] prompts, padded on any side.
            attention_mask: [B, T], 0 on padding.

        Returns:
            [B, L] boolean, true where the layer runs.
        """
        return self.routers.decide(self.prompt_rho(input_ids, attention_mask))

    def new_cache(self, prompt_length: int | None = None, routes: Routes | None = None) -> RoutedCache:
        """An empty cache that will carry this model's routes; see `RoutedCache`."""
        return RoutedCache(self.config, self.routers, prompt_length, routes, self._exit_head(routes))

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        routes: Routes | None = None,
        past_key_values: RoutedCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' own `generate` with routed decoding.

        Prompts may be padded on either side; right padding is moved to the left first, so a returned row is
        [padding, prompt, new tokens].

        Args:
            input_ids: [B, T] prompts (or `inputs_embeds=` [B, T, D]).
            attention_mask: [B, T], 0 on padding.
            routes: [L] or [B, L] boolean, forces which layers decode runs; or `StepRoutes` or `EarlyExit`, where that
                changes from step to step; or `PrunedRoutes`, which prefill follows, too.
            past_key_values: A cache of an earlier turn; its routes stay in force.
            **kwargs: Every option of transformers' `generate` and `GenerationConfig` that keeps one KV cache.

        Raises:
            ValueError: An option that routed decoding cannot honour, named in the message.
        """
        self._check_wrapped()
        check_generation_options(kwargs, self.lm.generation_config)
        if option_value("use_cache", kwargs, self.lm.generation_config) is False:
            kwargs["use_cache"] = True
        embeds = kwargs.get("inputs_embeds")
        if input_ids is None and embeds is None:
            raise ValueError("generate needs input_ids [batch, tokens] or inputs_embeds")
        prompt = input_ids if embeds is None else embeds
        assert prompt is not None
        cache = None if past_key_values is None else own_cache(past_key_values)
        if cache is None or cache.get_seq_length() == 0:
            if attention_mask is None:
                defaults = self.lm.generation_config
                pad, eos = (option_value(name, kwargs, defaults) for name in ("pad_token_id", "eos_token_id"))
                attention_mask = assumed_mask(prompt, pad, eos)
            check_prompt(prompt, attention_mask)
            check_rows(routes, prompt.shape[0])
            if not attention_mask[:, -1].all():
                order = attention_mask.long().argsort(dim=1, stable=True)
                attention_mask = attention_mask.gather(1, order)
                if input_ids is not None and input_ids.shape == order.shape:
                    input_ids = input_ids.gather(1, order)
                if embeds is not None:
                    kwargs["inputs_embeds"] = embeds.gather(1, order.unsqueeze(-1).expand_as(embeds))
            cache = self.new_cache() if cache is None else cache
            cache.expect_prompt(prompt.shape[1], routes, self._exit_head(routes))
        elif routes is not None:
            raise ValueError("routes= cannot be forced on a past_key_values that already carries routes; drop one")
        elif attention_mask is not None and not attention_mask[:, -1].all():
            raise ValueError("the new tokens after past_key_values are padded on the right; pad them on the left")
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask
        # New tokens behind a cache are then one piece, which gives the same tokens.
        if cache.get_seq_length() and CHUNKS_REPEAT_THE_CACHE:
            kwargs["prefill_chunk_size"] = None
        generate: Any = self.lm.generate  # transformers types its receiver more narrowly than PreTrainedModel
        return generate(input_ids, past_key_values=cache, **kwargs)


def _known(out: Any) -> dict[str, Any]:
    """What of an output has a place in `RouterAugmentedOutput`."""
    return {name: value for name, value in out.items() if name in _OUTPUT_FIELDS}


def _same(logits: Tensor) -> Tensor:
    return logits


def _begin_pass(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = find_cache(args, kwargs)
    if cache is None:
        return
    given = signature(decoder.forward).bind(*args, **kwargs).arguments
    inputs = given.get("input_ids")
    if inputs is None:
        inputs = given["inputs_embeds"]
    cache.begin_pass(inputs.shape[0], inputs.shape[1], given.get("attention_mask"))


def _end_pass(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache = find_cache(args, kwargs)
    if cache is not None:
        cache.end_pass()
