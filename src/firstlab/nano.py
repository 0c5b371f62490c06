"""Trains the nano model: a small deep Llama and its tokenizer, from generated or parallel text, on a plain CPU.

    python -m firstlab.nano                                            # the bundled model, conf/nano.yaml
    python -m firstlab.nano --config-name nano_parallel data_root=DIR  # a larger one, on real parallel text

The same command started again goes on where a killed one stopped, and gives the same weights. Processes share the
work of every step and add up their gradients; how many there are changes the weights by rounding only.

Notation used for tensor shapes: B rows of a batch, T tokens, N matrices of one shape.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import hydra
import numpy as np
import torch
import torch.distributed as dist
import transformers
from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from numpy.typing import NDArray
from omegaconf import MISSING, DictConfig, OmegaConf
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor, multiprocessing
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from firstlab.data.task import Example, Task

log = logging.getLogger(__name__)

CONFIG_DIR = str(Path(__file__).resolve().parents[2] / "conf")
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
# Words keep the space before them, digits stand alone, so that numbers are copied digit by digit.
_PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

Ints = NDArray[np.int64]


# ---------------------------------------------------------------------------------------------- settings


@dataclass(kw_only=True)
class TaskConfig:
    """One source of text."""

    task: Any = MISSING
    """A Hydra `_target_` that gives a `firstlab.data.task.Task`."""
    weight: float = 1.0
    """Share of this task in the training examples, relative to the other tasks."""
    count: int = 0
    """Generated tasks: how many different examples. 0: the task's own train pool."""


@dataclass(kw_only=True)
class ModelConfig:
    """Sizes of the Llama. `vocab_size` is an upper bound: a small text gives fewer merges."""

    vocab_size: int = MISSING
    hidden_size: int = MISSING
    intermediate_size: int = MISSING
    num_hidden_layers: int = MISSING
    num_attention_heads: int = MISSING
    num_key_value_heads: int = MISSING
    max_position_embeddings: int = MISSING
    initializer_range: float = MISSING


@dataclass(kw_only=True)
class TrainingConfig:
    """One run of `steps` steps, each `batches_per_step` batches of at most `tokens_per_batch` padded tokens."""

    steps: int = MISSING
    tokens_per_batch: int = MISSING
    batches_per_step: int = MISSING
    window: int = MISSING
    """Examples that are sorted by length together: more give less padding, fewer mix better."""
    max_length: int = MISSING
    """Longer examples are left out."""
    prompt_weight: float = MISSING
    """Loss weight of a prompt token; a response token weighs 1."""
    matrix_lr: float = MISSING
    """Peak learning rate of Muon, for the matrices inside the layers."""
    vector_lr: float = MISSING
    """Peak learning rate of AdamW, for embeddings and norms."""
    weight_decay: float = MISSING
    warmup_steps: int = MISSING
    decay_fraction: float = MISSING
    """Last part of the run, in which the learning rates fall linearly to zero."""
    clip_norm: float = MISSING
    checkpoint_every: int = MISSING
    log_every: int = MISSING


@dataclass(kw_only=True)
class EvaluationConfig:
    """Greedy generation on the held-out test sets."""

    examples: int = MISSING
    """Of each task; 0: all."""
    batch_size: int = MISSING
    max_new_tokens: int = MISSING


@dataclass(kw_only=True)
class NanoConfig:
    """Everything that `conf/nano.yaml` sets."""

    seed: int = MISSING
    output_dir: str = MISSING
    """Where the finished model goes."""
    work_dir: str = MISSING
    """Where prepared data and checkpoints are until then."""
    data_root: str | None = None
    """For use in the tasks, as `${data_root}`."""
    device: str = MISSING
    """cpu, cuda, or auto: cuda where there is one."""
    processes: int = MISSING
    """How many processes share a step on the CPU; cuda uses one."""
    threads: int = MISSING
    """Torch threads of each process."""
    tokenizer_examples: int = MISSING
    """Examples of each task that the tokenizer learns from."""
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


