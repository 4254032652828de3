"""How Sphinx builds the documentation: `make docs`."""

from __future__ import annotations

import skyward_lite

# Its entry in the API has the name that users write; otherwise Sphinx would only call it another name of the class.
skyward_lite.progress.__name__ = "progress"

project = "skyward_lite"
author = "The skyward_lite maintainers"
project_copyright = author
release = version = skyward_lite.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]

# Pages are Markdown that also reads well where only Markdown is shown. A link may name a heading of a page.
myst_enable_extensions = ["colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

# Docstrings are in numpydoc's format, and name code in single backticks.
default_role = "literal"
napoleon_google_docstring = False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True

html_theme = "furo"
pygments_dark_style = "monokai"
html_title = "skyward_lite"
html_static_path = ["_static"]
html_css_files = ["docs.css"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
