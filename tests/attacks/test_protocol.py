"""Protocols: worst case per sample, what few classes leave out, and what a result says of it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from hf_robust_vision.attacks import (
    PROTOCOLS,
    Attack,
    L2Ball,
    LinfBall,
    Misclassified,
    Protocol,
    StartNoise,
    apgd,
    classification_objective,
    fab,
    get_protocol,
    pgd,
    square,
)
from hf_robust_vision.evaluation.engine import evaluate
from hf_robust_vision.evaluation.results import load_samples
from hf_robust_vision.evaluation.task import RobustnessProtocol
from tests.evaluation.toy_task import BrighterHalf


IMAGES = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def described(protocol, ball, **about):
    return [attack.describe(ball, **about) for attack in protocol.attacks]


def linear_classifier(classes):
    weight = torch.randn(classes, 48, generator=torch.Generator().manual_seed(2))
    return lambda images: (images.flatten(1) - 0.5) @ weight.T


class Classifier(nn.Module):
    """A function of images to logits, as a model."""

    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return self.function(images)


@pytest.fixture
def worst_case(tmp_path_factory):
    """Records of a protocol's attacks on a classifier, one an image, in order."""

    def run(protocol, classify, images, ball, labels=None):
        folder, how = tmp_path_factory.mktemp("records"), RobustnessProtocol(protocol, (ball.eps,), ball.norm)
        task = BrighterHalf(Classifier(classify), images, labels=labels)
        (result,) = evaluate(task, how, model_name="linear", samples_dir=folder, progress=False)
        return sorted(load_samples(folder / result.samples), key=lambda record: record.id)

    return run


@pytest.mark.parametrize("name", list(PROTOCOLS))
@pytest.mark.parametrize("classes", [2, 3, 4, 5])
@pytest.mark.parametrize("ball", [LinfBall(0.05), L2Ball(0.3)], ids=["linf", "l2"])
def test_every_protocol_runs_with_few_classes(name, classes, ball, worst_case):
    queries = 20 if name == "autoattack" else None
    protocol, left_out = get_protocol(name, steps=5, queries=queries).for_classes(classes)
    assert left_out == (["apgd-dlr-targeted"] if name in ("robustvlm", "autoattack") and classes < 4 else [])
    assert all(attack.targets < classes for attack in protocol.attacks)
    records = worst_case(protocol, linear_classifier(classes), IMAGES, ball)
    names = {attack.name for attack in protocol.attacks}
    assert all(record.fooled_by in (names if record.adversarial != record.label else {None}) for record in records)
    assert any(record.fooled_by for record in records)


def test_targets_are_cut_to_the_wrong_classes():
    protocol, _ = get_protocol("robustvlm").for_classes(5)
    assert protocol.attacks[1].targets == 4
    assert get_protocol("robustvlm").for_classes(1000)[0].attacks[1].targets == 9


def test_one_class_is_no_classification():
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        get_protocol("apgd-ce").for_classes(1)


def test_worst_case_is_per_sample(monkeypatch, worst_case):
    """Two attacks, each good at one half of the batch: all are fooled, each by the attack that did it first."""
    met = []

    def classify(batch):
        lit = (batch[:, 0, 0, 0] > 0.5).float()
        return torch.stack([1 - lit, lit], 1)

    def pretend(attack, objective, batch, ball, noise, fooled):
        met.append((attack.name, list(noise.ids)))
        found = batch.clone()
        for row, sample in enumerate(noise.ids):
            if (attack.name == "even") == (sample % 2 == 0) and sample != 5:
                found[row, 0, 0, 0] += ball.eps
        return found

    monkeypatch.setattr(Attack, "run", pretend)
    both, images = Protocol("both", (Attack("even"), Attack("odd"))), torch.full((6, 3, 2, 2), 0.5)
    records = worst_case(both, classify, images, LinfBall(0.1), labels=[0] * 6)
    assert [record.fooled_by for record in records] == ["even", "odd", "even", "odd", "even", None]
    assert met == [("even", [0, 1, 2, 3, 4, 5]), ("odd", [1, 3, 5])]  # only the survivors go on
    assert [record.adversarial for record in records] == [1, 1, 1, 1, 1, 0]


