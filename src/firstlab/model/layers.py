"""Make decoder layers routable: the KV cache or the teacher-forced pass, if there is one, decides what a layer does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from inspect import signature
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from firstlab.model.cache import RoutedCache


class Routing(Protocol):
    """Decides what one layer does in one forward pass."""

    def run_layer(self, index: int, hidden: Tensor, run: Callable[[], Any], skip: Callable[[], Any]) -> Any: ...


_current: ContextVar[Routing | None] = ContextVar("firstlab_routing", default=None)


@contextmanager
def routing(value: Routing | None) -> Iterator[None]:
    """Applies `value` to every routable layer called without a routed cache in this context."""
    token = _current.set(value)
    try:
        yield
    finally:
        _current.reset(token)


def find_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> RoutedCache | None:
    """The routed cache among the arguments of a module call, under whatever name the architecture gives it."""
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, RoutedCache)), None)


class RoutableLayer(nn.Module):
    """Mixed in before a decoder layer's own class by `make_routable`."""

    dense_class: type[nn.Module]
    layer_index: int
    # Older architectures return (hidden, attention weights), newer ones a bare tensor: None. Learned from the first
    # call, 0 until then.
    output_length: int | None = 0
    # Set by `compiled`; for passes without a cache, whose code is the same for every layer.
    compiled_forward: Callable[..., Any] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cached = any(isinstance(each, Cache) for each in (*args, *kwargs.values()))
        run = partial((None if cached else self.compiled_forward) or super().forward, *args, **kwargs)
        current = find_cache(args, kwargs) or _current.get()
        if current is None:
            return run()
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.ndim != 3:
            raise ValueError(
                f"{self.dense_class.__name__} takes hidden states of shape {list(hidden.shape)}; only decoder layers "
                "from [batch, tokens, hidden size] to the same can be routed"
            )

        def run_and_note() -> Any:
            output = run()
            self.output_length = len(output) if isinstance(output, tuple) else None
            return output

        def skip() -> Any:
            if self.output_length == 0:
                run_and_note()  # in vain, once; keys and values that it leaves in a cache are freed behind the prompt
            return _as_output(hidden, self.output_length)

        return current.run_layer(self.layer_index, hidden, run_and_note, skip)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The subclass is made at run time: pickle by the dense class and make it again.
        own = {name: value for name, value in self.__dict__.items() if name != "compiled_forward"}
        return _rebuild, (self.dense_class,), own


def _as_output(hidden: Tensor, length: int | None) -> Any:
    return hidden if length is None else (hidden, *[None] * (length - 1))


def _rebuild(dense_class: type[nn.Module]) -> nn.Module:
    cls = _routable_class(dense_class)
    return cls.__new__(cls)


_routable_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _routable_class(dense_class: type[nn.Module]) -> type[nn.Module]:
    if dense_class not in _routable_classes:
        attributes = {"dense_class": dense_class, "__module__": dense_class.__module__}
        # Same name: FSDP wrapping policies and `_no_split_modules` go by it.
        _routable_classes[dense_class] = type(dense_class.__name__, (RoutableLayer, dense_class), attributes)
    return _routable_classes[dense_class]


def make_routable(layers: nn.ModuleList) -> None:
    for index, layer in enumerate(layers):
        layer.layer_index = index  # type: ignore[assignment]
        if not isinstance(layer, RoutableLayer):
            _set_class(layer, _routable_class(type(layer)))


@contextmanager
def compiled(layers: nn.ModuleList) -> Iterator[None]:
    """Within it, routable layers run through torch.compile where no cache takes part: once compiled for all layers."""
    limit = torch._dynamo.config.recompile_limit  # with and without LoRA, gradient, and sizes that change
    torch._dynamo.config.recompile_limit = max(64, limit)
    for layer in layers:
        dense: Any = layer.dense_class
        layer.__dict__["compiled_forward"] = torch.compile(MethodType(dense.forward, layer), dynamic=True)
    try:
        yield
    finally:
        torch._dynamo.config.recompile_limit = limit
        for layer in layers:
            del layer.__dict__["compiled_forward"]


def make_dense(layers: nn.ModuleList) -> None:
    for layer in layers:
        if isinstance(layer, RoutableLayer):
            _set_class(layer, layer.dense_class)
            for name in ("layer_index", "output_length"):
                layer.__dict__.pop(name, None)


def _set_class(layer: nn.Module, kind: type[nn.Module]) -> None:
    layer.__class__ = kind
    # A hook of accelerate (device maps, offloading) stays in front: it brings weights and inputs to one device.
    if "_old_forward" in layer.__dict__:
        layer._old_forward = MethodType(kind.forward, layer)  # type: ignore[assignment]


