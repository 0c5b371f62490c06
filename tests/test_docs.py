"""README and docs tell the truth: commands parse, snippets run, links lead somewhere, figures are recorded, the site
builds."""

import csv
import functools
import html
import importlib
import io
import itertools
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from firstlab import __version__, bench
from firstlab.config.build import model_path
from firstlab.config.command_line import own_folders, parse_options
from firstlab.config.compose import conf_dir, register, search_path, settings
from firstlab.dashboard import DashboardOptions
from firstlab.hub.__main__ import HubOptions
from firstlab.run.load import load, read
from firstlab.run.sweep import expand
from firstlab.serve import ServeOptions
from firstlab.serve.__main__ import build
from firstlab.serve.load import LoadOptions
from firstlab.serve.page import PageOptions
from firstlab.tables import cells as tables
from support.models import prompts, routed
from support.pages import PAGES, ROOT, Command, blocks, commands
from support.tiny_run import SMALL, composed

RESULTS = ROOT / "docs" / "results" / "nano.html"
GATED = "meta-llama/Llama-3.2-3B"  # what snippets load; here the bundled model takes its place
ADDRESS = LoadOptions.url  # what snippets ask; here a tiny model answers
HYDRA_FLAGS = ("--help", "--cfg", "job", "--multirun")
SERVING = {"serve": ServeOptions, "serve.load": LoadOptions, "serve.page": PageOptions}
TEXT_COMMANDS = ("generate", "evaluate", "dashboard")


COMMANDS = {" ".join(command.words): command for page in PAGES for command in commands(page)}


@functools.cache
def saved_config(data: str) -> str:
    """config.yaml of a run on the bundled model."""
    return yaml.safe_dump(composed(f"data={data}")[0].to_dict())


@pytest.fixture
def page_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that pages show: blocks whose first line is a comment with a path."""
    for page in PAGES:
        for text in blocks(page, "python", "yaml"):
            named = re.match(r"# (\S+\.(?:py|yaml))\n", text)
            if named:
                (tmp_path / named[1]).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / named[1]).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def check(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises if the command could not start; nothing is trained, downloaded or installed."""
    words = list(itertools.dropwhile(lambda word: re.fullmatch(r"[A-Z_]+=.*", word), command.words))
    words = words[words[0] == "srun" :]  # which starts what follows on every node
    program, arguments = Path(words[0]).name, words[1:]
    if program in ("echo", "cd", "git") or command.words == ["source", ".venv/bin/activate"]:
        return
    if program == "make":
        check_make(arguments)
    elif program == "pip":
        check_pip(arguments)
    elif program == "torchrun":
        check_module(arguments[arguments.index("-m") + 1 :], command, monkeypatch)
    elif program == "python" and arguments[0] == "-m":
        check_module(arguments[1:], command, monkeypatch)
    elif program == "python" and arguments[0].startswith("experiments/"):
        check_recipe(ROOT / arguments[0], arguments[1:])
    else:
        pytest.fail(f"{command.page}: nobody checks {' '.join(command.words)!r}: say how, or leave it out")


def check_make(arguments: list[str]) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        pattern = rf"^{name} \?=" if equals else rf"^{name}:.* ## "
        assert re.search(pattern, text, re.MULTILINE), f"the Makefile has no {name}"


def check_pip(arguments: list[str]) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert arguments[:2] == ["install", "-e"]
    extras = re.fullmatch(r"\.\[([\w,-]+)\]", arguments[2])
    assert extras and all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras[1].split(","))


def check_recipe(script: Path, arguments: list[str]) -> None:
    """The recipe of the bundled model, which is no part of the package."""
    flag, name, *options = arguments
    assert script.is_file() and flag == "--config-name"
    text = (script.parent / "conf" / f"{name}.yaml").read_text(encoding="utf-8")
    assert all(re.search(rf"^{option.partition('=')[0]}: ", text, re.MULTILINE) for option in options)


