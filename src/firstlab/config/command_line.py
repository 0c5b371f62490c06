"""Run a command: print errors as one message, and say how to resume. Imports no torch, so that help is fast."""

from __future__ import annotations

import argparse
import errno
import functools
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from firstlab.config import compose
from firstlab.config.schema import check_options

Input = TypeVar("Input")
Options = TypeVar("Options")

#: Set for the processes that a run starts: the one that started them speaks for all.
LAUNCHED = "FIRSTLAB_LAUNCHED"
_SYSTEM_ERRORS = {
    errno.ENOSPC: "no space left on the disk: free some",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EFBIG: "a file would be larger than `ulimit -f` or the file system allows: choose another folder",
    errno.EACCES: "no permission to read or write there: change it, or choose another folder",
    errno.EROFS: "the file system takes no files: choose another folder",
    errno.EISDIR: "a folder stands where a file should: move it away",
    errno.ENOTDIR: "a file stands where a folder should: move it away",
    errno.ELOOP: "a link stands where a file should: delete it",
    errno.ENAMETOOLONG: "a name is longer than the file system allows: shorten it",
}
_LOWER_MEMORY = (
    "lower the phase's batch_size (raise accumulate instead), data.max_length_*, evaluation.batch_size, "
    "trainer.read_batch_size or trainer.prompt_cache_mib, set trainer.gradient_checkpointing=true, or choose a smaller "
    "trainer.precision or model.dtype"
)


class ShortageError(ValueError):
    """A full disk or memory, as one message that says what to do."""


def command(name: str, main: Callable[[Any], None], resumes: bool = True) -> None:
    """Run `main` on what Hydra composes of conf/NAME.yaml and the arguments of this process; see `guarded`."""
    quiet()
    sys.argv[1:] = [_quoted(argument) for argument in sys.argv[1:]]
    compose.register()

    @functools.wraps(main)
    def checked(composed: Any) -> None:
        compose.refuse_misread(composed, HydraConfig.get().overrides.task)
        main(composed)

    # Without this Hydra would print its errors itself, over many lines, and exit with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    task = guarded(checked, resumes)
    try:
        hydra.main(version_base="1.3", config_path=compose.conf_dir(), config_name=name)(task)()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        print(f"error: {_one_line(error, name)}", file=sys.stderr)
        sys.exit(2)


def guarded(main: Callable[[Input], None], resumes: bool = True) -> Callable[[Input], None]:
    """Print a `ValueError`, a full disk or memory as one message and exit with 2; on Ctrl-C say how to go on."""

    @functools.wraps(main)
    def run(given: Input) -> None:
        quiet()
        way_out = "the same command goes on where it was" if resumes else "give the same command again"
        # SIGTERM would leave the processes of a sweep running. A launcher may have its own use for it; threads may not.
        in_main = threading.current_thread() is threading.main_thread()
        ours = in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if ours:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            if LAUNCHED in os.environ:
                # At once: processes that wait for this one would print tracebacks. Files are whole at any time.
                signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        try:
            with during():
                main(given)
        except ValueError as error:
            short = isinstance(error, ShortageError)  # often below a progress bar
            print(f"\nerror: {error}; then {way_out}" if short else f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            if _speaks():
                how = "without overwrite=true " * (resumes and _overwrites(given)) + way_out
                print(f"\ninterrupted; {how}", file=sys.stderr)
            sys.exit(130)
        finally:
            if ours:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)

    return run


def _speaks() -> bool:
    """Whether this is the process that tells of an interrupt: of several, the one that started them, or the first."""
    return LAUNCHED not in os.environ and os.environ.get("RANK", "0") == "0"


@contextmanager
def during(step: str = "") -> Iterator[None]:
    """Raise a full disk or memory as a `ShortageError` that names the step ("phase lora with batch_size=16")."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, ValueError) and (reason := _shortage(error)):
            what, colon, remedy = reason.partition(":")
            raise ShortageError(f"{what}{f' in {step}' if step else ''}{colon}{remedy}") from error
        raise


def _shortage(error: BaseException | None) -> str | None:
    """What the machine lacks, where that is what an error comes from; libraries wrap the system's in their own."""
    while error is not None:
        text = str(error)
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate" in text:
            return f"out of {'GPU' if 'CUDA' in text else 'main'} memory: {_LOWER_MEMORY}"
        for number, reason in _SYSTEM_ERRORS.items():
            # safetensors and torch keep no more than the text
            if getattr(error, "errno", None) == number or os.strerror(number) in text:
                name = str(getattr(error, "filename", None) or "")
                return reason + (f" ({name if len(name) < 200 else f'{name[:80]}...'})" if name else "")
        error = error.__cause__ or error.__context__
    return None


