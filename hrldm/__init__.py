"""HR-LDM companion: histogram-regularised latent diffusion for controllable lung-nodule synthesis."""

import importlib

__version__ = "0.1.0"
_TOOL = {  # the public names, imported on first use: the whole library takes seconds to import
    "insert": "hrldm.insertion.insert",
    "insert_file": "hrldm.insertion.files",
    "lung_labels": "hrldm.ct.lungs",
    "read_ct": "hrldm.ct.volume",
    "released": "hrldm.insertion.released",
    "write_nifti": "hrldm.ct.volume",
    "Wish": "hrldm.insertion.wish",
}


def __getattr__(name: str):
    if name in _TOOL:
        return getattr(importlib.import_module(_TOOL[name]), name)
    raise AttributeError(f"module 'hrldm' has no attribute {name!r}")
