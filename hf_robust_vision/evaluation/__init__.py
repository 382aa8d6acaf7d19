"""Robust accuracy, its records and its pictures."""
