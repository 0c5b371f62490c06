"""Publish a run, or measure it with lm-evaluation-harness.

    python -m firstlab.hub export run=DIR out=FOLDER     # a plain smaller model, of runs with method.skip_prefill=true
    python -m firstlab.hub push run=DIR/lora repo=ME/NAME # upload routers and LoRA with a model card
    python -m firstlab.hub lm_eval --model firstlab --model_args pretrained=DIR,skip_rate=0.25 --tasks hellaswag

Everything behind lm_eval goes to the harness's own command line. model.path=FOLDER says where a base has moved.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from firstlab.config.command_line import guarded, parse_options


@dataclass
class HubOptions:
    """Options of export and push: the run or folder, the variant, the folder or repository to write."""

    run: str = ""
    variant: str | None = None
    out: str = ""
    repo: str = ""
    private: bool = False


def _export(options: HubOptions, moved: dict[str, str]) -> None:
    from firstlab.hub.export import export
    from firstlab.hub.source import is_run, open_run

    if not is_run(options.run):
        raise ValueError(f"run={options.run} is no run directory of firstlab.train, which says what to remove")
    out = Path(options.out).expanduser()
    removed = export(open_run(options.run, options.variant, moved), out)
    print(f"{out}: the model without layers {', '.join(map(str, removed))}")


def _push(options: HubOptions, moved: dict[str, str]) -> None:
    from firstlab.hub.modeling import FirstlabForCausalLM

    base = {"base": moved["model.path"]} if moved else {}
    print(FirstlabForCausalLM.from_pretrained(options.run, **base).push_to_hub(options.repo, private=options.private))


@guarded
def main(arguments: list[str]) -> None:
    """Parse and do one of export, push, lm_eval."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    name, arguments = arguments[0], arguments[1:]
    if name == "lm_eval":
        _harness(arguments)
        return
    actions = {"export": (_export, "out"), "push": (_push, "repo")}
    if name not in actions:
        raise ValueError(f"{name!r} is unknown: choose export, push or lm_eval; see python -m firstlab.hub --help")
    base = "model.path="
    moved = dict(each.split("=", 1) for each in arguments if each.startswith(base))
    options, words = parse_options(HubOptions(), [each for each in arguments if not each.startswith(base)])
    action, target = actions[name]
    if words:
        raise ValueError(f"{words[0]!r} is not KEY=VALUE; see python -m firstlab.hub --help")
    for key in ("run", target):
        if not getattr(options, key):
            raise ValueError(f"{key}= is missing; see python -m firstlab.hub --help")
    action(options, moved)


def _harness(arguments: list[str]) -> None:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise ValueError("lm_eval needs the harness: pip install 'firstlab[lm-eval]'") from error
    # Its bootstrap ends worker processes by SIGTERM, which in them would raise what it raises here.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()


if __name__ == "__main__":
    main(sys.argv[1:])
