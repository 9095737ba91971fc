"""Sphinx: the notebooks as they are committed, and the API reference from the docstrings."""

project = "Which reviews made the model say that?"
author = "the founders"
copyright = "the founders, Apache-2.0"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = project

# Pages come from stored outputs: no model, no network, no kernel.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
default_role = "code"
