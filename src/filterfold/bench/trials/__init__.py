"""Many trials, each ending in one record.

`config` says what is run, `methods` has one function for each method, `trial` runs one trial, `runner` runs all that
have no record yet, in this process, in several (`parallel`) or on a Ray cluster (`ray`), and `records` is what is read.
"""

from __future__ import annotations
