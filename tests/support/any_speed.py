"""A tiny model with a `RouteRouter` whose made-up fit lets prompts choose differently."""

from __future__ import annotations

import copy

import torch

from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.route_router import RouteRouter
from firstlab.model.settings import RouterSettings
from support.models import LAYERS, pair

SETS = [(), (3,), (2, 3), (2, 4), (1, 2, 4)]


def filled(router: RouteRouter, seed: int = 0) -> None:
    """A fit that makes prompts choose differently."""
    torch.manual_seed(seed)
    features = router.harm_weight.shape[1]
    codebook = torch.ones(len(SETS), LAYERS)
    for place, skipped in enumerate(SETS):
        codebook[place, list(skipped)] = 0
    router.set_fit(
        codebook=codebook,
        harm_weight=0.3 * torch.randn(len(SETS), features),
        harm_bias=torch.tensor([0, 0.05, 0.1, 0.1, 0.2]),
        length_weight=0.2 * torch.randn(features),
        length_bias=torch.tensor(1.0),
        rates=torch.tensor([0, 0.1, 0.3, 0.5]),
        prices=torch.tensor([0, 0.05, 0.2, 1.0]),
        default_rate=torch.tensor(0.25),
    )


def routed(architecture: str = "llama", **options) -> RouterAugmentedLM:
    lm, _ = pair(architecture)
    model = RouterAugmentedLM(copy.deepcopy(lm), RouterSettings(kind="routes", **{"price": "length", **options})).eval()
    filled(model.routers)
    return model
