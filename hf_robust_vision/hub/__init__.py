"""What travels with a robust encoder."""
