"""Measure, harden and swap the CLIP vision towers of Hugging Face models against adversarial images."""
