"""Settings of the documentation site: ``sphinx-build -W --keep-going docs build/site``.

Why Sphinx: it imports the packages and reads the docstrings as they are, so the API pages can't get
out of date and a docstring that is no valid text fails the build, as does every link that leads
nowhere (warnings are errors). MyST reads the Markdown pages that are here for GitHub as well.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import tokenenv

project = "tokenenv"
copyright = "the tokenenv maintainers"
version = release = tokenenv.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "generated",  # docs/generated.py: pages from the registries and docstrings; formulas as MathML
]
exclude_patterns = ["listing.md"]  # texts for the lists of other projects

html_theme = "furo"  # reads well on a phone, in the light and in the dark
html_title = f"tokenenv {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_math_renderer = "mathml"
pygments_style = "friendly"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

napoleon_numpy_docstring = False
# A plain list: as entries they would be mixed up with those of the same name of other classes.
napoleon_custom_sections = [("Attributes", "params_style")]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
# Optional libraries, which the site is built without.
autodoc_mock_imports = ["benchmarl", "sb3_contrib", "stable_baselines3", "tensordict", "torchrl"]
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
