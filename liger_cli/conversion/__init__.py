"""The plan of a conversion, its edits, and the folder that is written."""
