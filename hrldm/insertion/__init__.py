"""From conditions to nodules: inpainting in latent space and blending into the original voxels."""
