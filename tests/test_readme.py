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
    monkeypatch.chdir(beside_a_run(tmp_path))
    exec(EXAMPLES[1], {})
    assert {"helps", "harms", "positive", "negative"} <= set(capsys.readouterr().out.split())


def test_the_page_for_own_models_goes_on_with_a_sample_and_with_the_errors_of_the_finished_model(
    tmp_path, monkeypatch, capsys
):
    page = (ROOT / "notebooks" / "own_model.md").read_text()
    five_lines, of_a_sample, of_errors, *_ = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(beside_a_run(tmp_path))
    namespace = {}
    exec(five_lines, namespace)
    exec(of_a_sample.replace("100", "4"), namespace)
    assert namespace["influence"].examples == 4
    capsys.readouterr()
    exec(of_errors, namespace)
    wrong = namespace["said"].loc[namespace["wrong"][:5]]
    asked = {line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]}
    assert (wrong["predicted"] != wrong["label"]).all()
    assert asked == {str(row) for row in range(len(wrong))} != set()


def beside_a_run(folder: Path) -> Path:
    """The folder, with what the page for own models asks for: checkpoints of a run, and two csv files."""
    for step in (200, 1000):
        make_model(folder / "my-run" / f"checkpoint-{step}")
    make_reviews(folder, queries=5)
    return folder


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
