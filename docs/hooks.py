"""The command line's own help in the pages: the block ``hrldm insert --help`` becomes what the command prints."""

import functools
import os
import re
import subprocess
import sys

WIDTH = "100"


def on_page_markdown(markdown: str, **_) -> str:
    """The page with each block that only asks for help replaced by the help."""
    return re.sub(r"^```\nhrldm (\w+) --help\n```$", lambda found: f"```\n{help_of(found[1])}```", markdown, flags=re.M)


@functools.cache
def help_of(*command: str) -> str:
    """What ``hrldm … --help`` prints."""
    environment = os.environ | {"COLUMNS": WIDTH, "NO_COLOR": "1", "PYTHONUTF8": "1"}
    call = [sys.executable, "-m", "hrldm", *command, "--help"]
    return subprocess.run(call, env=environment, check=True, capture_output=True, encoding="utf-8").stdout
