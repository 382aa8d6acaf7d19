"""Retrieval under attack: ranks by hand, what is attacked, and resumable like every evaluation."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hf_robust_vision.data.captions import CaptionedImages
from hf_robust_vision.data.demo import CLASS_NAMES, load_demo_captions
from hf_robust_vision.data.templates import TEMPLATES
from hf_robust_vision.evaluation.engine import evaluate
from hf_robust_vision.evaluation.images import AdversarialImages
from hf_robust_vision.evaluation.results import load_samples, save_results, wilson_interval
from hf_robust_vision.evaluation.samples import SampleStore
from hf_robust_vision.evaluation.tasks.retrieval import (
    CaptionLoss,
    CaptionsLost,
    Retrieval,
    RetrievalProtocol,
    evaluate_retrieval,
    remeasure_retrieval,
)
from hf_robust_vision.pixels import PixelTransform
from hf_robust_vision.report.page import write_report
from hf_robust_vision.towers.base import weights_sha256
from tests.conftest import NAMES, SIZE, picture


EPS = (0.0, 0.5 / 255, 2 / 255)
HOW = RetrievalProtocol(EPS, steps=5, ks=(1, 2), batch_size=5)
FIT = PixelTransform(SIZE, (SIZE, SIZE))


def embeddings(encoder, tokenizer, images, captions):
    """By stock transformers calls."""
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    keys = ("input_ids", "attention_mask")
    with torch.no_grad():
        texts = encoder.get_text_features(**{key: tokens[key] for key in keys}).pooler_output
        return F.normalize(encoder(images).image_embeds, dim=-1), F.normalize(texts, dim=-1)


@pytest.fixture(scope="module")
def dataset(_encoder, processor):
    """Eight images, each with the captions that the tiny model likes best for it: it is mostly right, until attacked."""
    captions = [template.format(name) for template in TEMPLATES["demo"] for name in NAMES]
    pictures = [picture(100 + i, i % 3) for i in range(8)]
    rows = [{"image": image, "captions": []} for image in pictures]
    images = torch.stack([CaptionedImages(_named(rows), FIT, name="x", split="x").image(i) for i in range(8)])
    seen, said = embeddings(_encoder, processor.tokenizer, images, captions)
    similar = (seen - seen.mean(0)) @ said.T
    for caption in range(len(captions)):
        for place in similar[:, caption].argsort(descending=True).tolist():
            if len(rows[place]["captions"]) < 3:
                rows[place]["captions"].append(captions[caption])
                break
    return CaptionedImages([row for row in rows if row["captions"]], FIT, name="tiny-captions", split="test")


def _named(rows):
    return [row | {"captions": "x"} for row in rows]


@pytest.fixture
def measure(encoder, processor, dataset):
    def run(how=HOW, **settings):
        settings = {"model_name": "before", "progress": False} | settings
        return evaluate_retrieval(encoder, processor.tokenizer, dataset, how, **settings)

    return run


@pytest.fixture
def by_hand(encoder, processor, dataset):
    """Similarities of clean images (rows) and captions (columns)."""
    images = torch.stack([dataset.image(place) for place in range(len(dataset))])
    seen, said = embeddings(encoder, processor.tokenizer, images, dataset.captions)
    return seen @ said.T


def ranks_by_hand(similar, owners):
    """Rank of the best own caption for each image, and of the own image for each caption, by sorting."""
    images, texts = [], []
    for place in range(len(similar)):
        order = similar[place].argsort(descending=True).tolist()
        images.append(min(order.index(c) for c, owner in enumerate(owners) if owner == place))
    for caption, owner in enumerate(owners):
        texts.append(similar[:, caption].argsort(descending=True).tolist().index(owner))
    return images, texts


def test_loss_and_success_by_hand():
    scores = torch.tensor([[3.0, 5.0, 4.0, 1.0], [3.0, 5.0, 4.0, 1.0]])
    own = torch.tensor([[True, False, False, True], [False, True, False, False]])
    loss = CaptionLoss(lambda images: scores[: len(images)], own, 1)
    images = torch.zeros(2, 3, 1, 1)
    assert loss(images).tolist() == [2.0, -1.0]  # best wrong minus best own
    assert replace(loss, k=2)(images).tolist() == [1.0, -2.0]
    assert CaptionsLost(loss)(images).tolist() == [True, False]
    nll = replace(loss, kind="nll")(images)
    assert nll[1] == pytest.approx(F.cross_entropy(scores[1:], torch.tensor([1])).item())
    assert nll[0] == pytest.approx(-scores[0].softmax(0)[[0, 3]].sum().log().item(), rel=1e-5)
    assert torch.equal(loss.take(torch.tensor([1])).own, own[1:])


def test_clean_recall_is_that_of_sorting(measure, by_hand, dataset, tmp_path):
    results = measure(replace(HOW, eps=(0.0,)), samples_dir=tmp_path)
    images, texts = ranks_by_hand(by_hand, dataset.owners)
    wanted = {
        f"{name}_recall@{k}": sum(rank < k for rank in ranks) / len(ranks)
        for name, ranks in (("image_to_text", images), ("text_to_image", texts))
        for k in (1, 2)
    }
    assert {result.metric: result.clean_accuracy for result in results} == wanted
    assert {result.metric: result.robust_accuracy for result in results} == wanted  # eps 0 is clean
    assert wanted["image_to_text_recall@1"] > 0
    for result, ranks in ((results[0], images), (results[-1], texts)):
        assert [record.clean for record in load_samples(tmp_path / result.samples)] == ranks
        assert result.num_samples == len(ranks)


@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
def test_what_is_attacked(encoder, processor, dataset, by_hand, monkeypatch, tmp_path, direction):
    """With black as the attack's answer, ranks are those of a black image in place of the one attacked alone."""
    monkeypatch.setattr(Retrieval, "strike", lambda task, stage, batch, seed: torch.zeros_like(batch.images))
    how, task = replace(HOW, eps=(1.0,), ks=(4,)), Retrieval(encoder, processor.tokenizer, dataset, direction, (4,))
    count = len(dataset) if direction == "image_to_text" else len(dataset.captions)
    about = {"model_name": "x", "samples_dir": tmp_path, "progress": False}
    (result,) = evaluate(task, how.robustness(direction), **about)
    records = load_samples(tmp_path / result.samples)
    black = embeddings(encoder, processor.tokenizer, torch.zeros(1, 3, SIZE, SIZE), dataset.captions)
    black = (black[0] @ black[1].T)[0]
    clean = ranks_by_hand(by_hand, dataset.owners)[direction == "text_to_image"]
    for sample in range(count):
        place = sample if direction == "image_to_text" else dataset.owners[sample]
        similar = by_hand.clone()
        similar[place] = black
        rank = ranks_by_hand(similar, dataset.owners)[direction == "text_to_image"][sample]
        # An attack that brings nothing worse than the clean image leaves no trace.
        worse = clean[sample] < 4 and rank >= clean[sample]
        assert records[sample].adversarial == (rank if worse else None)


