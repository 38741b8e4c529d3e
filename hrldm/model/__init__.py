"""Section 3 of the paper: autoencoder, conditional U-Net, histogram, losses, diffusion. Knows nothing of files."""
