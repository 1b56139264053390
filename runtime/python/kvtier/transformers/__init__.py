"""kvtier under ``model.generate()``; see :func:`attach` and :class:`TieredCache`."""

from __future__ import annotations

from .attach import Attached, attach
from .cache import TieredCache
from .families import TESTED as TESTED_FAMILIES

__all__ = ["Attached", "TESTED_FAMILIES", "TieredCache", "attach"]
