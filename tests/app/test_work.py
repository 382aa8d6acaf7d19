"""An attack in its thread: it tells how far it is, and ends when nobody listens."""

from __future__ import annotations

import threading
import time

import pytest

from hf_robust_vision.app.work import Progress, attacking


def steps(count, seconds=0.02, seen=None):
    """A job of so many passes."""

    def job(watch):
        for place in range(count):
            watch(place / count, 0.1)
            if seen is not None:
                seen.append(place)
            time.sleep(seconds)
        return "found"

    return job


def test_progress_rises_to_the_result():
    *news, result = attacking(steps(50), 60)
    assert result == "found"
    assert len(news) > 2
    shares = [one.share for one in news]
    assert shares == sorted(shares)
    assert news[-1] == Progress(news[-1].share, 0.1)


def test_who_closes_the_iterator_stops_the_attack_at_once():
    seen = []
    running = attacking(steps(10_000, 0.01, seen), 600)
    next(running)
    next(running)
    running.close()
    count = len(seen)
    assert 0 < count < 10_000
    assert not [thread for thread in threading.enumerate() if thread.name == "attack"]
    time.sleep(0.1)
    assert len(seen) == count


def test_an_attack_that_takes_too_long_is_stopped():
    seen = []
    with pytest.raises(ValueError, match=r"took over 0\.3 s"):
        list(attacking(steps(10_000, 0.01, seen), 0.3))
    assert len(seen) < 100


def test_what_the_attack_raises_is_raised_where_it_is_told():
    def broken(watch):
        raise ValueError("the model is none")

    with pytest.raises(ValueError, match="the model is none"):
        list(attacking(broken, 60))


def test_two_attacks_never_run_at_once():
    working, most = [], []

    def job(watch):
        working.append(1)
        most.append(len(working))
        time.sleep(0.2)
        working.pop()

    threads = [threading.Thread(target=lambda: list(attacking(job, 60))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]