class IntermediateHead:
    """The wrapped model's final norm and LM head on the output of any layer, [N, D] -> [N, V].

    The model itself, with layers that pass the given state on, keeps the architecture's projections, scales and caps.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model
        self._first_layer: Any = find_decoder(model)[1][0]

    @torch.no_grad()
    def __call__(self, states: Tensor) -> Tensor:
        ids = torch.zeros(len(states), 1, dtype=torch.long, device=self._model.device)
        with routing(_PassOn(_as_output(states.unsqueeze(1), self._first_layer.output_length))):
            return self._model(input_ids=ids, use_cache=False).logits[:, 0]

    def __deepcopy__(self, memo: dict[int, Any]) -> IntermediateHead:
        return self  # a copied cache serves the same model


class _PassOn:
    def __init__(self, output: Any) -> None:
        self._output = output

    def run_layer(self, index: int, hidden: Tensor, run: Callable[[], Any], skip: Callable[[], Any]) -> Any:
        return self._output


def watch_passes(decoder: nn.Module) -> None:
    """Tell the routed cache, if there is one, of every pass of the decoder; calling it twice changes nothing."""
    if not hasattr(decoder, "routing_hooks"):
        decoder.routing_hooks = [  # type: ignore[assignment]
            decoder.register_forward_pre_hook(_begin_pass, with_kwargs=True),
            decoder.register_forward_hook(_end_pass, with_kwargs=True),
        ]


def _begin_pass(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if (cache := find_cache(args, kwargs)) is None:
        return
    given = signature(decoder.forward).bind(*args, **kwargs).arguments
    inputs = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
    cache.begin_pass(inputs.shape[0], inputs.shape[1], given.get("attention_mask"))


def _end_pass(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if (cache := find_cache(args, kwargs)) is None:
        return
    runs, weights = cache.layers_run, getattr(output, "attentions", None)
    # Where transformers records the weights of the layers that it calls, the others have no entry yet.
    if weights is not None and len(weights) == sum(runs) < len(runs):
        left = iter(weights)
        output.attentions = tuple(next(left) if run else None for run in runs)
    cache.end_pass()


def unwatch_passes(decoder: nn.Module) -> None:
    for hook in decoder.__dict__.pop("routing_hooks", ()):
        hook.remove()


def find_decoder(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The module that owns the decoder layers, and the layers; ValueError unless they stand in one `ModuleList`."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder model; only decoder-only models can be routed")
    expected = model.config.get_text_config(decoder=True).num_hidden_layers
    modules = dict(model.named_modules())
    # A list inside a numbered module (experts of a layer, say) is not the list of layers.
    lists = {
        name: each
        for name, each in modules.items()
        if isinstance(each, nn.ModuleList) and len(each) == expected and not re.search(r"(^|\.)\d+(\.|$)", name)
    }
    if len(lists) != 1:
        raise ValueError(
            f"{type(model).__name__}: expected exactly one ModuleList of {expected} decoder layers, found "
            f"{', '.join(lists) or 'none'}; only decoder-only models whose layers stand in one ModuleList can be routed"
        )
    [(name, layers)] = lists.items()
    return modules[name.rpartition(".")[0]], layers


# Keys by which configs say how many hidden states a token has between two layers.
_STREAMS = ("hc_mult", "hc_count", "altup_num_inputs")
# Names of tables of absolute positions.
_POSITIONS = ("embed_positions", "position_embeddings")


def check_decoder(model: PreTrainedModel, decoder: nn.Module) -> None:
    """Raises ValueError for a model whose prompts or layers cannot be told apart as routing needs."""
    taken, config = signature(decoder.forward).parameters, model.config.get_text_config(decoder=True)
    why = None
    if missing := [name for name in ("input_ids", "past_key_values") if name not in taken]:
        why = (
            f"{type(decoder).__name__}, which runs the layers, takes no {' and no '.join(missing)}; only decoder-only "
            "models with a key-value cache can be routed"
        )
    elif any(hasattr(decoder, x) for x in _POSITIONS) and "position_ids" not in signature(model.forward).parameters:
        why = "it has a table of positions and takes no position_ids, so its prompts depend on their padding"
    elif streams := [name for name in _STREAMS if hasattr(config, name)]:
        why = (
            f"its layers pass on {getattr(config, streams[0])} hidden states of every token ({streams[0]}); only "
            "decoder layers from [batch, tokens, hidden size] to the same can be routed"
        )
    elif getattr(config, "cross_attention_layers", None):
        why = "its layers that attend to an image do not run on a prompt of text alone"
    elif "shared" in (getattr(config, "indexer_types", None) or ()):
        why = "layers with a shared indexer need what the layer below has found, which a route may skip"
    elif any(hasattr(each, "router_states_scale") for each in decoder.modules()):
        why = "its routers of experts need what the layer below has found, which a route may skip"
    if why:
        raise ValueError(f"{type(model).__name__} cannot be routed: {why}")
