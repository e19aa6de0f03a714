"""The two directions of conversion, by one name."""

from __future__ import annotations

from nemo_star.checkpoint.exporting import export_checkpoint
from nemo_star.checkpoint.importing import import_checkpoint

__all__ = ["export_checkpoint", "import_checkpoint"]
