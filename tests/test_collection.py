"""The notebooks as a collection: what a reader finds in every chapter, in the same place."""

import ast
import json
import re
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from experiments.collection import EXECUTED, code_digest, reading_order
from tests.test_links import LINK, Source

FOLDER = Path(__file__).parents[1] / "notebooks"
INDEX = "index.md"
BIBLIOGRAPHY = FOLDER.parent / "docs" / "references.bib"
PAPER = re.compile(r"\]\((https://(?:arxiv|aclanthology)\.org/[^)\s]+)\)")


@dataclass(frozen=True)
class Chapter:
    """A notebook, and its place among the others."""

    path: Path

    @cached_property
    def notebook(self) -> NotebookNode:
        return nbformat.read(self.path, as_version=4)

    @property
    def cells(self) -> list[NotebookNode]:
        return self.notebook.cells

    @property
    def code_cells(self) -> list[NotebookNode]:
        return [cell for cell in self.cells if cell.cell_type == "code"]

    @property
    def prose(self) -> list[str]:
        return [cell.source for cell in self.cells if cell.cell_type == "markdown"]

    @property
    def outputs(self) -> list[NotebookNode]:
        return [output for cell in self.code_cells for output in cell.outputs]

    @property
    def parameters(self) -> NotebookNode:
        tagged = [cell for cell in self.cells if "parameters" in tags(cell)]
        assert len(tagged) == 1, f"{len(tagged)} cells are tagged `parameters`, there must be one"
        return tagged[0]

    @property
    def next_page(self) -> str:
        """The following chapter; after the last one, the index."""
        chapters = reading_order(self.path.parent)
        following = chapters[chapters.index(self.path) + 1 :]
        return following[0].name if following else INDEX


@pytest.fixture(scope="module", params=reading_order(FOLDER), ids=lambda path: path.name)
def chapter(request) -> Chapter:
    return Chapter(request.param)


def tags(cell: NotebookNode) -> set[str]:
    return set(cell.metadata.get("tags", []))


def names_in(source: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}


def shows_a_figure(cell: NotebookNode) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.outputs)


def text_of(outputs: list[NotebookNode]) -> str:
    """What the outputs say in letters; an image in base64 can spell anything."""
    readable = [
        {kind: content for kind, content in output.data.items() if kind != "image/png"}
        if "data" in output
        else output
        for output in outputs
    ]
    return json.dumps(readable, ensure_ascii=False)


# The first page of a chapter


def test_is_a_valid_notebook_for_python3(chapter):
    nbformat.validate(chapter.notebook)
    kernel = chapter.notebook.metadata.get("kernelspec", {}).get("name")
    assert kernel == "python3", f"the kernel is {kernel!r}, it must be 'python3'"


def test_opens_with_its_title(chapter):
    assert chapter.cells[0].cell_type == "markdown", "the first cell must be markdown"
    assert chapter.cells[0].source.startswith("# "), "the first cell must start with `# title`"
    count = len(re.findall(r"^# ", Source(chapter.path).prose, flags=re.MULTILINE))
    assert count == 1, f"{count} headings are titles (`# …`), only the first line may be"


def test_has_a_title_of_its_own(chapter):
    others = [Chapter(path) for path in reading_order(chapter.path.parent) if path != chapter.path]
    title = chapter.cells[0].source.partition("\n")[0]
    namesakes = [other.path.name for other in others if other.cells[0].source.startswith(title + "\n")]
    assert not namesakes, f"{namesakes} have the same title {title!r}"


def test_asks_a_question(chapter):
    after_title = chapter.cells[0].source.partition("\n")[2]
    assert "?" in after_title, "the first cell must ask, below its title, the chapter's question"


def test_announces_at_most_four_things(chapter):
    _, announced, rest = chapter.cells[0].source.partition("You will see")
    assert announced, "the first cell must have a list `You will see`"
    bullets = re.findall(r"^[-*] ", rest, flags=re.MULTILINE)
    assert 1 <= len(bullets) <= 4, f"`You will see` has {len(bullets)} bullets, not one to four"


