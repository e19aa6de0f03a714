"""What pyproject.toml cannot say: a wheel holds the top-level folders recipes/ and conf/ inside the package."""

from pathlib import Path

from setuptools import find_packages, setup

PLACES = {"nemo_star.recipes": "recipes", "nemo_star.conf": "conf"}
# setuptools takes data only from folders that are named as packages.
folders = ["nemo_star." + ".".join(path.parts) for path in Path("conf").rglob("*") if path.is_dir()]

setup(packages=[*find_packages(include=["nemo_star*"]), *PLACES, *folders], package_dir=PLACES)
