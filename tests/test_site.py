"""The documentation's site builds, its figures are those of the records, and the citation is up to date."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from firstlab import __version__
from support.pages import PAGES, ROOT

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
