"""Training from a stream: shares without images, images that can not be decoded, and how it is loaded."""

from __future__ import annotations

import signal
import warnings
from itertools import islice
from types import SimpleNamespace

import pytest

from hf_robust_vision.data.datasets import StreamedImages
from hf_robust_vision.training import streams
from hf_robust_vision.training.streams import Endless
from tests.conftest import make_dataset
from tests.training.helpers import make_stream, make_trainer
from tests.training.ranks import said, start


def with_broken(count: int, broken: int) -> StreamedImages:
    images = make_dataset(max(count, 1))
    rows = [{"image": b"no image", "label": 0}] * broken + images.rows[:count]
    stream = StreamedImages(rows, images.class_names, images.transform, name="tiny", split="train")
    return stream.without_corrupt()


def test_a_share_without_images_is_said():
    stream = make_stream(count=2, shards=1).share(3, 4)
    with pytest.raises(ValueError, match="process 3 of 4 got no image"):
        next(iter(Endless(stream)))


def test_workers_without_images_end_the_run_with_an_error(clip_folder, tmp_path):
    """`Trainer` would take it for the end of the data, and a model that saw nothing for a trained one."""
    trainer = make_trainer(clip_folder, tmp_path, train=with_broken(0, 2), dataloader_num_workers=1)
    with pytest.raises(ValueError, match="process 0 of 1 got no image"):
        trainer.train()


def test_more_workers_than_shards_are_no_error(clip_folder, tmp_path):
    trainer = make_trainer(clip_folder, tmp_path, train=make_stream(6, shards=1), dataloader_num_workers=2)
    trainer.train()
    assert trainer.state.global_step == 3


def test_a_process_without_images_stops_the_others(clip_folder, tmp_path):
    """One image for two processes: the other would wait for gradients that never come."""
    codes = start(clip_folder, tmp_path, world=2, stream=1, dataloader_num_workers=1)
    assert not {0, -signal.SIGKILL} & set(codes), codes
    assert "process 1 of 2 got no image" in said(tmp_path, 1)


def test_skipped_images_are_told_at_every_tenfold():
    """Of 10 passes over six broken images and a good one."""
    items = iter(Endless(with_broken(1, 6)))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert [next(items)["ids"] for _ in range(10)] == [6] * 10
    assert [str(warning.message) for warning in told] == [
        f"process 0: skipped {count} corrupt images of tiny so far" for count in (6, 60)
    ]


@pytest.mark.parametrize("persistent", [True, False])
def test_persistent_workers_are_kept(persistent, clip_folder, tmp_path):
    settings = {"dataloader_num_workers": 1, "dataloader_persistent_workers": persistent}
    trainer = make_trainer(clip_folder, tmp_path, train=make_stream(), **settings)
    assert trainer.get_train_dataloader().persistent_workers == persistent


def test_a_stream_has_no_epochs(clip_folder, tmp_path):
    trainer = make_trainer(clip_folder, tmp_path, train=make_stream(), save_strategy="epoch")
    with pytest.raises(ValueError, match="type --save_strategy steps"):
        trainer.train()


def test_a_worker_that_is_ahead_does_not_shuffle_the_others(monkeypatch):
    """The epoch of a `datasets` stream lies in memory that the workers of a loader share."""
    stream = make_stream(6)
    monkeypatch.setattr(streams, "get_worker_info", lambda: SimpleNamespace(id=0))
    read = islice(iter(streams.Endless(stream)), 8)
    assert len(list(read)) == 8
    assert stream.rows.epoch == 0
