"""What the notebooks share: compared systems, measures, classifiers, tables and figures. Nothing in `hrldm` imports it."""
