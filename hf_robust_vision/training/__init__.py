"""Adversarial fine-tuning on `transformers.Trainer`, one file a method."""
