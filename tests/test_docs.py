"""The pages of `make docs` are built without a dead link, and say what the tool says."""

import ast
import functools
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import hrldm
import hrldm.__main__ as cli
from hrldm.insertion import files
from hrldm.insertion.cohorts import Preset
from hrldm.insertion.plans import read_plan
from hrldm.scoring.predictions import COLUMNS

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES = list(TEXTS)
TEXTS["README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
hooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hooks)
COMMANDS = re.search(r"\{([a-z,]+)\}", hooks.help_of())[1].split(",")
OTHERS = {"--ml"}  # of other programs
CALL = r"(?:^|`)(hrldm \w+ [^`\n#…]*)(?:#|`|$)"
CALLS = [(page, call.strip()) for page, text in TEXTS.items() for call in re.findall(CALL, text, re.M)]
CALLS += [(f"{c} --help", re.search("Example: (hrldm .+)", getattr(cli, c).__doc__)[1]) for c in COMMANDS]


def blocks(page: str, kind: str) -> list[str]:
    """The fenced blocks of a kind in a page."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", TEXTS[page], re.M | re.S)


@functools.cache
def said() -> str:
    """All text that the tool can print: its string literals, without docstrings; a value in one is a NUL."""
    found = []
    for path in (ROOT / "hrldm").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inner = {id(part) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for part in n.values}
        inner |= {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        for n in ast.walk(tree):
            if isinstance(n, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in n.values))
            elif isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in inner:
                found.append(n.value)
    return "\n".join(found)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    call = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(call, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_there_is_a_page_for_each_command_with_its_help(site):
    assert [c for c in COMMANDS if f"usage: hrldm {c}" not in (site / f"{c}.html").read_text(encoding="utf-8")] == []


def test_the_reference_has_what_the_package_exports(site):
    reference = (site / "api.html").read_text(encoding="utf-8")
    assert [name for name, home in hrldm._TOOL.items() if f'id="{home}.{name}"' not in reference] == []
    assert [name for name in hrldm._TOOL if f"`{name}`" not in TEXTS["api.md"].partition("##")[0]] == []


@pytest.mark.parametrize(("page", "call"), CALLS, ids=[f"{page}: {call}" for page, call in CALLS])
def test_a_call_in_the_pages_is_understood(page, call, monkeypatch, capsys):
    for command in COMMANDS:
        stub = functools.wraps(getattr(cli, command))(lambda *_, **__: print("understood"))
        monkeypatch.setattr(cli, command, stub)
    words = shlex.split(call)
    if call.endswith("--help") or len(words) == 2:  # the hook runs it; a name in a sentence
        return
    monkeypatch.setattr(sys, "argv", words)
    cli.main()
    out, errors = capsys.readouterr()
    assert "understood" in out or "no such file" in errors  # a mask is looked into


def test_calls_are_found_and_a_wrong_one_is_not_understood(monkeypatch, capsys):
    assert {call.split()[1] for _, call in CALLS} == set(COMMANDS)
    with pytest.raises(SystemExit):
        test_a_call_in_the_pages_is_understood("", "hrldm plan CTS plan.csv --preset foo", monkeypatch, capsys)


def test_options_in_the_pages_are_the_tools():
    known = OTHERS | {option for c in COMMANDS for option in re.findall(r"--[a-z-]+", hooks.help_of(c))}
    found = {option for page in PAGES for option in re.findall(r"(?<=[`\s])--[a-z][a-z-]*", TEXTS[page])}
    assert found - known == set()


def test_errors_are_quoted_as_they_are_said():
    rows = re.findall(r"^\| `([^`]+)`", TEXTS["troubleshooting.md"], re.M)
    assert len(rows) == TEXTS["troubleshooting.md"].count("\n| `") and rows
    assert [words for words in rows if words not in said()] == []


def test_samples_are_what_the_tool_reads(tmp_path):
    (plan,), (predictions,) = blocks("insert.md", "csv"), blocks("score.md", "csv")
    (tmp_path / "plan.csv").write_text(plan)
    assert [(w.subtype, w.at) for w in read_plan(tmp_path / "plan.csv")] == [
        ("solid", None),
        ("ground-glass", None),
        ("solid", (-61.5, 14.0, -120.0)),
    ]
    assert tuple(predictions.splitlines()[0].split(",")) in COLUMNS
    assert all("`" + ",".join(columns) + "`" in TEXTS["score.md"] for columns in COLUMNS)
    for page in PAGES:
        for block in blocks(page, "python"):
            compile(block, page, "exec")


def test_tables_name_what_there_is():
    presets = re.findall(r"^\| `([a-z][a-z-]+)` \|", TEXTS["plan.md"], re.M)
    assert presets == list(get_args(Preset))
    table = TEXTS["insert.md"].partition("| file |")[2].partition("\n\n")[0]
    names = [n for row in table.splitlines() for n in re.findall(r"`([\w-]+\.[\w.]+)`", row.split("|")[1])]
    assert len(names) > 4 and [n for n in names if not files._WRITTEN.fullmatch(n)] == []


def test_the_image_is_built_of_files_that_are_there():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for name in line.split()]
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied and all((ROOT / name).exists() for name in copied)
    assert set(copied) == allowed
