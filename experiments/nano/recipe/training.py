"""The training run: model, optimizers, loss, checkpoints, and the loop that several processes share.

Notation used for tensor shapes: B rows of a batch, T tokens, N matrices of one shape.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import overload

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recipe.corpus import Corpus, Ints, collate, plan_steps
from recipe.settings import ModelConfig, RecipeConfig, StageConfig, TrainingConfig, device_of, uses_bf16

log = logging.getLogger(__name__)


def build_model(config: ModelConfig, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """The untrained Llama with tied embeddings. Layers start as the identity, which lets a deep one learn fast."""
    torch.manual_seed(seed)
    sizes = {**asdict(config), "vocab_size": len(tokenizer)}
    model = LlamaForCausalLM(
        LlamaConfig(
            **sizes,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def orthogonalized(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Nearly the closest semi-orthogonal matrices to [N, rows, columns], by Newton-Schulz iteration.

    The quintic's coefficients (Jordan et al. 2024, "Muon") trade exactness, singular values end up between about
    0.7 and 1.2, for speed.
    """
    x = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if matrices.shape[-2] <= matrices.shape[-1] else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, for matrices (Jordan et al. 2024), with decoupled weight decay.

    Unlike `torch.optim.Muon` it handles all matrices of one shape at once, in their own precision: many small
    matrices on a CPU without bfloat16 are what the bundled model has.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every matrix with a gradient; a `closure` computes gradients and loss first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                updates = []
                for p in params:
                    assert p.grad is not None
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                    buffer = self.state[p]["momentum"]
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]))  # Nesterov
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for p, update in zip(params, orthogonalized(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=scale)
        return loss


def build_optimizers(model: LlamaForCausalLM, training: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms; `set_rates` sets their rates."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        Muon(matrices, lr=0.0, weight_decay=training.weight_decay),
        torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def lr_scale(step: int, stage: StageConfig) -> float:
    """Warm-up, constant, linear decay to zero: the factor of the peak learning rates at `step` of a stage (from 0)."""
    warm = (step + 1) / max(1, stage.warmup_steps)
    decay = (stage.steps - step) / max(1.0, stage.decay_fraction * stage.steps)
    return min(1.0, warm, decay)


def weighted_loss(model: LlamaForCausalLM, ids: Tensor, weights: Tensor, response: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over one batch: of weight * cross entropy, and of the cross entropy of response tokens.

    Rows are padded on the right, so causal attention needs no mask; only positions that count get logits.
    """
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    counted = weights[:, 1:] > 0
    logits = model.lm_head(hidden[counted])
    losses = F.cross_entropy(logits.float(), ids[:, 1:][counted], reduction="none")
    return (losses * weights[:, 1:][counted]).sum(), losses.detach()[response[:, 1:][counted]].sum()


@dataclass
class Progress:
    """What a run has behind it."""

    step: int = 0
    tokens: int = 0
    """Tokens of examples, padding left out."""
    seconds: float = 0.0


def save_checkpoint(
    path: Path, model: LlamaForCausalLM, optimizers: Sequence[torch.optim.Optimizer], progress: Progress
) -> None:
    """Writes everything needed to go on; a kill at any time leaves the old file or the new one."""
    part = path.with_suffix(".part")
    state = {
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
        "progress": asdict(progress),
    }
    torch.save(state, part)
    os.replace(part, path)


def load_checkpoint(path: Path, model: LlamaForCausalLM, optimizers: Sequence[torch.optim.Optimizer]) -> Progress:
    """Restores what `save_checkpoint` wrote; without a file nothing changes and the run starts at step 0."""
    if not path.exists():
        return Progress()
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=False):
        optimizer.load_state_dict(saved)
    return Progress(**state["progress"])


def set_rates(optimizers: Sequence[torch.optim.Optimizer], stage: StageConfig, step: int) -> float:
    """Sets both learning rates for `step` of a stage; returns the factor of their peaks."""
    scale = lr_scale(step, stage)
    for optimizer, peak in zip(optimizers, (stage.matrix_lr, stage.vector_lr), strict=True):
        optimizer.param_groups[0]["lr"] = peak * scale
    return scale


def schedule(config: RecipeConfig, corpus: Corpus) -> Iterator[tuple[StageConfig, int, list[Ints]]]:
    """For every step of the run: its stage, its number in the stage (from 0), its batches."""
    for number, stage in enumerate(config.training.stages.values()):
        weights = [stage.weights.get(task, 0.0) for task in config.tasks]
        tokens = stage.tokens_per_batch or config.training.tokens_per_batch
        training = replace(config.training, tokens_per_batch=tokens)
        plan = plan_steps(corpus, weights, training, (config.seed, number))
        yield from ((stage, step, batches) for step, batches in zip(range(stage.steps), plan, strict=False))


def add_up_gradients(model: LlamaForCausalLM) -> None:
    """Replaces every gradient by its sum over all processes."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = parameters_to_vector(gradients)
    dist.all_reduce(flat)
    vector_to_parameters(flat, gradients)


def train(rank: int, world: int, config: RecipeConfig, work: Path) -> None:
    """One process's share of the training run; the process of rank 0 writes checkpoints and the log."""
    torch.set_num_threads(config.threads)
    if world > 1:
        dist.init_process_group("gloo", f"file://{work.resolve()}/rendezvous", rank=rank, world_size=world)
    training, device = config.training, device_of(config)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    corpus = Corpus.load(work / "corpus.npz")
    model = build_model(config.model, tokenizer, config.seed)
    if device.type == "cpu":
        model.set_attn_implementation("eager")  # torch's fused attention has a slow backward pass there
    torch.nn.Module.to(model, device)
    if config.compile:
        model.model.compile(dynamic=True)
    optimizers = build_optimizers(model, training)
    progress = load_checkpoint(work / "checkpoint.pt", model, optimizers)
    began, start = time.perf_counter(), replace(progress)
    response_loss, response_tokens = 0.0, 0
    for stage, step, batches in itertools.islice(schedule(config, corpus), start.step, None):
        scale = set_rates(optimizers, stage, step)
        model.config.num_hidden_layers = stage.layers or config.model.num_hidden_layers  # Llama runs so many
        prompt_weight = training.prompt_weight if step < stage.prompt_steps else 0.0
        collated = [collate(corpus, rows, prompt_weight) for rows in batches]
        total = sum(float(weights.sum()) for _, weights, _ in collated)
        for tensors in collated[rank::world]:
            with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(config)):
                loss, part = weighted_loss(model, *(tensor.to(device) for tensor in tensors))
            (loss / total).backward()
            response_loss += float(part)
            response_tokens += int(tensors[2].sum())
        if world > 1:
            add_up_gradients(model)
        clip_grad_norm_(model.parameters(), training.clip_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        spent = time.perf_counter() - began
        progress.step += 1
        progress.tokens += int(sum(corpus.lengths()[rows].sum() for rows in batches))
        progress.seconds = start.seconds + spent
        if rank > 0:
            continue
        if progress.step % training.checkpoint_every == 0 or progress.step == training.steps:
            save_checkpoint(work / "checkpoint.pt", model, optimizers, progress)
        if progress.step % training.log_every == 0:
            log.info(
                "step %d/%d  response loss %.3f  lr x%.2f  %d tok/s  %.2f M tokens  %.0f s  ETA %.0f s",
                progress.step,
                training.steps,
                response_loss / response_tokens,
                scale,
                (progress.tokens - start.tokens) / spent,
                progress.tokens / 1e6,
                progress.seconds,
                spent / (progress.step - start.step) * (training.steps - progress.step),
            )
            response_loss, response_tokens = 0.0, 0
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def train_in_processes(config: RecipeConfig, work: Path) -> None:
    """Trains to the last step, in `config.processes` processes on a CPU; this one is rank 0."""
    world = config.processes if device_of(config).type == "cpu" else 1
    (work / "rendezvous").unlink(missing_ok=True)
    others = [
        multiprocessing.get_context("spawn").Process(target=train, args=(rank, world, config, work), daemon=True)
        for rank in range(1, world)
    ]
    for process in others:
        process.start()
    train(0, world, config, work)
    for process in others:
        process.join()
