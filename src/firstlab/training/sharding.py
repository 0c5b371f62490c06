"""Train with a frozen base that is spread over the processes (trainer=fsdp), while each holds all that is trained."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from firstlab.model.layers import find_decoder
from firstlab.model.lm import RouterAugmentedLM


class ShardedBase(ModelParallelStrategy):
    """Lightning's strategy for modules that shard themselves in `configure_model`, as phases do with `shard_base`.

    Routers and LoRA are small and stay whole, so clipping sees their global norm, and checkpoints and optimizer states
    are those of any other strategy; Lightning's own would gather the base for each.
    """

    lightning_restore_optimizer = True
    lightning_module_state_dict = Strategy.lightning_module_state_dict
    optimizer_state = Strategy.optimizer_state
    save_checkpoint = Strategy.save_checkpoint
    load_checkpoint = Strategy.load_checkpoint
    load_model_state_dict = Strategy.load_model_state_dict
    load_optimizer_state_dict = Strategy.load_optimizer_state_dict

    def __init__(self, processes: int) -> None:
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1)


def shard_base(model: RouterAugmentedLM, mesh: DeviceMesh) -> None:
    """Shard the frozen weights of the decoder over a mesh of one dimension; each layer gathers its own to run."""
    decoder, layers = find_decoder(model.lm)
    if isinstance(decoder, FSDPModule):
        return
    head: Any = model.lm.get_output_embeddings()
    # Tied to the embedding, the head's weight is also read outside the decoder, which would not gather it.
    kept = {p for p in decoder.parameters() if p.requires_grad} | set(head.parameters())
    for module in (*layers, decoder):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=kept)


class SharedGradients(Callback):
    """Averages over processes the gradients of what each of them holds whole, before they are clipped."""

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for parameter in _trained(module):
            dist.broadcast(parameter.data, 0)

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        gradients = [p.grad for p in _trained(module) if p.grad is not None]
        together = torch.cat([each.flatten() for each in gradients]) / trainer.world_size
        dist.all_reduce(together)
        for each, mean in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
            each.copy_(mean.view_as(each))


def _trained(module: L.LightningModule) -> list[torch.nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
