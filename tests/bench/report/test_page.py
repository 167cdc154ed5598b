"""The page: everything escaped, nothing fetched, the same bytes for the same records, seen by a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest

from filterfold.bench import report
from filterfold.bench.report.curves import cut_epochs
from filterfold.bench.report.figure import COLOURS, CONTROL, COOL, INK, MATPLOTLIB, METHODS, PAPER, WARM, group_styles
from filterfold.bench.report.plots import scatter
from filterfold.bench.report.study import MACS, studies
from filterfold.errors import ConfigError

pytestmark = pytest.mark.slow

VOID = {"meta", "br", "link", "img", "hr", "input"}


class _Reader(HTMLParser):
    """Checks that tags nest, and collects ids, references, and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                self.references.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def read_page(page: Path) -> _Reader:
    reader = _Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def page(records, tmp_path_factory) -> Path:
    return report.build(records, tmp_path_factory.mktemp("report"))


def test_the_page_is_self_contained(page):
    text, reader = page.read_text(encoding="utf-8"), read_page(page)
    assert reader.references
    assert all(reference.startswith("#") for reference in reader.references)
    assert {reference[1:] for reference in reader.references} <= set(reader.ids)
    assert len(reader.ids) == len(set(reader.ids))
    assert not reader.tags & {"script", "link", "img", "iframe", "object", "embed"}
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", text)
    assert not re.search(r"@import|url\((?!#)", text)


def test_all_sections_are_there_verdict_first(page):
    headings = re.findall(r"<h2>(.*?)</h2>", page.read_text(encoding="utf-8"))
    assert headings == [
        "Verdict", "Warnings", "Comparison", "Speed", "Training cost", "Tests", "While training",
        "Widths", "Clusters", "Every trial", "Failed trials", "Provenance",
    ]  # fmt: skip


def test_files_beside_the_page(page):
    plots = {path.name for path in (page.parent / "plots").iterdir()}
    for name in (
        "difference",
        "accuracy_macs",
        "accuracy_time",
        "accuracy_training",
        "curve_macs",
        "widths",
        "accuracy_speedup_1",
        "accuracy_speedup_512",
        "speedups",
        "accuracy_training_macs",
    ):
        assert {f"{name}.svg", f"{name}.png"} <= plots
    for path in (page.parent / "plots").glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    names = {path.stem for path in (page.parent / "tables").glob("*.csv")}
    assert {
        "comparison",
        "latency",
        "training",
        "trials",
        "kruskal_wallis",
        "dunn",
        "equivalence",
        "widths",
        "failed",
        "provenance",
    } <= names
    assert names == {path.stem for path in (page.parent / "tables").glob("*.md")}
    assert not [path for path in page.parent.rglob(".*") if path.is_file()]


def test_plots_follow_the_theme(page, records):
    text = page.read_text(encoding="utf-8")
    svg = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    for style in group_styles(studies(records)[0]).values():
        assert f"var(--{style.colour.name})" in svg
    for colour in COLOURS:
        assert text.count(f"--{colour.name}: ") >= 2
    left = set(re.findall(r"#[0-9a-f]{6}\b", svg))
    assert left <= {"#000000", "#ffffff"}


