"""The downstream classifiers of Sections 6.3-6.5: training, runs, tables."""
