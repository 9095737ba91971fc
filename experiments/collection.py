"""Runs the notebooks in reading order; `--in-place` makes the result the committed form.

Each notebook runs in a fresh kernel whose working directory is the folder of the notebooks. The
executed copy, a page of it in HTML and an `index.html` are left in the output folder. The first
notebook that fails ends the run.
"""

import argparse
import hashlib
import html
import os
import re
import shutil
import sys
import time
from base64 import b64decode
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError
from tqdm.std import Bar
from traitlets.config import Config

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"

README_FIGURE = "readme-figure:"

EXECUTED = "executed_code"
"""Metadata that says which code the stored outputs belong to."""

# A finished bar without its clock, so that running a notebook again changes no byte of its output.
BAR_WITHOUT_CLOCK = "{l_bar}{bar}| {n_fmt}/{total_fmt} {unit}"

# The documentation gives the same tags the same meaning.
HIDDEN_ON_PAGES = {
    "remove_cell_tags": {"hide-cell", "remove-cell", "injected-parameters"},
    "remove_input_tags": {"hide-input", "remove-input"},
    "remove_all_outputs_tags": {"hide-output", "remove-output"},
}

HEADING = re.compile(r'<h[1-6] id="(?P<name>[^"]+)">.*?</h[1-6]>')

# What these pages link of each other; glossary and API reference are pages of the site alone.
LINK_TO_A_PAGE = re.compile(r"(\]\((?!\w+:)[^)#]+)\.(?:ipynb|(?<=\(index\.)md)\b")
LINK_TO_THE_SITE = re.compile(r"\[([^\[\]]+)\]\((?!\w+:)[^)#]+\.md\b[^)]*\)")


MATHJAX = Path(__file__).parents[1] / "docs" / "_static" / "mathjax"
INDEX = "index.html"

# The template of nbconvert loads its scripts from elsewhere; a page must show its formulas anywhere.
PAGE = """{% extends "index.html.j2" %}
{% block html_head_js_requirejs %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block html_head_js_mathjax %}
<script>
MathJax = {tex: {inlineMath: [["$", "$"]]}, options: {ignoreHtmlClass: "jp-Cell-outputWrapper"}};
</script>
<script src="mathjax/tex-svg.js" async></script>
{% endblock %}
{% block html_head_css %}<style>main {max-width: 62rem; margin: auto;}</style>{% endblock %}
"""


class NotebookFailed(RuntimeError):
    """A notebook stopped before its last cell."""


def reading_order(folder: Path) -> list[Path]:
    """The notebooks of a folder: 01, 02, … and, because letters follow digits, appendices last."""
    return sorted(folder.glob("*.ipynb"))


def execute(notebook: Path, copy: Path, parameters: Mapping[str, object]) -> NotebookNode:
    """Run `notebook` with its parameters replaced, and write it in committed form to `copy`."""
    try:
        executed = papermill.execute_notebook(
            notebook,
            copy,
            parameters=dict(parameters),
            kernel_name="python3",
            language="python",
            cwd=notebook.parent,
            progress_bar={"desc": notebook.stem},
            # ipykernel warns at every start that a local kernel listens on a local port.
            extra_arguments=["--log-level=ERROR"],
        )
    except PapermillExecutionError as error:
        raise NotebookFailed(
            f"{notebook.name} failed at In [{error.exec_count}] with {error.ename}: {error.evalue}\n"
            f"Its cells up to there, with their output: {copy}"
        ) from error
    except DeadKernelError as error:
        raise NotebookFailed(
            f"{notebook.name} lost its kernel; most often the machine ran out of memory."
        ) from error
    executed = committed_form(executed)
    nbformat.write(executed, copy)
    return executed