def test_states_its_run_time(chapter):
    stated = re.search(r"two cores.*?\d+ (second|minute)", chapter.cells[0].source)
    assert stated, "the first cell must state `Run time on two cores: about 3 minutes`"


# parameters and CI mode


def test_has_one_parameters_cell(chapter):
    values = {}
    for statement in ast.parse(chapter.parameters.source).body:
        assert isinstance(statement, ast.Assign), "the parameters cell must only assign"
        values[ast.unparse(statement.targets[0])] = ast.literal_eval(statement.value)
    seed = values.pop("seed", None)
    assert type(seed) is int, f"`seed` must be a whole number, not {seed!r}"
    first = dict(list(values.items())[:2])
    assert first == {"ci": False, "source": "packaged"}, (
        'the parameters must begin with ci = False, source = "packaged" and seed, as committed'
    )


def test_has_small_sizes_under_nbmake(chapter):
    mock = chapter.parameters.metadata.get("nbmake", {}).get("mock")
    told = f'the parameters cell needs {{"nbmake": {{"mock": {{"ci": true}}}}}}, not {mock}'
    assert mock == {"ci": True}, told


def test_starts_its_code_with_hidden_parameters(chapter):
    hidden = tags(chapter.parameters) & {"hide-cell", "remove-cell"}
    assert hidden, "the parameters cell must be tagged `hide-cell` or `remove-cell`"
    assert chapter.code_cells[0] is chapter.parameters, "no code may come before the parameters cell"


def test_derives_all_sizes_in_the_next_cell(chapter):
    using = [n for n, cell in enumerate(chapter.code_cells[1:]) if "ci" in names_in(cell.source)]
    assert using in ([], [0]), "`ci` may be used in the code cell right after the parameters only"
    for cell in chapter.code_cells[1:]:
        word = re.search(r"\b(papermill|nbmake|CI)\b", cell.source)
        assert not word, f"the code mentions {word.group()!r}:\n{cell.source}"


# form


def test_is_short(chapter):
    lengths = [len(cell.source.splitlines()) for cell in chapter.code_cells]
    assert len(chapter.cells) <= 30, f"{len(chapter.cells)} cells, at most 30 are read"
    assert max(lengths) <= 15, f"a code cell has {max(lengths)} lines, at most 15 are read"
    median = statistics.median(lengths)
    assert median <= 6, f"the median code cell has {median} lines, not six or fewer"


def test_hides_the_code_of_figures(chapter):
    for cell in chapter.code_cells:
        hidden = not shows_a_figure(cell) or "hide-input" in tags(cell)
        assert hidden, f"a cell that shows a figure must be tagged `hide-input`:\n{cell.source}"


def test_describes_its_figures(chapter):
    for cell in filter(shows_a_figure, chapter.code_cells):
        text = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        assert len(text) > 20, (
            "a figure must be described for those who can't see it, in the metadata "
            f'{{"mystnb": {{"image": {{"alt": "…"}}}}}}:\n{cell.source}'
        )


def test_cites_papers_of_the_bibliography(chapter):
    known = set(re.findall(r"url = {(.*?)}", BIBLIOGRAPHY.read_text(encoding="utf-8")))
    for paper in PAPER.findall("\n".join(chapter.prose)):
        assert paper in known, f"{paper} is no `url` of docs/references.bib"


def test_closes_with_what_was_learned(chapter):
    starts = [
        number
        for number, cell in enumerate(chapter.cells)
        if cell.cell_type == "markdown" and cell.source.startswith("## What we learned")
    ]
    assert len(starts) == 1, "one markdown cell must start with `## What we learned`"
    *prose, _versions = chapter.cells[starts[0] :]
    assert all(cell.cell_type == "markdown" for cell in prose), (
        "only the cell with the versions may be code after `## What we learned`"
    )
    closing = "\n".join(cell.source for cell in prose)
    assert chapter.next_page in LINK.findall(closing), (
        f"`## What we learned` must be followed by a link to {chapter.next_page}"
    )


