"""A tiny random CLIP and a tiny labelled data set with signal: everything here runs in seconds, without a network."""

from __future__ import annotations

import copy
import os
import tempfile


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="hf-robust-vision-tests-"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.data.templates import TEMPLATES
from hf_robust_vision.pixels import PixelTransform
from hf_robust_vision.towers.load import load_encoder
from hf_robust_vision.towers.processors import load_tokenizer
from hf_robust_vision.towers.text_bank import _warn_of_twins, make_text_bank


SIZE = 32
NAMES = ("red", "green", "blue")
TEMPLATE = ("a photo of a {}",)


def pytest_xdist_auto_num_workers(config):
    """The whole suite shares out the cores; some files, or one whose prints are wanted, run in this process."""
    if config.args_source is config.ArgsSource.TESTPATHS and config.option.capture != "no":
        return None  # as xdist counts
    return 0


@pytest.fixture(autouse=True)
def _seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    _warn_of_twins.cache_clear()  # once in each test


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = sorted({w for t in TEMPLATES["demo"] for w in t.replace("{}", "").split()} | set(NAMES) | {"photo", "."})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[BOS]", "[EOS]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special)


def build_processor() -> CLIPProcessor:
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return CLIPProcessor(image_processor=images, tokenizer=build_tokenizer())


def build_clip(vocabulary: int = 40, vision_init: float = 8.0) -> CLIPModel:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = small | {"image_size": SIZE, "patch_size": 8, "initializer_factor": vision_init}
    text = small | {"vocab_size": vocabulary, "max_position_embeddings": 16}
    text |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    # A wide initialisation: with 0.02 the logits of all classes are nearly equal and every flag is a coin toss.
    wide = {"initializer_factor": 8.0}
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text | wide, projection_dim=16, **wide))
    return model.eval()


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """Folder of a tiny random CLIPModel with its processor."""
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    build_clip().save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


def build_siglip() -> SiglipModel:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {"vocab_size": 40, "max_position_embeddings": 12}  # fewer than the tokenizer would pad to
    text |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    vision = small | {"image_size": SIZE, "patch_size": 8}
    model = SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).eval()
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
        model.logit_bias.fill_(-4.0)
        model.text_model.encoder.layers[0].mlp.fc1.weight *= 4  # or all texts would be nearly one
    return model


@pytest.fixture(scope="session")
def siglip_folder(tmp_path_factory):
    """Folder of a tiny random SiglipModel with its processor."""
    folder = tmp_path_factory.mktemp("siglip") / "tiny-siglip"
    build_siglip().save_pretrained(folder)
    images = SiglipImageProcessor(size={"height": SIZE, "width": SIZE})
    SiglipProcessor(image_processor=images, tokenizer=build_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def processor(clip_folder):
    return CLIPProcessor.from_pretrained(clip_folder)


@pytest.fixture(scope="session")
def _encoder(clip_folder):
    return load_encoder(clip_folder)


@pytest.fixture
def encoder(_encoder):
    """A fresh copy of the tiny encoder."""
    return copy.deepcopy(_encoder)


@pytest.fixture(scope="session")
def bank(_encoder, clip_folder):
    return make_text_bank(_encoder, load_tokenizer(clip_folder), NAMES, TEMPLATE)


def picture(index: int, label: int, size: int = SIZE) -> Image.Image:
    """Noise with one channel raised: the class is in the colour."""
    random = np.random.default_rng(index)
    pixels = random.integers(30, 150, (size, size, 3))
    pixels[..., label] += 100
    return Image.fromarray(pixels.astype(np.uint8))


def make_dataset(count: int = 24, split: str = "train", start: int = 0) -> LabelledImages:
    rows = [{"image": picture(i, i % 3), "label": i % 3} for i in range(start, start + count)]
    return LabelledImages(rows, NAMES, PixelTransform(SIZE, (SIZE, SIZE)), name="tiny", split=split)


@pytest.fixture(scope="session")
def dataset():
    return make_dataset()


@pytest.fixture(scope="session")
def labelled_by_model(_encoder, bank, dataset):
    """The same images, labelled as the tiny model sees them: it is right about all, until it is attacked."""
    images = torch.stack([item["images"] for item in dataset])
    with torch.no_grad():
        labels = bank.logits(_encoder(images).image_embeds).argmax(1).tolist()
    rows = [{"image": row["image"], "label": label} for row, label in zip(dataset.rows, labels)]
    # Every fifth label is wrong, so that clean accuracy is neither 0 nor 1.
    for row in rows[::5]:
        row["label"] = (row["label"] + 1) % 3
    return LabelledImages(rows, NAMES, dataset.transform, name="tiny", split="test")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """`<split>/<class>/<image>.png` with 12 train, 6 validation and 6 test images."""
    folder = tmp_path_factory.mktemp("data") / "tiny-images"
    start = 0
    for split, count in (("train", 12), ("validation", 6), ("test", 6)):
        for i in range(start, start + count):
            place = folder / split / NAMES[i % 3]
            place.mkdir(parents=True, exist_ok=True)
            picture(i, i % 3).save(place / f"{i}.png")
        start += count
    return folder
