"""Measure, harden and swap the CLIP vision towers of Hugging Face models against adversarial images."""

__version__ = "0.1.0"
