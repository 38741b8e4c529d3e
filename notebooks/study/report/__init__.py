"""Tables, figures and the paper's published numbers. Knows nothing of training."""
