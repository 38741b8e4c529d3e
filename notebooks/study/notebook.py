"""A notebook's study: it says what it is, shows and saves what comes out, and records what that depended on."""

from dataclasses import dataclass, fields
from importlib import metadata

import pandas as pd
from matplotlib.figure import Figure

from hrldm import paths
from hrldm.train.device import device
from study import study as plain
from study.report.figures import save_figure
from study.report.provenance import PACKAGES, write_provenance
from study.report.tables import SEMI_SYNTHETIC, drop_table, save_table


@dataclass(frozen=True)
class Study(plain.Study):
    """See `study.study.Study`; results go below `results`."""

    @property
    def label(self) -> str:
        """What its nodules are, for titles."""
        return f"semi-synthetic ({paths.EMBEDDED})" if self.dataset == paths.EMBEDDED else self.dataset

    def _repr_markdown_(self) -> str:
        """The line below a notebook's title."""
        p, kind = self.profile, SEMI_SYNTHETIC if self.dataset == paths.EMBEDDED else "Real nodules."
        counts = self.frame.split.value_counts()
        nodules = ", ".join(f"{counts[s]} {s}" for s in ("train", "val", "test") if s in counts)
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
        changes = f" with `{p.settings}`" if p.settings else ""
        return (
            f"**{kind}**\n\nProfile `{p.name}`{changes}, seed {self.seed}, nodules: {nodules}; {device()}, {versions}."
        )

    def __repr__(self) -> str:
        """The same without Markdown: of the data's table, which names files of this machine, nothing."""
        return self._repr_markdown_().replace("*", "")

    def show(self, fig: Figure, name: str) -> Figure:
        """Save a figure below `results`; a cell that ends with this call displays it."""
        save_figure(fig, self.results, name)
        return fig

    def save(self, table: pd.DataFrame, name: str) -> pd.DataFrame:
        """Save a table and its Markdown view below `results`."""
        save_table(table, self.results, name)
        return table

    def drop(self, name: str) -> None:
        """Remove a table that a former run left and this one cannot make."""
        drop_table(self.results, name)

    def finish(self) -> str:
        """Record what this run depended on."""
        return (
            f"recorded in {write_provenance(self.results, self.profile, self.dataset, self.seed, self.data_hash).name}"
        )


def open_study(*arguments, **options) -> Study:
    """`study.study.open_study`, for a notebook."""
    study = plain.open_study(*arguments, **options)
    return Study(*(getattr(study, f.name) for f in fields(study)))
