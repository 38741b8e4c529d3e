"""Shared by the tests of insertion: a chest in memory and on disk, shapes of balls, a command line that paints."""

import sys

import nibabel as nib
import pytest

import hrldm.__main__ as cli
from tests import tiny
from tests.insertion.chests import LIBRARY, save, scan


@pytest.fixture(autouse=True, scope="module")
def _small_library():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hrldm.insertion.insert.load_shapes", lambda: LIBRARY)
        yield


@pytest.fixture(scope="session")
def chest():
    """A CT and its lungs; nothing may write to them."""
    ct, labels = scan()
    ct.stored.flags.writeable = labels.flags.writeable = False
    return ct, labels


@pytest.fixture
def nifti(tmp_path, chest):
    """The chest in a file, its lungs in lungs.nii.gz beside it."""
    ct, labels = chest
    image = nib.Nifti1Image(ct.stored, ct.affine)
    image.header["descrip"] = b"scanner X"
    nib.save(image, tmp_path / "scan.nii.gz")
    save(tmp_path / "lungs.nii.gz", labels, ct.affine)
    return tmp_path / "scan.nii.gz"


@pytest.fixture
def call(monkeypatch, capsys):
    """A function that runs a command line, with a generator that paints, and returns its status, output and errors."""

    painting = tiny.PaintingGenerator()

    def _call(*arguments, generator=painting):
        def made_by(**asked):
            tiny.painting(**asked)  # a misspelt one is an error
            return generator

        monkeypatch.setattr("hrldm.insertion.released.released", made_by)
        monkeypatch.setattr(sys, "argv", ["hrldm", *map(str, arguments)])
        return cli.main(), *capsys.readouterr()

    return _call
