"""The ``ivl-export`` command: :func:`main` runs a verb of :mod:`.app` and turns errors into exit codes."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from ..host import core_limit

if TYPE_CHECKING:
    from ..errors import IvlError

INTERRUPTED = 130
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
"""What a disk says that takes no more."""
RESUMED = frozenset({"build", "calibrate", "embed", "sensitivity", "train"})
"""Verbs that continue where they were stopped; of train all but 'train scenes'."""

TEXT_OPTIONS = frozenset({"--text", "--labels", "--template", "--query", "--prompt", "--question"})
"""Options whose value is a text for the model."""

_QUANT = (
    "It traces the model with torch and computes ONNX graphs and weights; running a bundle needs neither."
)
NEEDS = {
    "build": _QUANT,
    "calibrate": "Ranges are measured on the model in torch; running a bundle does not need it.",
    "export": _QUANT,
    "sensitivity": _QUANT,
    "train": "Training runs in torch; running a bundle does not need it.",
}
"""Verb -> why it needs the packages of its extra."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 is success, 2 wrong usage, 3 to 9 errors of :mod:`ivl_export.errors`, 130 Ctrl-C, 1 the rest.
    Errors go to stderr: what, why and fix, or one JSON object with ``--json``. ``--debug`` raises them.
    """
    with suppress(AttributeError, ValueError):  # a stream that was put in stdout's place
        if sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # no result is lost for a character
    if limit := core_limit():  # torch's own threads, too, keep to what a container may use
        os.environ.setdefault("OMP_NUM_THREADS", str(limit))
    args = _texts(sys.argv[1:] if argv is None else argv)
    end = args.index("--") if "--" in args else len(args)
    debug, as_json = "--debug" in args[:end], "--json" in args[:end]
    args = [a for a in args[:end] if a != "--debug"] + args[end:]

    from ..errors import IvlError
    from .app import app, current_words

    try:
        args = current_words(args)
        code = app(args or ["--help"], prog_name="ivl-export", standalone_mode=False)
    except IvlError as error:
        if debug:
            raise
        report(error, as_json)
        return error.exit_code
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own: wrong usage, named with the command's usage line
            return _usage(error, as_json)
        if debug:
            raise
        if isinstance(error, ModuleNotFoundError) and (lacking := _lacking(error, args[:1])) is not None:
            report(lacking, as_json)
            return lacking.exit_code
        if type(error).__name__ == "Abort":  # what older typer releases make of Ctrl-C
            code = INTERRUPTED
        elif isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            from ..errors import InputError
            from ..inputs.sources import shown

            why = f"It has {len(os.fsdecode(error.filename or ''))} letters."
            too_long = f"{shown(os.fsdecode(error.filename or ''))} can be no path."
            report(InputError(too_long, why, "Give the path of a file."), as_json)
            return InputError.exit_code
        elif isinstance(error, OSError) and error.errno in FULL:
            what = f"Cannot write {error.filename or 'the output'}: {error.strerror or error}."
            report(
                IvlError(what, "Nothing is wrong with the command.", "Make room, or write elsewhere."),
                as_json,
            )
            return 1
        else:
            what = f"Unexpected {type(error).__name__}: {error}".splitlines()[0]
            report(IvlError(what, "This is a bug in ivl-export.", "Run with --debug for details."), as_json)
            return 1
    if code == INTERRUPTED:
        resumed = not RESUMED.isdisjoint(args[:1]) and args[1:2] != ["scenes"]
        print("\nInterrupted." + " The same command resumes here." * resumed, file=sys.stderr)
    return code if isinstance(code, int) else 0


def _texts(argv: Sequence[str]) -> list[str]:
    """``argv`` with its texts read as UTF-8 where the locale has another encoding (``LC_ALL=C``).

    Python keeps bytes that the encoding lacks as lone surrogates, which file names need and texts do not.
    """
    args = list(argv)
    for i, arg in enumerate(args):
        option, _, value = arg.partition("=")
        if option in TEXT_OPTIONS and value:
            args[i] = f"{option}={_utf8(value)}"
        elif arg in TEXT_OPTIONS and i + 1 < len(args):
            args[i + 1] = _utf8(args[i + 1])
    return args


def _utf8(text: str) -> str:
    try:
        return os.fsencode(text).decode("utf-8") if not text.isprintable() else text
    except UnicodeError:
        return text


def report(error: object, as_json: bool) -> None:
    """Print an :class:`~ivl_export.errors.IvlError` to stderr."""
    import json

    from ..errors import IvlError

    assert isinstance(error, IvlError)
    if as_json:
        print(json.dumps(error.to_json()), file=sys.stderr)
        return
    color = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    red, plain = ("\x1b[1;31m", "\x1b[0m") if color else ("", "")
    print(f"{red}error:{plain} {_printable(error.what)}", file=sys.stderr)
    for name, text in (("why", error.why), ("fix", error.fix)):
        if text:
            print(f"  {name}: {_printable(text)}", file=sys.stderr)


def _lacking(error: ModuleNotFoundError, verb: Sequence[str]) -> IvlError | None:
    """The error where a package of an extra is not installed; None if no extra has it.

    Of several extras that have it the verb's own is named, or the first.
    """
    from ..errors import CapabilityError
    from ..profiles.extras import extras_with

    module = (error.name or "").partition(".")[0]
    extras = extras_with(module)
    if not extras:
        return None
    named = next((name for name in verb if name in extras), extras[0])
    return CapabilityError(
        f"'ivl-export {' '.join(verb)}' needs {module}, which is not installed.",
        NEEDS.get("".join(verb), f"It is a package of the extra {named!r}."),
        f"pip install 'ivl-export[{named}]'",
    )


def _usage(error: Exception, as_json: bool) -> int:
    from ..errors import UsageError

    if as_json:
        report(UsageError(str(error.format_message())), as_json)  # type: ignore[attr-defined]
    else:
        error.show()  # type: ignore[attr-defined]
    return int(getattr(error, "exit_code", UsageError.exit_code))


def _printable(text: str) -> str:
    """Without terminal escapes that a file name or manifest may carry."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
