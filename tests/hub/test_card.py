"""The card repeats robustness.json and nothing else."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from hf_robust_vision.evaluation.results import pretty_eps
from hf_robust_vision.hub.card import make_card, write_card
from tests.evaluation.test_results import result


def test_numbers_of_table_and_index(tmp_path):
    results = [
        result(model="before", robust_accuracy=0.125),
        result(training={"method": "Sim-CLIP", "form": "frozen"}),
    ]
    path = write_card(tmp_path, results, model_name="m", base_model="org/base", dataset="tiny", tags=["sim-clip"])
    card = ModelCard.load(path)
    values = {(row.metric_type, row.metric_value) for row in card.data.eval_results}
    assert values == {("accuracy", 0.75), ("robust_accuracy", 0.5)}
    assert card.data.base_model == "org/base"
    assert "sim-clip" in card.data.tags
    text = path.read_text()
    assert "| before | apgd-ce, linf 4/255 | 75.0 % (30.0 to 95.0) | 12.5 % (15.0 to 85.0) | 4 |" in text
    assert "| after | apgd-ce, linf 4/255 | 75.0 % (30.0 to 95.0) | 50.0 % (15.0 to 85.0) | 4 |" in text
    assert "- form: frozen" in text
    assert "5 steps, 1 restarts" in text


def test_card_of_the_original_alone_is_refused():
    with pytest.raises(ValueError, match="hardened model"):
        make_card([result(model="before")], model_name="m")


def test_radii_are_written_as_people_do():
    assert pretty_eps(result(eps=8 / 255)) == "8/255"
    assert pretty_eps(result(eps=0.5 / 255)) == "0.5/255"
    assert pretty_eps(result(eps=3.5, norm="l2")) == "3.5"
