"""What `python -m experiments.collection` does to a folder of notebooks, with real kernels."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from experiments.collection import EXECUTED, code_digest, main, reading_order

PARAMETERS = 'ci = False\nsource = "packaged"\nseed = 0'
SAY_PARAMETERS = "import os\n\nprint(ci, source, seed, os.path.basename(os.getcwd()))"
BARS = """from tqdm.auto import tqdm

print("before")
list(tqdm(range(3), unit="review", desc="Fitting <all>"))
list(tqdm(range(3), leave=False))
print("after")"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a notebook into `notebooks/` of an empty working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").mkdir()

    def write(name: str, *sources: str, opening: str = "# A title"):
        parameters = new_code_cell(PARAMETERS, metadata={"tags": ["parameters", "hide-cell"]})
        cells = [new_markdown_cell(opening), parameters, *map(new_code_cell, sources)]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
        path = tmp_path / "notebooks" / name
        nbformat.write(new_notebook(cells=cells, metadata=kernel), path)
        return path

    return write


def printed(path):
    """What the cells of a notebook left on its standard output."""
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    return "".join(output.text for cell in cells for output in cell.outputs if "text" in output)


def test_chapters_are_read_by_number_and_the_appendix_last(write):
    for name in ("appendix_a.ipynb", "10_late.ipynb", "02_second.ipynb", "01_first.ipynb"):
        folder = write(name).parent
    names = [path.name for path in reading_order(folder)]
    assert names == ["01_first.ipynb", "02_second.ipynb", "10_late.ipynb", "appendix_a.ipynb"]


def test_each_notebook_gets_the_parameters_and_works_in_the_folder_of_notebooks(write, tmp_path):
    committed = write("01_a.ipynb", SAY_PARAMETERS)
    before = committed.read_bytes()
    assert main(["--ci", "--source", "hub"]) == 0
    index = (tmp_path / "build/notebooks/index.html").read_text()
    assert "At the small sizes of a test, with reviews and model from the hub source" in index
    assert printed(tmp_path / "build/notebooks/01_a.ipynb") == "True hub 0 notebooks\n"
    assert committed.read_bytes() == before


ALPHA = """# Alpha

See [Zeta](appendix_z.ipynb#there), [all](index.md), [`fit`](api.md#support.fit), [paper](https://a.org/b.md).

## Seven reviews, *five* λ?"""


def test_pages_are_linked_in_order_and_show_no_parameters(write, tmp_path, capsys):
    write("appendix_z.ipynb", opening="# Zeta")
    write("01_a.ipynb", opening=ALPHA)
    assert main([]) == 0
    pages = tmp_path / "build/notebooks"
    index = (pages / "index.html").read_text()
    assert index.index('<a href="01_a.html">Alpha</a>') < index.index("appendix_z.html")
    page = (pages / "01_a.html").read_text()
    assert 'href="appendix_z.html#there"' in page
    assert '<h2 id="seven-reviews-five-λ">' in page
    assert page.count('href="index.html"') == 2
    assert '<code>fit</code>, <a href="https://a.org/b.md">paper</a>.' in page  # no reference to link to here
    assert "All notebooks" in page
    assert "All notebooks" not in index
    assert "packaged" not in page
    said = capsys.readouterr().out
    assert said.index("[1/2] 01_a: ") < said.index("[2/2] appendix_z: ") < said.index("2 notebooks in")


def test_the_first_failing_notebook_is_named_and_ends_the_run(write, tmp_path, capsys):
    failing = write("01_a.ipynb", "print('so far')", "raise ValueError('no such review')")
    write("02_b.ipynb")
    before = failing.read_bytes()
    assert main(["--in-place"]) == 1
    told = capsys.readouterr().err
    assert "01_a.ipynb failed at In [3] with ValueError: no such review" in told
    assert printed(tmp_path / "build/notebooks/01_a.ipynb") == "so far\n"
    assert not (tmp_path / "build/notebooks/02_b.ipynb").exists()
    assert failing.read_bytes() == before


def test_a_kernel_that_dies_is_named(write, capsys):
    write("01_a.ipynb", "import os\n\nos._exit(9)")
    assert main([]) == 1
    assert "01_a.ipynb lost its kernel" in capsys.readouterr().err


def test_the_committed_form_has_bars_as_text_and_no_traces_of_the_run_so_that_twice_is_once(write):
    path = write("01_a.ipynb", BARS)
    assert main(["--in-place"]) == 0
    once = path.read_bytes()
    assert main(["--in-place"]) == 0
    assert path.read_bytes() == once
    notebook = nbformat.read(path, 4)
    before, bar, after = notebook.cells[-1].outputs
    assert (before.text, after.text) == ("before\n", "after\n")
    assert bar.data == {"text/plain": "Fitting <all>: 100%|██████████| 3/3 review"}
    assert [cell.metadata for cell in notebook.cells] == [{}, {"tags": ["parameters", "hide-cell"]}, {}]
    assert set(notebook.metadata) == {"kernelspec", "language_info", EXECUTED}
    assert notebook.metadata[EXECUTED] == code_digest(notebook)


@pytest.mark.parametrize("arguments", [["--ci"], ["--source", "hub"]])
def test_committed_notebooks_are_never_executed_at_another_size_or_source(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["--in-place", *arguments])
    assert "full size, from the packaged source" in capsys.readouterr().err


def test_outside_the_repository_nothing_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([])
    assert "run this at the root of the repository" in capsys.readouterr().err
