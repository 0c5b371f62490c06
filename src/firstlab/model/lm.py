"""`RouterAugmentedLM`: any decoder-only transformers model with routers, LoRA and routed decoding."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from firstlab.model import inputs, lora, storage
from firstlab.model.cache import RoutedCache
from firstlab.model.generation_options import CHUNKS_REPEAT_THE_CACHE, check_generation_options, option_value
from firstlab.model.layers import (
    IntermediateHead,
    Routing,
    check_decoder,
    find_decoder,
    make_dense,
    make_routable,
    routing,
    unwatch_passes,
    watch_passes,
)
from firstlab.model.lora import LoraSettings
from firstlab.model.loss import OutputHead, labelled_losses, predicting
from firstlab.model.lossless import generate_lossless
from firstlab.model.output import RouterAugmentedOutput, known_fields
from firstlab.model.prompt_cache import Layout, PromptCache, PromptReading
from firstlab.model.quantization import is_quantized
from firstlab.model.route_router import RouteRouter
from firstlab.model.routers import Routers, RouterSettings, float32_kept
from firstlab.model.routes import FixedRoutes, RoutersDecide, Routes, as_asked, as_routes
from firstlab.model.teacher_forcing import PromptPass, TeacherForcedPass

LOSS_CHUNK = 1024  # half a GiB of fp32 logits for a vocabulary of 128k


class RouterAugmentedLM(nn.Module):
    """A causal LM whose prompt decides which layers decode skips.

    Wraps `lm`, a loaded decoder-only model of transformers, in place: its parameters, module names and state-dict keys
    stay as they are. ValueError where its layers cannot be routed.
    """

    def __init__(self, lm: PreTrainedModel, settings: RouterSettings | None = None) -> None:
        super().__init__()
        inputs.check_not_wrapped(lm)
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
        kind = RouteRouter if settings is not None and settings.kind == "routes" else Routers
        self.routers: Routers | RouteRouter = kind(len(layers), hidden_size, settings).to(device)
        # A cache that cannot carry routes is refused now, not after training.
        caches = {type(each) for each in RoutedCache(lm.config, self.routers).layers}
        self._reads_prompts_apart = caches <= {DynamicLayer, DynamicSlidingWindowLayer}
        self.gradient_checkpointing = False  # recompute layer activations in the backward pass
        self.cross_entropy = "torch"  # or "liger", see `firstlab.model.loss`
        self.loss_chunk = LOSS_CHUNK  # positions whose logits exist at a time with `forward(keep_logits=False)`
        self._takes_positions = "position_ids" in signature(lm.forward).parameters
        self._decoder_name = next(name for name, module in lm.named_modules() if module is decoder)
        # Merging LoRA takes the name from the config, as no folder holds those weights; the tokenizer stays the same.
        self.tokenizer_path = lm.config._name_or_path
        make_routable(layers)
        watch_passes(decoder)
        for parameter in lora.lora_parameters(lm):  # of an adapter that transformers has loaded
            parameter.data = parameter.data.float()
        self.train(lm.training)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        settings: RouterSettings | None = None,
        base: str | Path | None = None,
        merge: bool = False,
        **kwargs: Any,
    ) -> RouterAugmentedLM:
        """Load the hub id, local transformers folder, or folder written by `save_pretrained` that `path` names.

        Args:
            settings: Of fresh routers; a folder written by `save_pretrained` brings its own.
            base: Hub id or folder of the base model that such a folder belongs to, if it is not where it was.
            merge: Fold the LoRA of a PEFT folder into the weights; that of the base of a saved folder always is.
            **kwargs: For transformers' `from_pretrained`: dtype, device_map, revision, attn_implementation, ...
        """
        saved, kwargs = storage.find_saved(path, kwargs)
        if saved is None:
            if base is not None:
                raise ValueError(f"base={str(base)!r} is for a folder written by save_pretrained, which {path} is not")
            return cls(storage.load_base(path, merge, **kwargs), settings)
        model = cls(storage.load_base(base or saved.base, merge=True, **kwargs), saved.router)
        storage.load_trained(model.lm, model.routers, saved)
        return model.train(model.training)

    def save_pretrained(self, path: str | Path, save_base: bool = False, published: bool = False) -> None:
        """Write config.json, routers.safetensors, the PEFT adapter if any, and, if asked, the base and its tokenizer.

        With `published` the adapter gets a folder of its own; see `storage.save`.
        """
        if save_base and is_quantized(self.lm):
            raise ValueError("save_base=True: the base is quantized, for decoding alone; save it before quantizing")
        storage.save(self.lm, self.routers, path, save_base, self.tokenizer_path, published)

    @property
    def config(self) -> Any:
        return self.lm.config

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def max_positions(self) -> int | None:
        """Tokens that a table of absolute positions has room for; None where positions are relative."""
        config = self.config.get_text_config(decoder=True)
        rotary = getattr(config, "rope_parameters", None) is not None
        return None if rotary else getattr(config, "max_position_embeddings", None)

    @property
    def num_layers(self) -> int:
        return self.routers.num_layers

    @property
    def layer_routers(self) -> Routers:
        """The paper's routers, one per layer; ValueError where one router chooses whole routes."""
        if not isinstance(self.routers, Routers):
            raise ValueError("this needs routers per layer, and the model has router.kind=routes")
        return self.routers

    @property
    def backbone(self) -> nn.Module:
        """The model without its head: tokens to the decoder's output."""
        return self._decoder if self.lm.base_model is self.lm else self.lm.base_model

    @property
    def _decoder(self) -> nn.Module:
        return self.lm.get_submodule(self._decoder_name)

    def train(self, mode: bool = True) -> RouterAugmentedLM:
        """Training mode for routers and LoRA; the base is frozen in use, so its own dropout stays off."""
        super().train(mode)
        self.lm.eval()
        for layer in lora.lora_layers(self.lm):
            layer.lora_dropout.train(mode)
        return self

    def take_routers(self, routers: Routers | RouteRouter) -> None:
        """Use the routers of a model of the same architecture."""
        self.routers = routers.to(self.routers.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RouterAugmentedLM:
        # LoRA follows the model to its device, never to its dtype.
        with float32_kept(lora.lora_parameters(self.lm)):
            super()._apply(fn, recurse)
        return self

    def unwrap(self) -> PreTrainedModel:
        """Give the transformers model back as it came (LoRA layers stay if there are any)."""
        make_dense(find_decoder(self.lm)[1])
        unwatch_passes(self._decoder)
        return self.lm

    def _check_wrapped(self) -> None:
        if not hasattr(self._decoder, "routing_hooks"):
            raise ValueError("the model was unwrapped: use it as transformers does, or wrap it again")

    def add_lora(self, settings: LoraSettings | None = None) -> None:
        """Inject fresh LoRA layers, in float32, into the linear maps of the decoder layers (§4.2, A.4)."""
        lora.add_lora(self.lm, settings or LoraSettings())
        self.train(self.training)

    @property
    def has_lora(self) -> bool:
        return lora.has_lora(self.lm)

    def lora_disabled(self) -> AbstractContextManager[None]:
        return lora.lora_disabled(self.lm)

    def merge_and_unload(self) -> RouterAugmentedLM:
        """Fold LoRA into the base weights; returns self."""
        lora.merge_lora(self.lm)
        return self

    def freeze_all_but(self, *trainable: str) -> None:
        """Freeze every parameter except those of "routers" (phase 1), "lora" (phase 2), or both."""
        if unknown := sorted(set(trainable) - {"routers", "lora"}):
            raise ValueError(f"trainable={unknown[0]!r} is unknown; choose from routers, lora")
        self.requires_grad_(False)
        if "routers" in trainable:
            self.routers.requires_grad_(True)
        if "lora" in trainable:
            for parameter in lora.lora_parameters(self.lm):
                parameter.requires_grad_(True)

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
        routes: Routes | Tensor | None = None,
        keep_logits: bool = True,
        past_key_values: RoutedCache | None = None,
        prompt_continues: bool = False,
        **kwargs: Any,
    ) -> RouterAugmentedOutput:
        """One pass: teacher-forced without a cache, routed inference with one.

        Args:
            input_ids, labels: [B, T]; labels -100 where no loss is wanted.
            attention_mask: [B, T], or [B, seen + T] with a cache from `new_cache`; 0 on padding.
            prompt_mask: [B, T], true on prompt tokens: by default those before the first label, all without labels.
                With labels and without a cache, both masks and the labels may stay on the host: then nobody waits for
                the device to tell where the labels are.
            objective, gate, pooled_tokens, routes: See `TeacherForcedPass`.
            keep_logits: False, with labels, computes only the logits that predict a label, `loss_chunk` at a time, and
                returns none: less time and much less memory.
            prompt_continues: The tokens are a prompt's beginning, such as a system prompt whose cache is to be copied:
                the route is decided later, on the whole prompt, by the first call without this option or by `generate`.
        """
        self._check_wrapped()
        shape_source = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
        if shape_source is None:
            raise ValueError("forward needs input_ids [batch, tokens] or inputs_embeds")
        inputs.check_forward(
            self._decoder, shape_source, labels, routes, keep_logits, past_key_values is not None, kwargs
        )
        if attention_mask is None and not getattr(past_key_values, "decided", False):
            inputs.warn_of_padding(shape_source, self.lm.generation_config.pad_token_id)
        if past_key_values is not None:
            cache = inputs.own_cache(past_key_values)
            inputs.check_continuation(cache, shape_source.shape[1], generating=False)
            cache.set_prompt_continues(prompt_continues)
            out = self._run(None, self.lm, input_ids, attention_mask, cache, **kwargs)
            return RouterAugmentedOutput(**known_fields(out), rho=cache.rho)
        if prompt_continues:
            raise ValueError("prompt_continues=True needs past_key_values=model.new_cache(), which the rest comes to")
        if attention_mask is None:
            attention_mask = torch.ones(shape_source.shape[:2], dtype=torch.long, device=shape_source.device)
        inputs.check_mask(shape_source, attention_mask)
        attended = attention_mask.bool()
        if prompt_mask is None:
            prompt_mask = attended if labels is None else attended & ((labels != -100).cumsum(1) == 0)
        prompt_mask = prompt_mask.bool() & attended
        routes = self._decided(routes, input_ids, prompt_mask)
        real, prompt = (each.to(shape_source.device, non_blocking=True) for each in (attended, prompt_mask))
        current = TeacherForcedPass(
            self.routers, real, prompt, objective, gate, pooled_tokens, routes, self._exit_head(routes),
            checkpoint_layers=self.gradient_checkpointing,
        )  # fmt: skip
        constant_prompt = current.decode_consistent and routes is None and not keep_logits and not kwargs
        if constant_prompt and torch.is_grad_enabled() and not any(p.requires_grad for p in self.lm.parameters()):
            assert input_ids is not None and labels is not None
            reading = self.read_prompts(input_ids, attention_mask, prompt_mask)
            if reading is not None:
                return self.respond(reading, labels, gate)
        run = self.lm if keep_logits else self.backbone
        out = self._run(current, run, input_ids, attention_mask, **kwargs)
        kept = known_fields(out) if keep_logits else {}
        if labels is not None:
            found, head = (out.logits, None) if keep_logits else (out.last_hidden_state, self.output_head())
            kept |= self._losses(found, head, labels, attended, current.rho)
        return RouterAugmentedOutput(**kept | {"rho": current.rho}, ran=current.ran)

    def _decided(self, routes: Routes | Tensor | None, ids: Tensor | None, prompt_mask: Tensor) -> Routes | None:
        """Routes to force in a teacher-forced pass; None where per-layer routers decide while it runs."""
        rule = RoutersDecide() if routes is None else as_routes(routes)
        if not isinstance(rule, RoutersDecide):
            return rule
        self.routers.checked_rate(rule.skip_rate, len(prompt_mask))
        if isinstance(self.routers, Routers):
            return None
        if ids is None:
            raise ValueError("a model with router.kind=routes needs input_ids in a teacher-forced pass, or routes=")
        # It decides once the whole prompt is read, so the prompts run by themselves first.
        return FixedRoutes(self.route(ids, prompt_mask, rule.skip_rate))

    def _run(
        self,
        current: Routing | None,
        module: nn.Module,
        ids: Tensor | None,
        mask: Tensor | None,
        cache: Cache | None = None,
        **options: Any,
    ) -> Any:
        """The module's output for new tokens, with the mask [B, seen + T] of all; routed by `current` or the cache."""
        given = options["inputs_embeds"] if ids is None else ids
        mask = None if mask is None else mask.to(given.device, non_blocking=True)
        if mask is not None and self._takes_positions:
            positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
            options = {"position_ids": positions[:, -given.shape[1] :]} | options
        if cache is not None:
            options["past_key_values"] = cache
        with routing(current):
            return module(input_ids=ids, attention_mask=mask, use_cache=cache is not None, **options)

    def read_prompts(self, input_ids: Tensor, attention_mask: Tensor, prompt_mask: Tensor) -> PromptReading | None:
        """Prompts alone, as prefill runs them, without a graph but that from rho to the routers; for `respond`.

        None if prompts and responses cannot be told apart (`Layout.of`) or the cache holds more than keys and values.
        """
        attended = attention_mask.bool()
        prompt = prompt_mask.bool() & attended
        layout = Layout.of(prompt, attended & ~prompt) if self._reads_prompts_apart else None
        if layout is None:
            return None
        ids, length = layout.take(input_ids), layout.prompt_length
        real = layout.real.to(ids.device, non_blocking=True)
        cache = PromptCache()
        prompts = PromptPass(self.routers, real[:, :length], constant=isinstance(self.routers, Routers))
        with torch.no_grad():
            out = self._run(prompts, self.backbone, ids[:, :length], real[:, :length].long(), cache)
        cache.frozen = True
        return PromptReading(layout, ids, cache, out.last_hidden_state, prompts.rho)

    def respond(
        self,
        reading: PromptReading,
        labels: Tensor,
        gate: str = "hard",
        routes: Routes | Tensor | None = None,
        states: list[Tensor | None] | None = None,
        known: int = 0,
    ) -> RouterAugmentedOutput:
        """The decode-consistent pass over the responses behind prompts that were read; backward sees responses only.

        The model must be as it was when it read, but for the routers where `routes` are forced: one decision per prompt
        or for all. `labels` [B, T] stand as the ids that were read; the rest as in `TeacherForcedPass`.
        """
        layout, rho, length = reading.layout, reading.rho, reading.layout.prompt_length
        real, known_real = (layout.real.to(each.device, non_blocking=True) for each in (reading.ids, labels))
        attended = real[:, length:]
        responses = TeacherForcedPass(
            self.routers, attended, torch.zeros_like(attended), "decode_consistent", gate, routes=routes,
            checkpoint_layers=self.gradient_checkpointing, prompt_rho=rho, states=states, known=known,
        )  # fmt: skip
        out = self._run(responses, self.backbone, reading.ids[:, length:], real.long(), reading.cache)
        outputs = torch.cat([reading.states, out.last_hidden_state], 1)
        labels_there = layout.take(labels).masked_fill(~known_real, -100)
        found = self._losses(outputs, self.output_head(), labels_there, known_real, rho)
        found["token_losses"] = layout.put_back(found["token_losses"], labels.shape[1])
        return RouterAugmentedOutput(**found)

    def _losses(
        self, found: Tensor, head: OutputHead | None, labels: Tensor, attended: Tensor, rho: Tensor
    ) -> dict[str, Any]:
        losses: dict[str, Any] = labelled_losses(found, head, labels, attended, self.loss_chunk, self.cross_entropy)
        terms = {
            "cross_entropy": losses["loss"],
            "regularization": self.routers.squared_norm(),
            "non_skip": rho.mean(0).sum(),
            "token_count": losses.pop("count"),
        }
        return losses | {"rho": rho, "loss_terms": terms}

    def output_head(self) -> OutputHead:
        """Logits [N, V] of decoder outputs [N, D], as they come in `RouterAugmentedOutput.states`."""
        return OutputHead(self.lm, self._decoder_name)

    @torch.no_grad()
    def dense_states(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """The `states` [N, D] of the base model alone, every layer run and without LoRA, where labels are."""
        with self.lora_disabled():
            out = self._run(None, self.backbone, input_ids, attention_mask)
        states, places = out.last_hidden_state, predicting(labels, attention_mask.bool())
        return states.flatten(0, 1)[places.to(states.device, non_blocking=True)]

    def _exit_head(self, routes: Routes | None) -> IntermediateHead | None:
        return None if routes is None or routes.exit_rule is None else IntermediateHead(self.lm)

    # -- routed inference --

    def prompt_rho(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """rho of every layer as prefill measures it: [B, T] prompts -> [B, L] fp32; see `RoutedCache.rho`."""
        return self.routers.decision(self.prompt_means(input_ids, attention_mask))[0]

    @torch.no_grad()
    def prompt_means(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """What the routers read in prompts [B, T]: the means that they decide by, [B, L] or [B, F], fp32."""
        self._check_wrapped()
        attention_mask = self.prompt_mask(input_ids, attention_mask, {})
        # What stands behind every prompt's last token, such as responses, cannot matter.
        end = int(attention_mask.any(0).nonzero()[-1]) + 1
        input_ids = input_ids[:, :end]
        attention_mask = attention_mask[:, :end].to(input_ids.device, non_blocking=True)
        current = PromptPass(self.routers, attention_mask.bool())
        self._run(current, self.backbone, input_ids, attention_mask)
        return current.means

    def prompt_mask(self, prompt: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        """The mask of a prompt, checked; without one, what transformers' generate assumes."""
        if mask is None:
            defaults = self.lm.generation_config
            pad, eos = (option_value(name, options, defaults) for name in ("pad_token_id", "eos_token_id"))
            mask = inputs.assumed_mask(prompt, pad, eos)
        inputs.check_prompt(prompt, mask)
        return mask

    def check_routes(self, routes: Routes | None, prompts: int) -> None:
        """Raises ValueError for routes, or a skip rate, that do not fit the model or the number of prompts."""
        if routes is not None:
            routes.check(self.num_layers, prompts)
        if isinstance(routes, RoutersDecide):
            self.routers.checked_rate(routes.skip_rate, prompts)

    def route(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, skip_rate: float | Tensor | None = None
    ) -> Tensor:
        """[B, L] boolean, true where decode runs the layer for these prompts [B, T], padded on any side.

        `skip_rate` is for `router.kind=routes`: the rate over tokens to aim at, one for all prompts or [B].
        """
        self.routers.checked_rate(skip_rate, len(input_ids))
        return self.routers.decision(self.prompt_means(input_ids, attention_mask), skip_rate)[1]

    def new_cache(self, prompt_length: int | None = None, routes: Routes | Tensor | None = None) -> RoutedCache:
        """An empty cache that will carry this model's routes; see `RoutedCache`."""
        routes = None if routes is None else as_routes(routes)
        return RoutedCache(self.config, self.routers, prompt_length, routes, self._exit_head(routes))

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        routes: Routes | Tensor | None = None,
        skip_rate: float | Tensor | None = None,
        past_key_values: RoutedCache | None = None,
        lossless: bool = False,
        **kwargs: Any,
    ) -> Any:
        """transformers' own `generate` with routed decoding; a returned row is [padding, prompt, new tokens].

        Args:
            input_ids, attention_mask: [B, T] prompts (or `inputs_embeds=` [B, T, D]), 0 on padding on either side.
            routes: Forces which layers decode runs: a boolean tensor [L] or [B, L], or any `Routes`.
            skip_rate: How much the routers are to skip, over tokens, where they know any rate (`router.kind=routes`):
                one for all prompts, or [B].
            lossless: The route only drafts tokens, which dense passes verify: the text is the dense model's own. LoRA
                that is not merged belongs to the draft alone.
            past_key_values: A cache of an earlier turn, whose routes stay in force; or one that was filled with
                `prompt_continues=True`, whose tokens are the beginning of this prompt.
            **kwargs: Every option of transformers' `generate` and `GenerationConfig` that keeps one KV cache; a
                ValueError names any other.
        """
        self._check_wrapped()
        check_generation_options(kwargs, self.lm.generation_config)
        forced = as_asked(routes, skip_rate)
        if lossless:
            if past_key_values is not None:
                raise ValueError("lossless=True begins with the prompt; drop past_key_values")
            return generate_lossless(self, input_ids, attention_mask, forced, kwargs)
        if option_value("use_cache", kwargs, self.lm.generation_config) is False:
            kwargs["use_cache"] = True
        embeds = kwargs.get("inputs_embeds")
        if input_ids is None and embeds is None:
            raise ValueError("generate needs input_ids [batch, tokens] or inputs_embeds")
        cache = self.new_cache() if past_key_values is None else inputs.own_cache(past_key_values)
        prompt: Any = input_ids if embeds is None else embeds
        if cache.get_seq_length():
            inputs.check_new_tokens(prompt, attention_mask, cache)
            # New tokens behind a cache are then one piece, which gives the same tokens.
            if CHUNKS_REPEAT_THE_CACHE:
                kwargs["prefill_chunk_size"] = None
        else:
            attention_mask = self.prompt_mask(prompt, attention_mask, kwargs)
            attention_mask, input_ids, embeds = inputs.padded_on_the_left(attention_mask, input_ids, embeds)
            if embeds is not None:
                kwargs["inputs_embeds"] = embeds
        if not cache.decided:
            self.check_routes(forced, prompt.shape[0])
            cache.expect_prompt(prompt.shape[1], forced, self._exit_head(forced))
        elif forced is not None:
            raise ValueError("routes= cannot be forced on a past_key_values that already carries routes; drop one")
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask
        generate: Any = self.lm.generate  # transformers types its receiver more narrowly than PreTrainedModel
        return generate(input_ids, past_key_values=cache, **kwargs)
