"""What all command-line entry points share: one-line errors, resumable interrupts, several processes."""

from __future__ import annotations

import argparse
import errno
import functools
import logging
import os
import re
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

if TYPE_CHECKING:
    pass

Input = TypeVar("Input")
Options = TypeVar("Options")


def guarded(main: Callable[[Input], None], resumes: bool = True) -> Callable[[Input], None]:
    """Print a `ValueError`, or a full disk, as one message and exit with 2.

    On Ctrl-C or SIGTERM say how to go on and exit with 130.

    SIGTERM counts as Ctrl-C because the default would leave the processes of a sweep running.

    Args:
        main: The command.
        resumes: Whether the same command, given again, goes on where it was stopped.
    """
    way_out = "the same command goes on from the last checkpoint" if resumes else "nothing was written"

    @functools.wraps(main)
    def run(given: Input) -> None:
        quiet()
        # Not where a launcher or a library has a use of its own for it, nor in a thread, which may not.
        ours = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        ours = ours and threading.current_thread() is threading.main_thread()
        if ours:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            main(given)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            how = "without overwrite=true " * (resumes and _overwrites(given)) + way_out
            print(f"\ninterrupted; {how}", file=sys.stderr)  # on a line of its own, below a progress bar
            sys.exit(130)
        except Exception as error:
            if not _disk_is_full(error):
                raise
            print(f"\nerror: no space left on the disk: free some; {way_out}", file=sys.stderr)
            sys.exit(2)
        finally:
            if ours:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)

    return run


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether that is what an error comes from; libraries wrap the system's in their own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in str(error):  # safetensors keeps no more than the text
            return True
        error = error.__cause__ or error.__context__
    return False


def _overwrites(given: Any) -> bool:
    """Whether a composed configuration, or the arguments of a sweep, would start again from nothing."""
    if OmegaConf.is_config(given):
        return bool(OmegaConf.select(given, "overwrite"))
    return isinstance(given, list) and "overwrite=true" in map(str.lower, given)


def check_command_line(config_name: str, arguments: list[str]) -> None:
    """Compose once before Hydra does, to turn its complaints into one message with the allowed values.

    What comes with Hydra's own flags (--help, --multirun, ...) and the lists of values that narrow a sweep are left to
    Hydra, but for keys added with a plus, which it would take and no schema would see. Those that are arguments of a
    `_target_` are welcome: its class checks them.
    """
    arguments, folders = own_folders(arguments)
    flags = any(argument.startswith("-") for argument in arguments)
    given = arguments
    if any(argument.startswith("+sweep=") for argument in arguments):
        arguments = [argument for argument in arguments if "," not in argument]
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    from firstlab.config.compose import conf_dir, search_path

    arguments = [*search_path(folders), *arguments]
    added = ("+experiment=", "+sweep=")
    names = {each.name for each in Path(conf_dir()).iterdir() if each.is_dir()} - {"experiment", "sweep"}
    # Which keys there are depends on what is chosen from the groups, and where.
    chosen = (*added, "hydra.searchpath=", *(f"{name}=" for name in names))
    groups = [each for each in arguments if each.startswith(chosen)]
    groups = [each for each in groups if not (flags and "," in each)]
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        try:
            for argument in given:
                key, plus = argument.lstrip("+").partition("=")[0], argument.startswith("+")
                if config_name == "train" and key in ("experiment", "sweep") and not plus:
                    raise ValueError(f"{argument} names a file of conf/{key}: write +{argument}")
                if argument.startswith("+sweep=") and "," in argument:
                    raise ValueError(f"{argument}: one sweep at a time; conf/sweep/tables.yaml has those of all tables")
                if key in names and argument.partition("=")[2].strip("'\"").startswith(("[", "null")):
                    files = sorted(each.stem for each in (Path(conf_dir()) / key).glob("*.yaml"))
                    raise ValueError(f"{argument}: choose one of {', '.join(files)}")
                if plus and not argument.startswith(added):
                    node = compose(config_name, groups)
                    if not _has_target(OmegaConf.select(node, key.rpartition(".")[0])):
                        raise ValueError(_allowed(key, node))
            if not flags:
                compose(config_name, arguments)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            text = next(filter(None, map(_quoted, arguments)), str(error))
            unknown = re.search(r"Could not override '([\w.]+)'", text)
            if unknown:
                text = _allowed(unknown[1], compose(config_name, groups))
            else:
                text = f"{text}\n{error.__cause__ or ''}".partition("Config search path:")[0]
                lines = [line.strip() for line in text.splitlines() if line.strip()]
                text = ", ".join(x for x in lines if not x.startswith(("reference_type", "object_type", "full_key")))
            print(f"error: {text}", file=sys.stderr)
            sys.exit(2)


