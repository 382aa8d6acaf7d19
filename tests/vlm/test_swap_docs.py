import re
from pathlib import Path


def test_the_how_to_runs(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "how-to-swap.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 5
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks), "how-to-swap.md", "exec"), {})
    assert (tmp_path / "swapped" / "swap_report.json").is_file()
