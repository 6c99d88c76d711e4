"""The page of --preview in a real browser: rows, filters, sorting, sliders, and nothing on the console."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image

from library.caching.preview.cards import Card, shown_first
from library.caching.preview.decoded import Shown, View
from library.caching.preview.page import CHUNK, Heading, write_page
from library.data.lint import KINDS, Finding
from library.data.manifest import Text

INJECTION = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
NUM_ITEMS = 60


def uri(colour: str, size: tuple[int, int] = (64, 48)) -> str:
    """A plain picture as a data URI."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def card(number: int, kinds: tuple[str, ...] = (), caption: str = "red circle", lost: str = "") -> Card:
    """An item; its numbers follow from its place, so that an order by each of them is known."""
    name = f"set/{number}"
    return Card(
        name=name,
        entry=f"{number:032x}",
        subset="a" if number % 2 else "b",
        mode="edit",
        captions=(Text("", caption, lost),),
        sizes=((64, 48) if number % 3 else (48, 64),),
        variants=1,
        masks=2 if number == 0 else 1,
        cropped=number / 1000,
        enlarged=1.0,
        changed=None if number == 5 else (number * 7 % NUM_ITEMS) / 100,
        held_out=number == 1,
        findings=tuple(Finding(name, kind, f"{kind} of {number}") for kind in kinds),
    )