ConfigStore.instance().store(name="nano_schema", node=NanoConfig)


def check(config: NanoConfig) -> None:
    """Raises ValueError on impossible settings, before anything is generated or loaded."""
    training, model = config.training, config.model
    positive = {
        "processes": config.processes,
        "threads": config.threads,
        "tokenizer_examples": config.tokenizer_examples,
        "training.steps": training.steps,
        "training.batches_per_step": training.batches_per_step,
        "training.window": training.window,
        "training.checkpoint_every": training.checkpoint_every,
        "training.log_every": training.log_every,
    }
    for option, value in positive.items():
        if value < 1:
            raise ValueError(f"{option}={value} must be at least 1")
    if not config.tasks:
        raise ValueError("tasks is empty: give at least one task to train on")
    for name, task in config.tasks.items():
        if task.weight <= 0:
            raise ValueError(f"tasks.{name}.weight={task.weight} must be above 0; delete the task to leave it out")
    if config.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={config.device} must be auto, cpu or cuda")
    if training.max_length > min(training.tokens_per_batch, model.max_position_embeddings):
        raise ValueError(
            f"training.max_length={training.max_length} must not exceed training.tokens_per_batch="
            f"{training.tokens_per_batch} and model.max_position_embeddings={model.max_position_embeddings}"
        )
    if not 0 <= training.decay_fraction <= 1:
        raise ValueError(f"training.decay_fraction={training.decay_fraction} must be between 0 and 1")


# ------------------------------------------------------------------------------------------------- text


@runtime_checkable
class Generated(Protocol):
    """A task that makes as many training examples as one asks for, all apart from its test set."""

    def generate(self, count: int, seed: int) -> list[Example]: ...


def training_examples(task: Task, count: int, seed: int) -> list[Example]:
    """`count` generated examples, or the task's train pool when `count` is 0.

    Raises:
        ValueError: `count` is set for a task that generates nothing.
    """
    if count == 0:
        return task.train_pool()
    if not isinstance(task, Generated):
        raise ValueError(f"count={count} needs a task that generates text, {type(task).__name__} does not: set 0")
    return task.generate(count, seed)


def frame_lines(task: Task, example: Example) -> list[str]:
    """The fixed lines of a task's prompts, with the line ends around them."""
    prompt = task.prompt(example)
    for text in filter(None, (example.source, example.question)):
        prompt = prompt.replace(text, "\0")
    lines: list[str] = []
    for piece in prompt.split("\0"):
        lead = piece[: len(piece) - len(piece.lstrip("\n"))]
        parts = [line for line in piece.lstrip("\n").splitlines(keepends=True)]
        for part in parts:
            if part == "\n":
                lines[-1] += part
            else:
                lines.append(lead + part)
                lead = ""
    return lines


