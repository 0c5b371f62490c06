"""Settings of routers and LoRA, for options and saved folders alike. Imports no torch, so that help is fast."""

from __future__ import annotations

from dataclasses import dataclass, field

INPUT_NORMS = ("none", "rms")
KINDS = ("layers", "routes")
PRICES = ("auto", "length", "tokens", "size")
#: Of an option that came later: at its default it is no part of a run's identity, so that earlier records still match.
LATER = {"later": True}


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(allowed)}")


@dataclass(frozen=True)
class RouterSettings:
    """What a set of routers needs to be used as it was trained."""

    input_norm: str = "none"  # or "rms"; of routers per layer
    threshold: float = 0.5  # a layer runs when rho >= threshold
    # "layers" (the paper: one router per layer) or "routes" (`RouteRouter`: one router over whole routes)
    kind: str = field(default="layers", metadata=LATER)
    # What a `RouteRouter` pays for time: "length" (per expected token of the response), "tokens" (the same for every
    # prompt), "size" (no price, routes of one size) or "auto" (the better of the first two by the validation score).
    price: str = field(default="auto", metadata=LATER)
    # No prompt gets a route whose predicted rise of the loss per token is above it; None is no limit.
    max_harm: float | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        check_choice("router.input_norm", self.input_norm, INPUT_NORMS)
        check_choice("router.kind", self.kind, KINDS)
        check_choice("router.price", self.price, PRICES)
        if self.max_harm is not None and not self.max_harm > 0:
            raise ValueError(f"router.max_harm={self.max_harm} must be above 0, or null for no limit")
        if not 0 < self.threshold < 1:
            raise ValueError(f"router.threshold={self.threshold} must lie strictly between 0 and 1")


@dataclass(frozen=True)
class LoraSettings:
    """LoRA hyper-parameters; the defaults are the paper's (A.4)."""

    rank: int = 8
    lora_alpha: int = 32  # the update is multiplied by lora_alpha / rank
    dropout: float = 0.1  # on the adapter's input
    # Names of linear maps; None for all of the decoder layers (q, k, v, o, gate, up, down, or what stands for them).
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        for name in ("rank", "lora_alpha"):
            if getattr(self, name) < 1:
                raise ValueError(f"lora.{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout} must be at least 0 and below 1")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("lora.target_modules=[] names nothing; give module names, or null for all linear maps")
