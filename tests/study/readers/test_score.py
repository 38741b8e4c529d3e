"""The paper's Table 2 and closed forms come out of the readers' CSVs; what is wrong in a file is named with its line."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import cohen_kappa_score, roc_auc_score
from statsmodels.stats.proportion import proportion_confint

from study.measure.observers import CONDITIONS, accuracy_table
from study.readers import score
from study.report.published import load_published

PAGE = "0123456789ab"


def key_frame(n: int) -> pd.DataFrame:
    """n real and n synthetic cases of three subtypes and sizes."""
    i = np.arange(2 * n)
    return pd.DataFrame(
        {
            "case": [f"{k + 1:03d}" for k in i],
            "truth": np.where(i % 2, "synthetic", "real"),
            "nodule_id": [f"n{k}" for k in i],
            "subtype": np.resize(np.repeat(["solid", "part-solid", "ground-glass"], 2), 2 * n),
            "diameter_mm": np.resize(np.repeat([8.0, 12.0, 25.0], 6), 2 * n),
            "system": np.where(i % 2, "hr-ldm", ""),
            "page": PAGE,
        }
    )


def answers(key: pd.DataFrame, called, reader: str = "r1", confidence=3) -> pd.DataFrame:
    """A reader's file; called: condition -> (2n,) answers."""
    parts = [key[["case"]].assign(phase=c, answer=called[c], confidence=confidence) for c in CONDITIONS]
    return pd.concat(parts, ignore_index=True).assign(seconds=2.5, reader=reader, page=PAGE)


def written(folder, key: pd.DataFrame, *tables: pd.DataFrame):
    key.to_csv(folder / "key.csv", index=False)
    files = []
    for i, table in enumerate(tables):
        files.append(folder / f"readings{i}.csv")
        table.to_csv(files[-1], index=False)
    return files, folder / "key.csv"


def as_published(key: pd.DataFrame) -> dict:
    """Calls with the paper's counts."""
    called = {}
    for condition, counts in load_published("table2_turing").groupby("condition"):
        calls = pd.Series("", key.index)
        for row in counts.itertuples():
            calls[key.truth == row.truth] = ["real"] * row.called_real + ["synthetic"] * row.called_synthetic
        called[condition] = calls.to_numpy()
    return called


def test_the_papers_table_2(tmp_path):
    key = key_frame(50)
    files, key_file = written(tmp_path, key, answers(key, as_published(key), "radiologist"))
    tables = score.score(files, key_file, tmp_path / "out")
    published = load_published("table2_turing")
    pd.testing.assert_frame_equal(tables["readers_table2"], published, check_dtype=False)
    accuracy = tables["readers_accuracy"].query("nodules == 'all'").drop(columns="nodules")
    pd.testing.assert_frame_equal(
        accuracy, score.with_chance(accuracy_table(published)), check_dtype=False
    )  # the same from the counts alone
    found = accuracy.set_index(["condition", "quantity"])
    for condition, right, fooled in (("cropped", 66, 20), ("full_context", 56, 22)):
        row = found.loc[condition, "accuracy"]
        assert (row.value, row.n) == (right / 100, 100)
        assert (row.ci_low, row.ci_high) == pytest.approx(proportion_confint(right, 100, method="wilson"))
        assert row.p_chance == pytest.approx(2 * stats.binom.sf(right - 1, 100, 0.5))
        assert found.loc[(condition, "fooled"), "value"] == fooled / 50
    assert found.loc[("cropped", "accuracy"), "p_chance"] < 0.01 < found.loc[("full_context", "accuracy"), "p_chance"]
    assert (tmp_path / "out/tables/readers_table2.csv").is_file()
    assert "about 155 independent readings" in score.summary(tables)


def test_by_subtype_and_size_counts_add_up(tmp_path):
    key = key_frame(54)
    rng = np.random.default_rng(0)
    called = {c: rng.choice(["real", "synthetic"], 108) for c in CONDITIONS}
    table = score.score(*written(tmp_path, key, answers(key, called)))["readers_accuracy"]
    table = table[(table.quantity == "accuracy") & (table.condition == "cropped")].set_index("nodules")
    assert table.index.tolist() == ["all", "solid", "part-solid", "ground-glass", "6-10", "10-20", "20-30"]
    right = key.truth == called["cropped"]
    for groups, column in ((key.subtype, slice("solid", "ground-glass")), (key.diameter_mm, slice("6-10", "20-30"))):
        expected = right.groupby(groups).mean()
        assert sorted(table.loc[column, "value"]) == pytest.approx(sorted(expected))
        assert table.loc[column, "n"].sum() == table.n["all"] == 108


def test_confidence_orders_the_answers(tmp_path):
    key = key_frame(40)
    rng = np.random.default_rng(2)
    called = {c: rng.choice(["real", "synthetic"], 80) for c in CONDITIONS}
    file = answers(key, called, confidence=rng.integers(1, 6, 80))
    auc = score.score(*written(tmp_path, key, file))["readers_auc"].set_index("condition")
    for condition, part in file.groupby("phase"):
        signed = part.confidence * np.where(part.answer == "real", -1, 1)
        value = roc_auc_score(key.truth == "synthetic", signed)
        assert auc.value[condition] == pytest.approx(value)
        # DeLong's variance: the spread of each case's share of pairs in the right order
        positive, negative = signed[part.index % 2 == 1].to_numpy(), signed[part.index % 2 == 0].to_numpy()
        right = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
        se = np.sqrt(right.mean(1).var(ddof=1) / 40 + right.mean(0).var(ddof=1) / 40)
        assert auc.ci_high[condition] - auc.ci_low[condition] == pytest.approx(2 * 1.96 * se, rel=0.08)
    assert (auc.seconds == 2.5).all() and (auc.n == 80).all()


