"""One process leads, the others follow: how a command that knows nothing of ranks trains on all of them.

`torchrun -m filterfold ...` starts the command several times. Rank 0 alone runs it: it reads the options, writes the
files and shows what there is to show. Whenever it comes to `train`, it hands the work out (network, data, recipe,
callbacks), and all ranks train together; the others do nothing else, and wait in between.

What is handed out is pickled, from one process of a program to another as in `torch.multiprocessing`; no file is ever
read like that.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .. import ranks
from ..errors import TrainingError
from ..zoo.registry import FILE_MODULE, load_file

_LOG = logging.getLogger("filterfold.training")

PATIENCE = timedelta(minutes=1)
"""How long ranks that gave up wait for the others to give up as well."""

_waiting = False


def lead_or_follow(command: Callable[[], object], work: Callable[[Any], object]) -> None:
    """Meet the other ranks; run the command on rank 0, and on the others the work that it hands out, until it ends.

    **Arguments:**

    - `command`: what rank 0 does.
    - `work`: what every other rank does with what it is handed.
    """
    global _waiting
    ranks.join()
    if not ranks.first():
        _follow(work)
        ranks.leave()
        return
    _waiting = ranks.count() > 1
    try:
        command()
    finally:
        if _waiting:
            _waiting = False
            ranks.agreed(None)
        ranks.leave()


@contextmanager
def handed_out(job: Any) -> Iterator[None]:
    """Let the waiting ranks, if there are any, do in a `with` block what this one does in it.

    **Raises:** `TrainingError` if the job can't be sent; `SystemExit` if another rank is gone: nothing can be done but
    to start again from the checkpoint.
    """
    global _waiting
    if not _waiting:
        yield
        return
    ranks.agreed(_packed(job))
    try:
        yield
    except Exception as error:
        try:
            _all_gave_up()
        except RuntimeError:
            _waiting = False
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise SystemExit(
                f"filterfold: another process is gone ({reason}); the same command goes on from here"
            ) from error
        raise


def _follow(work: Callable[[Any], object]) -> None:
    nothing: tuple[list[str], int, bytes] | None = None
    while (packed := ranks.agreed(nothing)) is not None:
        files, threads, job = packed
        torch.set_num_threads(threads)
        for path in files:
            load_file(Path(path))
        try:
            work(torch.load(io.BytesIO(job), map_location="cpu", weights_only=False))
        except Exception as error:
            _LOG.debug("rank %d gave up", ranks.rank(), exc_info=error)
            try:
                _all_gave_up()
            except RuntimeError:  # the others go on, and would wait for this one: end, and torchrun ends them
                raise error from None


def _packed(job: Any) -> tuple[list[str], int, bytes]:
    """The files of a user's own that a job's classes are from, the CPU threads to compute with, and the job."""
    files = [str(module.__file__) for name, module in sys.modules.items() if name.startswith(FILE_MODULE)]
    buffer = io.BytesIO()
    try:
        torch.save(job, buffer)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainingError(
            f"the work can't be sent to the other processes ({reason}); train by a script that calls "
            "filterfold.training.train in every process"
        ) from error
    return files, torch.get_num_threads(), buffer.getvalue()


def _all_gave_up() -> None:
    """Make sure that every rank ended the job with an error, as when data and network don't fit.

    **Raises:** `RuntimeError` if one goes on.
    """
    dist.monitored_barrier(ranks.control(), timeout=PATIENCE)
