"""Where the project's own files are: in a checkout, or installed inside the package."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def checkout() -> Path | None:
    """The folder of the checkout that this package runs from, also by an editable install; None where a wheel was
    installed, which holds recipes/ and conf/ inside the package (setup.py)."""
    return None if (PACKAGE / "recipes").is_dir() else PACKAGE.parent


def data_folder(name: str) -> Path:
    """`recipes` or `conf`, wherever this package has it."""
    return (checkout() or PACKAGE) / name
