"""What an installation gets: files, pins, declared dependencies, Makefile targets."""

import ast
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from firstlab import __version__

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


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    done = run(sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", folder)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(folder.glob("firstlab-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


def test_the_wheel_installs_and_works_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    """As pip puts it into a fresh environment: the packages it needs are those of this one, to need no network."""
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-cache-dir", "--no-compile"]
    done = run(sys.executable, *pip, "--target", tmp_path / "site", wheel)
    assert done.returncode == 0, done.stderr

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "method:" in python("-m", "firstlab.train", "--help")
    assert "_target_: firstlab.methods.sleb.SLEB" in python("-m", "firstlab.train", "method=sleb", "--cfg", "job")
    program = "import firstlab, firstlab.config.compose as c; print(firstlab.__file__, c.conf_dir(), sep='\\n')"
    module, conf = (Path(line) for line in python("-c", program).splitlines())
    assert module == tmp_path / "site" / "firstlab" / "__init__.py"
    assert conf == tmp_path / "site" / "firstlab" / "conf"


def test_what_the_index_shows(wheel: Path) -> None:
    """Metadata of the wheel: a description that renders, the licence, every extra."""
    archive = zipfile.ZipFile(wheel)
    [name] = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode("utf-8"))
    assert metadata["Name"] == "firstlab" and metadata["Version"] == __version__
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2410.12513"]
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["project"]["optional-dependencies"])


def test_a_wheel_built_from_the_sdist_is_the_same(sdist: Path, wheel: Path) -> None:
    names = files_of(sdist)
    assert {"pyproject.toml", "LICENSE", "Makefile", "constraints.txt", "CITATION.cff", "mkdocs.yml"} <= names
    assert {"conf/train.yaml", "docs/index.md", "tests/test_packaging.py"} <= names
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel"],
        cwd=sdist,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    again = zipfile.ZipFile(next((sdist / "dist").glob("*.whl")))
    assert {each.filename: each.CRC for each in again.infolist()} == {
        each.filename: each.CRC for each in zipfile.ZipFile(wheel).infolist()
    }


#: Each CUDA build of torch brings its own Triton; Gradio asks for older packages than the others.
UNPINNED = ("triton", "gradio")


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_every_direct_dependency_has_one_fitting_pin(python: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.9", "extra": ""}
    pins: dict[str, list[Requirement]] = {}
    for pin in PINS:
        if pin.marker is None or pin.marker.evaluate(environment):
            pins.setdefault(canonicalize_name(pin.name), []).append(pin)

    build = [Requirement(line) for line in PROJECT["build-system"]["requires"]]
    for wanted in RUNTIME + EXTRAS + build:
        if wanted.name in UNPINNED or (wanted.marker is not None and not wanted.marker.evaluate(environment)):
            continue
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
    used = ("dashboard", "liger", "lm-eval", "mlflow", "page", "serve", "sweep")
    optional = (Requirement(line) for name in used for line in extras[name])
    declared = {canonicalize_name(requirement.name) for requirement in (*RUNTIME, *optional)}
    # One comes with torch where there is a GPU; the benchmark there compares with the other if somebody installed it.
    declared |= {"triton", "flashinfer"}
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
