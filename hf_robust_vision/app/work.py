"""An attack in a thread of its own, which ends as soon as nobody asks how far it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hf_robust_vision.evaluation.single import Watch


TELL = 0.2  # seconds between two words about the progress
# Models are shared, and under attack they are in another mode: one attack at a time, also where one is just ending.
_TURN = threading.Lock()


class StoppedError(Exception):
    """The visitor has left or cancelled."""


@dataclass(frozen=True)
class Progress:
    """How far an attack is."""

    share: float  # of the work, in [0, 1]
    eps: float  # radius at work; 0 before the first


def attacking(job: Callable[[Watch], Any], seconds: float) -> Iterator[Any]:
    """Run a job, and give its `Progress` until it is done, then what it returned.

    To close the iterator stops the attack before its next step, and waits for that.

    Args:
        job: Given the watch of the attack.
        seconds: That it may take.

    Raises:
        ValueError: If it took longer; or what the job raised.
    """
    stop, latest = threading.Event(), [Progress(0.0, 0.0)]
    outcome: list[tuple[Any, BaseException | None]] = []
    end = time.monotonic() + seconds

    def watch(share: float, eps: float) -> None:
        if stop.is_set():
            raise StoppedError
        if time.monotonic() > end:
            raise ValueError(
                f"the attack took over {seconds:g} s and was stopped: take fewer steps or a smaller image."
            )
        latest[0] = Progress(share, eps)

    def work() -> None:
        try:
            with _TURN:
                watch(0.0, 0.0)
                outcome.append((job(watch), None))
        except BaseException as error:  # it is raised again where the visitor is told
            outcome.append((None, error))

    thread = threading.Thread(target=work, name="attack", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            yield latest[0]
            thread.join(TELL)
    finally:
        stop.set()
        thread.join()
    result, error = outcome[0]
    if error is not None:
        raise error
    yield result
