"""Tables, curves and pages of results, drawn once."""
