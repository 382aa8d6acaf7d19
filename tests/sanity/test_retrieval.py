"""Sanity checks of retrieval: the demo model passes in both directions, behind a rounding of its images it is flagged."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

from hf_robust_vision.data.captions import CaptionedImages
from hf_robust_vision.data.demo import demo_checkpoint, load_demo_captions
from hf_robust_vision.evaluation.results import load_results, load_samples, save_results
from hf_robust_vision.evaluation.tasks.retrieval import DIRECTIONS, Retrieval, RetrievalProtocol, evaluate_retrieval
from hf_robust_vision.report.page import write_report
from hf_robust_vision.sanity.bench import Bench, pick
from hf_robust_vision.sanity.check import add_retrieval_sanity, check_retrieval_sanity, sanity_text
from hf_robust_vision.towers.base import attack_mode, weights_sha256
from hf_robust_vision.towers.load import load_encoder
from hf_robust_vision.towers.processors import load_tokenizer
from tests.sanity.maskers import InputQuantiser, masked


pytest.importorskip("easy_vqa")

HOW = RetrievalProtocol((32 / 255,), steps=8, ks=(1,), batch_size=12)
LITTLE = replace(HOW, steps=1, ks=(1, 2))


@pytest.fixture(scope="module")
def demo():
    return load_encoder(demo_checkpoint())


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(demo_checkpoint())


@pytest.fixture(scope="module")
def gallery(demo):
    return load_demo_captions("test", demo.transform)


@pytest.fixture(scope="module")
def few(gallery):
    """Eight images, two captions each."""
    rows = [{"image": row["image"], "captions": row["captions"][:2]} for row in list(gallery.rows)[:8]]
    return CaptionedImages(rows, gallery.transform, name="few", split="test")


def with_wrong_captions(gallery):
    """Every caption belongs to the image after its own."""
    turned = copy.copy(gallery)
    turned.owners = [(owner + 1) % len(gallery) for owner in gallery.owners]
    return turned


def numbers(report):
    return {check["name"]: check["numbers"] for check in report["checks"]}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_honest_model_is_not_flagged(demo, tokenizer, gallery, direction):
    """Nor nearly: everything falls long before the steps are spent, and noise is far behind."""
    how = replace(HOW, eps=(32 / 255, 64 / 255))
    report = check_retrieval_sanity(demo, tokenizer, gallery, how, direction=direction, samples=12, queries=10)
    assert report["flagged"] == []
    assert (report["verdict"], report["num_samples"]) == ("passed", 12)
    found = numbers(report)
    assert found["steps converged"]["robust"][-2:] == [0, 0]
    assert found["falls at a large radius"]["at_largest"] == 0
    assert found["stronger than noise"]["lead"] > 0.5
    assert report["metric"] == f"{direction}_recall@1"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_masker_is_flagged(demo, tokenizer, gallery, direction):
    rounded, how = masked(demo, InputQuantiser), replace(HOW, steps=2)
    report = check_retrieval_sanity(
        rounded, tokenizer, gallery, how, direction=direction, surrogate=demo, samples=8, queries=10
    )
    signs = {"gradients", "falls at a large radius", "stronger than noise", "as strong as a transfer"}
    assert signs <= set(report["flagged"])
    assert report["verdict"] == "flagged"


@pytest.mark.parametrize(
    ("direction", "k", "eps"), [("image_to_text", 1, 8), ("image_to_text", 2, 16), ("text_to_image", 2, 32)]
)
def test_what_is_checked_is_what_was_measured(demo, tokenizer, few, tmp_path, direction, k, eps):
    """The same samples fall to the same attacks as in the evaluation."""
    how = replace(HOW, eps=(eps / 255,), steps=2, ks=(k,))
    results = evaluate_retrieval(demo, tokenizer, few, how, model_name="x", samples_dir=tmp_path, progress=False)
    (result,) = (result for result in results if result.metric == f"{direction}_recall@{k}")
    right = {record.id: record for record in load_samples(tmp_path / result.samples) if record.clean < k}
    with attack_mode(demo):
        trials = pick(Retrieval(demo, tokenizer, few, direction, (k,)), how.robustness(direction), 6)
        bench = Bench(trials, "linf", how.eps, how.steps, 0, "nothing", "try harder")
        fell = bench.white().tolist()
        assert not any(torch.cat([trial.lost(trial.images) for trial in trials]))
    ids = [sample for trial in trials for sample in trial.noise.ids]
    assert len(ids) == len(set(ids)) == 6
    assert fell == [(right[sample].adversarial or 0) >= k for sample in ids]
    assert 0 < sum(fell) < 6


def test_results_carry_their_checks(demo, tokenizer, few, tmp_path):
    """Each direction and k its own; records on disk, and a call that goes on from them, are not touched."""
    measured = [
        evaluate_retrieval(demo, tokenizer, few, LITTLE, model_name="before", samples_dir=tmp_path, progress=False)
    ]
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    add_retrieval_sanity(measured[0], demo, tokenizer, few, LITTLE, samples=2, queries=1)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files
    measured.append(
        evaluate_retrieval(demo, tokenizer, few, LITTLE, model_name="before", samples_dir=tmp_path, progress=False)
    )
    plain = [[replace(result, seconds=0, sanity=None) for result in results] for results in measured]
    assert plain[0] == plain[1]
    results = measured[0]
    assert [result.sanity["metric"] for result in results] == [result.metric for result in results]
    save_results(results, tmp_path)
    assert [result.sanity for result in load_results(tmp_path)] == [result.sanity for result in results]
    assert json.loads(json.dumps(results[0].sanity, allow_nan=False)) == results[0].sanity
    page = write_report([tmp_path], tmp_path / "report")[1].read_text()
    assert page.count("undefended, falls at a large radius: ") == len(results) == 4
    said = sanity_text(results).splitlines()
    assert len(said) == 4
    assert said[0].startswith("sanity checks, before on few, image to text recall@1: ")


def test_no_trace(demo, tokenizer, few):
    demo.train()
    before, state = weights_sha256(demo), torch.get_rng_state()
    try:
        check_retrieval_sanity(demo, tokenizer, few, LITTLE, surrogate=demo, samples=2, queries=2)
        assert demo.training
        assert all(p.requires_grad and p.grad is None for p in demo.parameters())
        assert weights_sha256(demo) == before
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        demo.eval()


def test_bad_input(demo, tokenizer, gallery):
    def run(how=LITTLE, **settings):
        return check_retrieval_sanity(demo, tokenizer, gallery, how, samples=2, queries=1, **settings)

    with pytest.raises(ValueError, match="'up'; choose one of image_to_text"):
        run(direction="up")
    with pytest.raises(ValueError, match=r"recall at 3 was not measured, only at \[1, 2\]"):
        run(k=3)
    with pytest.raises(ValueError, match="nothing to check"):
        run(replace(LITTLE, eps=(0.0,)))
    how = replace(LITTLE, eps=(0.0,))
    results = evaluate_retrieval(demo, tokenizer, gallery, how, model_name="before", progress=False)
    add_retrieval_sanity(results, demo, tokenizer, gallery, how)
    assert {result.sanity["verdict"] for result in results} == {"not run"}
    turned = with_wrong_captions(gallery)
    with pytest.raises(ValueError, match="right about none of 24 samples"):
        check_retrieval_sanity(demo, tokenizer, turned, replace(LITTLE, ks=(1,)), samples=2, queries=1)