def train_tokenizer(texts: Iterable[str], frame: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every line of the prompts' frame is one token, so that prompts stay short.

    The start of every text and line gets a space, which decoding takes away, so that a word is the same token
    wherever it stands. BOS comes first; any Unicode text survives the round trip.
    """
    frame = sorted(set(frame))
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.Replace("\n", "\n "), normalizers.Prepend(" ")])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - len(frame),
            special_tokens=[PAD, BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.add_tokens([AddedToken(line, normalized=False, special=False) for line in frame])
    bpe.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace(Regex(r"(?:\A|(?<=\n)) "), "")]
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Corpus:
    """All training examples as token ids, one behind the other, task by task."""

    ids: Ints
    starts: Ints
    """Where each example starts in `ids`, and the end of the last one."""
    prompt_lengths: Ints
    sizes: Ints
    """Examples of each task."""

    def lengths(self) -> Ints:
        """Tokens of each example, prompt and response."""
        return np.diff(self.starts)

    def save(self, path: Path) -> None:
        part = path.with_suffix(".part.npz")
        np.savez(part, ids=self.ids, starts=self.starts, prompt_lengths=self.prompt_lengths, sizes=self.sizes)
        os.replace(part, path)

    @classmethod
    def load(cls, path: Path) -> Corpus:
        with np.load(path) as arrays:
            return cls(**{name: arrays[name] for name in arrays.files})


def encode_corpus(
    tokenizer: PreTrainedTokenizerFast, tasks: Sequence[tuple[Task, Sequence[Example]]], max_length: int
) -> Corpus:
    """Prompt and first reference of every example, closed with EOS; longer ones than `max_length` are left out.

    Raises:
        ValueError: Nothing of a task is left.
    """
    rows: list[list[int]] = []
    prompt_lengths: list[int] = []
    sizes: list[int] = []
    for task, examples in tasks:
        prompts = tokenizer([task.prompt(e) for e in examples])["input_ids"]
        responses = tokenizer([e.references[0] for e in examples], add_special_tokens=False)["input_ids"]
        before = len(rows)
        for prompt, response in zip(prompts, responses, strict=True):
            row = [*prompt, *response, tokenizer.eos_token_id]
            if len(row) <= max_length:
                rows.append(row)
                prompt_lengths.append(len(prompt))
        sizes.append(len(rows) - before)
        if sizes[-1] == 0:
            raise ValueError(
                f"training.max_length={max_length} leaves no example of {type(task).__name__}: raise it"
            )
    return Corpus(
        ids=np.concatenate([np.asarray(row, np.int64) for row in rows]),
        starts=np.cumsum([0, *map(len, rows)], dtype=np.int64),
        prompt_lengths=np.asarray(prompt_lengths, np.int64),
        sizes=np.asarray(sizes, np.int64),
    )


# ---------------------------------------------------------------------------------------------- batches


def endless(first: int, size: int, rng: np.random.Generator) -> Iterator[int]:
    """`first` to `first + size - 1`, permuted anew in each round."""
    while True:
        yield from (first + rng.permutation(size)).tolist()


def cut_by_tokens(rows: Ints, lengths: Ints, tokens: int) -> list[Ints]:
    """Rows, which are sorted by length, in runs of at most `tokens` tokens, padding counted."""
    batches: list[Ints] = []
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or (end + 1 - start) * lengths[rows[end]] > tokens:
            batches.append(rows[start:end])
            start = end
    return batches


def plan_steps(
    corpus: Corpus, weights: Sequence[float], training: TrainingConfig, seed: int
) -> Iterator[list[Ints]]:
    """The batches of each step, for ever; rows of a batch are of similar length.

    What a step sees does not depend on `training.steps`, so a run can be made longer or shorter on its way.
    """
    rng = np.random.default_rng([seed, 0])
    lengths = corpus.lengths()
    firsts = np.cumsum([0, *corpus.sizes[:-1]])
    streams = [
        endless(int(first), int(size), np.random.default_rng([seed, 1, task]))
        for task, (first, size) in enumerate(zip(firsts, corpus.sizes, strict=True))
    ]
    shares = [max(1, round(training.window * weight / sum(weights))) for weight in weights]
    pending: list[Ints] = []
    while True:
        drawn = [itertools.islice(stream, share) for stream, share in zip(streams, shares, strict=True)]
        rows = rng.permutation(np.fromiter(itertools.chain(*drawn), np.int64))
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches = cut_by_tokens(rows, lengths, training.tokens_per_batch)
        pending += [batches[i] for i in rng.permutation(len(batches))]
        while len(pending) >= training.batches_per_step:
            yield pending[: training.batches_per_step]
            del pending[: training.batches_per_step]


def collate(corpus: Corpus, rows: Ints, prompt_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [B, T], padded on the right with 0, the loss weight and the response mask of each token [B, T].

    The tokens of a response of n tokens weigh n^-1/2 each: short answers would be drowned by long ones if all
    tokens counted alike, and long ones carry more than one answer's worth of learning.
    """
    shape = (len(rows), int(corpus.lengths()[rows].max()))
    ids, weights = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    response = torch.zeros(shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        start, end = corpus.starts[row], corpus.starts[row + 1]
        prompt, length = int(corpus.prompt_lengths[row]), int(end - start)
        ids[i, :length] = torch.from_numpy(corpus.ids[start:end])
        response[i, prompt:length] = True
        weights[i, :prompt] = prompt_weight * prompt**-0.5
        weights[i, prompt:length] = (length - prompt) ** -0.5
    weights[:, 0] = 0.0  # nothing predicts BOS
    return ids, weights, response


# --------------------------------------------------------------------------------------------- training


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
    matrices on a CPU without bfloat16 are what nano has.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                updates = []
                for p in params:
                    state = self.state[p]
                    buffer = state.setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]))  # Nesterov
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for p, update in zip(params, orthogonalized(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=scale)


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


def build_optimizers(model: LlamaForCausalLM, training: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        Muon(matrices, lr=training.matrix_lr, weight_decay=training.weight_decay),
        torch.optim.AdamW(others, lr=training.vector_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def lr_scale(step: int, training: TrainingConfig) -> float:
    """Warm-up, constant, linear decay to zero: the factor of the peak learning rates at `step` (from 0)."""
    warm = (step + 1) / max(1, training.warmup_steps)
    decay = (training.steps - step) / max(1.0, training.decay_fraction * training.steps)
    return min(1.0, warm, decay)


def weighted_loss(
    model: LlamaForCausalLM, ids: Tensor, weights: Tensor, response: Tensor
) -> tuple[Tensor, Tensor]:
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


def load_checkpoint(
    path: Path, model: LlamaForCausalLM, optimizers: Sequence[torch.optim.Optimizer]
) -> Progress:
    """Restores what `save_checkpoint` wrote; without a file nothing changes and the run starts at step 0."""
    if not path.exists():
        return Progress()
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return Progress(**state["progress"])


def train(rank: int, world: int, config: NanoConfig, work: Path) -> None:
    """One process's share of the training run; the process of rank 0 writes checkpoints and the log."""
    torch.set_num_threads(config.threads)
    if world > 1:
        dist.init_process_group("gloo", f"file://{work.resolve()}/rendezvous", rank=rank, world_size=world)
    training, device = config.training, device_of(config)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    corpus = Corpus.load(work / "corpus.npz")
    model = build_model(config.model, tokenizer, config.seed).to(device)
    optimizers = build_optimizers(model, training)
    progress = load_checkpoint(work / "checkpoint.pt", model, optimizers)
    parameters = list(model.parameters())
    steps = plan_steps(corpus, [t.weight for t in config.tasks.values()], training, config.seed)
    began, first = time.perf_counter(), progress.step
    done_before, tokens_before = progress.seconds, progress.tokens
    response_loss, response_tokens = 0.0, 0
    for batches in itertools.islice(steps, first, training.steps):
        scale = lr_scale(progress.step, training)
        for optimizer, peak in zip(optimizers, (training.matrix_lr, training.vector_lr), strict=True):
            optimizer.param_groups[0]["lr"] = peak * scale
        collated = [collate(corpus, rows, training.prompt_weight) for rows in batches]
        total = sum(float(weights.sum()) for _, weights, _ in collated)
        for tensors in collated[rank::world]:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, part = weighted_loss(model, *(tensor.to(device) for tensor in tensors))
            (loss / total).backward()
            response_loss += float(part)
            response_tokens += int(tensors[2].sum())
        gradients = [p.grad for p in parameters if p.grad is not None]
        if world > 1:
            flat = parameters_to_vector(gradients)
            dist.all_reduce(flat)
            vector_to_parameters(flat, gradients)
        clip_grad_norm_(parameters, training.clip_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        progress.step += 1
        progress.tokens += int(sum(corpus.lengths()[rows].sum() for rows in batches))
        progress.seconds = done_before + time.perf_counter() - began
        if rank == 0 and (progress.step % training.checkpoint_every == 0 or progress.step == training.steps):
            save_checkpoint(work / "checkpoint.pt", model, optimizers, progress)
        if progress.step % training.log_every == 0 and rank == 0:
            spent = time.perf_counter() - began
            log.info(
                "step %d/%d  response loss %.3f  lr x%.2f  %d tok/s  %.2f M tokens  %.0f s  ETA %.0f s",
                progress.step,
                training.steps,
                response_loss / response_tokens,
                scale,
                (progress.tokens - tokens_before) / spent,
                progress.tokens / 1e6,
                progress.seconds,
                spent / (progress.step - first) * (training.steps - progress.step),
            )
            response_loss, response_tokens = 0.0, 0
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def device_of(config: NanoConfig) -> torch.device:
    """Where training runs."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def train_in_processes(config: NanoConfig, work: Path) -> None:
    """Trains to the last step, in `config.processes` processes on a CPU; this one is rank 0."""
    world = config.processes if device_of(config).type == "cpu" else 1
    (work / "rendezvous").unlink(missing_ok=True)
    others = [
        multiprocessing.get_context("spawn").Process(
            target=train, args=(rank, world, config, work), daemon=True
        )
        for rank in range(1, world)
    ]
    for process in others:
        process.start()
    train(0, world, config, work)
    for process in others:
        process.join()


# ------------------------------------------------------------------------------------------------- run


def recipe(config: NanoConfig) -> dict[str, Any]:
    """The settings that decide about the weights, but for the run's length, which may change on the way."""
    chosen = asdict(config)
    training = chosen["training"]
    for option in ("steps", "decay_fraction", "checkpoint_every", "log_every"):
        del training[option]
    return {name: chosen[name] for name in ("seed", "tokenizer_examples", "tasks", "model", "training")}


def prepare(config: NanoConfig, tasks: dict[str, Task], work: Path) -> None:
    """Writes tokenizer and corpus into `work` unless they are there already.

    Raises:
        ValueError: What is there was made by another recipe.
    """
    path = work / "recipe.json"
    if path.exists():
        if json.loads(path.read_text()) != recipe(config):
            raise ValueError(
                f"work_dir={config.work_dir} holds a run of another recipe (see recipe.json there): choose another "
                "work_dir, or delete this one to start anew"
            )
        return
    work.mkdir(parents=True, exist_ok=True)
    pools = {
        name: training_examples(task, config.tasks[name].count, config.seed) for name, task in tasks.items()
    }
    seen = [example for pool in pools.values() for example in pool[: config.tokenizer_examples]]
    tokenizer = train_tokenizer(
        (text for e in seen for text in (e.source, e.question, e.references[0]) if text),
        (line for name, task in tasks.items() for line in frame_lines(task, pools[name][0])),
        config.model.vocab_size,
    )
    tokenizer.model_max_length = config.model.max_position_embeddings
    tokenizer.save_pretrained(work / "tokenizer")
    corpus = encode_corpus(
        tokenizer, [(task, pools[name]) for name, task in tasks.items()], config.training.max_length
    )
    corpus.save(work / "corpus.npz")
    log.info("%d examples, %.1f M tokens, vocabulary %d", len(corpus.lengths()), len(corpus.ids) / 1e6, len(tokenizer))
    part = path.with_suffix(".part")
    part.write_text(json.dumps(recipe(config), indent=1))
    os.replace(part, path)


@hydra.main(config_path=CONFIG_DIR, config_name="nano", version_base="1.3")
def main(raw: DictConfig) -> None:
    """Prepares, trains, saves and scores; goes on where an earlier call was stopped."""
    OmegaConf.resolve(raw)
    config = OmegaConf.to_object(raw)
    assert isinstance(config, NanoConfig)
    check(config)
    tasks = {name: instantiate(chosen.task) for name, chosen in config.tasks.items()}
    work = Path(config.work_dir)
    prepare(config, tasks, work)
    train_in_processes(config, work)


if __name__ == "__main__":
    main()
