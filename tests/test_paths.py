"""Names that become folders, and the folders everything is written to, are refused by a sentence before anything is written."""

import pytest

from hrldm import paths
from study.study import open_study


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", "a b", "it's", "-x", "x\n", "a\\b", "~", "$HOME"])
@pytest.mark.parametrize("option", ["PROFILE", "DATASET"])
def test_a_name_that_is_no_folder_name(tmp_path, name, option):
    (tmp_path / "manifest.csv").write_text("")
    names = {"PROFILE": "smoke", "DATASET": "mine", option: name}
    with pytest.raises(ValueError, match=f"{option} .* names a folder of results"):
        paths.check_run(names["PROFILE"], names["DATASET"], str(tmp_path))


def test_the_folder_of_the_data_comes_back_in_full(tmp_path, monkeypatch):
    (tmp_path / "it's mine").mkdir()
    (tmp_path / "it's mine" / "manifest.csv").write_text("")
    monkeypatch.chdir(tmp_path)
    assert paths.check_run("quick", "Mein_1.0-é", "it's mine") == str(tmp_path / "it's mine")
    assert paths.check_run("quick", "lidc-mini", "") == ""


@pytest.mark.parametrize("variable", ["HRLDM_CACHE", "HRLDM_RESULTS"])
def test_an_output_that_cannot_be_written_is_found_before_the_data_are_made(tmp_path, monkeypatch, variable):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(variable, str(tmp_path / "file" / "deeper"))
    with pytest.raises(ValueError, match=f"{variable} .*file is no folder; choose another"):
        open_study("smoke")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    monkeypatch.setenv(variable, str(tmp_path / "link"))
    with pytest.raises(ValueError, match="link is no folder"):
        open_study("smoke")
    monkeypatch.setenv(variable, str(tmp_path / "new"))
    monkeypatch.setattr(paths.os, "access", lambda there, _: there != tmp_path)  # root may write everywhere
    with pytest.raises(ValueError, match=f"{variable} .*new: {tmp_path} may not be written"):
        open_study("smoke")


def test_an_empty_variable_is_none(monkeypatch):
    monkeypatch.setenv("HRLDM_RESULTS", "")
    monkeypatch.setenv("HRLDM_CACHE", "")
    assert paths.cache_dir() == paths.ROOT / ".cache"