def test_more_attacks_never_raise_robust_accuracy(worst_case):
    survivors = []
    for name in ("apgd-ce", "robustvlm"):
        protocol, _ = get_protocol(name, steps=10).for_classes(6)
        records = worst_case(protocol, linear_classifier(6), IMAGES, LinfBall(0.02))
        survivors.append({record.id for record in records if record.robust_hit})
    assert survivors[1] <= survivors[0]


def test_budget_changes_every_attack():
    protocol = get_protocol("robustvlm", steps=7, restarts=3)
    assert [(a.steps, a.restarts) for a in protocol.attacks] == [(7, 3), (7, 3)]
    assert [a.steps for a in get_protocol("robustvlm").attacks] == [100, 100]


def test_steps_and_queries_are_two_budgets():
    """A query is a look at the model without a gradient: 5 steps must not make 5 queries of Square, nor 5000 steps."""
    budget = {a.name: a.steps for a in get_protocol("autoattack", steps=7).attacks}
    assert budget == {"apgd-ce": 7, "apgd-dlr-targeted": 7, "fab-targeted": 7, "square": 5000}
    budget = {a.name: a.steps for a in get_protocol("autoattack", queries=9).attacks}
    assert budget == {"apgd-ce": 100, "apgd-dlr-targeted": 100, "fab-targeted": 100, "square": 9}
    assert all(a.restarts == 2 for a in get_protocol("autoattack", restarts=2).attacks)


def test_a_name_never_lies_about_the_steps():
    assert [a.name for a in get_protocol("quick", steps=3).attacks] == ["pgd-3"]
    assert [a.name for a in get_protocol("tecoa").attacks] == ["pgd-10", "pgd-20", "pgd-100"]
    assert [a.name for a in get_protocol("tecoa", steps=4).attacks] == ["pgd-4"]  # three equal attacks are one


def test_autoattack_is_the_standard_version():
    """Attacks, order and budgets of the other implementation's own object."""
    theirs = pytest.importorskip("pyautoattack").AutoAttack(lambda x: x, version="standard", device="cpu")
    ours = get_protocol("autoattack").attacks
    names = {"apgd-ce": "apgd-ce", "apgd-dlr-targeted": "apgd-t", "fab-targeted": "fab-t", "square": "square"}
    assert [names[attack.name] for attack in ours] == theirs.attacks_to_run
    apgd, targeted, fab, square = ours
    assert (apgd.steps, apgd.restarts) == (theirs.apgd.n_iter, theirs.apgd.n_restarts)
    for attack, other in ((targeted, theirs.apgd_targeted), (fab, theirs.fab)):
        assert (attack.steps, attack.restarts) == (other.n_iter, other.n_restarts)
        assert attack.targets == other.n_target_classes
    assert (square.steps, square.restarts) == (theirs.square.n_queries, theirs.square.n_restarts)


def test_tecoa_counts_are_those_of_each_attack_alone(worst_case):
    """One start and one step size: what falls in the first steps of the long attack falls in the short one."""
    generator = torch.Generator().manual_seed(4)
    first, last = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((48, 64), (64, 4)))
    images = torch.rand(24, 3, 4, 4, generator=torch.Generator().manual_seed(1))

    def classify(x):
        return torch.sin((x.double().flatten(1) - 0.5) @ first / 10) @ last

    protocol, ball = get_protocol("tecoa"), LinfBall(32 / 255)
    together = worst_case(protocol, classify, images, ball)
    fallen = set()
    for attack in protocol.attacks:
        alone = worst_case(Protocol("one", (attack,)), classify, images, ball)
        fallen |= {record.id for record in together if record.fooled_by == attack.name}
        assert {record.id for record in alone if record.fooled_by} == fallen
    assert {record.fooled_by for record in together} == {"pgd-10", "pgd-20", "pgd-100", None}


def test_later_attacks_meet_survivors_only_and_never_lose_the_stronger_image(worst_case):
    """FAB gives back the clean image where it finds none: what an earlier attack left nearer to a mistake is kept."""
    first, both = get_protocol("apgd-ce", steps=5), get_protocol("autoattack", steps=5, queries=10)
    one, all_ = (
        worst_case(protocol, linear_classifier(5), IMAGES, LinfBall(0.003))
        for protocol in (first, both.for_classes(5)[0])
    )
    assert None in {record.fooled_by for record in all_}
    assert all(after.score >= before.score for before, after in zip(one, all_))