def _contrast(first: str, second: str) -> float:
    """WCAG 2.2: (L + .05) / (l + .05) of relative luminances."""
    light = []
    for colour in (first, second):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(light) + 0.05) / (min(light) + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_marks_stand_out_from_the_paper(theme):
    for colour in (CONTROL, *METHODS, *COOL, *WARM):
        assert _contrast(getattr(colour, theme), getattr(PAPER, theme)) >= 3, colour.name
    assert _contrast(getattr(INK, theme), getattr(PAPER, theme)) >= 7


def test_groups_never_look_the_same(records):
    many = [r | {"method": f"m{i}", "label": f"m{i}"} for i in range(20) for r in records[:1]]
    series = [
        r | {"method": "other", "label": f"other k={k}", "clusters": k} for k in range(1, 19) for r in records[:1]
    ]
    looks = [(style.colour, style.marker) for style in group_styles(studies(records + many + series)[0]).values()]
    assert len(looks) == len(set(looks)) == 45


def test_legends_of_many_long_names_stay_inside_the_figure(make):
    records = [make("l1", 0) | {"label": f"{i:02} a method with a long name", "method": f"m{i}"} for i in range(19)]
    [study] = studies([make("dense", 0), *records])
    with matplotlib.rc_context(MATPLOTLIB):
        plot = scatter(study, group_styles(study), MACS, "accuracy_macs", "work", "MACs")
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', plot.svg)[1])
    names = re.findall(r'<text style="[^"]*" x="([-\d.]+)"[^>]*>\d\d a method', plot.svg)
    assert len(names) == 19
    # 28 letters of 7.5 points, at most .6 em wide, begin here
    assert all(0 < float(x) < width - 28 * 7.5 * 0.6 for x in names)


def test_everything_from_records_is_escaped(make, tmp_path):
    evil = '<script>alert("1")</script>$x^2$'
    records = [make(m, s) | {"model": evil, "data": evil, "command": evil} for m in ("dense", "l1") for s in (0, 1)]
    for record in records[2:]:
        record["label"] = f"_{evil}"
        record["result"]["widths"] = {evil: [4, 2], "b": [4, 3]}
        record["environment"] = {evil: evil}
    records.append(make("l1", 3, status="failed", reason=evil))
    page = report.build(records, tmp_path, title=None)
    reader = read_page(page)
    assert "script" not in reader.tags
    assert evil in "".join(reader.text)


def test_equal_records_give_equal_bytes(make, tmp_path):
    records = [make(m, s) for m in ("dense", "l1") for s in (0, 1)]
    first, second = report.build(records, tmp_path / "a"), report.build(records[::-1], tmp_path / "b")
    for path in sorted(first.parent.rglob("*.*")):
        other = second.parent / path.relative_to(first.parent)
        if path.suffix in (".svg", ".png", ".html") and path.stem != "provenance":
            assert path.read_bytes() == other.read_bytes(), path.name


def test_several_studies_on_one_page(make, tmp_path):
    records = [make(m, s) | {"data": data} for data in ("cifar10", "digits") for m in ("dense", "l1") for s in (0, 1)]
    page = report.build(records, tmp_path)
    reader = read_page(page)
    assert {"s0-study", "s1-study"} <= set(reader.ids)
    assert len(reader.ids) == len(set(reader.ids))
    assert (tmp_path / "tables" / "2-vgg16-on-digits-comparison.csv").exists()


@pytest.mark.parametrize(
    "case", ["one record", "one group", "all failed", "no control", "accuracy only", "equal values"]
)
def test_thin_material_still_gives_a_page(make, tmp_path, case):
    pairs = [(method, seed) for method in ("dense", "l1") for seed in (0, 1)]
    records = {
        "one record": [make("dense", 0)],
        "one group": [make("dense", 0), make("dense", 1)],
        "all failed": [make("dense", 0, status="failed", reason=None)],
        "no control": [make("l1", 0), make("l1", 1), make("random", 0), make("random", 1)],
        "accuracy only": [make(m, s) | {"result": {"top1": 90.0 + s}, "history": []} for m, s in pairs],
        "equal values": [make(m, s, top1=90.0, top5=99.0, inference_seconds=1.0) for m, s in pairs],
    }[case]  # fmt: skip
    read_page(report.build(records, tmp_path))
    assert report.verdict(records)


def test_a_foreign_table(reference, tmp_path):
    page = report.build(report.read_table(reference / "figures_4_5.csv"), tmp_path)
    text = "".join(read_page(page).text)
    for figure in (".0332", ".1979", ".8722", ".0610", ".3302", ".0384", ".0222", "−0.698 points"):
        assert figure in text
    assert "But the speed-up itself is suspect" in text


def test_margin_must_be_positive(records, tmp_path):
    with pytest.raises(ConfigError, match="margin is 0"):
        report.build(records, tmp_path, margin=0)
    assert not list(tmp_path.iterdir())


def test_moments_of_pruning_are_where_the_network_shrinks():
    steps = [{"macs": macs} for macs in (100, 100, 60, 60, 40)]
    assert cut_epochs({"history": steps}) == [3, 5]
    assert cut_epochs({}) == []


def _chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium to open the page with")


def look(page: Path, folder: Path, width: int, scheme: int) -> None:
    """Open a page in a browser: it is filled, in the theme's colours, and nothing sticks out to the right."""
    from PIL import Image

    picture = folder / "page.png"
    command = [
        _chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}", f"--window-size={width},2400",
        page.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    image = Image.open(picture).convert("RGB")
    counts = {colour: n for n, colour in image.getcolors(1 << 24)}
    paper = max(counts, key=counts.__getitem__)
    assert paper == ((247, 245, 240) if scheme else (19, 21, 24))
    assert 1 - counts[paper] / (image.width * image.height) > 0.05
    assert len(counts) > 200
    # The outermost columns are paper from top to bottom.
    edge = image.crop((image.width - 12, 0, image.width, image.height))
    assert edge.getcolors() == [(12 * image.height, paper)]


@pytest.mark.parametrize(("width", "scheme"), [(1200, 1), (390, 1), (1200, 0)], ids=["desk", "phone", "dark"])
def test_a_browser_shows_it(page, tmp_path, width, scheme):
    look(page, tmp_path, width, scheme)
