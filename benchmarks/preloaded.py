"""Sets Django up when imported: for fork servers that import a module before their first fork."""

from __future__ import annotations

from .jobs import set_up_django

set_up_django()
