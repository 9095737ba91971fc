"""What the README shows and promises is so."""

import re
from base64 import b64decode
from pathlib import Path

import nbformat

from experiments.collection import README_FIGURE, reading_order
from tests.tiny_job import make_model, make_reviews

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def statements(example: str) -> list[str]:
    return [line for line in example.splitlines() if line and "import " not in line]


def test_the_engine_in_ten_lines_runs_as_written(capsys):
    example, _ = EXAMPLES
    assert len(statements(example)) <= 10
    namespace = {}
    exec(example, namespace)
    assert namespace["influences"].shape == (5, 200)
    assert "tensor" in capsys.readouterr().out


def test_a_checkpoint_and_a_csv_take_five_lines_here_and_on_the_page_for_own_models(
    tmp_path, monkeypatch, capsys
):
    page = (ROOT / "notebooks" / "own_model.md").read_text()
    assert EXAMPLES[1] == re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[0]
    assert len(statements(EXAMPLES[1])) == 5
    make_model(tmp_path / "my-run" / "checkpoint-200")
    make_reviews(tmp_path, queries=5)
    monkeypatch.chdir(tmp_path)
    exec(EXAMPLES[1], {})
    assert {"helps", "harms", "positive", "negative"} <= set(capsys.readouterr().out.split())


def test_every_figure_is_there_and_the_one_in_its_notebook():
    figures = {}
    for path in reading_order(ROOT / "notebooks"):
        for cell in nbformat.read(path, as_version=4).cells:
            for tag in cell.metadata.get("tags", []):
                if tag.startswith(README_FIGURE):
                    name = f"docs/{tag.removeprefix(README_FIGURE)}.png"
                    figures[name] = [b64decode(o.data["image/png"]) for o in cell.outputs]
    every = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert all((ROOT / name).exists() for name in every)
    shown = [name for name in every if name.startswith("docs/")]
    assert shown
    for name in shown:
        assert [(ROOT / name).read_bytes()] == figures[name]


def test_the_map_lists_all_notebooks_in_reading_order():
    linked = re.findall(r"^\| \[[^\]]+\]\((notebooks/[^)]+)\)", README, flags=re.MULTILINE)
    assert linked == [f"notebooks/{path.name}" for path in reading_order(ROOT / "notebooks")]


def test_every_make_target_named_in_the_readme_exists():
    named = set(re.findall(r"(?:^|`)make (?!:)([a-z]+)", README, flags=re.MULTILINE))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"notebooks", "test"} <= named <= targets
