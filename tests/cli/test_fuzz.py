"""Values that nobody thought of, for 30 seconds: a reader gives a value that makes sense or a ValueError, nothing else."""

from __future__ import annotations

import json
import math

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_robust_vision.attacks import get_protocol
from hf_robust_vision.configs import read_yaml
from hf_robust_vision.evaluation.results import SampleRecord, load_samples
from hf_robust_vision.evaluation.task import RobustnessProtocol
from hf_robust_vision.methods.sim_clip import SimCLIPTrainer
from hf_robust_vision.pipeline.arguments import RecipeParser, _typed
from hf_robust_vision.training.config import Radius


FUZZ = settings(
    max_examples=300, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
RADII = st.from_regex(r"\A-?[0-9]{0,4}(\.[0-9]{1,3})?(/-?[0-9]{0,4})?\Z") | st.text(max_size=6) | st.floats().map(str)
LINES = st.dictionaries(
    st.sampled_from([*SampleRecord.__dataclass_fields__, "other"]),
    SCALARS | st.lists(st.integers(), max_size=2),
    max_size=8,
)


def need(name, error):
    assert name in str(error)


@pytest.fixture(scope="module")
def actions():
    return {
        action.dest: action for action in reversed(RecipeParser(SimCLIPTrainer)._actions) if action.type is not None
    }


@FUZZ
@given(data=st.data(), value=VALUES)
def test_yaml_values(actions, data, value):
    """findings-reliability 8: true is no number, 2.5 no whole one."""
    action = actions[
        data.draw(st.sampled_from(["max_steps", "learning_rate", "test_eps", "overwrite", "templates", "form"]))
    ]
    try:
        got = _typed(action, value, "file.yaml: name")
    except ValueError as error:
        return need("file.yaml: name", error)
    if action.dest == "max_steps":
        assert isinstance(got, int)
        assert str(value).strip().lstrip("+") == str(got) or int(str(value)) == got
        assert not isinstance(value, bool)
    elif action.dest == "learning_rate":
        assert isinstance(got, float)
        assert not isinstance(value, bool)
    elif action.dest == "test_eps":
        assert isinstance(got, list)
        assert got
        assert all(isinstance(radius, Radius) for radius in got)
    elif action.dest == "overwrite":
        assert isinstance(got, bool)


@FUZZ
@given(text=st.text(max_size=60) | VALUES.map(lambda value: yaml.safe_dump(value, allow_unicode=True)))
def test_yaml_files(tmp_path, text):
    file = tmp_path / "any.yaml"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        values = read_yaml(file)
    except ValueError as error:
        return need(str(file), error)
    assert all(isinstance(name, str) for name in values)


@FUZZ
@given(texts=st.lists(RADII, min_size=1, max_size=3), norm=st.sampled_from(["linf", "l2"]))
def test_radii(texts, norm):
    try:
        how = RobustnessProtocol(get_protocol("quick"), tuple(float(Radius(text)) for text in texts), norm)
    except ValueError:
        return
    assert len(set(how.eps)) == len(texts)
    assert all(math.isfinite(eps) and eps >= 0 and (norm == "l2" or eps <= 1) for eps in how.eps)


@FUZZ
@given(lines=st.lists(LINES, min_size=1, max_size=3))
def test_sample_records(tmp_path, lines):
    """findings-reliability 12: what is no record never becomes one."""
    file = tmp_path / "samples.jsonl"
    file.write_text("".join(json.dumps(line, default=str) + "\n" for line in lines))
    try:
        records = load_samples(file)
    except ValueError as error:
        return need(str(file), error)
    for record in records:
        assert type(record.id) in (int, str)
        assert record.fooled_by is None or isinstance(record.fooled_by, str)
        assert record.score is None or math.isfinite(record.score)
