"""All stands in pyproject.toml but for what it cannot say: packages that are found, and one whose folder lies elsewhere."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["raysae*"]), "raysae.configs"])
