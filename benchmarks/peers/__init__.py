"""The contestants of the comparison of one training step: a module each, built alike.

`build(sizes, layout)` joins no process group by itself and returns a function that trains one step
and returns its loss. A contestant that cannot be built here raises :class:`AbsentError`.
"""

from __future__ import annotations


class AbsentError(Exception):
    """Why a contestant does not take part."""
