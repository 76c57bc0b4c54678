"""Packages are found, so that a new room need not be listed; the model code lies beside the package."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["liger_cli", "liger_cli.*"]), "liger_cli.templates"])
