"""`_target_` nodes: what is missing, unknown or of the wrong type is named before an object is made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest

from firstlab.config import instantiate


@dataclass
class Thing:
    size: int
    rate: float = 0.5
    names: str | Sequence[str] = "a"
    inner: "Thing | None" = None
    table: Mapping[str, int] | None = None
    on: bool = False


NAME = f"{__name__}.Thing"


def test_what_fits_is_built():
    node = {"_target_": NAME, "size": 2, "rate": 1, "names": ["x", "y"], "inner": {"_target_": NAME, "size": 1}}
    assert instantiate.build(node, "thing") == Thing(2, 1, ["x", "y"], Thing(1))
    assert instantiate.build({"_target_": NAME}, "thing", size=3) == Thing(3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"thing\.size is missing"),
        ({"size": 1, "sise": 2}, r"thing\.sise is unknown: .*Thing takes size, rate, names, inner, table, on"),
        ({"size": True}, r"thing\.size=True is not allowed: it takes a whole number"),
        ({"size": 1.5}, r"thing\.size=1\.5 is not allowed"),
        ({"size": 1, "rate": float("inf")}, r"thing\.rate=inf is not allowed: it takes a finite number"),
        ({"size": 1, "rate": False}, r"thing\.rate=False is not allowed"),
        ({"size": 1, "names": [1]}, r"thing\.names=\[1\] is not allowed: it takes text or a list"),
        ({"size": 1, "table": [1]}, r"thing\.table=\[1\] is not allowed: it takes keys and values or null"),
        ({"size": 1, "on": "yes"}, r"thing\.on='yes' is not allowed: it takes true or false"),
    ],
)
def test_what_does_not_fit_is_named(given: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        instantiate.build({"_target_": NAME, **given}, "thing")


@pytest.mark.parametrize("node", [None, "text", {"size": 1}])
def test_a_node_without_a_target(node: object):
    with pytest.raises(ValueError, match="thing needs a `_target_`"):
        instantiate.build(node, "thing")
