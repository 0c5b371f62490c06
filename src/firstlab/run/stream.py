"""Stream text from a trained run and show which layers decode ran.

    python -m firstlab.generate run=DIR "text to translate, summarise, ..."
    python -m firstlab.generate run=DIR question="Who ...?" "passage"
    echo "text" | python -m firstlab.generate run=DIR prompt=raw

The text is put into the prompt that the run was trained on, unless prompt=raw. Text that looks like an option goes
behind --. Where the run's base model has moved, model.path=FOLDER says where it is.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firstlab.config.command_line import guarded, parse_options
from firstlab.data.files import has_text, without_marks

if TYPE_CHECKING:
    from torch import Tensor

    from firstlab.model import RouterAugmentedLM, Routes


@dataclass
class GenerateConfig:
    """Options of `python -m firstlab.generate`.

    Attributes:
        run: Run directory of firstlab.train, or a folder written by save_pretrained.
        variant: "router_lora", "router", or "base" (every layer runs); the most trained one by default.
        prompt: "task" puts the text into the run's prompt, "raw" takes it as it is.
        question: The question, for QA runs.
        part: Which task of a mixture the text is for.
        max_new_tokens: Length limit; the run's own by default.
        decoder: "generate" (transformers'), or "engine": the same text, greedy in float32, and faster.
        quantization: int8 or int4 for such weights in the decoder layers, or null.
        do_sample, temperature, top_k: Sampling instead of greedy decoding.
        seed: For sampling.
    """

    run: str = ""
    variant: str | None = None
    prompt: str = "task"
    question: str = ""
    part: str = ""
    max_new_tokens: int | None = None
    decoder: str = "generate"
    quantization: str | None = None
    do_sample: bool = False
    temperature: float = 0.8
    top_k: int = 10
    seed: int = 0


def layer_map(skips: list[float]) -> str:
    """One line: a block per layer, the lower the more decode steps skipped it, a dot where all did; the skip rate."""
    blocks = "·▁▂▃▄▅▆▇█"
    drawn = "".join(
        blocks[8 if skip == 0 else 0 if skip == 1 else min(7, max(1, round(8 * (1 - skip))))] for skip in skips
    )
    rate = sum(skips) / len(skips)
    return f"layers 0 {drawn} {len(skips) - 1}   skipped {sum(skips):.3g} of {len(skips)} ({100 * rate:.1f} %)"


@guarded
def main(arguments: list[str]) -> None:
    """Parse, load, stream, show the route."""
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\n{GenerateConfig.__doc__}")
        return
    base = "model.path="
    moved = dict(each.split("=", 1) for each in arguments if each.startswith(base))
    options, words = parse_options(GenerateConfig(), [each for each in arguments if not each.startswith(base)])
    if not options.run:
        raise ValueError('run=DIR is missing; try: python -m firstlab.generate run=DIR "text"')
    if options.prompt not in ("task", "raw"):
        raise ValueError(f"prompt={options.prompt!r} is not allowed: choose one of task, raw")
    if options.decoder not in ("generate", "engine"):
        raise ValueError(f"decoder={options.decoder!r} is not allowed: choose one of generate, engine")
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={options.max_new_tokens} must be at least 1")
    if not 0 < options.temperature < math.inf:
        raise ValueError(f"temperature={options.temperature} is not allowed: greater than 0; do_sample=false is greedy")
    if options.top_k < 0:
        raise ValueError(f"top_k={options.top_k} is not allowed: at least 0, which keeps all tokens")
    text = without_marks(" ".join(words) if words else sys.stdin.read().strip())
    if not has_text(text):
        raise ValueError("the text is empty; give at least one word")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the text is not valid UTF-8; convert it")

    import torch

    from firstlab.config.build import build_data, check_vocabulary
    from firstlab.data.encoding import fit_prompt, prompt_ids
    from firstlab.data.task import Example
    from firstlab.evaluation.decoding import check_engine
    from firstlab.model import FixedRoutes, RouterAugmentedLM, load_tokenizer
    from firstlab.model.generation_options import pinned_generation
    from firstlab.model.quantization import check_quantization, quantize
    from firstlab.run.decisions import decided_routes
    from firstlab.run.load import load_run
    from firstlab.training.prompt_set import PromptSet

    check_quantization(options.quantization)
    example, routes = Example("input", text, (), options.question, part=options.part), None
    if (Path(options.run) / "config.yaml").is_file():
        config, method, model, variant = load_run(Path(options.run), options.variant, moved)
        data = build_data(config)
        check_vocabulary(config, data.tokenizer, model)
        task, tokenizer = data.task, data.tokenizer
        prompts = PromptSet(model, data, [example], 1)
        if options.prompt == "raw":
            prompts.texts = [text]
        routes = decided_routes(Path(options.run), method, variant, prompts)
        limit, new_tokens = config.data.max_prompt_length, options.max_new_tokens or config.data.max_new_tokens
    else:
        if moved:
            raise ValueError(f"model.path is for run directories of firstlab.train; run={options.run} is none")
        if options.prompt == "task":
            raise ValueError(
                f"run={options.run} is not a run directory of firstlab.train; pass prompt=raw for a model folder"
            )
        model, task = RouterAugmentedLM.from_pretrained(options.run), None
        if options.variant == "base":
            routes = FixedRoutes(torch.ones(model.num_layers, dtype=torch.bool))
        tokenizer = load_tokenizer(options.run)
        limit, new_tokens = 0, options.max_new_tokens or 80
    check_engine(model, "decoder", options.decoder)
    if options.prompt == "task":
        assert task is not None
        if task.parts.get(options.part, task).kind == "qa" and not options.question:
            raise ValueError('this run answers questions: pass question="..." and the passage as text')
        text = fit_prompt(task, example, tokenizer, limit, "data.max_prompt_length")
    markup = task is None or options.prompt == "raw" or task.markup
    ids = torch.tensor([prompt_ids(tokenizer, text, markup)], device=model.device)
    if ids.numel() == 0:
        raise ValueError("the text is empty, and this tokenizer adds no BOS token; give at least one word")
    room = model.max_positions
    if room is not None and ids.shape[1] + new_tokens > room:
        raise ValueError(
            f"the prompt has {ids.shape[1]} tokens and max_new_tokens={new_tokens}, but the model has {room} "
            "positions; shorten the text or lower max_new_tokens"
        )
    if options.quantization is not None:
        quantize(model.merge_and_unload().lm, options.quantization)
    with pinned_generation(model.lm):
        if options.decoder == "engine":
            skips = _by_engine(model, tokenizer, ids[0].tolist(), routes, new_tokens, options)
        else:
            skips = _by_generate(model, tokenizer, ids, routes, new_tokens, options)
    print(layer_map(skips))


def _by_generate(
    model: RouterAugmentedLM, tokenizer: Any, ids: Tensor, routes: Routes | None, limit: int, options: GenerateConfig
) -> list[float]:
    """Stream through transformers' `generate`; of each layer, the share of decode steps that skipped it."""
    import torch
    from transformers import TextStreamer

    from firstlab.model.generation_options import stop_tokens

    torch.manual_seed(options.seed)
    sampling: dict[str, Any] = {"temperature": options.temperature, "top_k": options.top_k} if options.do_sample else {}
    result = model.generate(
        ids,
        routes=None if routes is None else routes.to(model.device),
        max_new_tokens=limit,
        do_sample=options.do_sample,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        eos_token_id=stop_tokens(model.lm, tokenizer) or None,
        return_dict_in_generate=True,
        **sampling,
    )
    shares: list[float] = result.past_key_values.layer_skips()[0].tolist()
    return shares


def _by_engine(
    model: RouterAugmentedLM,
    tokenizer: Any,
    prompt: list[int],
    routes: Routes | None,
    limit: int,
    options: GenerateConfig,
) -> list[float]:
    """Stream through the decode engine; of each layer, the share of decode steps that skipped it."""
    import torch
    from transformers import TextStreamer

    from firstlab.engine.engine import DecodeEngine
    from firstlab.engine.sampling import Sampling
    from firstlab.model.generation_options import stop_tokens

    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    out = DecodeEngine(model.merge_and_unload(), len(prompt) + limit).generate(
        [prompt],
        limit,
        routes,
        stop_tokens(model.lm, tokenizer),
        on_step=lambda read: streamer.put(torch.tensor(list(read.values()))),
        sampling=Sampling(options.temperature, options.top_k, seed=options.seed) if options.do_sample else None,
    )
    streamer.end()
    shares: list[float] = out.layer_skips[0].tolist()
    return shares
