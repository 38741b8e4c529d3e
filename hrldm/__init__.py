"""HR-LDM companion: histogram-regularised latent diffusion for controllable lung-nodule synthesis."""

import importlib

__version__ = "0.1.0"
_TOOL = {  # what a user of the tool needs, imported when asked for: the library itself takes seconds to import
    "insert": "hrldm.synthesis.insert",
    "insert_file": "hrldm.synthesis.files",
    "lung_labels": "hrldm.data.lungs",
    "read_ct": "hrldm.data.ct",
    "released": "hrldm.synthesis.released",
    "write_nifti": "hrldm.data.ct",
    "Wish": "hrldm.synthesis.plan",
}


def __getattr__(name: str):
    if name in _TOOL:
        return getattr(importlib.import_module(_TOOL[name]), name)
    raise AttributeError(f"module 'hrldm' has no attribute {name!r}")
