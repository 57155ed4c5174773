import base64
from html.parser import HTMLParser

import matplotlib.pyplot as plt

from samelib.plots import Slider


class Reader(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def of(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]


def test_a_slider_shows_one_drawn_figure_at_a_time():
    before = plt.get_fignums()
    captions = ["left", 'a "quoted" <middle>', "right"]
    made = Slider("where & how", ((plt.figure(), caption) for caption in captions), start=1)
    assert plt.get_fignums() == before
    page = Reader(made._repr_html_())
    (control,) = page.of("input")
    assert (control["min"], control["max"], control["value"]) == ("0", "2", "1")
    assert [figure.get("style") for figure in page.of("figure")] == ["display: none", None, "display: none"]
    assert [image["alt"] for image in page.of("img")] == captions
    for image in page.of("img"):
        head, data = image["src"].split(",")
        assert head == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")
