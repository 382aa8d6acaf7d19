"""The evaluator: sums over samples, resumable, independent of the batch."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from hf_robust_vision.attacks import get_protocol
from hf_robust_vision.evaluation.results import SampleRecord
from hf_robust_vision.evaluation.samples import SampleStore
from hf_robust_vision.evaluation.task import RobustnessProtocol, Verdict
from hf_robust_vision.evaluation.tasks.zero_shot import ZeroShot, evaluate_zero_shot
from hf_robust_vision.towers.base import weights_sha256
from tests.conftest import NAMES
from tests.evaluation.test_results import summarize


EPS = (0.25 / 255, 0.5 / 255, 1 / 255)
HOW = RobustnessProtocol(get_protocol("apgd-ce", steps=5), EPS, batch_size=5)


@pytest.fixture
def measure(encoder, bank, labelled_by_model):
    def run(how=HOW, **settings):
        settings = {"model_name": "before", "progress": False} | settings
        return evaluate_zero_shot(encoder, bank, settings.pop("dataset", labelled_by_model), how, **settings)

    return run


def lines(folder, result):
    return [json.loads(line) for line in (folder / result.samples).read_text().splitlines()]


def flags(folder, results):
    return [[(row["id"], row["clean"], row["fooled_by"]) for row in lines(folder, result)] for result in results]


def test_a_protocol_says_what_it_is():
    protocol = get_protocol("robustvlm", restarts=1)
    how = RobustnessProtocol(protocol, (8 / 255, 4 / 255), restarts=((8 / 255, 5),))
    assert str(how).startswith(str(protocol))
    assert str(how).endswith("\n  linf, eps 4/255, 8/255 (5 restarts)")
    assert str(RobustnessProtocol(protocol, (0.5,), "l2")).endswith("\n  l2, eps 0.5")


def test_curve_falls(measure, tmp_path):
    results = measure(replace(HOW, eps=(1 / 255, 0.0, 0.25 / 255, 0.5 / 255)), samples_dir=tmp_path)
    assert [result.eps for result in results] == [0.0, *EPS]  # in rising order, whatever was asked
    robust = [result.robust_accuracy for result in results]
    assert robust[0] == results[0].clean_accuracy  # eps 0 is the clean accuracy, exactly
    assert robust == sorted(robust, reverse=True)
    assert 0 < robust[2] < robust[0] < 1
    fallen = [{row["id"] for row in lines(tmp_path, result) if row["fooled_by"]} for result in results]
    assert all(less <= more for less, more in zip(fallen, fallen[1:]))


@pytest.fixture
def script(monkeypatch):
    """Attacks that fool just what a function of the stage and the batch says; gives the sizes of the batches."""
    attacked, judge = [], ZeroShot.judge

    def install(fools):
        def strike(task, stage, batch, seed):
            attacked.append((stage.attack.name, stage.ball.eps, len(batch.places)))
            task.fooled = fools(stage, batch)
            return batch.images.clone()

        def judged(task, batch, images):
            if not batch.clean:
                return judge(task, batch, images)
            rows = zip(batch.clean, task.fooled)
            return [Verdict((v.answer + hit) % 3, hit, 1.0 if hit else -1.0, 0.0) for v, hit in rows]

        monkeypatch.setattr(ZeroShot, "strike", strike)
        monkeypatch.setattr(ZeroShot, "judge", judged)
        return attacked

    return install


def test_a_fallen_sample_stays_fallen(measure, script, tmp_path):
    """The smaller ball lies inside the larger: what fell is not attacked again, however lucky it would be."""
    attacked = script(lambda stage, batch: [stage.ball.eps == EPS[0] and row == 0 for row in range(len(batch.places))])
    results = measure(replace(HOW, batch_size=24), samples_dir=tmp_path)
    right = round(results[0].clean_accuracy * 24)
    assert [size for *_, size in attacked] == [right, right - 1, right - 1]
    assert [round(result.robust_accuracy * 24) for result in results] == [right - 1] * 3


def test_survivors_of_batches_are_attacked_together(measure, script, tmp_path):
    """No batch is attacked half empty while samples wait or are still to come."""
    attacked = script(lambda stage, batch: [place % 2 == 0 for place in batch.places])
    measure(replace(HOW, batch_size=8, eps=EPS[:2]), samples_dir=tmp_path)
    first = [size for _, eps, size in attacked if eps == EPS[0]]
    second = [size for _, eps, size in attacked if eps == EPS[1]]
    assert set(first[:-1]) == {8}
    assert sum(second) < sum(first)
    assert len(second) == -(-sum(second) // 8)


def test_every_attack_has_the_accuracy_that_it_leaves(measure, tmp_path):
    """What fell at a smaller radius has fallen before the first attack of the larger one."""
    how = replace(HOW, protocol=get_protocol("autoattack", steps=3, queries=5), eps=EPS[:2])
    results = measure(how, samples_dir=tmp_path)
    for place, result in enumerate(results):
        rows = lines(tmp_path, result)
        before = {row["id"] for row in lines(tmp_path, results[0]) if row["fooled_by"]} if place else set()
        left = [row for row in rows if row["clean"] == row["label"] and row["id"] not in before]
        for attack in result.attacks:
            left = [row for row in left if row["fooled_by"] != attack["name"]]
            assert attack["robust_accuracy"] == len(left) / 24
        assert [attack["name"] for attack in result.attacks] == ["apgd-ce", "fab-targeted", "square"]
        assert result.attacks[-1]["robust_accuracy"] == result.robust_accuracy
        assert result.left_out == ["apgd-dlr-targeted"]
    assert results[0].robust_accuracy < results[0].clean_accuracy


def test_tecoa_attacks_every_sample_at_every_radius_anew(measure, script, tmp_path):
    """So that the row of PGD-10 at 4/255 does not hold what PGD-100 did at 1/255."""

    def fools(stage, batch):
        name = "pgd-100" if stage.ball.eps == EPS[0] else "pgd-10"
        return [stage.attack.name == name and row == 0 for row in range(len(batch.places))]

    attacked = script(fools)
    how = replace(HOW, batch_size=24, protocol=get_protocol("tecoa"))
    results = measure(how, samples_dir=tmp_path)
    right = round(results[0].clean_accuracy * 24)
    assert [size for name, _, size in attacked if name == "pgd-10"] == [right] * 3
    left = [[round(attack["robust_accuracy"] * 24) for attack in result.attacks] for result in results]
    assert left == [[right, right, right - 1], [right - 1] * 3, [right - 1] * 3]


def test_accuracies_are_sums_over_the_samples_file(measure, labelled_by_model, tmp_path):
    for result in measure(samples_dir=tmp_path):
        rows = lines(tmp_path, result)
        assert [row["id"] for row in rows] == labelled_by_model.ids
        assert [row["label"] for row in rows] == labelled_by_model.labels()
        assert {"id", "label", "clean", "adversarial", "score", "fooled_by"} <= set(rows[0])
        assert result.num_samples == len(rows) == 24
        assert result.clean_accuracy == sum(row["clean"] == row["label"] for row in rows) / 24
        assert result.robust_accuracy == sum(row["fooled_by"] is None for row in rows) / 24
        assert result.ci95 == summarize([SampleRecord(**row) for row in rows])["ci95"]
        for row in rows:
            assert (row["fooled_by"] == "clean") == (row["clean"] != row["label"])
            if row["fooled_by"] == "apgd-ce":
                assert row["adversarial"] != row["label"]
                assert row["score"] >= 0
            if row["fooled_by"] is None:
                assert row["adversarial"] == row["label"]
                assert row["score"] <= 0
    assert not list(tmp_path.glob("*.rank*"))


def test_flags_do_not_depend_on_batch_size_or_order(measure, labelled_by_model, tmp_path):
    wanted = flags(tmp_path / "a", measure(samples_dir=tmp_path / "a"))
    for place, how in (("b", replace(HOW, batch_size=24)), ("c", replace(HOW, batch_size=1))):
        assert flags(tmp_path / place, measure(how, samples_dir=tmp_path / place)) == wanted
    turned = labelled_by_model.select(list(range(24))[::-1])
    got = flags(tmp_path / "d", measure(dataset=turned, samples_dir=tmp_path / "d"))
    assert [rows[::-1] for rows in got] == wanted


def test_result_carries_its_protocol(measure, bank, encoder):
    how = replace(HOW, restarts=((EPS[1], 3),), seed=7)
    result = measure(how)[1]
    assert (result.task, result.model, result.norm, result.protocol) == ("zero_shot", "before", "linf", "apgd-ce")
    assert (result.dataset, result.split, result.group) == ("tiny", "test", "all")
    assert result.model_sha256 == weights_sha256(encoder)
    assert result.class_names == list(NAMES)
    assert result.logit_scale == pytest.approx(encoder.logit_scale.exp().item())
    attack = result.attacks[0]
    assert (attack["steps"], attack["restarts"], attack["seed"], attack["dtype"]) == (5, 3, 7, "float32")
    assert attack["resolution"] == 32
    assert [r.attacks[0]["restarts"] for r in measure(how)] == [1, 3, 1]
    assert {"torch", "transformers", "python", "hf-robust-vision"} <= set(result.versions)
    assert result.samples is None


def test_targeted_attack_is_left_out_for_three_classes(measure):
    for result in measure(replace(HOW, protocol=get_protocol("robustvlm", steps=3))):
        assert result.left_out == ["apgd-dlr-targeted"]
        assert [attack["name"] for attack in result.attacks] == ["apgd-ce"]


class Killed(BaseException):
    pass


def kill_after(monkeypatch, batches, searches=()):
    """Die when the next batch is written down; gives how many searches there were at each that was."""
    add, done = SampleStore.add, []

    def add_or_die(self, *progress):
        if len(done) == batches:
            raise Killed
        done.append(len(searches))
        add(self, *progress)

    monkeypatch.setattr(SampleStore, "add", add_or_die)
    return done


@pytest.fixture
def searches(monkeypatch):
    """What was attacked: attack, target, radius and place of every sample of every batch."""
    met, strike = [], ZeroShot.strike

    def counted(task, stage, batch, seed):
        met.append([(stage.attack.name, stage.target, stage.ball.eps, place) for place in batch.places])
        return strike(task, stage, batch, seed)

    monkeypatch.setattr(ZeroShot, "strike", counted)
    return met


@pytest.mark.parametrize("batches", [0, 3, 7])
def test_resumed_equals_unbroken(measure, searches, monkeypatch, tmp_path, batches):
    """A sample goes on from the search that it was in."""
    unbroken = measure(samples_dir=tmp_path / "a")
    whole = sorted(search for batch in searches for search in batch)
    searches.clear()
    with monkeypatch.context() as patch:
        written = kill_after(patch, batches, searches)
        with pytest.raises(Killed):
            measure(samples_dir=tmp_path / "b")
    del searches[written[-1] if written else 0 :]  # those that died before they were written down
    resumed = measure(samples_dir=tmp_path / "b")
    assert sorted(search for batch in searches for search in batch) == whole  # what was done is not done again
    assert [lines(tmp_path / "b", r) for r in resumed] == [lines(tmp_path / "a", r) for r in unbroken]
    assert not list((tmp_path / "b").glob("*.rank*"))
    assert all(one.seconds > 0 for one in resumed)
    for one, other in zip(resumed, unbroken):
        assert replace(one, seconds=0) == replace(other, seconds=0)


@pytest.mark.parametrize("cut", [1, 20, 70])
def test_a_line_cut_off_is_measured_again_even_twice(measure, monkeypatch, tmp_path, cut):
    """Killed in the middle of a line, resumed, killed again: the torn line must not swallow the next one."""
    wanted = flags(tmp_path / "a", measure(samples_dir=tmp_path / "a"))
    for batches in (5, 3):
        with monkeypatch.context() as patch:
            kill_after(patch, batches)
            with pytest.raises(Killed):
                measure(samples_dir=tmp_path / "b")
        (torn,) = (tmp_path / "b").glob("*.rank0")
        torn.write_text(torn.read_text()[:-cut])
    assert flags(tmp_path / "b", measure(samples_dir=tmp_path / "b")) == wanted


def test_files_of_other_measurements_are_not_reused(measure, encoder, monkeypatch, tmp_path):
    measure(samples_dir=tmp_path)
    with monkeypatch.context() as patch:  # the same again is not measured at all
        done = kill_after(patch, 0)
        measure(samples_dir=tmp_path)
        assert done == []
    for change in ("seed", "steps", "weights"):
        how = HOW
        if change == "seed":
            how = replace(HOW, seed=1)
        elif change == "steps":
            how = replace(HOW, protocol=get_protocol("apgd-ce", steps=6))
        else:
            with torch.no_grad():
                encoder.visual_projection.weight[0, 0] += 0.1
        with monkeypatch.context() as patch:
            done = kill_after(patch, 99)
            measure(how, samples_dir=tmp_path)
        assert len(done) > 5, change


def test_other_class_names_are_refused(encoder, bank, labelled_by_model):
    other = replace(bank, class_names=("red", "blue", "green"))
    with pytest.raises(ValueError, match=r"dataset\.class_names"):
        evaluate_zero_shot(encoder, other, labelled_by_model, HOW, model_name="x", progress=False)


@pytest.mark.parametrize(
    ("settings", "said"), [({"eps": ()}, "at least one eps"), ({"eps": (4.0,)}, "4/255"), ({"norm": "l7"}, "'l7'")]
)
def test_protocol_is_checked_at_once(settings, said):
    with pytest.raises(ValueError, match=said):
        replace(HOW, **settings)


def test_no_trace_on_the_model(measure, encoder):
    encoder.train()
    before = weights_sha256(encoder)
    state = torch.get_rng_state()
    measure(replace(HOW, eps=(EPS[0],)))
    assert encoder.training
    assert all(p.requires_grad and p.grad is None for p in encoder.parameters())
    assert weights_sha256(encoder) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_bf16_weights_are_measured_in_bf16(measure, encoder):
    encoder.to(torch.bfloat16)
    (result,) = measure(replace(HOW, eps=(EPS[1],)))
    assert result.attacks[0]["dtype"] == "bfloat16"
    assert 0 <= result.robust_accuracy < result.clean_accuracy


def test_records_of_other_pixels_are_not_reused(measure, encoder, monkeypatch, tmp_path):
    """A corrected mean is another classifier under the same weights: its flags must be measured anew."""
    (old,) = measure(replace(HOW, eps=(EPS[0],)), samples_dir=tmp_path)
    monkeypatch.setattr(encoder, "transform", replace(encoder.transform, mean=(0.0, 0.0, 0.0)))
    (new,) = measure(replace(HOW, eps=(EPS[0],)), samples_dir=tmp_path)
    assert old.model_sha256 == new.model_sha256
    assert old.samples != new.samples
