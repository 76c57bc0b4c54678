"""One module a command of `liger`."""
