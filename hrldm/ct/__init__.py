"""A scan in and out: NIfTI and DICOM, geometry, lungs."""