def test_kappa_of_two_and_of_three_readers(tmp_path):
    key = key_frame(30)
    rng = np.random.default_rng(3)
    first = rng.choice(["real", "synthetic"], 60)
    second, third = (np.where(rng.random(60) < 0.3, rng.choice(["real", "synthetic"], 60), first) for _ in range(2))
    files = [answers(key, dict.fromkeys(CONDITIONS, c), f"r{i}") for i, c in enumerate((first, second, third))]
    two = score.score(*written(tmp_path, key, *files[:2]))["readers_kappa"]
    assert (two.kappa == "cohen").all() and two.value.tolist() == pytest.approx([cohen_kappa_score(first, second)] * 2)
    three = score.score(*written(tmp_path, key, *files))["readers_kappa"]
    # Fleiss, 1971: pairs of readers that agree, beyond what the shares alone give
    said = (np.stack([first, second, third]) == "real").sum(0)
    share = said.mean() / 3
    agreed = ((said * (said - 1) + (3 - said) * (2 - said)) / 6).mean()
    chance = share**2 + (1 - share) ** 2
    assert (three.kappa == "fleiss").all() and three.value[0] == pytest.approx((agreed - chance) / (1 - chance))
    assert (three.ci_low < three.value).all() and (three.value < three.ci_high).all() and three.readers[0] == 3


def test_readers_together_are_as_many_cases_as_there_are(tmp_path):
    """Four readers who say the same know no more than one: the interval is by case."""
    key = key_frame(50)
    files = [answers(key, as_published(key), f"r{i}") for i in range(4)]
    table = score.accuracies(score.read_readings(*written(tmp_path, key, *files)))
    rows = table[(table.nodules == "all") & (table.condition == "cropped") & (table.quantity == "accuracy")]
    one, together = rows[rows.observer == "r0"].iloc[0], rows[rows.observer == score.TOGETHER].iloc[0]
    assert together.value == 0.66 and together.n == 400
    assert together.ci_high - together.ci_low == pytest.approx(one.ci_high - one.ci_low, rel=0.08)


def test_readings_that_a_claim_takes():
    about, exact = score.readings_needed()
    assert about == 155  # 154.6
    assert exact == 158

    def limit(n: int, right: int) -> float:
        return proportion_confint(right, n, alpha=0.1, method="beta")[1]

    def shown(n: int) -> float:
        """Probability that a guesser's exact one-sided upper limit is under .60."""
        return sum(stats.binom.pmf(k, n, 0.5) for k in range(n + 1) if limit(n, k) < 0.6)

    assert shown(158) >= 0.8 > max(map(shown, range(150, 158)))


def test_whether_the_claim_is_shown(tmp_path):
    key = key_frame(100)
    called = {"cropped": key.truth.to_numpy(), "full_context": np.full(200, "real")}
    table = score.score(*written(tmp_path, key, answers(key, called)))["readers_needed"].set_index("condition")
    assert table.shown.to_dict() == {"cropped": False, "full_context": True}
    assert table.upper["full_context"] == pytest.approx(proportion_confint(100, 200, 0.1, "beta")[1])


def broken(table: pd.DataFrame, line: int, **cells) -> pd.DataFrame:
    table = table.astype({"confidence": object, "seconds": object})
    for column, value in cells.items():
        table.loc[line - 2, column] = value
    return table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: broken(t, 5, case="777"), r"readings0.csv, line 5: case '777' is not in the key"),
        (lambda t: broken(t, 5, answer="maybe"), r"readings0.csv, line 5: answer 'maybe' is not real or synthetic"),
        (lambda t: broken(t, 3, confidence=2.5), r"readings0.csv, line 3: confidence '2.5' is not a whole number"),
        (lambda t: broken(t, 3, seconds=""), r"readings0.csv, line 3: seconds '' is not a number"),
        (lambda t: broken(t, 4, phase="both"), r"readings0.csv, line 4: phase 'both' is not cropped or full_context"),
        (
            lambda t: broken(t, 4, page="ffff"),
            rf"readings0.csv, line 4: answers to page ffff, the key is of page {PAGE}",
        ),
        (lambda t: pd.concat([t, t.iloc[3:4]]), r"readings0.csv, line 14: case 004 is answered twice in cropped"),
        (lambda t: t.drop(index=[1, 8]), r"readings0.csv: 1 case\(s\) without an answer in full_context \(003\)"),
        (lambda t: t.drop(columns="page"), r"readings0.csv: missing column\(s\) page"),
        (lambda t: broken(t, 4, reader="r2"), r"readings0.csv: 2 readers"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(tmp_path, change, message):
    key = key_frame(3)
    table = answers(key, {c: key.truth.to_numpy() for c in CONDITIONS})
    assert len(score.read_readings(*written(tmp_path, key, table))) == 12
    with pytest.raises(ValueError, match=message):
        score.read_readings(*written(tmp_path, key, change(table)))


def test_a_file_given_twice_and_another_key_are_refused(tmp_path):
    key = key_frame(3)
    table = answers(key, {c: key.truth.to_numpy() for c in CONDITIONS})
    with pytest.raises(ValueError, match="readings1.csv: reader 'r1' stands in .*readings0.csv too"):
        score.read_readings(*written(tmp_path, key, table, table))
    with pytest.raises(ValueError, match="key.csv, line 3: not as the page's maker wrote it"):
        score.read_key(written(tmp_path, key.assign(truth=["real", "odd"] * 3))[1])
    with pytest.raises(ValueError, match="no key of a reader study"):
        score.read_key(written(tmp_path, table)[1])
