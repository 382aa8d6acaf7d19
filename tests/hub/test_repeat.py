"""A recorded measurement, made again from its record alone."""

from __future__ import annotations

import json

import pytest
import torch

from hf_robust_vision.attacks import get_protocol
from hf_robust_vision.evaluation.results import RobustnessResult
from hf_robust_vision.evaluation.task import RobustnessProtocol
from hf_robust_vision.evaluation.tasks.zero_shot import evaluate_zero_shot
from hf_robust_vision.hub.repeat import repeat_zero_shot
from tests.conftest import make_dataset


HOW = RobustnessProtocol(
    get_protocol("robustvlm", steps=3), (0.1 / 255, 0.4 / 255), restarts=((0.4 / 255, 2),), batch_size=7, seed=3
)


@pytest.fixture
def recorded(encoder, bank, labelled_by_model, tmp_path):
    """Results as they come back from `robustness.json`."""
    results = evaluate_zero_shot(
        encoder, bank, labelled_by_model, HOW, model_name="after", samples_dir=tmp_path, progress=False
    )
    assert 0 < results[1].robust_accuracy < results[0].robust_accuracy < results[0].clean_accuracy < 1
    return [RobustnessResult.from_dict(json.loads(json.dumps(result.to_dict()))) for result in results]


def repeat(encoder, processor, recorded, tmp_path, dataset, **settings):
    return repeat_zero_shot(encoder, processor.tokenizer, recorded, tmp_path, dataset=dataset, **settings)


def test_every_flag_comes_back(encoder, processor, recorded, labelled_by_model, tmp_path):
    """All radii, restarts of one, the recorded seed; other batches, and only some of the samples."""
    again = repeat(encoder, processor, recorded[::-1], tmp_path, labelled_by_model)
    assert (again.samples, again.flags, again.differing) == (24, 72, ())
    again = repeat(encoder, processor, recorded, tmp_path, labelled_by_model, max_samples=5, batch_size=2)
    assert (again.samples, again.flags, again.differing) == (5, 15, ())


@pytest.mark.parametrize(
    ("name", "budget", "norm", "eps", "own"),
    [
        ("quick", {"steps": 4}, "linf", (0.2 / 255, 0.4 / 255), ()),
        ("tecoa", {}, "linf", (0.2 / 255, 0.4 / 255), ()),
        ("tecoa", {"steps": 2}, "l2", (0.02, 0.05), ()),
        ("autoattack", {"steps": 2, "queries": 3}, "linf", (0.2 / 255, 0.4 / 255), ((0.2 / 255, 2),)),
        ("robustvlm", {"steps": 2}, "linf", (0.2 / 255, 0.3 / 255, 0.4 / 255), ((0.2 / 255, 2), (0.4 / 255, 3))),
    ],
)
def test_every_protocol_and_budget_is_repeated_as_it_was(
    name, budget, norm, eps, own, encoder, processor, bank, labelled_by_model, tmp_path
):
    """findings-code 2: renamed attacks, a protocol that carries nothing over, fixed steps, restarts of each radius."""
    how = RobustnessProtocol(get_protocol(name, **budget), eps, norm, own, batch_size=12)
    data = labelled_by_model.select(range(12))
    results = evaluate_zero_shot(encoder, bank, data, how, model_name="m", samples_dir=tmp_path, progress=False)
    results = [RobustnessResult.from_dict(json.loads(json.dumps(result.to_dict()))) for result in results]
    assert {result.carry for result in results} == {name != "tecoa"}
    again = repeat(encoder, processor, results, tmp_path, data)
    assert (again.samples, again.differing) == (12, ())


def test_records_that_do_not_fit_are_not_repeated(encoder, processor, recorded, labelled_by_model, tmp_path):
    """findings-reliability 12."""
    path = tmp_path / recorded[0].samples
    path.write_text(path.read_text().replace('"fooled_by": null', '"fooled_by": "clean"', 1))
    with pytest.raises(ValueError, match=path.name):
        repeat(encoder, processor, recorded, tmp_path, labelled_by_model)


def test_another_model_differs(encoder, processor, recorded, labelled_by_model, tmp_path):
    with torch.no_grad():
        encoder.visual_projection.weight += 0.3 * torch.randn_like(encoder.visual_projection.weight)
    assert repeat(encoder, processor, recorded, tmp_path, labelled_by_model).differing


def test_other_data_or_another_protocol_is_refused(encoder, processor, recorded, labelled_by_model, tmp_path):
    with pytest.raises(ValueError, match="is not the data that was measured on: samples .* other labels"):
        repeat(encoder, processor, recorded, tmp_path, make_dataset(24))
    with pytest.raises(ValueError, match=r"samples \[6, .* are missing"):
        repeat(encoder, processor, recorded, tmp_path, labelled_by_model.select(range(6)))
    with pytest.raises(ValueError, match="neither a folder nor a dataset"):
        repeat(encoder, processor, recorded, tmp_path, None)
    for result in recorded:
        result.attacks[0]["step_size"] = 0.5
    with pytest.raises(ValueError, match="the protocol 'robustvlm' was recorded as"):
        repeat(encoder, processor, recorded, tmp_path, labelled_by_model)
    (tmp_path / recorded[0].samples).unlink()
    with pytest.raises(ValueError, match="is missing: the samples of a result lie beside it"):
        repeat(encoder, processor, recorded, tmp_path, labelled_by_model)
    with pytest.raises(ValueError, match="no zero-shot result"):
        repeat(encoder, processor, [], tmp_path, labelled_by_model)