def test_recall_falls_and_is_the_sum_over_samples(measure, tmp_path):
    results = measure(samples_dir=tmp_path)
    assert len(results) == 2 * 2 * 3
    for result in results:
        records = load_samples(tmp_path / result.samples)
        k = int(result.metric[-1])
        worst = [r.clean if r.adversarial is None else r.adversarial for r in records]
        assert result.clean_accuracy == sum(r.clean < k for r in records) / len(records)
        assert result.robust_accuracy == sum(rank < k for rank in worst) / len(records)
        assert result.ci95["robust_accuracy"] == list(wilson_interval(sum(rank < k for rank in worst), len(records)))
        assert all((r.fooled_by is None) == (rank == 0) for r, rank in zip(records, worst))
        assert all(rank >= r.clean for r, rank in zip(records, worst))
    for metric in {result.metric for result in results}:
        curve = [result.robust_accuracy for result in results if result.metric == metric]
        assert curve == sorted(curve, reverse=True)
        assert curve[-1] < curve[0]
    found = {(r.metric, r.eps): r.robust_accuracy for r in results}
    for direction in ("image_to_text", "text_to_image"):
        assert all(found[f"{direction}_recall@1", eps] <= found[f"{direction}_recall@2", eps] for eps in EPS)


def test_flags_do_not_depend_on_batch_size(measure, tmp_path):
    files = []
    for place, size in (("a", 5), ("b", 1), ("c", 64)):
        results = measure(replace(HOW, batch_size=size), samples_dir=tmp_path / place)
        files.append([load_samples(tmp_path / place / result.samples) for result in results])
    assert files[0] == files[1] == files[2]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("batches", [1, 3])
def test_resumed_equals_unbroken(measure, monkeypatch, tmp_path, batches):
    unbroken = measure(samples_dir=tmp_path / "a")
    add, done = SampleStore.add, []

    def add_or_die(self, *progress):
        if len(done) == batches:
            raise Killed
        done.append(1)
        add(self, *progress)

    with monkeypatch.context() as patch:
        patch.setattr(SampleStore, "add", add_or_die)
        with pytest.raises(Killed):
            measure(samples_dir=tmp_path / "b")
    resumed = measure(samples_dir=tmp_path / "b")
    assert [replace(result, seconds=0) for result in resumed] == [replace(result, seconds=0) for result in unbroken]
    for result in unbroken:
        assert load_samples(tmp_path / "a" / result.samples) == load_samples(tmp_path / "b" / result.samples)


