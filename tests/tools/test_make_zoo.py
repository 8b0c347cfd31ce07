"""tools/make_zoo.py: the page has what the cards have, and in a browser it sorts, filters, plots and opens cards."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

pytest.importorskip("mmengine")

from tiny import tool

make_zoo = tool("make_zoo")
ROOT = Path(__file__).parents[2]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")


class Page(HTMLParser):
    """Rows of the table, circles of the plot, links, and which tags are open at the end."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.links, self.circles, self.ids, self.open, self.outside = [], [], 0, [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "input"):
            self.open.append(tag)
        self.rows += [attributes] * ("data-name" in attributes)
        self.circles += tag == "circle"
        self.links += [attributes[key] for key in ("href",) if key in attributes]
        self.outside += [(tag, attributes[key]) for key in ("src", "srcset") if key in attributes]
        self.outside += [(tag, attributes.get("href"))] * (tag == "link")
        self.ids += [attributes[key] for key in ("id",) if key in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def shown(self):
        return [row["data-name"] for row in self.rows if "hidden" not in row]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """Return a page of two families, with made-up throughputs."""
    folder = tmp_path_factory.mktemp("zoo")
    cards = folder / "model_cards"
    (cards / "facts").mkdir(parents=True)
    for family in ("nat", "quadtree"):
        facts = yaml.safe_load((ROOT / f"model_cards/facts/{family}.yaml").read_text())
        facts["models"] = {name: model for name, model in facts["models"].items() if "21k" not in name}
        (cards / "facts" / f"{family}.yaml").write_text(yaml.safe_dump(facts))
    for file in ("flops.json", "parity.json"):
        shutil.copy(ROOT / "model_cards" / file, cards)
    how = dict(training=700, way="compiled", machine="a GPU", date="2026-01-01")
    throughput = {"nat_mini": dict(how, inference=2000), "nat_tiny": dict(how, inference=1500)}
    (cards / "throughput.json").write_text(json.dumps(throughput))
    cards_module = __import__("make_cards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cards_module, "CARDS", cards)
        assert make_zoo.main(["--out-dir", str(folder / "zoo")]) == 0
    return folder / "zoo" / "index.html"


def test_page_has_what_the_cards_have(path):
    text = path.read_text()
    page = Page(text)
    assert page.open == [] and page.outside == [], "it works from the file system alone"
    assert len(page.ids) == len(set(page.ids))
    rows = {row["data-name"]: row for row in page.rows}
    models = {}
    for file in ("nat", "quadtree"):
        models |= yaml.safe_load((ROOT / f"model_cards/facts/{file}.yaml").read_text())["models"]
    assert rows.keys() == {name for name in models if "21k" not in name} and len(rows) >= 14
    for name, row in rows.items():
        assert f"#{name}" in page.links and name in page.ids
        for key, dataset in (("top1", "ImageNet-1k"), ("box_ap", "COCO"), ("pq", "COCO"), ("miou", "ADE20K")):
            results = [result for result in models[name]["results"] if key in result and result["dataset"] == dataset]
            best = max((result[key] for result in results), default=None)
            assert row.get(f"data-{key.replace('_', '-')}") == (None if best is None else str(best))
    mini = rows["nat_mini"]
    assert (mini["data-params"], mini["data-flops"], mini["data-throughput"]) == ("19.98", "2.69", "2000")
    assert "data-throughput" not in rows["nat_base"]
    assert "Throughput was measured in inference: a GPU, 2026-01-01</p>" in text
    articles = dict(re.findall(r'<article id="(\w+)">.*?<p>Throughput: (.*?)</p>', text, re.DOTALL))
    measured = "2000 images per second in inference, 700 in training, compiled (a GPU, 2026-01-01)"
    assert articles["nat_mini"] == measured and articles["nat_base"] == "not measured"
    assert mini["data-family"] == "NAT" and rows["quadtree_b0"]["data-family"] == "QuadTree"
    for link in page.links:
        if link.startswith("../"):
            assert (ROOT / link.removeprefix("../")).is_file(), link
        else:
            assert link == "#" or link.startswith(("https://", "#"))


def test_snippets_are_those_of_the_card(path):
    pattern = r'<article id="nat_mini">.*?<pre class="timm">(.*?)</pre>.*?config">(.*?)</pre>'
    snippets = re.search(pattern, path.read_text(), re.DOTALL)
    card = (ROOT / "model_cards/nat_mini.md").read_text()
    for snippet in snippets.groups():
        assert snippet.strip() and snippet.strip() in card


def browse(path, query="", script=""):
    """Return the page after its scripts, and then `script`, have run."""
    page = path
    if script:
        page = path.with_name("scripted.html")
        page.write_text(path.read_text().replace("</body>", f"<script>{script}</script></body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=2000"]
    profile = f"--user-data-dir={path.parent / 'profile'}"
    command = [BROWSER, *options, profile, "--dump-dom", page.as_uri() + query]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def numbers(page, key):
    return [float(row[key]) for row in page.rows if key in row and "hidden" not in row]


@in_a_browser
def test_view_of_the_address(path):
    page = Page(browse(path))
    assert page.circles == len([row for row in page.rows if "data-top1" in row]) and page.shown() == [
        row["data-name"] for row in page.rows
    ]
    text = browse(path, "?filter=dinat+mi&y=box_ap&x=flops&sort=-params")
    page = Page(text)
    assert page.shown() == ["dinat_mini"] and page.circles == 1 and "1 of " in text
    page = Page(browse(path, "?filter=nat&x=throughput&sort=-top1"))
    assert page.circles == 2
    assert (top1 := numbers(page, "data-top1")) == sorted(top1, reverse=True) and len(top1) > 5
    # Nonsense changes nothing.
    page = Page(browse(path, "?sort=x&family=x&y=%22%3E&filter="))
    assert len(page.shown()) == len(page.rows) and page.circles


@in_a_browser
def test_clicks(path):
    page = Page(browse(path, script="document.querySelector('th[data-key=flops] button').click()"))
    assert (flops := numbers(page, "data-flops")) == sorted(flops) and len(flops) == len(page.rows)
    click = "document.querySelector('th[data-key=box_ap] button').click();"
    page = Page(browse(path, script=click))
    assert (best := numbers(page, "data-box-ap")) == sorted(best, reverse=True)
    # Those without a number are last, either way.
    assert ["data-box-ap" in row for row in page.rows] == [True] * len(best) + [False] * (len(page.rows) - len(best))
    page = Page(browse(path, script=click + click))
    assert numbers(page, "data-box-ap") == sorted(best) and "data-box-ap" in page.rows[0]
    choose = "$('family').value = 'QuadTree'; $('family').dispatchEvent(new Event('input'));"
    page = Page(browse(path, script=choose))
    assert page.shown() and all(name.startswith("quadtree") for name in page.shown())


@in_a_browser
def test_a_name_opens_its_card(path):
    visible = "[...document.querySelectorAll('article')].filter(a => getComputedStyle(a).display !== 'none')"
    script = f"""
        addEventListener('hashchange', () => document.title = {visible}.map(a => a.id).join());
        document.title = {visible}.length;
        document.querySelector('td a[href="#quadtree_b1"]').click();
    """
    assert "<title>quadtree_b1</title>" in browse(path, script=script)


def test_broken_facts(tmp_path, monkeypatch, capsys):
    (tmp_path / "facts").mkdir()
    monkeypatch.setattr(__import__("make_cards"), "CARDS", tmp_path)
    assert make_zoo.main(["--out-dir", str(tmp_path / "zoo")]) == 2
    assert "make_zoo: " in capsys.readouterr().err and not (tmp_path / "zoo").exists()
