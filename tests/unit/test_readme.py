"""The README tells the truth about settings and targets."""

import re

from controlplane.config import ROOT
from controlplane.settings_table import settings_table

README = (ROOT / "README.md").read_text()


def test_the_table_of_settings_is_the_one_of_the_code() -> None:
    assert settings_table() in README, "run `python -m controlplane.settings_table` and put its output into README.md"


def test_every_make_target_that_the_readme_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", README)) <= targets


def test_every_file_that_the_readme_links_to_exists() -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]