@pytest.mark.parametrize(
    "settings",
    [{"objective": "targeted-dlr"}, {"targets": 3}, {"algorithm": "fab", "objective": "margin"}],
)
def test_attacks_that_can_not_target_are_refused(settings):
    with pytest.raises(ValueError, match="can not run"):
        Protocol("odd", (Attack("odd", **settings),)).for_classes(5)


@pytest.mark.parametrize("settings", [{"algorithm": "fgsm"}, {"objective": "nll"}])
def test_unknown_parts_of_an_attack(settings):
    with pytest.raises(ValueError, match=r"unknown .*choose one of"):
        Protocol("odd", (Attack("odd", **settings),)).for_classes(5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": -1}, "steps"),
        ({"algorithm": "square", "objective": "margin", "steps": 0}, "queries"),
        ({"restarts": 0}, "restarts"),
        ({"step_size": 0.1, "relative_step": 0.1}, "to pgd"),
        *(
            ({"algorithm": "pgd"} | sizes, said)
            for sizes, said in (
                ({"step_size": 0.1}, "give both"),
                ({"relative_step": 0.1}, "give both"),
                ({"step_size": 8, "relative_step": 1}, r"type .*8/255"),
                ({"step_size": float("inf"), "relative_step": 1}, "finite"),
                ({"step_size": 0, "relative_step": 1}, "above 0"),
                ({"step_size": 0.1, "relative_step": float("nan")}, "finite"),
            )
        ),
    ],
)
def test_attacks_that_do_nothing_are_refused(settings, said):
    """findings-reliability 2 and 8: no step, no query, no restart, no length; by whatever door they come in."""
    with pytest.raises(ValueError, match=said):
        Attack("odd", **settings)


def test_budgets_that_do_nothing_are_refused():
    """findings-reliability 2: `--steps 0 --queries 0` was robust 100 %."""
    for budget in ({"steps": 0}, {"restarts": 0}, {"queries": -5}):
        with pytest.raises(ValueError, match="at least 1"):
            get_protocol("autoattack", **budget)
    with pytest.raises(ValueError, match="queries=5 changes nothing: protocol 'quick' has no attack"):
        get_protocol("quick", queries=5)  # findings-reliability 8
    with pytest.raises(ValueError, match="steps=5 changes nothing"):
        Protocol("black box", (Attack("square", "square", "margin"),)).with_budget(steps=5)
    with pytest.raises(ValueError, match="no attack of protocol 'few' can run with 3 classes"):
        Protocol("few", (Attack("apgd-t", objective="targeted-dlr", targets=9),)).for_classes(3)


@pytest.mark.parametrize("ball", [LinfBall(4 / 255), LinfBall(1 / 255), L2Ball(0.5), L2Ball(20.0)], ids=repr)
@pytest.mark.parametrize(
    "protocol",
    [*PROTOCOLS.values(), get_protocol("quick", steps=20), get_protocol("robustvlm", restarts=2).for_classes(5)[0]],
    ids=str,
)
def test_a_record_says_how_to_repeat_it(protocol, ball):
    """findings-code 2: what a result holds gives back the attacks, whatever the budget was, also by way of JSON."""
    rows = described(protocol, ball, resolution=224, seed=3, dtype=torch.float32)
    again = Protocol.from_rows(protocol.name, json.loads(json.dumps(rows)), carry=protocol.carry)
    assert described(again, ball, resolution=224, seed=3, dtype=torch.float32) == rows
    if ball.norm == "linf":
        assert again == protocol


def test_records_of_other_tasks():
    """An objective that only its task knows; a target in words; a retrieval row of old, which named no algorithm."""
    attack = Attack("apgd-nll@1", objective="nll@1", steps=7, restarts=2)
    row = attack.describe(
        LinfBall(0.1), resolution="mixed", seed=0, dtype="float16", target="3 strongest wrong classes"
    )
    assert (row["target"], row["dtype"], row["resolution"]) == ("3 strongest wrong classes", "float16", "mixed")
    assert Attack.from_row(row) == attack
    del row["algorithm"]
    assert Attack.from_row(row) == attack
    for name in ("name", "steps"):
        with pytest.raises(ValueError, match=f"not complete.*{name}"):
            Attack.from_row({key: value for key, value in row.items() if key != name})
    with pytest.raises(ValueError, match="steps"):
        Attack.from_row(row | {"steps": "7"})