def committed_form(notebook: NotebookNode) -> NotebookNode:
    """The notebook without traces of when, where and by what it was run.

    Live progress bars cannot be shown by a page, so each becomes the line it ended on.
    """
    widgets = notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    for name in ("widgets", "papermill"):
        notebook.metadata.pop(name, None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    notebook.metadata[EXECUTED] = code_digest(notebook)
    for cell in notebook.cells:
        for name in ("execution", "papermill"):
            cell.metadata.pop(name, None)
        if not cell.metadata.get("tags", ["some"]):
            del cell.metadata["tags"]
        if cell.cell_type == "code":
            as_text = (_bar_as_text(output, widgets) for output in cell.outputs)
            cell.outputs = _joined([output for output in as_text if output])
    return notebook


def code_digest(notebook: NotebookNode) -> str:
    """SHA-256 of what the code cells say, in order."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Consecutive pieces of one stream as one: where a kernel cuts them is a matter of timing."""
    joined: list[NotebookNode] = []
    for output in outputs:
        if joined and output.get("name", "") == joined[-1].get("name"):
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def _bar_as_text(output: NotebookNode, widgets: Mapping) -> NotebookNode | None:
    """An output that is a bar becomes text, or nothing when the bar was taken away at its end."""
    view = output.get("data", {}).get(WIDGET_VIEW)
    if view is None:
        return output
    model = widgets.get(view["model_id"])
    if model is None or _state(widgets, model["state"]["layout"]).get("visibility") == "hidden":
        return None
    if model["model_name"] == "HBoxModel":
        before, bar, after = (_state(widgets, child) for child in model["state"]["children"])
        # tqdm pads with figure spaces, because HTML swallows ordinary ones.
        left, right = (html.unescape(part["value"]).replace("\u2007", " ") for part in (before, after))
        output.data["text/plain"] = f"{left}|{Bar(bar['value'] / bar['max'])}|{right}"
    del output.data[WIDGET_VIEW]
    return output


def _state(widgets: Mapping, reference: str) -> Mapping:
    return widgets[reference.removeprefix("IPY_MODEL_")]["state"]


def write_page(notebook: NotebookNode, page: Path) -> None:
    """One HTML page of an executed notebook, its links leading to the other pages and back.

    What it links on the site alone becomes plain text.
    """
    name = title(notebook)
    notebook = NotebookNode(notebook, cells=[NotebookNode(cell) for cell in notebook.cells])
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            linked = LINK_TO_A_PAGE.sub(r"\1.html", cell.source)
            cell.source = LINK_TO_THE_SITE.sub(r"\1", linked)
    if page.name != INDEX:
        notebook.cells.insert(0, nbformat.v4.new_markdown_cell(f"[← All notebooks]({INDEX})"))
    exporter = HTMLExporter(
        raw_template=PAGE,
        config=Config(TagRemovePreprocessor={"enabled": True} | HIDDEN_ON_PAGES),
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    body, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": name}})
    page.write_text(HEADING.sub(_with_slug, body), encoding="utf-8")


def _with_slug(heading: re.Match) -> str:
    """A heading under the name by which the site and other notebooks link it: `the-curvature`."""
    name = unquote(html.unescape(heading["name"]))
    slug = re.sub(r"[^\w-]", "", name.lower())
    return (
        heading[0].replace(f'"{heading["name"]}"', f'"{slug}"').replace(f'"#{heading["name"]}"', f'"#{slug}"')
    )


def write_readme_figures(notebook: NotebookNode, folder: Path) -> None:
    """The figures of cells tagged `readme-figure:NAME` as `NAME.png`: those the README shows."""
    for cell in notebook.cells:
        for tag in cell.metadata.get("tags", []):
            if tag.startswith(README_FIGURE):
                folder.mkdir(exist_ok=True)
                image = next(o.data["image/png"] for o in cell.outputs if "image/png" in o.data)
                (folder / f"{tag.removeprefix(README_FIGURE)}.png").write_bytes(b64decode(image))


def title(notebook: NotebookNode) -> str:
    """The heading of the first cell, without its mark."""
    return notebook.cells[0].source.partition("\n")[0].removeprefix("# ")


def run(
    notebooks: list[Path], output: Path, parameters: Mapping[str, object], in_place: bool = False
) -> None:
    """Execute the notebooks one after the other, and say how long each took."""
    shutil.copytree(MATHJAX, output / "mathjax", dirs_exist_ok=True)
    for page in notebooks[0].parent.glob("*.html"):  # those that chapters link
        shutil.copy(page, output)
    seconds = {}
    for number, path in enumerate(notebooks, start=1):
        start = time.monotonic()
        executed = execute(path, output / path.name, parameters)
        write_page(executed, output / f"{path.stem}.html")
        if in_place:
            nbformat.write(executed, path)
            write_readme_figures(executed, path.parents[1] / "docs")
        took = time.monotonic() - start
        seconds[f"[{title(executed)}]({path.stem}.html)"] = took
        print(f"[{number}/{len(notebooks)}] {path.stem}: {took:.0f} s", flush=True)
    write_page(index_of(seconds, parameters), output / INDEX)
    whole = sum(seconds.values())
    print(f"{len(notebooks)} notebooks in {whole:.0f} s: {output / INDEX}")


def index_of(seconds: Mapping[str, float], parameters: Mapping[str, object]) -> NotebookNode:
    """The first page: every notebook by its link, with how long it took, and how they were run."""
    size = "At the small sizes of a test" if parameters.get("ci") else "At full size"
    source = parameters.get("source", "packaged")
    rows = [f"| {link} | {took:.0f} |" for link, took in seconds.items()]
    text = [
        "# The notebooks, executed",
        f"{size}, with reviews and model from the {source} source.",
        "\n".join(["| notebook | seconds |", "| :--- | ---: |", *rows]),
    ]
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("\n\n".join(text))])


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.collection", description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of notebooks/")
    parser.add_argument("--ci", action="store_true", help="reduced sizes")
    parser.add_argument("--source", choices=["packaged", "hub"], default="packaged")
    parser.add_argument("--in-place", action="store_true", help="execute the committed notebooks")
    parser.add_argument("--output", type=Path, default=Path("build/notebooks"))
    chosen = parser.parse_args(arguments)
    if chosen.in_place and (chosen.ci or chosen.source != "packaged"):
        parser.error("committed notebooks are full size, from the packaged source")
    notebooks = chosen.notebooks or reading_order(Path("notebooks"))
    if not notebooks:
        parser.error("no notebooks here: run this at the root of the repository")
    missing = [str(path) for path in notebooks if not path.is_file()]
    if missing:
        parser.error(f"there is no {', no '.join(missing)}")
    # Without parameters papermill adds no cell of its own.
    parameters = {} if chosen.in_place else {"ci": chosen.ci, "source": chosen.source}
    os.environ["TQDM_BAR_FORMAT"] = BAR_WITHOUT_CLOCK
    try:
        run(notebooks, chosen.output.resolve(), parameters, chosen.in_place)
    except NotebookFailed as failure:
        print(f"{failure.__cause__}\n{failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
