"""`_target_` nodes: what is missing, unknown or of the wrong type is named before an object is made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from firstlab.config import instantiate


@dataclass
class Thing:
    size: int
    rate: float = 0.5
    names: str | Sequence[str] = "a"
    table: Mapping[str, int] | None = None
    on: bool = False


NAME = f"{__name__}.Thing"


@pytest.fixture(autouse=True)
def named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(instantiate, "_trusted", {NAME})


def build(node: Any, **extra: Any) -> Any:
    return instantiate.build(node, "data.task", object, **extra)


def test_what_fits_is_built():
    assert build({"_target_": NAME, "size": 2, "rate": 1, "names": ["x", "y"]}) == Thing(2, 1, ["x", "y"])
    assert build({"_target_": NAME, "rate": 1}, size=3) == Thing(3, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"data\.task\.size is missing"),
        ({"size": 1, "sise": 2}, r"data\.task\.sise is unknown: .*Thing takes size, rate, names, table, on"),
        ({"size": True}, r"data\.task\.size=True is not allowed: it takes a whole number"),
        ({"size": 1.5}, r"data\.task\.size=1\.5 is not allowed"),
        ({"size": 1, "rate": float("inf")}, r"data\.task\.rate=inf is not allowed: it takes a finite number"),
        ({"size": 1, "rate": False}, r"data\.task\.rate=False is not allowed"),
        ({"size": 1, "names": [1]}, r"data\.task\.names=\[1\] is not allowed: it takes text or a list"),
        ({"size": 1, "table": [1]}, r"data\.task\.table=\[1\] is not allowed: it takes keys and values or null"),
        ({"size": 1, "on": "yes"}, r"data\.task\.on='yes' is not allowed: it takes true or false"),
    ],
)
def test_what_does_not_fit_is_named(given: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        build({"_target_": NAME, **given})


@pytest.mark.parametrize("node", [None, "text", {"size": 1}])
def test_a_node_without_a_target(node: object):
    with pytest.raises(ValueError, match="data.task needs a `_target_`"):
        build(node)


def test_a_class_of_another_kind_is_named():
    with pytest.raises(ValueError, match=r"Thing' is not a firstlab task"):
        instantiate.build({"_target_": NAME, "size": 1}, "data.task", Mapping)


@pytest.mark.parametrize("trusted", [NAME, NAME.rpartition(".")[0], NAME.partition(".")[0]])
def test_a_class_that_the_user_names_is_built_and_no_other(trusted: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(instantiate, "_trusted", set())
    with pytest.raises(ValueError, match="what is saved runs no code of others.*trust="):
        build({"_target_": NAME, "size": 1})
    instantiate.trust([trusted])
    assert build({"_target_": NAME, "size": 1}) == Thing(1)
    with pytest.raises(ValueError, match="stands in a saved file"):
        build({"_target_": "subprocess.Popen", "args": ["true"]})


def test_defaults_of_a_class_that_may_not_be_imported_stay_unknown():
    ours = {"_target_": "firstlab.methods.sleb.SLEB", "target_skip": 1}
    assert instantiate.with_defaults(ours, "method")["search_width"] == 1
    assert isinstance(instantiate.with_defaults(ours, "method")["target_skip"], float)
    for name in ("subprocess.Popen", "firstlab.methods.nothing.X", "firstlab.methods.sleb.torch.jit.load"):
        assert instantiate.with_defaults({"_target_": name, "a": 1}, "method") == {"_target_": name, "a": 1}