def test_ends_with_the_versions(chapter):
    last = chapter.cells[-1]
    printed = last.cell_type == "code" and re.search(r"\d+\.\d+", text_of(last.outputs))
    asked = "version" in last.source
    assert asked, "the last cell must be code that prints versions"
    assert printed, "the last cell shows no version in its output"


# executed, and without traces


def test_was_run_from_top_to_bottom(chapter):
    counts = [cell.execution_count for cell in chapter.code_cells]
    assert counts == list(range(1, len(counts) + 1)), (
        f"the cells were run in the order {counts}; `make execute` runs them from top to bottom"
    )


def test_shows_what_this_code_gave(chapter):
    stored = chapter.notebook.metadata.get(EXECUTED)
    assert stored == code_digest(chapter.notebook), (
        "the code was changed after it was executed, so the outputs are of other code: "
        f"make execute NOTEBOOK=notebooks/{chapter.path.name}"
    )


def test_shows_results_without_errors_or_warnings(chapter):
    shown = [cell for cell in chapter.code_cells[:-1] if cell.outputs]
    assert shown, "no cell but the last has an output; `make execute` stores them"
    for output in chapter.outputs:
        assert output.output_type != "error", f"a cell failed: {output.ename}: {output.evalue}"
        warning = output.get("name") == "stderr" and "Warning" in output.text
        assert not warning, f"an output is a warning: {output.text}"


def test_names_no_place_of_one_machine(chapter):
    everything = text_of(chapter.outputs) + "".join(cell.source for cell in chapter.cells)
    found = re.search(r"/(root|home|tmp|Users)/|\bat 0x[0-9a-f]+", everything)
    assert not found, f"{found.group()!r} is a path or an address of one machine"


def test_has_no_traces_of_its_run(chapter):
    metadata = [chapter.notebook.metadata, *(cell.metadata for cell in chapter.cells)]
    traces = {"execution", "papermill", "widgets"} & set().union(*metadata)
    assert not traces, f"metadata has {sorted(traces)}; `make execute` leaves it out"
    injected = [cell for cell in chapter.cells if "injected-parameters" in tags(cell)]
    assert not injected, "a cell of papermill's is left: commit the notebook, not an executed copy"
    widgets = "application/vnd.jupyter.widget-view+json" in text_of(chapter.outputs)
    assert not widgets, "an output is a live widget, which no page can show; use `make execute`"


def test_the_index_links_every_notebook_in_reading_order_and_nothing_that_is_not_there():
    text = (FOLDER / INDEX).read_text(encoding="utf-8")
    pages = [link.partition("#")[0] for link in LINK.findall(text)]
    missing = [page for page in pages if page and not (FOLDER / page).exists()]
    assert not missing, f"{INDEX} links {missing}, which do not exist"
    linked = list(dict.fromkeys(page for page in pages if page.endswith(".ipynb")))
    chapters = [path.name for path in reading_order(FOLDER)]
    assert linked == chapters, f"{INDEX} links {linked}, the reading order is {chapters}"
    misnamed = [name for name in chapters if not re.match(r"(\d\d|appendix)_[a-z_]+\.ipynb$", name)]
    assert not misnamed, f"{misnamed} must be called 01_… or appendix_…"


def test_the_page_beside_08_is_of_the_job_that_08_shows():
    shown = text_of(Chapter(FOLDER / "08_scale.ipynb").outputs).partition("Over all queries:")[2]
    told = re.findall(r"\\n +\d+ +(\d+) [\d.]+% ", shown)[:10]
    page = (FOLDER / "top.html").read_text(encoding="utf-8")
    listed = re.findall(r'id="all-plain-row-(\d+)"', page)
    assert len(told) == 10
    assert listed[:10] == told
    assert not re.search(r"/(root|home|tmp|Users)/", re.sub(r"<(blockquote|span).*?</\1>", "", page))
