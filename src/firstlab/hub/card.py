"""Write the model card of a saved model from the record of its run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData

from firstlab import __version__
from firstlab.model.storage import read_config
from firstlab.store import results
from firstlab.store.files import read_own, write_atomically

_LOAD = """\
```python
import firstlab
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained({name!r}), AutoTokenizer.from_pretrained({name!r})
tokens = model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=80{rate})
```"""
_ADAPTER = "\n\nWithout firstlab, the LoRA alone loads with PEFT: `PeftModel.from_pretrained(base, {name!r}, {where})`."
_PLAIN = """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({name!r})
```"""
_ROUTED = (
    "While a prompt is read, all {layers} decoder layers run and small routers decide which of them the tokens of the "
    "response skip."
)
_EXPORTED = "Layers {skipped} of the base model were removed, for prompts and responses alike; any engine can run it."


class PublishedRun(NamedTuple):
    """The run that a folder of a saved model belongs to.

    Attributes:
        record: Of a finished run.
        variant: The variant that the folder holds.
        fixed: The run's method has fixed routes, which the folder does not hold.
    """

    directory: Path
    record: dict[str, Any] | None
    variant: str
    fixed: bool


def published_run(folder: Path) -> PublishedRun | None:
    """The run directory that a saved model stands in, if it does.

    Raises:
        ValueError: Its record or its routes are damaged.
    """
    directory = folder.resolve().parent
    if not (directory / "config.yaml").is_file() or folder.resolve().name not in ("router", "lora", "refit"):
        return None
    file = directory / "routes.json"
    saved = read_own(file, lambda found: found) if file.is_file() else None
    dense = saved is None or (isinstance(saved, list) and all(saved))
    variant = "router" if folder.resolve().name == "router" else "router_lora"
    fixed = not dense or (directory / "routes.jsonl").is_file()
    return PublishedRun(directory, results.read(directory), variant, fixed)


def write_card(
    folder: Path,
    layers: int,
    source: Path | None = None,
    removed: list[int] | None = None,
    name: str | None = None,
) -> None:
    """Write README.md.

    Args:
        folder: Where the model was saved.
        layers: Of the base.
        source: The folder inside a run that the model came from.
        removed: Layers that are not there any more, of a plain export.
        name: By which the model is loaded; that of the folder by default.
    """
    run, name = None if source is None else published_run(source), name or folder.name
    if run is None and source is not None and (source / "README.md").is_file():
        text = (source / "README.md").read_text(encoding="utf-8")
        for before in re.findall(r"AutoModelForCausalLM\.from_pretrained\('([^']+)'\)", text)[:1]:
            text = text.replace(f"'{before}'", f"'{name}'")
        write_atomically(folder / "README.md", text)
        return
    saved = read_config(folder)
    base = "" if saved is None else saved.base
    if run is not None and run.record is not None:
        base = str(run.record["config"]["model"].get("path", base))
    at_hub = base.count("/") == 1 and not Path(base).exists()
    tags = ["layer-skipping", "firstlab"]
    adapter = next((where for where in ("adapter", "") if (folder / where / "adapter_config.json").is_file()), None)
    if adapter is not None:
        tags.append("peft")
    licence = _licence(base)
    data = ModelCardData(
        base_model=base if at_hub else None,
        library_name="transformers" if removed is not None else "firstlab",
        license=licence,
        pipeline_tag="text-generation",
        tags=tags,
    )
    what = _ROUTED.format(layers=layers) if removed is None else _EXPORTED.format(skipped=removed)
    shown = "in `base/`" if saved is not None and saved.base == str(folder / "base") else f"`{base}`"
    origin = [f"- base model: {shown}", f"- licence of the base: {licence or 'see the base model'}"]
    title = name.rpartition("/")[2] if run is None else run.directory.name
    parts = [f"# {title}", f"{what} Made with firstlab {__version__}.", "\n".join(origin)]
    if run is not None and run.record is not None and run.variant in run.record["variants"]:
        parts.append(_measured(run.directory, run.record, run.variant))
    text = _LOAD if removed is None else _PLAIN
    rate = ", skip_rate=0.25" if saved is not None and saved.router.kind == "routes" else ""
    if adapter is not None:
        text += _ADAPTER.replace("{where}", f"subfolder={adapter!r}" if adapter else "")
    parts.append("## Load it\n\n" + text.format(name=name, rate=rate))
    write_atomically(folder / "README.md", f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _licence(base: str) -> str | None:
    """What the card of the base says, where it can be read."""
    local = Path(base).expanduser()
    if not base or (local.exists() and not (local / "README.md").is_file()):
        return None
    try:
        found = ModelCard.load(str(local / "README.md") if local.exists() else base, ignore_metadata_errors=True)
    except (OSError, ValueError):  # no card, or the hub cannot be reached: the card says so
        return None
    licence = found.data.get("license")
    return licence if isinstance(licence, str) else None


def _measured(directory: Path, record: dict[str, Any], variant: str) -> str:
    """Task, skipped layers, and quality with intervals beside that of the dense model."""
    from firstlab.run.report import neighbours

    found = record["variants"][variant]
    metric, skip = found["primary_metric"], found["skip"]
    dense = next((each for each in neighbours(directory, record) if each["method"] == "none"), None)
    rows = [(f"{record['label']} ({record.get('level') or 'own rate'})", found)]
    if dense is not None:
        name = "base_lora" if variant.endswith("_lora") and "base_lora" in dense["variants"] else "base"
        title = "dense, LoRA on the same data" if name == "base_lora" else "dense"
        rows = [(title, dense["variants"][name]), *rows]
    table = [f"| | {metric} [95 % interval] | skipped layers | TPOT ratio to dense |", "|---|---|---|---|"]
    if (confidence := record["config"]["evaluation"].get("confidence", 0.95)) != 0.95:
        table[0] = table[0].replace("95 %", f"{100 * confidence:g} %")
    for title, each in rows:
        score, ratio = each["metrics"].get(metric), each.get("timing", {}).get("tpot_ratio")
        quality = f"{score['value']:.1f} [{score['low']:.1f}, {score['high']:.1f}]" if score else "-"
        ratio = "-" if ratio is None else f"{ratio:.2f}"
        table.append(f"| {title} | {quality} | {100 * each['skip']['skip_rate']:.1f} % | {ratio} |")
    often = [f"{layer} ({100 * share:.0f} %)" for layer, share in enumerate(skip["per_layer"]) if share > 0]
    timed = any(each.get("timing", {}).get("tpot_ratio") is not None for _, each in rows)
    device = f" Time per output token was measured on {record.get('device', 'an unknown device')}." if timed else ""
    notes = [
        f"Task: {record['data']}, {found['n']} test prompts, seed {record['seed']}.{device}",
        f"Layers skipped, with the share of prompts: {', '.join(often) or 'none'}.",
    ]
    return "## Measured\n\n" + "\n\n".join(["\n".join(table), *notes])
