"""Recipes, data, objectives, and the run that makes an adapter."""
