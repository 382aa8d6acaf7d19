"""One file a training method: its arguments, its losses, its trainer."""
