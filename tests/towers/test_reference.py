"""Features of the original: asked for when needed, and once a sample if they are remembered."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from hf_robust_vision import TeCoATrainer
from hf_robust_vision.towers.base import Reads
from hf_robust_vision.towers.reference import Reference, TargetCache
from tests.conftest import make_dataset
from tests.training.helpers import largest_gap, make_trainer, weights


IMAGES, IDS = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([5, 3, 9, 0, 7, 2])


@pytest.fixture
def reference(encoder):
    """The original, and how many images it was asked for at each call."""
    inner, calls = Reference(encoder, Reads("patch_tokens")), []

    def counted(images):
        calls.append(len(images))
        return inner(images)

    return counted, calls


def test_features_are_those_of_the_original(reference):
    counted, calls = reference
    cache = TargetCache(counted, 1, None)
    wanted = counted(IMAGES)
    for rows in (torch.tensor([0, 1, 2]), torch.tensor([2, 3, 0]), torch.arange(6), torch.tensor([5, 4, 3, 1, 2, 0])):
        for key, value in cache(IMAGES[rows], IDS[rows]).items():
            torch.testing.assert_close(value, wanted[key][rows], rtol=1e-5, atol=1e-6)
    assert calls == [6, 3, 1, 2]  # the last batch was known


def test_what_is_remembered_is_bit_equal(reference):
    cache = TargetCache(reference[0], 1, None)
    first, again = cache(IMAGES, IDS), cache(IMAGES, IDS)
    wanted = reference[0](IMAGES)
    for key, value in wanted.items():
        assert torch.equal(first[key], value)
        assert torch.equal(again[key], value)
    assert set(again.keys()) == {"image_embeds", "patch_tokens"}


def test_memory_is_bounded(reference):
    """16 + 16 * 32 + 64 numbers of four bytes a sample: four of them fit into 10 kB, and one more does not."""
    counted, calls = reference
    cache = TargetCache(counted, 0, None)
    cache._room = 10_000
    for _ in range(2):
        cache(IMAGES, IDS)
    assert len(cache) == 4
    assert calls == [6, 2]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage() for e in cache._features.values() for t in e.values()}
    assert sum(storage.nbytes() for storage in held.values()) <= 10_000


def test_augmented_images_are_noticed(reference):
    cache = TargetCache(reference[0], 1, None)
    cache(IMAGES, IDS)
    with pytest.raises(ValueError, match=r"sample 9 has other pixels.*--cache_targets_mb 0"):
        cache(torch.cat([IMAGES[:2], IMAGES[2:3].flip(-1)]), IDS[:3])


def test_streams_are_refused(clip_folder, tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from make_dataset(6)

    with pytest.raises(ValueError, match="for a stream type 0"):
        make_trainer(clip_folder, tmp_path, train=Stream(), cache_targets_mb=1)


@pytest.mark.parametrize(
    "options", [{"form": "anchored", "feature": "both"}, {"use_peft": True}], ids=["full", "lora"]
)
def test_training_with_a_cache_is_the_same_training(options, clip_folder, tmp_path):
    """24 images in batches of 6: two epochs need 24 features, not 48. In float64, to 1e-12."""
    settings = {"double": True, "max_steps": 8, "save_strategy": "no", "logging_steps": 100} | options
    plain = make_trainer(clip_folder, tmp_path, **settings)
    plain.train()
    cached = make_trainer(clip_folder, tmp_path, cache_targets_mb=8, **settings)
    seen, inner = [], cached.targets.reference
    cached.targets.reference = lambda images: (seen.append(len(images)), inner(images))[1]
    cached.train()
    assert sum(seen) == 24
    assert largest_gap(weights(plain), weights(cached)) < 1e-12


class Views(Dataset):
    """Samples in seeded views, shifted and flipped; each view is an item with an id of its own."""

    def __init__(self, samples, views):
        self.samples, self.views = samples, views
        self.class_names = samples.class_names

    def __len__(self):
        return len(self.samples) * self.views

    def __getitem__(self, index):
        view, sample = divmod(index, len(self.samples))
        item = self.samples[sample]
        draw = torch.Generator().manual_seed(1 + index)
        shift, flip = torch.randint(-4, 5, (2,), generator=draw).tolist(), torch.rand((), generator=draw) < 0.5
        images = item["images"].roll(shift, (1, 2)) if view else item["images"]
        return item | {"images": images.flip(2) if flip else images, "ids": index}


def test_seeded_views_of_a_sample_are_remembered(clip_folder, tmp_path):
    """Eight samples in three views, two epochs in one order: 24 features instead of 48, and not a bit differs."""
    images = Views(make_dataset(8), 3)
    settings = {"max_steps": 8, "train": images, "learning_rate": 1e-3, "train_sampling_strategy": "sequential"}
    plain = make_trainer(clip_folder, tmp_path, **settings)
    plain.train()
    cached = make_trainer(clip_folder, tmp_path, cache_targets_mb=8, **settings)
    cached.train()
    assert len(cached.targets) == 24
    assert [row["passes"] for row in cached.state.log_history if "passes" in row] == [8.0] * 4 + [7.0] * 4
    assert largest_gap(weights(plain), weights(cached)) == 0
    losses = [[row["loss"] for row in each.state.log_history if "loss" in row] for each in (plain, cached)]
    assert losses[0] == losses[1]


def test_a_method_that_reads_no_original_computes_none(clip_folder, tmp_path):
    """TeCoA pays no reference pass but for the log and the check at the end; Sim-CLIP pays one a step."""
    calls = {}
    for name, kind in (("tecoa", {"kind": TeCoATrainer}), ("sim-clip", {})):
        trainer = make_trainer(clip_folder, tmp_path, max_steps=4, logging_steps=4, **kind)
        seen, inner = [], trainer.reference
        trainer.reference = lambda images, seen=seen, inner=inner: (seen.append(1), inner(images))[1]
        trainer.train()
        calls[name] = len(seen)
    assert calls == {"tecoa": 2, "sim-clip": 5}  # the log measures drift at step 0, and the end looks for a collapse
