"""Imports run one way: entry points -> experiment, training -> methods, data, metrics -> model -> nothing."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "firstlab"

# Top to bottom: a part imports from its own row or from a lower one.
LAYERS = (
    {"train", "evaluate", "generate", "benchmark", "training_speed", "tables", "nano", "dashboard"},
    {
        "entry",
        "sweep",
        "report",
        "experiment",
        "run_directory",
        "start",
        "build",
        "routes",
        "evaluation",
        "timing",
        "speed",
        "throughput",
        "tracking",
        "compose",
        "config",
        "targets",
        "results",
    }
    | {"figures", "training"},
    {"methods", "data", "metrics"},
    {"model", "files", "energy"},
)
HEIGHT = {part: -row for row, parts in enumerate(LAYERS) for part in parts}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> Iterator[str]:
    """The top-level parts of firstlab that the file imports, also inside functions and under TYPE_CHECKING."""
    package = ["firstlab", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "firstlab" and len(parts) > 1:
                # What the package root itself offers (version, public class) comes from the model, at the bottom.
                yield parts[1] if (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").exists() else "model"


def import_graph() -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path != PACKAGE / "__init__.py":
            graph.setdefault(part_of(path), set()).update(set(imported_parts(path)) - {part_of(path)})
    return graph


def test_every_part_has_a_layer() -> None:
    unplaced = set(import_graph()) - set(HEIGHT)
    assert not unplaced, f"give {sorted(unplaced)} a row in LAYERS"


def test_no_part_imports_from_a_higher_layer() -> None:
    upward = [
        f"{part} -> {target}"
        for part, targets in import_graph().items()
        for target in targets
        if HEIGHT[target] > HEIGHT[part]
    ]
    assert not upward


def test_no_parts_import_each_other() -> None:
    TopologicalSorter(import_graph()).prepare()  # raises CycleError with the cycle's members
