"""Built-in prompts and class names (findings-scale 9): OpenAI's for ImageNet."""

from __future__ import annotations

import hashlib
import json
import warnings

import pytest

from hf_robust_vision.data.sources import load_labelled_images
from hf_robust_vision.data.templates import CLASS_NAMES, IMAGENET, TEMPLATES, get_templates, read_class_names
from hf_robust_vision.pipeline.measure import EvaluationSet
from hf_robust_vision.pipeline.run_data import DataArguments, load_splits
from hf_robust_vision.pixels import PixelTransform
from hf_robust_vision.towers.load import load_encoder
from hf_robust_vision.towers.processors import load_tokenizer
from hf_robust_vision.towers.text_bank import check_templates, make_text_bank
from tests.conftest import NAMES, SIZE
from tests.data.test_datasets import rows_of, saved
from tests.data.test_folders import fill


FIT = PixelTransform(SIZE, (SIZE, SIZE))


def test_the_lists_are_openais():
    """As open_clip 3 has them, and in the order of ImageNet's labels, which is that of the ids."""
    text = json.dumps([TEMPLATES["openai-7"], TEMPLATES["openai-80"], IMAGENET])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "6cf6bca7c08a5141"
    assert list(IMAGENET) == sorted(IMAGENET)
    few = {
        "n01440764": "tench",
        "n02012849": "crane bird",
        "n03126707": "construction crane",
        "n15075141": "toilet paper",
    }
    assert {key: IMAGENET[key] for key in few} == few


def test_the_lists_are_those_of_open_clip():
    known = pytest.importorskip("open_clip.zero_shot_metadata")
    assert list(CLASS_NAMES["openai-imagenet"]) == list(known.IMAGENET_CLASSNAMES)
    for name, templates in (
        ("openai-7", known.SIMPLE_IMAGENET_TEMPLATES),
        ("openai-80", known.OPENAI_IMAGENET_TEMPLATES),
    ):
        assert [template.format("x") for template in TEMPLATES[name]] == [template("x") for template in templates]


@pytest.mark.parametrize(("name", "count"), [("openai-7", 7), ("openai-80", 80)])
def test_templates_by_name(name, count):
    templates = get_templates(name)
    check_templates(templates)
    assert len(set(templates)) == count
    assert set(templates) <= set(TEMPLATES["openai-80"])


def test_class_names_by_name():
    assert read_class_names("openai-imagenet") == tuple(IMAGENET.values())
    assert len(IMAGENET) == 1000
    with pytest.raises(ValueError, match=r"nor one of the lists \['openai-imagenet'\]"):
        read_class_names("imagenet")


def test_folders_of_a_part_of_imagenet(tmp_path):
    """Ten classes of it, say, need no --class_names."""
    fill(tmp_path / "test", "n03126707/1.JPEG", "n02012849/2.JPEG", "n02979186/3.JPEG")
    part = load_labelled_images(tmp_path, "test", FIT)
    assert part.class_names == ("crane bird", "cassette player", "construction crane")
    assert part.labels() == [0, 1, 2]


def test_labels_of_a_saved_dataset(tmp_path):
    names = ("n01440764", "n01443537", "n01484850")
    assert load_labelled_images(saved(rows_of(6), tmp_path / "d", names), "train", FIT).class_names == (
        "tench", "goldfish", "great white shark",
    )  # fmt: skip


@pytest.mark.parametrize("folder", ["n0144076", "n014407640", "m01440764", "nice"])
def test_a_name_that_is_no_id_is_a_name(folder, tmp_path):
    fill(tmp_path / "test", f"{folder}/1.png", "n01443537/2.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(load_labelled_images(tmp_path, "test", FIT).class_names) == {folder, "n01443537"}


def test_ids_beyond_imagenet_are_said(tmp_path):
    """Of all 21,000 synsets: a prompt of an id says nothing, and half a list of names would be worse."""
    fill(tmp_path / "test", "n01440764/1.png", "n00004475/2.png")
    with pytest.warns(UserWarning, match=r"1 of 2 class names are WordNet ids .* n00004475.*--class_names FILE"):
        assert load_labelled_images(tmp_path, "test", FIT).class_names == ("n00004475", "n01440764")


def test_names_and_templates_of_a_measurement(tmp_path):
    folder = saved(rows_of(6), tmp_path / "d", tuple(f"label {place}, Latin {place}" for place in range(1000)))
    data = EvaluationSet(str(folder), split="train", class_names="openai-imagenet", templates="openai-80")
    images, templates = data.load(FIT)
    assert (images.class_names, templates) == (CLASS_NAMES["openai-imagenet"], TEMPLATES["openai-80"])


def test_names_of_a_training_run(tmp_path):
    names = [f"label {place}, Latin {place}" for place in range(1000)]
    options = DataArguments(str(saved(rows_of(9), tmp_path / "d", names)), class_names="openai-imagenet")
    options.validation_size, options.test_split = 2, "train"
    train, validation, _ = load_splits(options, 0, FIT, measure=False)
    assert train.class_names == validation.class_names == CLASS_NAMES["openai-imagenet"]


def test_each_set_has_its_hash(encoder, clip_folder):
    """The one of the protocol: a number of seven prompts is none of eighty."""
    tokenizer = load_tokenizer(clip_folder)
    sets = ("photo", "openai-7", "openai-80")
    hashes = [make_text_bank(encoder, tokenizer, NAMES, get_templates(name)).template_hash for name in sets]
    assert len(set(hashes)) == 3


def test_names_that_the_tokenizer_writes_alike_are_refused(clip_folder):
    """Both words unknown, or both cut off; in another case they are as names that stand twice."""
    encoder, tokenizer = load_encoder(clip_folder), load_tokenizer(clip_folder)
    with pytest.raises(
        ValueError, match="makes one text of the classes 'rose' and 'tulip'.*does not know these words"
    ):
        make_text_bank(encoder, tokenizer, ["red", "rose", "tulip"], ["a photo of a {}"])
    far = "a photo of a " * 5 + "{}"
    with pytest.raises(ValueError, match="one text of the classes 'red' and 'green'.*cuts the prompt off"):
        make_text_bank(encoder, tokenizer, ["red", "green"], [far])
    bank = make_text_bank(encoder, tokenizer, ["red", "green"], [far, "a photo of a {}"])
    assert len(bank.class_names) == 2, "one template tells them apart"
    make_text_bank(encoder, tokenizer, ["Rose", "red", "rose"], ["a photo of a {}"], batch_size=2)
