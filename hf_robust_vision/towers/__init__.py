"""What sees: the one room that knows transformers' model classes."""
