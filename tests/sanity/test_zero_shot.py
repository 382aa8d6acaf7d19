"""Sanity checks: models that hide their gradient are flagged, honest ones are not.

The honest models are smooth ones, trained here in a second; the maskers stand in front of the hardened one of them.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

from hf_robust_vision.attacks import Attack, CrossEntropy, LinfBall, Logits, Protocol, StartNoise, get_protocol, pgd
from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.evaluation.task import Batch, RobustnessProtocol, Verdict
from hf_robust_vision.evaluation.tasks.zero_shot import ZeroShot, evaluate_zero_shot
from hf_robust_vision.sanity import checks
from hf_robust_vision.sanity.bench import Bench, Trial
from hf_robust_vision.sanity.check import add_sanity, check_sanity, sanity_text
from hf_robust_vision.towers.base import weights_sha256
from hf_robust_vision.towers.load import as_encoder, image_embedder, load_encoder
from hf_robust_vision.towers.processors import load_tokenizer
from hf_robust_vision.towers.text_bank import make_text_bank
from tests.conftest import NAMES, TEMPLATE, build_clip, build_processor, make_dataset
from tests.evaluation.toy_task import BrighterHalf, Halves
from tests.sanity.maskers import InputQuantiser, RandomResize, masked, saturated


HOW = RobustnessProtocol(get_protocol("apgd-ce", steps=12), (32 / 255,))
# Cross-entropy alone is too weak for some of the honest models, which is one of the tests.
MARGINS = Attack("apgd-margin-targeted", objective="targeted-margin", targets=2, steps=12)
BOTH = replace(HOW, protocol=Protocol("both", (*HOW.protocol.attacks, MARGINS)))
SMALL = {"samples": 25, "queries": 50}
CHECKS = (
    "same answer twice",
    "gradients",
    "loss rises",
    "more steps help",
    "steps converged",
    "falls at a large radius",
    "larger radii help",
    "stronger than noise",
    "as strong as another loss",
    "as strong as a black box",
    "as strong as a transfer",
)


def train(encoder, bank, kind):
    """The vision tower on coloured noise: clean, with noise, or against PGD."""
    encoder = copy.deepcopy(encoder)
    classify = bank.classify(image_embedder(encoder))
    items = list(make_dataset(96, start=1000))
    images, labels = torch.stack([item["images"] for item in items]), torch.tensor([item["labels"] for item in items])
    generator = torch.Generator().manual_seed(0)
    tower = [*encoder.vision_model.parameters(), *encoder.visual_projection.parameters()]
    optimizer = torch.optim.Adam(tower, lr=2e-3)
    for update in range(30):
        rows = torch.randint(len(images), (32,), generator=generator)
        batch, truth = images[rows], labels[rows]
        if kind == "noise":
            batch = (batch + 0.1 * torch.randn(batch.shape, generator=generator)).clamp(0, 1)
        if kind == "pgd":
            noise = StartNoise(update, rows.tolist())
            batch = pgd(CrossEntropy(classify, truth), batch, LinfBall(16 / 255), steps=2, noise=noise)
        loss = CrossEntropy(classify, truth)(batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder


@pytest.fixture(scope="module")
def smooth():
    """Untrained, and its classifier."""
    encoder = as_encoder(build_clip(vision_init=2.0))
    return encoder, make_text_bank(encoder, build_processor().tokenizer, NAMES, TEMPLATE)


@pytest.fixture(scope="module")
def honest(smooth):
    return {kind: train(*smooth, kind) for kind in ("clean", "noise", "pgd")}


@pytest.fixture(scope="module")
def images():
    return make_dataset(36, "test")


def verdicts(report):
    return {check["name"]: check["verdict"] for check in report["checks"]}


@pytest.mark.parametrize("kind", ["clean", "noise", "pgd"])
def test_honest_models_are_not_flagged(honest, smooth, images, kind):
    surrogate = honest["noise" if kind == "clean" else "clean"]
    report = check_sanity(honest[kind], smooth[1], images, BOTH, surrogate=surrogate, **SMALL)
    assert report["flagged"] == []
    assert verdicts(report) == dict.fromkeys(CHECKS, "passed")
    assert report["num_samples"] == 25


@pytest.mark.parametrize(
    ("masker", "signs"),
    [
        ("quantiser", {"gradients", "loss rises", "falls at a large radius", "stronger than noise"}),
        ("scale", {"gradients", "loss rises", "falls at a large radius", "stronger than noise"}),
        ("resize", {"same answer twice"}),
    ],
)
def test_maskers_are_flagged(honest, smooth, images, masker, signs):
    hardened, bank = honest["pgd"], smooth[1]
    encoder = {"quantiser": masked(hardened, InputQuantiser), "resize": masked(hardened, RandomResize)}.get(masker)
    classifier = saturated(bank) if masker == "scale" else bank
    report = check_sanity(
        encoder or hardened, classifier, images, HOW, surrogate=hardened, surrogate_bank=bank, **SMALL
    )
    assert report["verdict"] == "flagged"
    assert signs <= set(report["flagged"])
    if masker == "resize":
        why = next(check["why"] for check in report["checks"] if check["name"] == "same answer twice")
        assert "expectation over transformation" in why


def test_a_loss_too_weak_for_an_honest_model_is_flagged(honest, smooth, images):
    report = check_sanity(honest["clean"], smooth[1], images, HOW, samples=25, queries=5)
    assert report["flagged"] == ["as strong as another loss"]


def test_report_is_plain(honest, smooth, images):
    """What `robustness.json` and the report page read."""
    how = replace(HOW, protocol=get_protocol("quick", steps=2), eps=(32 / 255,))
    report = check_sanity(honest["clean"], smooth[1], images, how, samples=4, queries=5)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert tuple(check["name"] for check in report["checks"]) == CHECKS
    for check in report["checks"]:
        assert set(check) == {"name", "verdict", "numbers", "threshold", "why"}
        assert check["verdict"] in ("passed", "flagged", "not run")
        assert check["threshold"].split()[0] in check["numbers"] or check["verdict"] == "not run"
    assert verdicts(report)["as strong as a transfer"] == "not run"
    assert "surrogate=" in report["checks"][-1]["why"]
    assert (report["num_samples"], report["steps"], report["eps"]) == (4, 2, 32 / 255)


def test_no_trace(honest, smooth, images):
    encoder = honest["clean"].train()
    before, state = weights_sha256(encoder), torch.get_rng_state()
    gradients = [parameter.grad for parameter in encoder.parameters()]
    how = replace(HOW, protocol=get_protocol("quick", steps=2), eps=(0.5,))
    check_sanity(encoder, smooth[1], images, how, surrogate=honest["noise"], samples=4, queries=5)
    assert encoder.training
    assert weights_sha256(encoder) == before
    assert all(now is then for now, then in zip([p.grad for p in encoder.parameters()], gradients))
    assert torch.equal(torch.get_rng_state(), state)


def trial(classify, images, labels, protocol):
    """Images that a function classifies, on trial."""
    task = BrighterHalf(Halves(), images, labels=labels)
    task.logits = Logits(classify)
    return Trial(task, Batch(tuple(task.ids), images, (Verdict(0, False, -1.0),) * len(images)), protocol, seed=0)


def bench(classify, images=None, labels=None, size=7, count=20):
    images = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0)) if images is None else images
    labels = classify(images).argmax(1).detach() if labels is None else labels
    whole = trial(classify, images, labels.tolist(), get_protocol("quick", steps=40))
    trials = [whole.take(rows) for rows in torch.arange(count).split(size)]
    commonest = labels.bincount().max().item() / count
    return Bench(trials, "linf", HOW.eps, 40, commonest, "the share of the commonest class", "try harder")


def linear(batch):
    weight = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    return (batch.flatten(1) - 0.5) @ weight.T


def test_samples_keep_their_places_in_batches_of_different_sizes():
    """What a check finds belongs to its sample, also where only some are wanted."""
    small, large = (
        trial(linear, torch.full((2, 3, side, side), side / 10), [0, side], get_protocol("quick")) for side in (4, 5)
    )
    several = Bench([small, large], "linf", HOW.eps, 40, 0.5, "half", "try harder")
    assert len(several) == 4

    def look(trial):
        labels = [trial.task.label(place) for place in trial.batch.places]
        return torch.stack([trial.images.flatten(1)[:, 0], torch.tensor(labels), torch.tensor(trial.noise.ids)], 1)

    whole = torch.tensor([[0.4, 0, 0], [0.4, 4, 1], [0.5, 0, 0], [0.5, 5, 1]])
    assert torch.allclose(several.each(look), whole)
    wanted = torch.tensor([False, True, False, False])
    assert torch.allclose(several.each(look, wanted), whole * wanted[:, None])
    assert several.each(look, torch.zeros(4, dtype=torch.bool)).tolist() == [False] * 4


def test_broken_gradients_are_unusable():
    """The square root has no slope at 0: five images of 20 give gradients that are not numbers."""

    def classify(batch):
        logits = linear(batch)
        return torch.cat([logits[:15], logits[15:] + (logits[15:] * 0).sqrt()])

    check = checks.gradients(bench(classify, size=20))
    assert check["verdict"] == "flagged"
    assert check["numbers"]["not_finite"] == check["numbers"]["unusable"] == 0.25
    assert check["numbers"]["zero"] == 0


def test_a_rare_draw_is_seen():
    """A defence that is random now and then agrees with itself in most pairs of passes."""
    calls = []

    def classify(batch):
        calls.append(1)
        return linear(batch) + (len(calls) % 5 == 0)

    check = checks.same_answer(bench(classify, labels=torch.zeros(20, dtype=torch.long), size=20))
    assert check["verdict"] == "flagged"
    assert checks.same_answer(bench(linear))["verdict"] == "passed"


@pytest.mark.parametrize(
    ("fallen", "flagged"),
    [
        ((5, 12, 12, 12), set()),
        ((12, 5, 12, 12), {"more steps help"}),
        ((5, 8, 10, 14), {"steps converged"}),
        ((5, 8, 10, 11), set()),  # one sample of 20 is within the tolerance
    ],
)
def test_steps(fallen, flagged):
    attacked = bench(linear)
    for steps, count in zip((1, 10, 40, 80), fallen):
        attacked._flags[attacked.ball.eps, steps] = torch.arange(20) < count
    found = checks.more_steps(attacked)
    assert found[0]["numbers"]["robust"] == pytest.approx([1 - count / 20 for count in fallen])
    assert {check["name"] for check in found if check["verdict"] == "flagged"} == flagged


@pytest.mark.parametrize(
    ("fallen", "flagged"),
    [
        ((5, 15, 20), set()),
        ((15, 5, 20), {"larger radii help"}),
        ((5, 10, 10), {"falls at a large radius"}),
        ((4, 4, 4), {"falls at a large radius", "stronger than noise"}),
    ],
)
def test_radii(fallen, flagged, monkeypatch):
    monkeypatch.setattr(checks, "lost_to_noise", lambda bench, ball: torch.arange(20) < 1)
    attacked = bench(linear)
    radii = (32 / 255, 64 / 255, 0.5)
    for eps, count in zip(radii, fallen):
        attacked._flags[eps, 40] = torch.arange(20) < count
    found = checks.radii(attacked)
    assert found[0]["numbers"]["eps"] == pytest.approx(radii, rel=1e-3)
    assert {check["name"] for check in found if check["verdict"] == "flagged"} == flagged


def test_noise_is_the_worst_of_ten_draws_inside_the_ball():
    """Against a classifier that answers by the sign of one pixel: a corner flips it in half of the draws."""
    met = []

    def classify(batch):
        met.append(batch)
        return torch.stack([batch[:, 0, 0, 0], 1 - batch[:, 0, 0, 0]], 1)

    grey = bench(classify, torch.full((20, 3, 4, 4), 0.51), torch.zeros(20, dtype=torch.long))
    lost = checks.lost_to_noise(grey, LinfBall(0.1))
    assert lost.double().mean() > 0.9  # all but one in 2 ** 10
    assert torch.allclose((torch.cat(met) - 0.51).abs(), torch.tensor(0.1))
    assert 20 < len(torch.cat(met)) < 20 * 5  # what fell meets no further draw
    met.clear()
    assert not checks.lost_to_noise(grey, LinfBall(0.005)).any()
    assert len(met) == 10 * 3  # draws times batches


def test_the_grey_image_bounds_every_classifier():
    """At half the pixel range all balls share a point: no classifier keeps more than its commonest class."""
    images = torch.cat([trial.images for trial in bench(linear).trials])
    labels = linear(images).argmax(1)
    ball = LinfBall(0.5)
    grey = ball.project(torch.full_like(images, 0.5), images)
    assert torch.allclose(grey, torch.full_like(grey, 0.5))
    assert len(linear(grey).argmax(1).unique()) == 1 < len(labels.unique())


def test_add_sanity_fills_the_results_of_each_model(honest, smooth, images):
    bank = smooth[1]
    how = replace(HOW, protocol=get_protocol("quick", steps=2), eps=(16 / 255, 32 / 255))
    few = images.select(range(8))
    models = {"before": (honest["clean"], bank), "after": (honest["pgd"], bank)}
    results = [
        result
        for name, (encoder, _) in models.items()
        for result in evaluate_zero_shot(encoder, bank, few, how, model_name=name, progress=False)
    ]
    tasks = {name: ZeroShot(encoder, bank, few) for name, (encoder, bank) in models.items()}
    add_sanity(results, tasks, how, queries=5)
    said = [line.split(":")[0] for line in sanity_text(results).splitlines()]
    assert said == ["sanity checks, before on tiny", "sanity checks, after on tiny"]
    assert all(verdicts(result.sanity)["as strong as a transfer"] != "not run" for result in results)
    assert results[0].sanity == results[1].sanity != results[2].sanity


def test_a_measurement_without_a_gradient_says_why_nothing_was_checked(honest, smooth, images):
    bank, black = smooth[1], Protocol("black", (Attack("square", "square", "margin", steps=5),))
    for how in (replace(HOW, protocol=black), replace(HOW, eps=(0.0,))):
        with pytest.raises(ValueError, match="follows no gradient.*'apgd-ce'"):
            check_sanity(honest["clean"], bank, images, how)
    few = images.select(range(4))
    how = replace(HOW, protocol=black)
    results = evaluate_zero_shot(honest["clean"], bank, few, how, model_name="before", progress=False)
    assert sanity_text(results) == ""
    add_sanity(results, {"before": ZeroShot(honest["clean"], bank, few)}, how)
    assert "before on tiny: nothing to check" in sanity_text(results)
    assert results[0].sanity["verdict"] == "not run"


def test_a_model_that_is_never_right_is_refused(honest, smooth, images):
    rows = [{"image": row["image"], "label": (row["label"] + 1) % 3} for row in images.rows]
    wrong = LabelledImages(rows, NAMES, images.transform, name="tiny", split="test")
    with pytest.raises(ValueError, match="right about none of 36 samples"):
        check_sanity(honest["clean"], smooth[1], wrong, HOW)
    with pytest.raises(ValueError, match=r"dataset\.class_names"):
        check_sanity(honest["clean"], replace(smooth[1], class_names=("a", "b", "c")), images, HOW)


@pytest.mark.slow
@pytest.mark.parametrize("masker", [None, "quantiser", "scale", "resize"])
def test_on_the_demo(masker):
    """The undefended demo model is not flagged; behind a masker it is."""
    from hf_robust_vision.data.demo import demo_checkpoint, load_demo
    from hf_robust_vision.data.templates import TEMPLATES

    demo = load_encoder(demo_checkpoint())
    test = load_demo("test", demo.transform)
    bank = make_text_bank(demo, load_tokenizer(demo_checkpoint()), test.class_names, TEMPLATES["demo"])
    encoder = {"quantiser": masked(demo, InputQuantiser), "resize": masked(demo, RandomResize)}.get(masker, demo)
    # Cross-entropy alone is too weak for the demo model, too.
    protocol = get_protocol("apgd-ce", steps=5) if masker else get_protocol("robustvlm", steps=20, restarts=1)
    how = RobustnessProtocol(protocol, (8 / 255, 16 / 255))
    classifier = saturated(bank) if masker == "scale" else bank
    report = check_sanity(encoder, classifier, test, how, samples=16 if masker else 40, queries=100)
    assert report["verdict"] == ("passed" if masker is None else "flagged")
