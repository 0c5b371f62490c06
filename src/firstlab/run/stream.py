"""Stream text from a trained run or a model folder, and show which layers decode ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TextStreamer

from firstlab.config import instantiate
from firstlab.config.build import build_data, check_vocabulary
from firstlab.config.schema import GenerateConfig
from firstlab.data.encoding import fit_prompt, prompt_ids
from firstlab.data.task import Example
from firstlab.engine.engine import DecodeEngine
from firstlab.engine.sampling import Sampling
from firstlab.evaluation.decoding import check_engine
from firstlab.methods.base import routes_without
from firstlab.model.generation_options import pinned_generation, stop_tokens
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.quantization import check_quantization, quantize
from firstlab.model.routes import FixedRoutes, RoutersDecide, Routes
from firstlab.model.storage import load_tokenizer
from firstlab.run import load
from firstlab.run.decisions import decided_routes
from firstlab.training.prompt_set import PromptSet


def layer_map(skips: list[float]) -> str:
    """One line: a block per layer, the lower the more decode steps skipped it, a dot where all did; the skip rate."""
    levels = [8 if skip == 0 else 0 if skip == 1 else min(7, max(1, round(8 * (1 - skip)))) for skip in skips]
    drawn, count, skipped = "".join("·▁▂▃▄▅▆▇█"[level] for level in levels), len(skips), sum(skips)
    return f"layers 0 {drawn} {count - 1}   skipped {skipped:.3g} of {count} ({100 * skipped / count:.1f} %)"


def stream(options: GenerateConfig, text: str, moved: dict[str, str]) -> None:
    """Load what the options name, stream its response to the text, print its route; `moved` may hold model.path."""
    check_quantization(options.quantization)
    is_run = (Path(options.run) / "config.yaml").is_file()
    source = _run(options, text, moved) if is_run else _folder(options, text, moved)
    model, room = source.model, source.model.max_positions
    check_engine(model, "decoder", options.decoder)
    if not source.ids:
        raise ValueError("the text is empty, and this tokenizer adds no BOS token; give at least one word")
    if room is not None and len(source.ids) + source.new_tokens > room:
        sizes = f"the prompt has {len(source.ids)} tokens and max_new_tokens={source.new_tokens}"
        raise ValueError(f"{sizes}, but the model has {room} positions; shorten the text or lower max_new_tokens")
    if (rate := options.skip_rate) is not None:
        if source.routes is not None:
            raise ValueError(f"skip_rate={rate}: the routes of this variant are fixed; leave it out")
        model.routers.checked_rate(rate)
        source = source._replace(routes=RoutersDecide(rate))
    if options.lossless and options.decoder == "engine":
        raise ValueError("lossless=true and decoder=engine do not go together: leave one of them out")
    if options.quantization is not None:
        quantize(model.merge_and_unload().lm, options.quantization)
    with pinned_generation(model.lm):
        print(layer_map(_stream(source, options)))


class _Source(NamedTuple):
    """What decodes, and what it decodes."""

    model: RouterAugmentedLM
    tokenizer: Any
    ids: list[int]
    routes: Routes | None
    new_tokens: int


def _run(options: GenerateConfig, text: str, moved: dict[str, str]) -> _Source:
    """A run directory of firstlab.train: its model, its prompt and what its method decides."""
    instantiate.trust([] if options.trust is None else [options.trust])
    config, method, model, variant = load.load_run(Path(options.run), options.variant, moved)
    data = build_data(config)
    check_vocabulary(config, data.tokenizer, model)
    raw, task = options.prompt == "raw", data.task
    if options.part and (raw or not task.parts):
        raise ValueError(f"part={options.part!r}: this prompt is of no mixture; leave part out")
    is_qa = not raw and task.parts.get(options.part, task).kind == "qa"
    if options.question and not is_qa:
        raise ValueError(f"question={options.question!r}: this prompt takes no question; leave it out")
    if is_qa and not options.question:
        raise ValueError('this run answers questions: pass question="..." and the passage as text')
    example = Example("input", text, (), options.question, part=options.part)
    prompts = PromptSet(model, data, [example], 1)
    if raw:
        prompts.texts = [text]
    routes = decided_routes(Path(options.run), method, variant, prompts)
    if not raw:
        text = fit_prompt(task, example, data.tokenizer, config.data.max_prompt_length, "data.max_prompt_length")
    ids = prompt_ids(data.tokenizer, text, raw or task.markup)
    return _Source(model, data.tokenizer, ids, routes, options.max_new_tokens or config.data.max_new_tokens)


def _folder(options: GenerateConfig, text: str, moved: dict[str, str]) -> _Source:
    """A folder written by save_pretrained, which knows no task."""
    if moved:
        raise ValueError(f"model.path is for run directories of firstlab.train; run={options.run} is none")
    if options.prompt == "task":
        raise ValueError(f"run={options.run} is no run directory of firstlab.train, but a model folder: add prompt=raw")
    for name, value in {"question": options.question, "part": options.part}.items():
        if value:
            raise ValueError(f"{name}={value!r}: prompt=raw takes the text alone; leave {name} out")
    model, tokenizer = RouterAugmentedLM.from_pretrained(options.run), load_tokenizer(options.run)
    routes = FixedRoutes(routes_without(model.num_layers, [])) if options.variant == "base" else None
    return _Source(model, tokenizer, prompt_ids(tokenizer, text, True), routes, options.max_new_tokens or 80)


def _stream(source: _Source, options: GenerateConfig) -> list[float]:
    """Print the response as it is decoded; of each layer, the share of decode steps that skipped it."""
    model, tokenizer, prompt, routes, limit = source
    ends, by_engine = stop_tokens(model.lm, tokenizer), options.decoder == "engine"
    streamer = TextStreamer(tokenizer, skip_prompt=not by_engine, skip_special_tokens=True)
    if by_engine:
        out = DecodeEngine(model.merge_and_unload(), len(prompt) + limit).generate(
            [prompt],
            limit,
            routes,
            ends,
            on_step=lambda read: streamer.put(torch.tensor(list(read.values()))),
            sampling=Sampling(options.temperature, options.top_k, seed=options.seed) if options.do_sample else None,
        )
        streamer.end()
        return list(out.layer_skips[0].tolist())
    torch.manual_seed(options.seed)
    sampling: Any = {"temperature": options.temperature, "top_k": options.top_k} if options.do_sample else {}
    result = model.generate(
        torch.tensor([prompt], device=model.device),
        routes=None if routes is None else routes.to(model.device),
        max_new_tokens=limit,
        do_sample=options.do_sample,
        streamer=streamer,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        eos_token_id=ends or None,
        return_dict_in_generate=True,
        lossless=options.lossless,
        **sampling,
    )
    if not options.lossless:
        return list(result.past_key_values.layer_skips()[0].tolist())
    [drafted], [accepted], [passes] = result.drafted, result.accepted, result.dense_passes
    print(f"{accepted} of {drafted} drafted tokens accepted in {passes} dense passes")
    return list((~result.routes)[0].float().tolist())
