"""Checks against gradient masking, for any task."""
