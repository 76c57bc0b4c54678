"""Reading, checking and writing model folders and adapters."""
