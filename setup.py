"""What pyproject.toml cannot say: a wheel holds the top-level folders recipes/ and conf/ inside the package."""

from setuptools import find_packages, setup

INSIDE = {"nemo_star.recipes": "recipes", "nemo_star.conf": "conf"}

setup(packages=[*find_packages(include=["nemo_star*"]), *INSIDE], package_dir=INSIDE)
