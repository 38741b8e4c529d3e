"""What is put into a CT and learned from: nodules of any source in one manifest, and shapes, positions, histograms."""
