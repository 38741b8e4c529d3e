"""HR-LDM companion: histogram-regularised latent diffusion for controllable lung-nodule synthesis."""

__version__ = "0.1.0"
