"""Each rule can fail: a collection that keeps all of them, and every rule broken in turn."""

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from experiments.collection import EXECUTED, code_digest, reading_order
from tests import chapter_rules as rules

OPENING, PARAMETERS, SIZES, PLOT, LEARNED, VERSIONS = range(6)
"""Places of the cells of the good chapter."""


def chapter_that_keeps_all_rules(title: str, next_page: str) -> NotebookNode:
    opening = f"# {title}\n\nWhich one?\n\n**You will see**\n\n- [it](#what-we-learned)\n\n"
    notebook = new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
        cells=[
            new_markdown_cell(opening + "Run time on two cores: about 9 seconds."),
            new_code_cell(
                'ci = False\nsource = "packaged"\nseed = 0',
                metadata={"tags": ["parameters", "hide-cell"], "nbmake": {"mock": {"ci": True}}},
            ),
            new_code_cell("size = 7 if ci else 100"),
            new_code_cell(
                "heatmap(size)",
                metadata={
                    "tags": ["hide-input"],
                    "mystnb": {"image": {"alt": "Seven rows, each as dark as the next"}},
                },
            ),
            new_markdown_cell(f"## What we learned\n\nOne of 7. Next: [on]({next_page})"),
            new_code_cell('print(version("torch"))'),
        ],
    )
    for count, number in enumerate((PARAMETERS, SIZES, PLOT, VERSIONS), start=1):
        notebook.cells[number].execution_count = count
    figure = {"text/plain": "<Figure>", "image/png": "iVBORw0KGgo="}
    notebook.cells[PLOT].outputs = [new_output("display_data", figure)]
    notebook.cells[VERSIONS].outputs = [new_output("stream", text="2.13.0\n")]
    notebook.metadata[EXECUTED] = code_digest(notebook)
    return notebook


@pytest.fixture
def folder(tmp_path):
    """A collection of two chapters and an index."""
    first = chapter_that_keeps_all_rules("First", "appendix_last.ipynb")
    nbformat.write(first, tmp_path / "01_first.ipynb")
    last = chapter_that_keeps_all_rules("Last", rules.INDEX)
    nbformat.write(last, tmp_path / "appendix_last.ipynb")
    (tmp_path / rules.INDEX).write_text("1. [a](01_first.ipynb)\n2. [b](appendix_last.ipynb)\n")
    return tmp_path


def edit(cell: int, old: str, new: str):
    """Replaces a piece of a cell's source."""

    def change(notebook):
        assert old in notebook.cells[cell].source
        notebook.cells[cell].source = notebook.cells[cell].source.replace(old, new)

    return change


def describe(cell: int, **metadata):
    """Replaces a part of a cell's metadata."""
    return lambda notebook: notebook.cells[cell].metadata.update(metadata)


def show(cell: int, kind: str, *data, **content):
    """Adds an output to a cell."""
    return lambda notebook: notebook.cells[cell].outputs.append(new_output(kind, *data, **content))


def insert(place: int, cell: NotebookNode):
    return lambda notebook: notebook.cells.insert(place, cell)


def remove_outputs(notebook):
    for number in (PLOT, VERSIONS):
        notebook.cells[number].outputs = []


def pad_with_cells(notebook):
    notebook.cells += [new_markdown_cell() for _ in range(25)]


def rename_kernel(notebook):
    notebook.metadata.kernelspec.name = "my-env"


BREAKS = [
    (
        rules.shows_what_this_code_gave,
        edit(SIZES, "100", "101"),
        "changed after it was executed.*make execute NOTEBOOK=notebooks/01_first.ipynb",
    ),
    (rules.is_a_valid_notebook_for_python3, rename_kernel, "the kernel is 'my-env'"),
    (rules.opens_with_its_title, edit(OPENING, "# First", "First"), "must start with `# title`"),
    (rules.has_a_title_of_its_own, edit(OPENING, "# First", "# Last"), "have the same title '# Last'"),
    (rules.asks_a_question, edit(OPENING, "Which one?", "That one."), "must ask"),
    (rules.announces_at_most_four_things, edit(OPENING, "You will see", "Here"), "must have a list"),
    (rules.states_its_run_time, edit(OPENING, "about 9 seconds", "short"), "must state `Run time"),
    (rules.has_one_parameters_cell, describe(SIZES, tags=["parameters"]), "2 cells are tagged"),
    (rules.has_small_sizes_under_nbmake, describe(PARAMETERS, nbmake={}), "needs .* not None"),
    (rules.starts_its_code_with_hidden_parameters, describe(PARAMETERS, tags=["parameters"]), "`hide-cell`"),
    (rules.starts_its_code_with_hidden_parameters, insert(1, new_code_cell("1")), "no code may come before"),
    (rules.derives_all_sizes_in_the_next_cell, edit(PLOT, "size", "ci"), "right after the parameters"),
    (
        rules.derives_all_sizes_in_the_next_cell,
        edit(PLOT, "(size)", "(size)  # small in CI"),
        "mentions 'CI'",
    ),
    (rules.is_short, pad_with_cells, "31 cells"),
    (rules.hides_the_code_of_figures, describe(PLOT, tags=[]), "must be tagged `hide-input`"),
    (rules.describes_its_figures, describe(PLOT, mystnb={}), "must be described for those who"),
    (rules.has_links_that_lead_somewhere, edit(LEARNED, "_last", "_lost"), "'appendix_lost.ipynb' leads"),
    (
        rules.cites_papers_of_the_bibliography,
        edit(OPENING, "Which one?", "Which one? [Nobody 1999](https://arxiv.org/abs/9901.00001)"),
        "9901.00001 is no `url` of docs/references.bib",
    ),
    (rules.closes_with_what_was_learned, edit(LEARNED, "learned", "saw"), "one markdown cell must start"),
    (rules.ends_with_the_versions, edit(VERSIONS, "version", "str"), "must be code that prints versions"),
    (rules.was_run_from_top_to_bottom, insert(3, new_code_cell("1")), r"in the order \[1, 2, None, 3, 4\]"),
    (rules.shows_results_without_errors_or_warnings, remove_outputs, "no cell but the last has an output"),
    (
        rules.shows_results_without_errors_or_warnings,
        show(SIZES, "error", ename="ValueError", evalue="no", traceback=[]),
        "a cell failed: ValueError: no",
    ),
    (
        rules.names_no_place_of_one_machine,
        show(SIZES, "stream", text="saved to /home/me/x"),
        "'/home/' is a path",
    ),
    (rules.has_no_traces_of_its_run, describe(SIZES, execution={}), r"metadata has \['execution'\]"),
]


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_a_good_collection_keeps_every_rule(folder, rule):
    for path in reading_order(folder):
        rule(rules.Chapter(path))


@pytest.mark.parametrize(("rule", "change", "message"), BREAKS)
def test_a_broken_rule_is_told(folder, rule, change, message):
    path = folder / "01_first.ipynb"
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)
    with pytest.raises(AssertionError, match=message):
        rule(rules.Chapter(path))


def test_every_rule_has_been_broken():
    assert {rule for rule, _, _ in BREAKS} == set(rules.RULES)


def test_a_wrong_index_is_told(folder):
    rules.check_index(folder)
    (folder / rules.INDEX).write_text("[a](01_first.ipynb)")
    with pytest.raises(AssertionError, match=r"links \['01_first.ipynb'\], the reading order is"):
        rules.check_index(folder)
