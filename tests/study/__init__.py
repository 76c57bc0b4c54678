"""The study behind the default recipe: its texts, its bases, and its table."""
