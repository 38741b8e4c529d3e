"""Reading and writing scans (NIfTI and DICOM), geometry, lungs."""
