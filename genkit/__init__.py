"""genkit: one toolkit for diffusion, flow matching, VAE, GAN and policies. See README.md."""

__version__ = "0.1.0"
