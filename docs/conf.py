"""Sphinx: the notebooks as they are committed, and the API reference from the docstrings."""

from docutils.nodes import Element, document, term
from sphinx.addnodes import desc_signature
from sphinx.application import Sphinx

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
html_title = project
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
html_css_files = ["site.css"]
html_js_files = ["site.js"]
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
default_role = "code"


def setup(app: Sphinx) -> None:
    app.connect("doctree-read", offer_terms_and_functions)


def offer_terms_and_functions(app: Sphinx, page: document) -> None:
    """Lets notebooks link `glossary.md#term-Fisher` and `api.md#support…`; else headings alone."""
    anchors = app.env.metadata[app.env.docname].setdefault("myst_slugs", {})
    for node in page.findall(Element):
        if isinstance(node, term | desc_signature):
            anchors.update({name: (node.line, name, node.astext()) for name in node["ids"]})
