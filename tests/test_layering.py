"""Imports run one way: from the commands down to what knows nothing of the rest, never sideways or up."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "firstlab"

# Top to bottom: a folder imports from lower rows and from itself, never from its neighbours.
ROWS = (
    {"train", "evaluate", "generate", "benchmark", "dashboard"},
    {"serve"},
    {"hub"},
    {"run", "bench", "tables"},
    {"training", "evaluation"},
    {"methods", "engine", "config"},
    {"model", "data", "metrics", "store"},
)
HEIGHT = {part: -row for row, parts in enumerate(ROWS) for part in parts}


def files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def module_file(dotted: str) -> Path | None:
    """The file of a module of the package, or None for anything else."""
    path = PACKAGE.parent.joinpath(*dotted.split("."))
    return next((each for each in (path.with_suffix(".py"), path / "__init__.py") if each.is_file()), None)


def imported(path: Path) -> Iterator[Path]:
    """Files of the package that a file imports, also inside functions and under TYPE_CHECKING."""
    package = ["firstlab", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # A name may be a module of its own or something inside the module.
            names = [f"{base}.{each.name}" if module_file(f"{base}.{each.name}") else base for each in node.names]
        for name in names:
            if name == "firstlab":  # what the package itself offers comes from the model
                yield PACKAGE / "model" / "__init__.py"
            elif name.startswith("firstlab.") and (file := module_file(name)) is not None:
                yield file
            assert name.split(".")[0] not in ("experiments", "recipe"), f"{path} imports {name}"


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_nothing_but_commands_stands_at_the_root() -> None:
    assert {part_of(path) for path in files()} == set(HEIGHT)
    assert {path.stem for path in files() if path.parent == PACKAGE} == ROWS[0]


def test_imports_run_strictly_down_or_stay_in_their_folder() -> None:
    wrong = sorted(
        f"{path.relative_to(PACKAGE)} -> {target.relative_to(PACKAGE)}"
        for path in files()
        for target in imported(path)
        if part_of(target) != part_of(path) and HEIGHT[part_of(target)] >= HEIGHT[part_of(path)]
    )
    assert not wrong


def test_no_files_import_each_other() -> None:
    # A package's __init__ hands names on: whoever imports it imports what stands behind them.
    graph = {path: set(imported(path)) - {path} for path in files()}
    TopologicalSorter(graph).prepare()  # raises CycleError with the cycle's members
