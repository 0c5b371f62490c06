"""Two line-aligned files, as parallel text comes."""

from pathlib import Path


def write(root: Path, name: str, pairs: list[tuple[str, str]], source: str = "en", target: str = "de") -> None:
    (root / f"{name}.{source}").write_text("".join(f"{pair[0]}\n" for pair in pairs), encoding="utf-8")
    (root / f"{name}.{target}").write_text("".join(f"{pair[1]}\n" for pair in pairs), encoding="utf-8")