def test_result_says_what_was_attacked(measure, encoder, tmp_path):
    results = measure(samples_dir=tmp_path)
    first, last = results[0], results[-1]
    assert (first.task, first.metric, first.norm) == ("retrieval", "image_to_text_recall@1", "linf")
    assert first.model_sha256 == weights_sha256(encoder)
    assert [attack["name"] for attack in first.attacks] == [
        "apgd-nll@1", "apgd-margin@1", "apgd-nll@2", "apgd-margin@2",
    ]  # fmt: skip
    assert {attack["target"] for attack in first.attacks} == {"the image that searches"}
    assert [attack["target"] for attack in last.attacks] == ["the image to be found, the others stay clean"]
    assert (last.attacks[0]["steps"], last.attacks[0]["resolution"], last.attacks[0]["dtype"]) == (5, SIZE, "float32")
    save_results(results, tmp_path)
    page = write_report([tmp_path], tmp_path / "report")[1].read_text()
    assert "## tiny-captions (test), text to image recall@2" in page
    assert json.loads((tmp_path / "robustness.json").read_text())["results"][0]["task"] == "retrieval"


def test_no_trace_on_the_model(measure, encoder):
    encoder.train()
    before, state = weights_sha256(encoder), torch.get_rng_state()
    measure(replace(HOW, eps=(1 / 255,), steps=1))
    assert encoder.training
    assert all(p.requires_grad and p.grad is None for p in encoder.parameters())
    assert weights_sha256(encoder) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_input(measure, dataset):
    with pytest.raises(ValueError, match="smaller ks"):
        measure(replace(HOW, ks=(1, 99)))
    with pytest.raises(ValueError, match="one k of at least 1"):
        replace(HOW, ks=())
    with pytest.raises(ValueError, match="4/255"):
        replace(HOW, eps=(4.0,))
    shared = {"name": "x", "split": "x"}
    with pytest.raises(ValueError, match="at least 2"):
        CaptionedImages(dataset.rows[:1], FIT, **shared)
    with pytest.raises(ValueError, match="'texts'"):
        CaptionedImages(dataset.rows, FIT, caption_column="texts", **shared)
    with pytest.raises(ValueError, match="image 1 of x has no caption"):
        CaptionedImages([dataset.rows[0], {"image": None, "captions": []}], FIT, **shared)


def test_demo_gallery():
    pytest.importorskip("easy_vqa")
    gallery = load_demo_captions("test", PixelTransform(64, (64, 64)))
    assert len(gallery) == len(CLASS_NAMES) == 24
    assert len(set(gallery.captions)) == len(gallery.captions) == 24 * 6
    assert gallery.captions[6 * 3] == f"a photo of a {CLASS_NAMES[3]}"
    assert gallery.owners[6 * 3] == 3
    assert gallery.image(3).shape == (3, 64, 64)


def test_captions_of_a_datasets_table():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"image": ["a.png", "b.png"], "captions": [["one", "two"], ["three"]]})
    gallery = CaptionedImages(rows, FIT, name="x", split="x")
    assert (gallery.captions, gallery.owners) == (["one", "two", "three"], [0, 0, 1])


def test_saved_images_give_the_reported_numbers(measure, encoder, processor, dataset, tmp_path):
    tools = (encoder, processor.tokenizer, dataset)
    with pytest.raises(ValueError, match="needs a samples_dir"):
        measure(save_images=True)
    without = measure(samples_dir=tmp_path)
    with pytest.raises(ValueError, match="no images"):
        remeasure_retrieval(*tools, without[0], tmp_path)
    results = measure(samples_dir=tmp_path, save_images=True)  # what was measured without images is measured again
    assert [r.robust_accuracy for r in results] == [r.robust_accuracy for r in without]
    assert any(result.robust_accuracy < result.clean_accuracy for result in results)
    for result in results:
        again = remeasure_retrieval(*tools, result, tmp_path)
        assert again.num_samples == result.num_samples
        assert (again.clean_accuracy, again.robust_accuracy) == (result.clean_accuracy, result.robust_accuracy)
        assert again.reported == result.robust_accuracy
        assert (again.changed, again.outside) == ([], [])
        assert again.farthest <= result.eps * (1 + 1e-4)
    assert max(remeasure_retrieval(*tools, result, tmp_path).farthest for result in results) > EPS[1]


def test_images_that_were_changed_on_disk_are_found(measure, encoder, processor, dataset, tmp_path):
    results = measure(samples_dir=tmp_path, save_images=True)
    result = next(row for row in results if row.eps == EPS[-1] and row.robust_accuracy < row.clean_accuracy)
    images = AdversarialImages(tmp_path / result.images)
    for sample in images.ids():
        clean, _ = images.read(sample, 1.0)
        images.write(sample, clean, {})
    again = remeasure_retrieval(encoder, processor.tokenizer, dataset, result, tmp_path)
    assert again.changed
    assert again.robust_accuracy == result.clean_accuracy
