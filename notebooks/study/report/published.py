"""The paper's own numbers, as printed in its tables and text, in the columns of our result files.

`results/published/<name>.csv`, transcribed by hand from the paper and never computed. Empty cells are what it does not
state (intervals, number of runs, of patients). Table 1 is stored raw: KID as printed times 1e-3, MMD times 1e-2.
Extra columns where the paper has more to say: `qualifier` of Fig. 7 (about, above, below: from the text, the curves have
no printed values) and `sd` of Fig. 8 ("+/-", not explained there). p_mann_whitney stands on the rows of
`Real + Synth`. `anomalies` lists what does not add up, with the printed values left as they are; `claims` what the paper
says, with the rule that judges it (see `claims`). `settings` quotes the sentence of each setting of Sections 3 to 5, with
the field of profile `paper` and its value; `ours` is empty where they agree, else what was chosen where the paper is silent
(open), which of our additions is left out (off), or what differs and why.
"""

import pandas as pd

from hrldm import paths

COLUMNS: dict[str, tuple[str, ...]] = {
    name: tuple(columns.split())
    for name, columns in {
        "table1_fidelity": "system extractor metric plane value ci_low ci_high n_real n_synthetic",
        "table2_turing": "observer condition truth called_real called_synthetic",
        "table3_subtype": "metric size_mm subtype arm mean sd n_runs n_patients p_mann_whitney p_bootstrap",
        "fig7_scarcity": "subtype metric retention arm mean ci_low ci_high n_runs qualifier",
        "fig8_malignancy": "arm auroc ci_low ci_high n_runs n_patients sd",
        "dataset_counts": "use source class n",
        "anomalies": "where printed observation",
        "settings": "section setting sentence field value ours",
        "claims": "section claim over side paper null margin family where quantity why",
    }.items()
}


def load_published(name: str) -> pd.DataFrame:
    """One table of the paper by its name in `COLUMNS`, checked for its columns.

    Raises:
        ValueError: unknown name, missing file, or other columns than expected.
    """
    if name not in COLUMNS:
        raise ValueError(f"no published table {name!r}; known: {', '.join(COLUMNS)}")
    path = paths.PUBLISHED / f"{name}.csv"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; it belongs to the repository, restore it with `git checkout`")
    table = pd.read_csv(path)
    if tuple(table.columns) != COLUMNS[name]:
        raise ValueError(f"{path}: columns {list(table.columns)}, expected {list(COLUMNS[name])}")
    return table
