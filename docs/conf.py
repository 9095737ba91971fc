"""Sphinx: the notebooks as they are committed, and the API reference from the docstrings."""

import sys

from docutils.nodes import Element, document, term
from sphinx.addnodes import desc_signature
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

project = "Which reviews made the model say that?"
author = "the founders"
copyright = "the founders, Apache-2.0"
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinxcontrib.bibtex",
]
html_theme = "furo"
pygments_dark_style = "a11y-high-contrast-dark"
html_title = project
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
html_css_files = ["site.css"]
html_js_files = ["site.js"]
# Pages of their own, beside the chapters that link them: there JupyterLab finds them, too.
html_extra_path = ["../notebooks/explorer.html", "../notebooks/top.html"]
exclude_patterns = ["_static/mathjax/README.md"]

# Pages come from stored outputs: no model, no network, no kernel.
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}
mathjax_path = "mathjax/tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
add_module_names = False
maximum_signature_line_length = 110
python_trailing_comma_in_multi_line_signatures = False

# What docstrings quote is a link where it is the name of something documented, else code.
default_role = "py:obj"


def class_of_another_module(app, env, node, content):
    """A link to the documented class, wherever it is defined; nothing when no such class is."""
    name = node["reftarget"]
    if node.get("reftype") != "obj" or not name[:1].isupper():
        return None
    python = env.domains["py"]
    found = python.find_obj(env, node.get("py:module"), node.get("py:class"), name, None, 1)
    if len(found) != 1:
        return None
    ((target, entry),) = found
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content, target)


def no_words_of_others(app, what, name, documented, options, lines):
    """A method that has no docstring is shown with its shapes, not with the one it inherits."""
    if what == "method" and documented.__doc__ is None:
        lines.clear()


def source_of_an_alias(app, module, name):
    """A name for a type of others, `Map = Callable[…]`, has its source where it is given."""
    named = getattr(sys.modules.get(module), name, None)
    ours = getattr(named, "__module__", module).partition(".")[0] == "support"
    return None if ours else module


def offer_terms_and_functions(app: Sphinx, page: document) -> None:
    """Lets notebooks link `glossary.md#term-Fisher` and `api/judge.md#support…`, not headings alone."""
    anchors = app.env.metadata[app.env.docname].setdefault("myst_slugs", {})
    for node in page.findall(Element):
        if isinstance(node, term | desc_signature):
            anchors.update({name: (node.line, name, node.astext()) for name in node["ids"]})


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("doctree-read", offer_terms_and_functions)
    app.connect("viewcode-follow-imported", source_of_an_alias)
    app.connect("autodoc-process-docstring", no_words_of_others)
    app.connect("missing-reference", class_of_another_module)
