"""A measured folder of the tiny CLIP, a hub on this machine, and a process whose client speaks to it."""

from __future__ import annotations

import copy
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from hf_robust_vision.attacks import get_protocol
from hf_robust_vision.data.decode import decode_image
from hf_robust_vision.data.sources import load_labelled_images
from hf_robust_vision.evaluation.results import save_results
from hf_robust_vision.evaluation.task import RobustnessProtocol
from hf_robust_vision.evaluation.tasks.zero_shot import evaluate_zero_shot
from hf_robust_vision.hub.card import write_card
from hf_robust_vision.report.pictures import plot_curve
from hf_robust_vision.towers.load import load_encoder
from hf_robust_vision.towers.text_bank import make_text_bank
from tests.conftest import NAMES, picture
from tests.hub.server import running_hub


TRAINING = {"method": "Sim-CLIP", "form": "frozen", "eps": 4 / 255, "steps": 7}
LEFTOVERS = ("training_args.bin", "trainer_state.json", "checkpoint-2/optimizer.pt", "notes.txt", ".hidden")


def measure(encoder, processor, data, folder, model):
    """Two radii on the twelve test images."""
    images = load_labelled_images(data, "test", encoder.transform)
    bank = make_text_bank(encoder, processor.tokenizer, images.class_names, ["a photo of a {}"])
    how = RobustnessProtocol(get_protocol("apgd-ce", steps=3), (0.1 / 255, 1 / 255), restarts=((1 / 255, 2),))
    return evaluate_zero_shot(encoder, bank, images, how, model_name=model, samples_dir=folder, progress=False)


def describe(folder, results, **settings):
    """What a recipe writes beside the weights."""
    for result in results:
        result.training = TRAINING if result.model == "after" else None
    save_results(results, folder)
    picture = plot_curve(results, folder / "robustness.png").name
    named = {"model_name": "tiny-robust", "base_model": "me/base", "tags": ["sim-clip"], "license": "mit"}
    write_card(folder, results, picture=picture, paper="2407.14971", **(named | settings))


@pytest.fixture(scope="session")
def seen_images(clip_folder, processor, tmp_path_factory):
    """Twelve test images in the folders of the classes that the tiny CLIP sees, but every fifth: all flags occur."""
    folder = tmp_path_factory.mktemp("seen") / "tiny-images"
    encoder = load_encoder(clip_folder)
    bank = make_text_bank(encoder, processor.tokenizer, NAMES, ["a photo of a {}"])
    pictures = [picture(number, number % 3) for number in range(12)]
    with torch.no_grad():
        images = torch.stack([decode_image(image) for image in pictures])
        labels = bank.logits(encoder(images).image_embeds).argmax(1).tolist()
    for number, (image, label) in enumerate(zip(pictures, labels)):
        place = folder / "test" / NAMES[(label + (number % 5 == 0)) % 3]
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def measured(clip_folder, processor, seen_images, tmp_path_factory):
    """What a recipe leaves behind, with the files of training that must stay at home."""
    folder = tmp_path_factory.mktemp("measured") / "robust-clip"
    before = load_encoder(clip_folder)
    after = copy.deepcopy(before)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in after.vision_model.parameters():
            parameter += 0.001 * torch.randn_like(parameter)
    after.save_pretrained(folder)
    processor.save_pretrained(folder)
    results = measure(before, processor, seen_images, folder, "before")
    describe(folder, results + measure(after, processor, seen_images, folder, "after"))
    (folder / "checkpoint-2").mkdir()
    for name in LEFTOVERS:
        (folder / name).write_text("stays at home")
    return folder


@pytest.fixture(scope="module")
def _server():
    with running_hub() as hub:
        yield hub


@pytest.fixture
def hub(_server):
    """Emptied for each test."""
    _server.repos.clear()
    _server.collections.clear()
    _server.objects.clear()
    _server.requests.clear()
    _server.faults.clear()
    _server.corrupt = None
    return _server


@pytest.fixture(scope="module")
def hub_settings(_server, tmp_path_factory):
    """Environment of a process whose client talks to the hub: it is read when the client is imported."""
    return {
        "HF_ENDPOINT": _server.url, "HF_HOME": str(tmp_path_factory.mktemp("home")), "HF_TOKEN": "hf_writer",
        "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


@pytest.fixture(scope="module")
def client(hub_settings):
    """`client(function, ...)` runs it in a fresh process that talks to the hub, and returns or raises what it does."""
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for name, value in hub_settings.items():
            patch.setenv(name, value)
        pool.submit(int).result()  # the process starts now, with these settings
        patch.undo()
        yield lambda function, *args, **more: pool.submit(function, *args, **more).result(timeout=600)
