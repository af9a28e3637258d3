"""How the manual is built; see `make docs`."""

import sys
from pathlib import Path

from vraxion_ckpt import __version__

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "vraxion-ckpt"
author = "the vraxion-ckpt authors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click", "reference"]

default_role = "py:obj"  # single backticks in docstrings: a link where there is such a name, else code
myst_heading_anchors = 3  # as GitHub makes them
autodoc_default_options = {"exclude-members": "model_config, kind_of_facts"}
autodoc_member_order = "bysource"
maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes as a list, below a signature that has their types

smartquotes_action = "D"  # dashes, but no curly quotes: much of this is to be copied

html_theme = "furo"
html_title = f"vraxion-ckpt {version}"
html_static_path = ["_static"]
html_css_files = ["manual.css"]
html_show_sourcelink = False
html_show_copyright = False
pygments_style = "friendly"
