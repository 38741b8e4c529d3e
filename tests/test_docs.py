"""The pages of `make docs` are built without a dead link, and say what the tool says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [*PAGES, ROOT / "README.md"]
SOURCE = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "hrldm").rglob("*.py"))
COMMANDS = ("insert", "batch", "plan", "score", "erase")


def calls() -> list[tuple[str, str]]:
    """Every call of the tool in the pages: the page's name, and the call."""
    return [
        (path.name, call)
        for path in TEXTS
        for call in re.findall(r"(?:^|`)(hrldm \w+ [^`\n#]*)", path.read_text(encoding="utf-8"), re.M)
    ]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    call = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(call, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_there_is_a_page_for_each_command_with_its_help(site):
    for command in COMMANDS:
        assert f"usage: hrldm {command}" in (site / f"{command}.html").read_text(encoding="utf-8")


def test_the_reference_has_what_the_package_exports(site):
    import hrldm

    reference = (site / "api.html").read_text(encoding="utf-8")
    assert [name for name, home in hrldm._TOOL.items() if f'id="{home}.{name}"' not in reference] == []


def test_calls_in_the_pages_have_only_options_that_there_are(site):
    known = {c: set(re.findall(r"--[a-z-]+", (site / f"{c}.html").read_text(encoding="utf-8"))) for c in COMMANDS}
    found = calls()
    assert {call.split()[1] for _, call in found} == set(COMMANDS)
    wrong = [
        f"{page}: {call}: {option}"
        for page, call in found
        for option in re.findall(r"--[a-z-]+", call)
        if option not in known[call.split()[1]]
    ]
    assert wrong == []


def test_errors_are_quoted_as_they_are_raised():
    """Messages may be written in pieces, so the source is read with its literals joined."""
    joined = re.sub(r'"\s*f?"', "", SOURCE)
    rows = re.findall(r"^\| `([^`]+)`", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) > 20
    assert [words for words in rows if words not in joined] == []


def test_the_image_is_built_of_files_that_are_there():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for name in line.split()]
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied and all((ROOT / name).exists() for name in copied)
    assert set(copied) == allowed