def _overwrites(given: Any) -> bool:
    """Whether a composed configuration, or the arguments of a sweep, would start again from nothing."""
    if isinstance(given, list):
        return "overwrite=true" in map(str.lower, given)
    return hasattr(given, "get") and bool(given.get("overwrite"))


def _quoted(argument: str) -> str:
    """A KEY=VALUE in quotes if Hydra's grammar takes its value in no other way (as `~/data`, `a(b)`)."""
    key, _, value = argument.partition("=")
    if key.startswith("-") or re.fullmatch(r"[\w./,+-]*", value):
        return argument
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    for each in (argument, f'{key}="{escaped}"'):
        with suppress(HydraException):
            OverridesParser.create().parse_override(each)
            return each
    return argument


def _one_line(error: Exception, name: str) -> str:
    """Hydra's complaint without its internals, and the keys that there are where one is unknown."""

    def overrides() -> list[str]:
        arguments, folders = own_folders(sys.argv[1:])
        return [*compose.search_path(folders), *(each for each in arguments if each[:1] != "-")]

    text = f"{error}\n{error.__cause__ or ''}".partition("Config search path:")[0]
    if "Ambiguous value" in text:  # also where a sweep file would allow several values, but there is no such file
        parsed = OverridesParser.create().parse_overrides(overrides())
        try:
            compose.compose_file(name, [str(each.input_line) for each in parsed if not each.is_sweep_override()])
        except HydraException as first:
            return _one_line(first, name)
    unknown = re.search(r"Could not override '([\w.]+)'", text)
    if unknown and "in the defaults list" not in text:
        key = unknown[1]
        with suppress(HydraException, ValueError):  # the others may be wrong, too
            return compose.allowed_keys(key, [x for x in overrides() if x.lstrip("+").partition("=")[0] != key], name)
    lines = filter(None, map(str.strip, text.splitlines()))
    told = ", ".join(line for line in lines if not line.startswith(("reference_type", "object_type", "full_key")))
    return told.replace(":,", ":")


def own_folders(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments without --config-dir, and the folder that it names; ValueError if that is not there."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    given, others = parser.parse_known_args(arguments)
    folders = [os.path.expanduser(given.config_dir)] if given.config_dir is not None else []
    if folders and not os.path.isdir(folders[0]):
        raise ValueError(f"--config-dir {given.config_dir}: there is no such folder")
    return others, folders


def quiet() -> None:
    """Silence notices of the libraries that a user can do nothing about, and let no terminal refuse a character."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # "\\u03b1" for α where the terminal knows ASCII alone
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        "It is recommended to use .*sync_dist=True",
        ".*broadcast_buffers. is deprecated",
        ".*treespec, LeafSpec.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        "You have overridden .transfer_batch_to_device. in .LightningModule.*",
        # The frozen base is in eval mode on purpose, and the data module resumes by itself.
        "Found .* module.s. in eval mode at the start of training.*",
        "You're resuming from a checkpoint that ended before the epoch.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def _is_key(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


def split_options(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """KEY=VALUE arguments and the others."""
    given = [each for each in arguments if "=" in each and _is_key(each.partition("=")[0])]
    return dict(each.split("=", 1) for each in given), [each for each in arguments if each not in given]


def parse_options(defaults: Options, arguments: list[str]) -> tuple[Options, list[str]]:
    """Fill a dataclass from KEY=VALUE arguments; everything that names none of its fields, or follows `--`, is text."""
    schema = OmegaConf.structured(defaults)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    words: list[str] = []
    for argument in arguments[:end]:
        key, equals, value = argument.partition("=")
        if equals and key in schema:
            compose.refuse_misread(schema, [argument])
            try:
                schema[key] = None if value == "null" else value
            except OmegaConfBaseException as error:
                raise ValueError(f"{argument}: {str(error).splitlines()[0]}") from error
        elif equals and not words and _is_key(key):
            raise ValueError(f"{key} is unknown: the options are {', '.join(schema)}; text like this goes behind --")
        else:
            words.append(argument)
    return compose.settings(schema, type(defaults)), words + arguments[end + 1 :]


def read_options(kind: type[Options], arguments: list[str], about: str | None) -> Options:
    """The checked options of a command that takes nothing else; --help prints what it is about, and ends it."""
    if {"-h", "--help"} & set(arguments):
        print(f"{about}\n{kind.__doc__}")
        sys.exit(0)
    options, words = parse_options(kind(), arguments)
    if words:
        raise ValueError(f"{words[0]!r} is not KEY=VALUE; see --help")
    check_options(options)
    return options


def _interrupted_early(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """What Python does with an error that nobody caught; Ctrl-C while a command still imports is one line."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    if _speaks():
        print("interrupted; nothing had started", file=sys.stderr, flush=True)
    os._exit(130)


_command = getattr(sys.modules["__main__"], "__spec__", None)
if _command is not None and _command.name.startswith("firstlab."):
    sys.excepthook = _interrupted_early
