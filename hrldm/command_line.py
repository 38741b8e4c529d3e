"""How a command of the tool, or of the study, is run: errors and log in the words of the command line."""

import contextlib
import logging
import re
import sys
from collections.abc import Callable

import tyro


def run(commands: Callable | dict[str, Callable], prog: str, description: str | None = None) -> int:
    """Run the one command there is, or the requested one; an error that the user can fix prints one line and returns status 2."""
    with contextlib.suppress(AttributeError):  # file names may hold characters that stdout cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    logging.getLogger("highdicom").setLevel(logging.WARNING)  # lists every module that it copies
    for handler in logging.getLogger().handlers:
        handler.addFilter(_log_options)
    try:
        if isinstance(commands, dict):
            return tyro.extras.subcommand_cli_from_dict(commands, prog=prog, description=description)
        return tyro.cli(commands, prog=prog, description=description) or 0
    except (ValueError, OSError) as error:
        print(f"error: {as_options(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing of the unfinished result is left; call again to make it", file=sys.stderr)
        return 130


def _log_options(record: logging.LogRecord) -> bool:
    """Apply `as_options` to log messages."""
    with contextlib.suppress(TypeError):  # another library's call with wrong arguments; logging reports it
        record.msg, record.args = as_options(record.getMessage()), None
    return True


def as_options(text: str) -> str:
    """Replace the argument names in a library message (overwrite=True) by command-line options (--overwrite)."""

    def option(found: re.Match) -> str:
        name = {"on": "device"}.get(found[1], found[1])
        value = "" if found[2] in ("True", "...") else " " + found[2].strip("'")
        return f"--{name.replace('_', '-')}{value}"

    names = "overwrite|retries|lungs|steps|on|series_uid|format|location|seg|lps|coordinates"
    return re.sub(rf"(?<![^ (])({names})=(\.\.\.|'?[\w.+-]+'?)", option, text)
