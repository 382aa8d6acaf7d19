"""One sample under a watched attack: what the engine finds, pass by pass, until it is stopped."""

from __future__ import annotations

import pytest

from hf_robust_vision.attacks import get_protocol
from hf_robust_vision.evaluation.engine import evaluate
from hf_robust_vision.evaluation.results import load_samples
from hf_robust_vision.evaluation.single import attack_sample
from hf_robust_vision.evaluation.task import RobustnessProtocol
from hf_robust_vision.evaluation.tasks.zero_shot import ZeroShot


HOW = RobustnessProtocol(get_protocol("robustvlm", steps=4, restarts=2), (1 / 255, 4 / 255, 16 / 255), batch_size=4)


def test_each_sample_alone_meets_what_it_meets_in_the_engine(encoder, bank, labelled_by_model, tmp_path):
    results = evaluate(
        ZeroShot(encoder, bank, labelled_by_model), HOW, model_name="m", samples_dir=tmp_path, progress=False
    )
    levels = [load_samples(tmp_path / result.samples) for result in results]
    fallen = 0
    for place in range(6):
        task = ZeroShot(encoder, bank, labelled_by_model.select([place]))
        clean, *attempts = attack_sample(task, HOW)
        for level, attempt in zip(levels, attempts, strict=True):
            record = next(record for record in level if record.id == task.ids[0])
            assert clean.verdict.answer == record.clean
            assert attempt.verdict.lost == (not record.robust_hit)
            if record.adversarial is not None and attempt.verdict.lost:
                assert attempt.verdict.answer == record.adversarial
                assert attempt.verdict.score == pytest.approx(record.score, abs=1e-5)
            distance = (attempt.image - clean.image).abs().max()
            assert distance <= attempt.eps + 1e-6
            assert 0 <= attempt.image.min() <= attempt.image.max() <= 1
        fallen += attempts[-1].verdict.lost and not clean.verdict.lost
    assert fallen


def test_the_watch_sees_each_pass_and_can_end_the_attack(encoder, bank, labelled_by_model):
    task = ZeroShot(encoder, bank, labelled_by_model.select([1]))
    told = []
    attack_sample(task, HOW, lambda share, eps: told.append((share, eps)))
    assert told == sorted(told)
    assert told[0] == (0, 1 / 255)
    assert all(0 <= share <= 1 for share, _ in told)

    def stop(share, eps):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        attack_sample(task, HOW, stop)
    assert all(parameter.requires_grad for parameter in task.model.vision_model.parameters())
