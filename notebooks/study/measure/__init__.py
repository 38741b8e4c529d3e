"""The evaluation protocol of Section 6: features, fidelity, classification, statistics, model observer."""
