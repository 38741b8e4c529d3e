"""The command line's own help in the pages: ``{{ hrldm insert }}`` becomes what ``hrldm insert --help`` prints."""

import os
import re
import subprocess
import sys

WIDTH = "100"


def on_page_markdown(markdown: str, **_) -> str:
    return re.sub(r"^\{\{ hrldm (\w+) \}\}$", lambda found: f"```\n{command_help(found[1])}```", markdown, flags=re.M)


def command_help(command: str) -> str:
    environment = os.environ | {"COLUMNS": WIDTH, "NO_COLOR": "1", "PYTHONUTF8": "1"}
    call = [sys.executable, "-m", "hrldm", command, "--help"]
    return subprocess.run(call, env=environment, check=True, capture_output=True, encoding="utf-8").stdout
