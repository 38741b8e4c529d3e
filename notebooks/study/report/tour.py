"""Controls of notebook 04: choose a nodule, put it into a CT, see before, after and difference in three planes."""

import tempfile
from dataclasses import replace
from pathlib import Path

import ipywidgets as widgets
import numpy as np
from IPython.display import display
from matplotlib.figure import Figure
from scipy.spatial import cKDTree

from hrldm.config import SUBTYPES
from hrldm.ct.geometry import shifted, to_world
from hrldm.ct.label_maps import LOBE_NAMES
from hrldm.ct.nifti import scaled
from hrldm.ct.volume import CT, to_ras, write_nifti
from hrldm.insertion.generator import Generator
from hrldm.insertion.insert import Inserted, insert
from hrldm.insertion.wish import LARGEST_MM, SMALLEST_MM, Wish, point
from hrldm.nodules.positions import LOCATIONS
from study.report.figures_images import Panel, before_after, montage

SIDE_MM = 60.0  # of what is shown around a lesion
ANYWHERE = "any"


def around_lesion(ct: CT, made: Inserted, number: int = 1, side_mm: float = SIDE_MM, label: str = "") -> list[Panel]:
    """The `number`-th lesion's surroundings without and with it, RAS, in the scan's own voxels."""
    lesion = made.mask == number
    centre = np.round(np.argwhere(lesion).mean(0)).astype(int)
    half = np.ceil(side_mm / 2 / ct.spacing).astype(int)
    low = np.maximum(0, centre - half)
    cut = tuple(slice(a, b) for a, b in zip(low, centre + half, strict=True))
    affine = shifted(ct.affine, low)
    inside = to_ras(CT(lesion[cut], affine))
    crops = (to_ras(CT(scaled(stored[cut], ct.slope, ct.inter), affine)) for stored in (ct.stored, made.stored))
    spacing = tuple(float(s) for s in inside.spacing)
    return [Panel(crop.array, inside.array, label, spacing) for crop in crops]


def change_reach(ct: CT, made: Inserted) -> tuple[int, float]:
    """Voxels changed, and how far the farthest of them is from the nearest voxel of a lesion, mm."""
    lesions, changed = (to_world(ct.affine, np.argwhere(x)) for x in (made.mask > 0, made.stored != ct.stored))
    distance, _ = cKDTree(lesions).query(changed)
    return len(changed), float(distance.max(initial=0.0))


def inserted_figure(ct: CT, made: Inserted) -> Figure:
    """`before_after` of the first nodule, titled by what was asked for and what came."""
    record, quality = made.records[0], made.records[0]["quality"]
    title = (
        f"{record['wish']['subtype']}, {record['diameter_mm']:g} mm, {record['lobe']}; mean "
        f"{quality['requested_mean_hu']:.0f} HU requested, {quality['obtained_mean_hu']:.0f} obtained"
    )
    return before_after(*around_lesion(ct, made), title)


class Tour:
    """The controls of one CT; `widget` is what a notebook shows.

    labels: (X, Y, Z) lungs or lobes on the CT's grid
    made:   what is shown before the first press
    """

    def __init__(self, ct: CT, labels: np.ndarray, generator: Generator, made: Inserted | None = None) -> None:
        self.ct, self.labels, self.generator, self.made = ct, labels, generator, made
        lobes = [name for k, name in LOBE_NAMES.items() if (labels == k).any()]
        self.subtype = widgets.Dropdown(options=SUBTYPES, description="subtype")
        self.diameter = widgets.FloatSlider(12, min=SMALLEST_MM, max=LARGEST_MM, step=0.5, description="diameter, mm")
        self.core = widgets.FloatSlider(0, min=0, max=20, step=0.5, description="core, mm (0: as it comes)")
        self.lobe = widgets.Dropdown(options=[ANYWHERE, *lobes], description="lobe")
        self.location = widgets.Dropdown(options=LOCATIONS, description="location")
        self.at = widgets.Text(placeholder="x, y, z in RAS mm, or empty", description="place")
        self.seed = widgets.IntText(0, description="seed")
        self.button = widgets.Button(description="insert", button_style="primary")
        self.scroll = widgets.IntSlider(0, min=-25, max=25, description="axial slice, from the middle")
        self.said, self.view, self.axial = widgets.HTML(), widgets.Output(), widgets.Output()
        self.button.on_click(lambda _: self.insert())
        self.scroll.observe(lambda _: self._show_axial(), "value")
        controls = (self.subtype, self.diameter, self.core, self.lobe, self.location, self.at, self.seed, self.button)
        for control in (*controls[:-1], self.scroll):
            control.style.description_width, control.layout.width = "14em", "34em"
        self.widget = widgets.VBox([*controls, self.said, self.view, self.scroll, self.axial])
        self._show()

    def wish(self) -> Wish:
        """What the controls say.

        Raises:
            ValueError: no such nodule, or a place that is not three numbers.
        """
        at = point(self.at.value) if self.at.value.strip() else None  # then where it lies is said
        return Wish(
            self.subtype.value,
            self.diameter.value,
            None if self.lobe.value == ANYWHERE or at else self.lobe.value,
            LOCATIONS[0] if at else self.location.value,
            at,
            core_mm=self.core.value or None,
            seed=self.seed.value,
        )

    def insert(self) -> None:
        """Insert the wish and show it; what is wrong with it is said in its place."""
        self.button.disabled, self.made = True, None
        self.said.value = "inserting …"
        self._show()
        try:
            self.made = insert(self.ct, [self.wish()], self.generator, self.labels)
        except ValueError as error:
            self.said.value = f"<b>{error}</b>"
        finally:
            self.button.disabled = False
        self._show()

    def _show(self) -> None:
        """What was made; nothing where nothing was."""
        self.view.clear_output()
        self.scroll.disabled = self.made is None
        if self.made is not None:
            changed, reach = change_reach(self.ct, self.made)
            self.said.value = (
                f"{changed} of {self.ct.stored.size} voxels changed, none more than {reach:.1f} mm from the lesion"
            )
            with self.view:
                display(inserted_figure(self.ct, self.made))
        self._show_axial()

    def _show_axial(self) -> None:
        """The slice that is scrolled to, before and after."""
        self.axial.clear_output(wait=self.made is not None)
        if self.made is not None:
            panels = [
                replace(panel, label=label, slices_off=self.scroll.value)
                for panel, label in zip(around_lesion(self.ct, self.made), ("before", "after"), strict=True)
            ]
            with self.axial:
                display(montage(panels, columns=2, title=f"{self.scroll.value:+d} slices"))


def viewer_3d(ct: CT, made: Inserted):
    """The scan with its nodules in an interactive viewer (NiiVue), slices and rendering.

    Raises:
        ImportError: the optional package `ipyniivue` is not installed.
    """
    try:
        from ipyniivue import NiiVue
    except ImportError as error:
        raise ImportError("the 3D viewer is optional; install it by: pip install 'hrldm[viewer]'") from error
    folder = Path(tempfile.mkdtemp(prefix="hrldm-viewer-"))  # the viewer reads it as long as the notebook is open
    write_nifti(folder / "ct.nii.gz", made.stored, ct)
    write_nifti(folder / "mask.nii.gz", made.mask, CT(made.mask, ct.affine))
    viewer = NiiVue(height=600)
    scan = {"path": folder / "ct.nii.gz", "cal_min": -1350, "cal_max": 150}
    viewer.load_volumes([scan, {"path": folder / "mask.nii.gz", "colormap": "red", "opacity": 0.4}])
    return viewer
