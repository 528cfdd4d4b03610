"""The site: every page of this repository, and the API reference made from the docstrings.

sphinx-build -nWq -c docs . site

The source folder is the repository's root, so that links between pages, to plugins and to source
files are the same on the site as in the repository.
"""

from __future__ import annotations

import mhc_core

project = "mhc-core"
author = "The mhc-core authors"
project_copyright = author
version = release = mhc_core.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md", "plugins/*/README.md"]

myst_heading_anchors = 3

napoleon_google_docstring = False
napoleon_use_rtype = False  # "Returns" sections name the results
napoleon_use_ivar = True  # attributes of a class are listed in its docstring
autodoc_class_signature = "separated"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the types are in the docstrings; the signatures name the arguments

nitpick_ignore_regex = [("py:class", r"(?!mhc_).*")]  # other libraries' classes have no page here

html_theme = "furo"
html_title = f"mhc-core {release}"
html_copy_source = False
templates_path = ["templates"]
html_additional_pages = {"index": "redirect.html"}