@pytest.mark.parametrize("algorithm", ["pgd", "apgd", "fab", "square"])
def test_one_door_to_every_algorithm(algorithm):
    """`Attack.run` is the function of that name with the settings of the attack."""
    classify, noise, ball = linear_classifier(5), StartNoise(0, range(8)), LinfBall(0.05)
    labels = classify(IMAGES).argmax(1)
    nearest = classify(IMAGES).scatter(1, labels[:, None], -torch.inf).argmax(1)
    settings = {"queries" if algorithm == "square" else "steps": 5, "restarts": 2, "noise": noise}
    attack = Attack("one", algorithm, "targeted-margin", 5, 2, targets=1)
    objective, fooled = classification_objective(attack, classify, labels, nearest), Misclassified(classify, labels)
    function = {"pgd": pgd, "apgd": apgd, "fab": fab, "square": square}[algorithm]
    found = attack.run(objective, IMAGES, ball, noise, fooled)
    assert torch.equal(found, function(objective, IMAGES, ball, fooled=fooled, **settings))
    assert not torch.equal(found, IMAGES)


@pytest.mark.parametrize("ball", [LinfBall(0.05), L2Ball(0.3)], ids=repr)
def test_the_step_that_is_written_down_is_the_one_that_runs(ball):
    def slope(images):
        return images.flatten(1).sum(1)

    for sizes in ({}, {"step_size": 0.01, "relative_step": 0.25}):
        attack = Attack("one", "pgd", steps=1, **sizes)
        size = attack.describe(ball, resolution=4, seed=0, dtype=torch.float32)["step_size"]
        noise = StartNoise(0, range(8))
        ran = attack.run(slope, IMAGES, ball, noise)
        assert torch.equal(ran, pgd(slope, IMAGES, ball, steps=1, step_size=size, noise=noise))
    assert not torch.equal(ran, pgd(slope, IMAGES, ball, steps=1, noise=noise))


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_a_protocol_prints_what_it_is(name):
    text = str(get_protocol(name))
    assert text.startswith(f"{name}: worst case per sample")
    for attack in get_protocol(name).attacks:
        assert f"{attack.name}: " in text
        assert str(attack.steps) in text
    assert "targets" not in text


def test_what_tecoa_and_autoattack_print():
    assert "pgd-20: PGD on cross-entropy, 20 steps of 1/255" in str(get_protocol("tecoa"))
    lines = str(get_protocol("autoattack").for_classes(3)[0]).splitlines()
    assert lines[2:] == [
        "  2. fab-targeted: FAB on targeted-margin, 100 steps towards each of the 2 strongest wrong classes",
        "  3. square: Square, black box, on margin, 5000 queries",
    ]
    assert "5 restarts" in str(get_protocol("robustvlm"))


def test_unknown_protocol():
    with pytest.raises(ValueError, match="unknown protocol 'nope'.*'quick'"):
        get_protocol("nope")


def test_description_is_complete():
    rows = described(get_protocol("robustvlm"), LinfBall(4 / 255), resolution=224, seed=3, dtype=torch.bfloat16)
    wanted = {"name", "objective", "target", "steps", "step_size", "restarts", "resolution", "seed", "dtype"}
    assert all(wanted <= set(row) for row in rows)
    assert rows[0]["target"] is None
    assert rows[1]["target"].startswith("9 ")
    assert (rows[0]["dtype"], rows[0]["seed"], rows[0]["resolution"]) == ("bfloat16", 3, 224)
    (quick,) = described(get_protocol("quick"), LinfBall(0.1), resolution=32, seed=0, dtype=torch.float32)
    assert quick["step_size"] == pytest.approx(0.025)
    for name in PROTOCOLS:
        for ball in (LinfBall(4 / 255), L2Ball(0.5)):
            rows = described(get_protocol(name), ball, resolution=32, seed=0, dtype=torch.float32)
            assert all(wanted <= set(row) for row in rows)
            json.dumps(rows)
    tecoa = [
        described(get_protocol("tecoa"), b, resolution=32, seed=0, dtype=torch.float32)[0]
        for b in (ball, LinfBall(0.1))
    ]
    assert [row["step_size"] for row in tecoa] == [0.25 * 0.5, 1 / 255]
