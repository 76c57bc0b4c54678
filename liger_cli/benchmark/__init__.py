"""Time and memory of a model and of its base, measured side by side."""
