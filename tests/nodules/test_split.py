"""The committed patient split covers LIDC-IDRI once and is asserted disjoint."""

import pandas as pd
import pytest

from hrldm.nodules import split
from hrldm.nodules.split import SPLITS, assert_disjoint, patient_split


def test_every_lidc_patient_stands_in_one_split():
    table = pd.read_csv(split._FILE)
    assert table.patient_id.is_unique and set(table.split) == set(SPLITS)
    assert table.patient_id.str.fullmatch(r"LIDC-IDRI-\d{4}").sum() >= 1010  # all of LIDC-IDRI
    share = table.split.value_counts(normalize=True)
    assert share["train"] > 0.6 and share["test"] > 0.1 and share["val"] > 0.05
    assert all(patient_split(r.patient_id) == r.split for r in table.itertuples())


def test_the_embedded_ct_is_a_training_patients():
    assert patient_split("LIDC-IDRI-0001") == "train"


def test_unknown_patient_is_named():
    with pytest.raises(ValueError, match="'NLST-7' is not in lidc_split.csv: add a `split` column"):
        patient_split("NLST-7")


def test_shared_patient_is_named():
    frame = pd.DataFrame({"patient_id": ["a", "b", "b"], "site": ["x", "y", "x"], "split": ["train", "test", "test"]})
    assert_disjoint(frame)
    with pytest.raises(ValueError, match=r"1 site value\(s\) stand in two splits, for example \['x'\]"):
        assert_disjoint(frame, "site")