def own_folders(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments without Hydra's --config-dir, and the folder that this names."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config-dir", "-cd", dest="folder")
    known, others = parser.parse_known_args(arguments)
    folder = getattr(known, "folder", None)
    # One that does not exist is left to Hydra, which says so.
    return (others, [folder]) if folder is not None and Path(folder).is_dir() else (arguments, [])


def _quoted(argument: str) -> str | None:
    """How to write a KEY=VALUE that Hydra's grammar does not take without quotes; None if it does, or if none help."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, equals, value = argument.partition("=")
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    right = f'{key}="{escaped}"'

    def parses(each: str) -> bool:
        try:
            OverridesParser.create().parse_override(each)
        except HydraException:
            return False
        return True

    if not equals or parses(argument) or not parses(right):
        return None
    return f"{argument}: the value needs quotes: {shlex.quote(right)}"


def _allowed(key: str, node: Any) -> str:
    """Why `key` is wrong: the deepest part of it that exists, and the keys that part has."""
    parts, path = key.split("."), []
    while parts and OmegaConf.is_dict(node) and parts[0] in node:
        path.append(parts.pop(0))
        node = node[path[-1]]
    where = ".".join(path) or "the configuration"
    keys = ", ".join(map(str, node)) if OmegaConf.is_dict(node) else ""
    more = f"; another argument of its class is added: +{key}=..." if len(parts) == 1 and _has_target(node) else ""
    return f"{key} is unknown: {where} has no key '{parts[0] if parts else ''}'; its keys are {keys or 'none'}{more}"


def _has_target(node: Any) -> bool:
    return OmegaConf.is_dict(node) and "_target_" in node


def quiet() -> None:
    """Silence notices of the libraries that a user can do nothing about."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    # The frozen base is in eval mode on purpose, and the data module resumes by itself.
    warnings.filterwarnings("ignore", message="Found .* module.s. in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch.*")


def split_options(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """KEY=VALUE arguments and the others."""
    options, words = {}, []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and all(part.isidentifier() for part in key.split(".")):
            options[key] = value
        else:
            words.append(argument)
    return options, words


def parse_options(defaults: Options, arguments: list[str]) -> tuple[Options, list[str]]:
    """Fill a dataclass from KEY=VALUE arguments; everything that names none of its fields, or follows `--`, is text.

    Raises:
        ValueError: A value of the wrong type; or before the text a key that is no field.
    """
    schema = OmegaConf.structured(defaults)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    words: list[str] = []
    for argument in arguments[:end]:
        key, equals, value = argument.partition("=")
        if not equals or key not in schema:
            if equals and not words and all(part.isidentifier() for part in key.split(".")):
                raise ValueError(
                    f"{key} is unknown: the options are {', '.join(schema)}; text like this goes behind --"
                )
            words.append(argument)
            continue
        try:
            schema[key] = None if value == "null" else value
        except OmegaConfBaseException as error:
            raise ValueError(f"{key}={value}: {str(error).splitlines()[0]}") from error
    options: Any = OmegaConf.to_object(schema)
    return options, words + arguments[end + 1 :]