CARDS = [
    card(number, {3: ("identical",), 4: ("identical", "duplicate"), 50: ("shifted",)}.get(number, ()))
    for number in range(NUM_ITEMS - 2)
] + [card(58, caption=INJECTION), card(59, ("long_caption",), "red circle with a teal square", "teal square")]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty items; all but the last have pictures, the first has two conditions."""
    path = tmp_path_factory.mktemp("page") / "out.html"
    views = (View(uri("blue"), uri("white")), View(uri("green"), uri("black")))
    pictures = [(number, Shown(uri("red"), views[: 2 if number == 0 else 1], uri("gray"))) for number in range(59)]
    write_page(path, Heading("/some/where/run.toml", "cache", "nano"), CARDS, pictures[::-1])
    return path


@pytest.fixture
def tab(browser, page):
    """The page in a tab of its own, without errors at the beginning and at the end."""
    opened = browser.open(page)
    opened.wait_for("document.documentElement.dataset.ready")
    yield opened
    assert opened.errors == []
    opened.close()


def names(tab) -> list[int]:
    """Numbers of the items in the page, in its order."""
    found = tab.evaluate("[...document.querySelectorAll('.card')].map(card => card.dataset.name)")
    return [int(name.split("/")[1]) for name in found]


def press(tab, kind: str) -> None:
    tab.click(f'#kinds button[data-kind="{kind}"]')


def put(tab, control: str, value: str) -> None:
    """Set a control as a person does: its value, then its event."""
    tab.evaluate(
        f"(e => {{ e.value = {value!r}; e.dispatchEvent(new Event('input')); }})(document.querySelector({control!r}))"
    )


def test_all_items_are_listed_and_more_come_when_scrolled_to(tab) -> None:
    assert tab.evaluate("document.title") == "What the model sees"
    assert tab.evaluate("count.textContent") == "60 of 60 items"
    assert names(tab) == list(range(48))
    tab.evaluate("scrollTo(0, document.body.scrollHeight)")
    tab.wait_for("document.querySelectorAll('.card').length === 60")
    assert names(tab) == list(range(60))


def test_pictures_are_filled_in_when_seen(tab) -> None:
    tab.wait_for("document.querySelector('.card').dataset.filled")
    seen = tab.evaluate("document.querySelectorAll('.card[data-filled]').length")
    assert 0 < seen < 48
    for name in ("target", "condition", "mask", "changed"):
        tab.wait_for(f"document.querySelector('.card .{name}').naturalWidth === 64")
    last = "document.querySelector('.card[data-name=\"set/47\"]')"
    assert not tab.evaluate(f"{last}.dataset.filled")
    tab.evaluate(f"{last}.scrollIntoView()")
    tab.wait_for(f"{last}.dataset.filled")


def test_chips_filter_by_warning(tab) -> None:
    counts = tab.evaluate("[...kinds.children].map(b => [b.dataset.kind, b.querySelector('b').textContent])")
    expected = {"": 60, "any": 4, "clean": 56, "identical": 2, "duplicate": 1, "shifted": 1, "long_caption": 1}
    assert {kind: int(count) for kind, count in counts} == {**dict.fromkeys(KINDS, 0), **expected}
    press(tab, "identical")
    assert names(tab) == [3, 4] and tab.evaluate("count.textContent") == "2 of 60 items"
    assert tab.evaluate("[...document.querySelectorAll('.card[data-name=\"set/4\"] li')].map(e => e.textContent)") == [
        "identical of 4",
        "duplicate of 4",
    ]
    press(tab, "identical")
    press(tab, "any")
    assert names(tab) == [3, 4, 50, 59]
    assert tab.evaluate("document.querySelector('[data-kind=cropped]').disabled")


def test_search_bucket_and_subset_narrow_the_rows(tab) -> None:
    put(tab, "#search", "TEAL red")
    assert names(tab) == [59]
    put(tab, "#search", "nothing like it")
    assert names(tab) == [] and tab.evaluate("!none.hidden")
    put(tab, "#search", "")
    put(tab, "#bucket", "48x64")
    put(tab, "#subset", "b")
    assert names(tab) == [number for number in range(60) if number % 6 == 0]


@pytest.mark.parametrize(
    "by, first",
    [("warnings", [4, 3, 50]), ("changed", [17, 34, 51]), ("cropped", [59, 58, 57]), ("name", [0, 1, 2]),
     ("unchanged", [0, 43, 26]), ("bucket", [0, 3, 6]), ("order", [0, 1, 2])],
)  # fmt: skip
def test_sorting(tab, by: str, first: list[int]) -> None:
    put(tab, "#sort", by)
    assert names(tab)[:3] == first


def test_the_slider_uncovers_the_target(tab) -> None:
    clip = "getComputedStyle(document.querySelector('.card .target')).clipPath"
    edge = "parseFloat(getComputedStyle(document.querySelector('.card .edge')).left)"
    assert tab.evaluate(clip) == "inset(0px 0px 0px 50%)"
    tab.centre(".card .compare")
    box = tab.box(".card .compare")
    middle = box["y"] + box["height"] / 2
    tab.drag((box["x"] + box["width"] / 2, middle), (box["x"] + box["width"] * 0.25, middle))
    value = float(tab.evaluate("document.querySelector('.card .slider').value"))
    assert 20 < value < 30
    covered = float(re.fullmatch(r"inset\(0px 0px 0px ([\d.]+)%\)", tab.evaluate(clip))[1])
    assert covered == pytest.approx(value, abs=0.01)
    assert tab.evaluate(edge) == pytest.approx(box["width"] * value / 100, abs=1)
    other = "getComputedStyle(document.querySelectorAll('.card .target')[1]).clipPath"
    assert tab.evaluate(other) == "inset(0px 0px 0px 50%)"  # only that item's
    put(tab, "#cut", "80")
    assert tab.evaluate(clip) == tab.evaluate(other) == "inset(0px 0px 0px 80%)"


def test_condition_variants_are_stepped_through(tab) -> None:
    tab.wait_for("document.querySelector('.card').dataset.filled")
    shown = "[...document.querySelector('.card').querySelectorAll('.condition, .mask')].map(e => e.src)"
    assert tab.evaluate(shown) == [uri("blue"), uri("white")]
    tab.click(".card .views button:nth-child(2)")
    assert tab.evaluate(shown) == [uri("green"), uri("black")]
    assert tab.evaluate("document.querySelectorAll('.card')[1].querySelectorAll('.views button').length") == 0


def test_a_view_can_be_linked_to(browser, page) -> None:
    tab = browser.open(f"{page.as_uri()}#warning=any&sort=warnings&cut=30&apart=1&overlay=1&width=400")
    tab.wait_for("document.documentElement.dataset.ready")
    assert names(tab) == [4, 3, 50, 59]
    assert tab.evaluate("[apart.checked, overlay.checked, cut.value, width.value, sort.value]") == [
        True, True, "30", "400", "warnings",
    ]  # fmt: skip
    assert tab.evaluate("getComputedStyle(document.querySelector('.tint')).visibility") == "visible"
    put(tab, "#sort", "name")
    assert "sort=name" in tab.evaluate("location.hash") and "cut=30" in tab.evaluate("location.hash")
    assert tab.errors == []
    tab.close()


def test_captions_are_text_and_lost_words_are_struck_out(tab) -> None:
    put(tab, "#search", "onerror")
    assert names(tab) == [58]
    assert tab.evaluate("document.querySelector('.captions').textContent") == INJECTION
    assert tab.evaluate("document.title") == "What the model sees"
    put(tab, "#search", "teal")
    assert tab.evaluate("document.querySelector('.captions s').textContent") == "teal square"
    assert tab.evaluate("document.querySelector('.captions').textContent") == "red circle with a teal square"
    assert tab.evaluate("!document.querySelector('.unseen').hidden && document.querySelector('.compare').hidden")


def test_side_by_side_shows_both_whole(tab) -> None:
    tab.click("#apart")
    target, condition = tab.box(".card .target"), tab.box(".card .condition")
    assert tab.evaluate("getComputedStyle(document.querySelector('.card .target')).clipPath") == "none"
    assert target["x"] >= condition["x"] + condition["width"] - 1
    assert target["width"] == pytest.approx(condition["width"], abs=1)


def test_the_page_needs_nothing_from_outside(page) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"https?://[^\s\"']+", text) == []
    assert not re.search(r'(?:src|href)="(?!data:)', text.replace("\\u003c", "<").split("<script type")[0])
    chunks = re.findall(r'id="pictures-(\d+)"', text)
    assert [int(number) for number in chunks] == list(range(-(-59 // CHUNK)))


def test_items_with_warnings_get_their_pictures_first() -> None:
    assert shown_first(CARDS, 100) == list(range(60))
    assert shown_first(CARDS, 3) == [3, 4, 50]
    few = shown_first(CARDS, 8)
    assert len(few) == 8 and {3, 4, 50, 59} < set(few)
    assert min(few) < 10 and max(few) == 59
