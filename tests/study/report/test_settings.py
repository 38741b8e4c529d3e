"""The paper's settings: each sentence is the paper's, each value is that of profile `paper`, and no field lacks a row."""

import csv
import dataclasses
import importlib
import shlex

import pytest

from hrldm import paths
from hrldm.config import with_settings
from study.profiles import PAPER

with (paths.PUBLISHED / "settings.csv").open(encoding="utf-8", newline="") as file:
    ROWS = list(csv.DictReader(file))
METHOD = ("data", "autoencoder", "vae", "unet", "diffusion", "histogram", "latents", "ldm", "sampling")
DIFFERS = {  # what is not to the letter, all of it
    "weights of the VAE-GAN", "what the truncated decoder is given", "malignancy", "software",
    "nodules held out for synthesis", "size of the volumes",
}  # fmt: skip


def text(constant: object) -> str:
    return ",".join(constant) if isinstance(constant, tuple) else str(constant)


@pytest.mark.parametrize("row", [r for r in ROWS if r["field"]], ids=lambda r: r["field"])
def test_the_profile_has_the_value_of_the_row(row):
    if row["field"].startswith("hrldm."):
        module, _, name = row["field"].rpartition(".")
        assert text(getattr(importlib.import_module(module), name)) == row["value"]
    else:  # set to the row's value, nothing changes
        assert with_settings(PAPER, f"{row['field']}={shlex.quote(row['value'])}") == PAPER


def test_every_field_of_the_method_has_a_row():
    fields = {f"{part}.{f.name}" for part in METHOD for f in dataclasses.fields(getattr(PAPER, part))}
    assert fields - {r["field"] for r in ROWS} == set()


def test_a_row_without_a_sentence_is_a_choice_and_what_differs_is_named():
    kinds = {r["ours"].partition(":")[0] for r in ROWS}
    assert kinds == {"", "open", "off", "differs"}
    assert all(r["ours"] for r in ROWS if not (r["sentence"] and r["field"]))
    assert {r["setting"] for r in ROWS if r["ours"].startswith("differs")} == DIFFERS
    assert sum(not r["ours"] for r in ROWS) > len(ROWS) / 3


def test_every_sentence_is_the_papers(shared_data):
    paper = shared_data.parent / "reference" / "paper.txt"
    if not paper.is_file():
        pytest.skip(f"no text of the paper at {paper}")
    printed = " ".join(paper.read_text(encoding="utf-8").split())
    assert [r["sentence"] for r in ROWS if r["sentence"] not in printed] == []
