"""What ends up in a model folder: the model code, and the templates it is rendered from."""