def check_module(words: list[str], command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    module, arguments = words[0], words[1:]
    if module == "pytest":
        for argument in arguments:
            assert argument in ("-m", "-x", "gpu") or (ROOT / argument).exists(), argument
        return
    name = module.removeprefix("firstlab.")
    assert name != module, f"{module} is not firstlab's"
    importlib.import_module(module)
    if name == "hub":
        check_hub(arguments)
        return
    if name in SERVING:
        assert parse_options(SERVING[name](), arguments)[1] == []
        return
    if name in TEXT_COMMANDS:
        check_text_command(name, arguments, command.piped, monkeypatch)
        return
    config_name = name
    if name == "benchmark":
        for each in pkgutil.iter_modules(bench.__path__, "firstlab.bench."):
            importlib.import_module(each.name)  # registers its schema
        if arguments[:1] == ["training"]:
            config_name = f"{arguments.pop(0)}_speed"
        elif any(each.startswith("preset=") for each in arguments):
            config_name = "gpu_benchmark"
    arguments, folders = own_folders([each for each in arguments if each not in HYDRA_FLAGS])
    overrides = [*search_path(folders), *arguments]
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        if name == "train":
            check_runs(overrides)
        elif name == "benchmark":
            speed = compose(config_name, overrides)
            settings(speed, OmegaConf.get_type(speed))
        elif name == "tables":
            tables.load(compose(name, overrides))
        else:
            pytest.fail(f"{command.page}: nobody checks python -m {module}")


def check_hub(arguments: list[str]) -> None:
    """Its options are known; there is no such run, which is the one thing wrong with the command."""
    action, *options = arguments
    if action == "lm_eval":
        assert options[0::2] == ["--model", "--model_args", "--tasks"] and options[1] == "firstlab"
        assert {each.partition("=")[0] for each in options[3].split(",")} <= {"pretrained", "skip_rate", "variant"}
        return
    assert action in ("export", "push") and parse_options(HubOptions(), options)[1] == []


def check_runs(overrides: list[str]) -> None:
    """The run, or the last one of a sweep, would start."""
    given = {
        each.get_key_element(): list(each.sweep_string_iterator())
        if each.is_sweep_override()
        else [each.get_value_element_as_str()]
        for each in OverridesParser.create().parse_overrides(overrides)
    }
    grids = {}
    if "+sweep" in given:
        given.pop("hydra.searchpath", None)
        whole = compose("train", [f"{k}={v[0]}" for k, v in given.items() if len(v) == 1], return_hydra_config=True)
        from firstlab.run.sweep import with_cells

        sweeper = whole.hydra.sweeper
        grids = with_cells(sweeper.scale, sweeper.cells, sweeper.grids)
        given = {key: values for key, values in given.items() if not key.startswith(("+", "hydra"))}
    runs = expand(grids, given)
    assert runs
    load(compose("train", runs[-1]))


class Reached(Exception):
    """All options were understood."""


def check_text_command(name: str, arguments: list[str], piped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command that parses its own options, up to where it would load a model."""
    if name == "dashboard":
        assert parse_options(DashboardOptions(), arguments)[1] == []
        return

    def reached(directory: Path, variant: str | None, overrides: dict | None = None, config_dirs: tuple = ()) -> None:
        data = "mini_qa" if "qa" in str(directory) else "mini_ende"
        saved = Path("saved.yaml")
        saved.write_text(saved_config(data))
        read(saved, overrides, config_dirs)
        raise Reached

    [run] = (each.removeprefix("run=") for each in arguments if each.startswith("run="))
    if not (Path(run) / "config.yaml").exists():
        Path(run).mkdir(parents=True)
        (Path(run) / "config.yaml").touch()
    monkeypatch.setattr("firstlab.run.load.load_run", reached)
    if piped:  # another command writes the text
        monkeypatch.setattr(sys, "stdin", io.StringIO("text"))
    with pytest.raises(Reached):
        importlib.import_module(f"firstlab.{name}").main(arguments)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_every_command_would_start(command: Command, page_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    check(command, monkeypatch)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.parent.name != "tutorials"], ids=lambda page: page.name
)
def test_every_snippet_runs(page: Path, page_files: Path) -> None:
    ids, mask = prompts()
    # Pages whose snippets go on with a trained model and its prompts.
    names = {"model": routed(), "batch": {"input_ids": ids, "attention_mask": mask}} if page.stem == "any-speed" else {}
    names["__name__"] = page.name
    with served(page, page_files) as address:
        for text in blocks(page, "python"):
            if "# model/" not in text:  # pseudo-code
                text = text.replace(GATED, model_path("bundled:nano")).replace(ADDRESS, address)
                exec(compile(text, page.name, "exec"), names)  # a snippet goes on with what those before it made


@contextmanager
def served(page: Path, folder: Path) -> Iterator[str]:
    """A server for a page whose snippets ask one; its address."""
    if not any(ADDRESS in text for text in blocks(page, "python")):
        yield ADDRESS
        return
    pytest.importorskip("uvicorn", reason="needs the extra: pip install 'firstlab[serve]'")
    from support.serving import running, save_any_speed

    with running(build(ServeOptions(run=str(save_any_speed(folder)), device="cpu"), {}, None)) as address:
        yield address


def test_the_method_and_the_task_of_ones_own_train(page_files: Path, tiny_model_dir: Path) -> None:
    from firstlab.run.experiment import Experiment

    Path("articles").mkdir()
    for name in ("train", "test"):
        rows = [f'{{"text": "article {i} {name}", "title": "title {i}"}}' for i in range(20)]
        Path(f"articles/{name}.jsonl").write_text("\n".join(rows))
    small = [each for each in SMALL if not each.startswith(("method.", "data.train_size"))]
    own = ["method=by_length", "data=headlines", "data.root=articles", "phases=[evaluate]", "evaluation.tpot_prompts=0"]
    record = Experiment(*composed(*search_path(["mine"]), *small, f"model.path={tiny_model_dir}", *own)).run()
    assert record["variants"]["router"]["skip"]["skip_rate"] == 0.5


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
        path = "".join(target).partition("#")[0]
        assert re.match(r"https?://", path) or (page.parent / path).exists(), path


def test_pages_are_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900
    for page in PAGES[1:]:
        assert len(page.read_text(encoding="utf-8").split()) <= 1300, page.name
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert pages == {"index.md", *re.findall(r"\]\(([\w/-]+\.md)\)", index)}


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_the_table_of_results_is_that_of_the_records(page: str) -> None:
    """Kept share and measured rate of every cell stand in the method's row of the page that the records make."""
    [overview] = re.findall(r"<table.*?</table>", RESULTS.read_text(encoding="utf-8"), re.DOTALL)[:1]
    rows = {}
    for row in re.findall(r"<tr>(.*?)</tr>", overview, re.DOTALL):
        name, *cells = (html.unescape(re.sub(r"<[^>]+>", " ", each)) for each in row.split("</td>"))
        rows[name.replace(" ", "").lower()] = " ".join(cells)
    checked = 0
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        name = line.lstrip("| ").partition(" |")[0].replace(" ", "").lower() + "+lora"
        for kept, rate in re.findall(r"\| ([\d.]+)(?: %)? \(([\d.]+)(?: %)?\)", line):
            assert f"{kept} % kept at {rate} %" in rows[name], line
            checked += 1
    assert checked >= 16


def test_names_of_the_data_flow_exist() -> None:
    """The pseudo-code of the README and the picture beside it speak of the code as it is."""
    [flow] = [text for text in blocks(ROOT / "README.md", "python") if "# model/" in text]
    named = re.findall(r"# .*?([\w/]+)\.py: (\w+)\.?(\w+)?", flow)
    assert len(named) >= 9
    for module, outer, inner in named:
        found = getattr(importlib.import_module(f"firstlab.{module.replace('/', '.')}"), outer)
        assert not inner or hasattr(found, inner), f"{outer} has no {inner}"
    drawn = set(re.findall(r"\w+", (ROOT / "docs" / "pictures" / "data-flow.svg").read_text(encoding="utf-8")))
    assert {"RoutedCache", "run_layer", "Routers", "decide", "router_loss", "lora_loss", "dual_step"} <= drawn


def test_the_layout_lists_every_folder() -> None:
    [layout] = [text for text in blocks(ROOT / "README.md", "") if "src/firstlab/" in text]
    listed = set(re.findall(r"^  (\w+)/", layout, re.MULTILINE))
    package = ROOT / "src" / "firstlab"
    assert listed == {each.parent.name for each in package.glob("*/*.py")}


#: What a column of docs/what-skipping-gives.md shows of a row of summary.csv.
SHOWN = {
    "TPOT ms": lambda row: f"{float(row['tpot_mean_s']) * 1e3:.2f}",
    "TTFT ms": lambda row: f"{float(row['ttft_s']) * 1e3:.1f}",
    "TPOT ratio": lambda row: f"{float(row['tpot_ratio']):.2f}x",
    "limit by bytes": lambda row: f"{float(row['limit_ratio']):.2f}x",
    "layers skipped": lambda row: f"{float(row['skip_rate']):.1%}".replace("%", " %"),
}
SCORE = "{value:.1f} [{low:.1f}, {high:.1f}]"


def row_of(record: str) -> dict[str, str]:
    """The one row of a study's summary that `STUDY key=value ...` names."""
    study, *keys = record.strip("`").split()
    wanted = dict(key.split("=", 1) for key in keys)
    with (ROOT / "experiments" / study / "summary.csv").open(encoding="utf-8") as file:
        [row] = (row for row in csv.DictReader(file) if wanted.items() <= row.items() and not row.get("quantization"))
    return row


def test_every_figure_of_what_skipping_gives_stands_in_a_record() -> None:
    text = (ROOT / "docs" / "what-skipping-gives.md").read_text(encoding="utf-8")
    header, checked = [], 0
    for line in text.splitlines():
        cells = [each.strip() for each in line.split("|")[1:-1]]
        if cells[-1:] == ["record"]:
            header = cells
        elif cells and not cells[0].startswith("---"):
            row = row_of(cells[-1])
            for title, cell in list(zip(header, cells, strict=True))[:-1]:
                if title in SHOWN:
                    assert cell == SHOWN[title](row), line
                elif title in ("BLEU", "F1", "score"):
                    assert cell == SCORE.format(**{key: float(row[key]) for key in ("value", "low", "high")}), line
                checked += title in SHOWN or title in ("BLEU", "F1", "score")
    assert checked >= 30
    times = [row_of(f"benchmark name=epyc batch_size=1 decoder=engine skip_rate={rate}") for rate in ("0", "0.25")]
    for tokens, said in re.findall(r"of (\d+) tokens takes (0\.\d\d)", text):
        dense, routed = (float(row["ttft_s"]) + (int(tokens) - 1) * float(row["tpot_mean_s"]) for row in times)
        assert f"{routed / dense:.2f}" == said
    assert len(re.findall(r"of \d+ tokens takes 0\.\d\d", text)) == 2


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="needs MkDocs: pip install 'firstlab[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr and "not included in the" not in done.stderr, done.stderr
    for page in (ROOT / "docs").rglob("*.md"):
        html = (tmp_path / page.relative_to(ROOT / "docs").with_suffix(".html")).read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"https?://[^\"]+", html), page.name
    api = (tmp_path / "api.html").read_text(encoding="utf-8")
    assert 'id="firstlab.model.lm.RouterAugmentedLM.generate"' in api and "Every option of transformers" in api
    start = (tmp_path / "start.html").read_text(encoding="utf-8")
    assert 'href="results.html"' in start and 'src="pictures/data-flow.svg"' in start


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        if page.is_relative_to(ROOT / "docs"):
            assert f": {page.relative_to(ROOT / 'docs').as_posix()}\n" in menu


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    assert citation["version"] == __version__
    [paper] = citation["references"]
    assert paper["url"].endswith("2410.12513") and len(paper["authors"]) == 4
