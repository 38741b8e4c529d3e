"""Provenance: complete, merged by the notebooks of one run, begun anew by another run."""

import json
from concurrent.futures import ProcessPoolExecutor

from hrldm.cache import digest
from study.profiles import get_profile
from study.report import provenance
from study.report.provenance import device_name, read_provenance, write_provenance

SMOKE = get_profile("smoke")


def _record(folder, number):
    write_provenance(folder, get_profile("smoke"), "lidc-mini", 0, wall_time_s={f"{number:02d}": float(number)})


def test_record_holds_what_a_run_depends_on(tmp_path):
    write_provenance(tmp_path, SMOKE, "lidc-mini", 3, data_hash="ab12")
    record = read_provenance(tmp_path)
    assert record["profile_fields"]["unet"]["channels"] == list(SMOKE.unet.channels)
    assert record["profile_digest"] == digest(SMOKE) and record["seed"] == 3 and record["data_hash"] == "ab12"
    assert record["packages"]["torch"].startswith("2.") and record["device"] == device_name()
    assert set(record["git"]) == {"commit", "dirty"}


def test_notebooks_ending_at_once_lose_nothing(tmp_path):
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(_record, [tmp_path] * 12, range(12)))
    assert read_provenance(tmp_path)["wall_time_s"] == {f"{i:02d}": float(i) for i in range(12)}
    assert [p.name for p in tmp_path.iterdir()] == ["provenance.json"]


def test_same_run_is_completed_and_another_begins_anew(tmp_path):
    write_provenance(tmp_path, SMOKE, "lidc-mini", 0, data_hash="ab12")
    _record(tmp_path, 5)
    assert read_provenance(tmp_path)["data_hash"] == "ab12"
    write_provenance(tmp_path, get_profile("smoke", histogram__weight=0.0), "lidc-mini", 0)
    assert read_provenance(tmp_path)["data_hash"] is None and read_provenance(tmp_path)["wall_time_s"] == {}


def test_a_broken_record_counts_as_none_and_is_replaced(tmp_path):
    assert read_provenance(tmp_path) == {}
    (tmp_path / "provenance.json").write_text("{")
    assert read_provenance(tmp_path) == {}
    _record(tmp_path, 1)
    assert json.loads((tmp_path / "provenance.json").read_text(encoding="utf-8"))["wall_time_s"] == {"01": 1.0}


def test_each_notebook_keeps_the_commit_it_ran_on(tmp_path, monkeypatch):
    for commit, number in (("aaa", 1), ("bbb", 2), ("ccc", 1)):
        monkeypatch.setattr(provenance, "git_state", lambda commit=commit: {"commit": commit, "dirty": False})
        write_provenance(tmp_path, SMOKE, "lidc-mini", 0)  # a notebook's own last cell
        _record(tmp_path, number)
    assert read_provenance(tmp_path)["commits"] == {"01": "ccc", "02": "bbb"}
    record = read_provenance(tmp_path)
    del record["commits"]  # a file of before there were any
    (tmp_path / "provenance.json").write_text(json.dumps(record))
    monkeypatch.setattr(provenance, "git_state", lambda: {"commit": "ddd", "dirty": False})
    _record(tmp_path, 2)
    assert read_provenance(tmp_path)["commits"] == {"01": "ccc", "02": "ddd"}


def test_each_notebook_keeps_the_hash_of_the_data_it_read(tmp_path):
    for data, number in (("aaaa", 1), ("aaaa", 2), ("bbbb", 1)):
        write_provenance(tmp_path, SMOKE, "lidc-mini", 0, data)
        _record(tmp_path, number)
    assert read_provenance(tmp_path)["data_hashes"] == {"01": "bbbb", "02": "aaaa"}
    record = read_provenance(tmp_path)
    del record["data_hashes"]  # a file of before there were any
    (tmp_path / "provenance.json").write_text(json.dumps(record))
    write_provenance(tmp_path, SMOKE, "lidc-mini", 0, "cccc")
    _record(tmp_path, 2)
    assert read_provenance(tmp_path)["data_hashes"] == {"01": "bbbb", "02": "cccc"}
