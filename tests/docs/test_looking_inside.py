"""docs/looking-inside.md explains every field, and its pictures are there and small."""

from __future__ import annotations

import re
from pathlib import Path

import skyward_lite as sky

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE = (DOCS / "looking-inside.md").read_text("utf-8")
MAX_PICTURE_BYTES = 200_000


def test_every_field_is_explained():
    """The table of fields names those of `Node` and `Status`, but for names, process numbers and the nodes."""
    explained = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| `.*?\|", PAGE, re.MULTILINE))))
    fields = {*sky.Node.__dataclass_fields__, *sky.Status.__dataclass_fields__}
    assert explained - {"Status", "Node"} == fields - {"name", "pid", "nodes"}


def test_pictures_are_there_and_small():
    """Each has less than 200 kB."""
    pictures = re.findall(r"_static/[\w-]+\.png", PAGE)
    assert len(pictures) == 3
    assert all((DOCS / picture).stat().st_size < MAX_PICTURE_BYTES for picture in pictures)
