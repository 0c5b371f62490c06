"""What an installation gets: files, pins, declared dependencies, Makefile targets."""

import ast
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
PINS = [Requirement(line) for line in CONSTRAINTS if line and not line.startswith("#")]

RUNTIME = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
EXTRAS = [Requirement(line) for extra in PROJECT["project"]["optional-dependencies"].values() for line in extra]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    done = run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("firstlab-*.whl"))


def files_of(folder: Path) -> set[str]:
    """Relative paths below the folder, without what tools leave behind."""
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {name.as_posix() for name in names if not any(part.startswith((".", "__pycache__")) for part in name.parts)}


def test_wheel_carries_package_assets_configuration_and_licence(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"firstlab/{name}" for name in files_of(ROOT / "src" / "firstlab")}
    expected |= {f"firstlab/conf/{name}" for name in files_of(ROOT / "conf")}

    assert "firstlab/conf/train.yaml" in expected
    assert expected <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"firstlab", "hydra_plugins"}


def test_wheel_finds_its_configuration_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = "import firstlab.config.compose as c; print(c.__file__); print(c.conf_dir())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    module, conf = (Path(line) for line in done.stdout.splitlines()[-2:])
    assert module == tmp_path / "firstlab" / "config" / "compose.py"
    assert conf == tmp_path / "firstlab" / "conf"
    assert (conf / "train.yaml").is_file()


def test_sdist_carries_what_a_wheel_is_built_from(tmp_path: Path) -> None:
    done = run(sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", tmp_path)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("firstlab-*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "Makefile", "constraints.txt", "conf/train.yaml"} <= names
    assert "src/firstlab/__init__.py" in names


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_every_direct_dependency_has_one_fitting_pin(python: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.9", "extra": ""}
    pins: dict[str, list[Requirement]] = {}
    for pin in PINS:
        if pin.marker is None or pin.marker.evaluate(environment):
            pins.setdefault(canonicalize_name(pin.name), []).append(pin)

    build = [Requirement(line) for line in PROJECT["build-system"]["requires"]]
    for wanted in RUNTIME + EXTRAS + build:
        if wanted.name == "triton" or (wanted.marker is not None and not wanted.marker.evaluate(environment)):
            continue  # of Triton, each CUDA build of torch brings its own version
        found = pins.get(canonicalize_name(wanted.name), [])
        assert len(found) == 1, f"{wanted.name} on Python {python}: {len(found)} pins"
        (version,) = (clause.version for clause in found[0].specifier)
        assert version in wanted.specifier, f"{found[0]} does not fit {wanted}"


def test_pins_are_exact_and_hold_on_every_machine() -> None:
    for pin in PINS:
        assert re.fullmatch(r"==[^+*]+", str(pin.specifier)), f"{pin}: not an exact public version"
        assert pin.url is None
        assert not pin.name.startswith(("nvidia-", "cuda-", "triton")), f"{pin}: torch's own CUDA build brings it"
    assert not any(line.startswith("-") or "://" in line for line in CONSTRAINTS)


def test_every_import_of_the_package_is_a_declared_dependency() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    used = ("dashboard", "liger", "lm-eval", "quantization", "sweep")
    optional = map(Requirement, [each for extra in used for each in extras[extra]])
    declared = {canonicalize_name(requirement.name) for requirement in (*RUNTIME, *optional)}
    declared.add("triton")  # comes with torch where there is a GPU, and is not imported elsewhere
    distributions = packages_distributions()
    undeclared = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules = [node.module]
            for name in {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"firstlab"}:
                if declared.isdisjoint(map(canonicalize_name, distributions.get(name, [name]))):
                    undeclared.add(f"{path.relative_to(ROOT)}: {name}")
    assert not undeclared


def test_make_help_lists_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert phony
    plain, named = run("make"), run("make", "help")
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout == named.stdout
    listed = re.findall(r"^  make (\S+)\s+\S", plain.stdout, re.MULTILINE)
    assert sorted(listed) == sorted(phony[1].split())


def test_make_setup_names_a_python_that_is_not_there(tmp_path: Path) -> None:
    done = run("make", "setup", "PYTHON=no-such-python", f"VENV={tmp_path / 'environment'}")
    assert done.returncode != 0
    assert "no program called 'no-such-python'" in done.stderr
    assert not (tmp_path / "environment").exists()
