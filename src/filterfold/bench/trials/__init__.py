"""Many trials, each ending in one record.

`config` says what is run, `trial` runs one, `launch` runs all that have no record yet, `records` is what is read.
"""

from __future__ import annotations
