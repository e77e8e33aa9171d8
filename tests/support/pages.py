"""Reading report pages: their content, and what every page must satisfy."""

import base64
import io
import re
from html.parser import HTMLParser

from PIL import Image

VOID = {"meta", "img", "input", "br", "hr", "link"}


class Page(HTMLParser):
    """The content of a page; its elements must close in order."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts, self.values = [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.texts.append(" ".join(data.split()))
        if self.open and self.open[-1] == "data":
            self.values.append(data)

    @property
    def text(self):
        return " ".join(filter(None, self.texts))

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def check_page(html):
    """The parsed page, after checks that every page must pass: it refers to nothing outside itself, say."""
    page = Page(html)
    for tag, attrs in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            value = attrs.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        assert not any(name.startswith("on") for name in attrs), attrs
    assert not re.search(r"url\((?!#)|@import", html)
    assert len(page.all("script")) == 1
    for link in page.all("a"):
        assert link["href"][1:] in [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for attrs in page.all("use"):
        assert attrs["href"][1:] in ids
    for image in page.all("img"):
        kind, _, data = image["src"].partition(",")
        assert kind in ("data:image/png;base64", "data:image/gif;base64")
        decoded = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        decoded.load()
        assert (str(decoded.width), str(decoded.height)) == (image["width"], image["height"])
        assert image["alt"]
    for svg in page.all("svg"):
        assert svg["role"] == "img"
        assert svg["aria-label"]
    return page
