"""Stream text from a trained run and show which layers decode ran.

    python -m firstlab.generate run=DIR "text to translate, summarise, ..."
    python -m firstlab.generate run=DIR question="Who ...?" "passage"
    echo "text" | python -m firstlab.generate run=DIR prompt=raw

The text is put into the prompt that the run was trained on, unless prompt=raw.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firstlab.entry import guarded, parse_options


@dataclass
class GenerateConfig:
    """Options of `python -m firstlab.generate`.

    Attributes:
        run: Run directory of firstlab.train, or a folder written by save_pretrained.
        variant: "router_lora", "router", or "base" (every layer runs); the most trained one by default.
        prompt: "task" puts the text into the run's prompt, "raw" takes it as it is.
        question: The question, for QA runs.
        max_new_tokens: Length limit; the run's own by default.
        do_sample, temperature, top_k: Sampling instead of greedy decoding.
        seed: For sampling.
    """

    run: str = ""
    variant: str | None = None
    prompt: str = "task"
    question: str = ""
    max_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 0.8
    top_k: int = 10
    seed: int = 0


def layer_map(runs: list[bool]) -> str:
    """One line: a block per layer that ran, a dot per layer that was skipped, and the skip rate."""
    drawn = "".join("█" if each else "·" for each in runs)
    skipped = runs.count(False)
    return f"layers 0 {drawn} {len(runs) - 1}   skipped {skipped} of {len(runs)} ({100 * skipped / len(runs):.1f} %)"


@guarded
def main(arguments: list[str]) -> None:
    """Parse, load, stream, show the route."""
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\n{GenerateConfig.__doc__}")
        return
    options, words = parse_options(GenerateConfig(), arguments)
    if not options.run:
        raise ValueError('run=DIR is missing; try: python -m firstlab.generate run=DIR "text"')
    if options.prompt not in ("task", "raw"):
        raise ValueError(f"prompt={options.prompt!r} is not allowed: choose one of task, raw")
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={options.max_new_tokens} must be at least 1")
    text = " ".join(words) if words else sys.stdin.read().strip()

    import torch
    from transformers import TextStreamer

    from firstlab.data.encoding import fit_prompt, prompt_ids
    from firstlab.data.task import Example
    from firstlab.experiment import load_run
    from firstlab.model import RouterAugmentedLM, load_tokenizer

    if (Path(options.run) / "config.yaml").is_file():
        config, model, variant, task = load_run(Path(options.run), options.variant)
        tokenizer = load_tokenizer(model.lm.config._name_or_path)
        limit, new_tokens = config.data.max_prompt_length, options.max_new_tokens or config.data.max_new_tokens
    else:
        if options.prompt == "task":
            raise ValueError(
                f"run={options.run} is not a run directory of firstlab.train; pass prompt=raw for a model folder"
            )
        model, variant, task = RouterAugmentedLM.from_pretrained(options.run), options.variant or "router_lora", None
        tokenizer = load_tokenizer(options.run)
        limit, new_tokens = 0, options.max_new_tokens or 80
    if options.prompt == "task":
        assert task is not None
        if task.kind == "qa" and not options.question:
            raise ValueError('this run answers questions: pass question="..." and the passage as text')
        text = fit_prompt(
            task, Example("input", text, ("",), options.question), tokenizer, limit, "data.max_prompt_length"
        )
    ids = torch.tensor([prompt_ids(tokenizer, text)], device=model.device)
    if ids.numel() == 0:
        raise ValueError("the text is empty, and this tokenizer adds no BOS token; give at least one word")
    torch.manual_seed(options.seed)
    dense = torch.ones(model.num_layers, dtype=torch.bool, device=model.device)
    sampling: dict[str, Any] = {"temperature": options.temperature, "top_k": options.top_k} if options.do_sample else {}
    result = model.generate(
        ids,
        routes=dense if variant == "base" else None,
        max_new_tokens=new_tokens,
        do_sample=options.do_sample,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        return_dict_in_generate=True,
        **sampling,
    )
    print(layer_map(result.past_key_values.routes[0].tolist()))


if __name__ == "__main__":
    main(sys.argv[1:])
