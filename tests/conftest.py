"""Shared by all tests: results never go into the repository's own folder; real data is found or the test is skipped."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HRLDM_DETERMINISTIC", "1")  # before hrldm is imported: tests compare bits, on a GPU too
ROOT = Path(__file__).resolve().parents[1]
# processes that a test starts find the study too, as `make` sees to
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "notebooks"), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(autouse=True)
def _results_apart(tmp_path_factory, monkeypatch):
    """A test that writes results writes them into a temporary folder."""
    monkeypatch.setenv("HRLDM_RESULTS", str(tmp_path_factory.getbasetemp() / "results"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Workers report in UTF-8, which cannot hold the file names that some tests log."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real nodules (`HRLDM_SHARED_DATA`, else ../shared/data beside the repository)."""
    folder = Path(os.environ.get("HRLDM_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set HRLDM_SHARED_DATA")
    return folder
