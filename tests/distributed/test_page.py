"""The page at /, in a browser, on two ranks of the demo model: what a user does there, by keyboard alone.

NEMO_STAR_SCREENSHOT=docs/serving_page.png writes the picture of the documentation.
"""

import os
import re
import shutil
from urllib.parse import urlsplit

import pytest
from launch import ROOT
from serving import service

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install 'nemo-star[browser]'")
expect = playwright.expect

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="needs a browser: chromium, chromium-browser or google-chrome in PATH"),
]

OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync "
    "--no-first-run"
)
DOCUMENT = ROOT / "assets" / "demo_document.txt"
ANSWERS = {"easy-canyon": "2138216", "stable-shadow": "2051580"}
ENDLESS = "word " * 40
"""What the demo model answers with all tokens it may."""
KEYS = [f"a-key-of-one-test-{number}" for number in range(9)]
NAME = "(e => e === document.body ? '' : (e.labels?.[0] ?? e).innerText.trim() || e.tagName)(document.activeElement)"
OUTLINE = """(e => getComputedStyle(e.type === "file" ? e.labels[0] : e).outlineStyle)(document.activeElement)"""

DROP = """([name, text]) => {
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([text], name));
  for (const kind of ["dragover", "drop"])
    document.body.dispatchEvent(new DragEvent(kind, { dataTransfer, bubbles: true, cancelable: true }));
}"""


def sentence(needle):
    """What the demo model goes on with, short enough for a second one within its 8192 positions."""
    return f"The special magic number for {needle} mentioned in the provided text is"


def long_question(needle):
    return f"What is the special magic number for {needle} mentioned in the provided text? {sentence(needle)}"


@pytest.fixture(scope="module")
def server(demo, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("\n".join(KEYS))
    changes = (f"server.api_keys_file={keys}", "inference.tokens_to_generate=4000", "server.max_context_tokens=null")
    with service(demo, *changes) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    expect.set_options(timeout=60_000)
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=BROWSER, args=OPTIONS.split())
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def keys():
    return iter(KEYS)


@pytest.fixture
def page(server, browser, keys):
    """As a user with a key of his own, and so without contexts, finds it. What it may never do is looked at in the
    end: ask another host, say an error on the console other than that a request was refused."""
    opened = browser.new_page(viewport={"width": 1280, "height": 800}, reduced_motion="reduce")
    hosts, said = set(), []
    opened.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("filechooser", lambda _: None)  # caught from now on: `expect_file_chooser` alone may come too late
    opened.goto(f"{server.address}/")
    give_key(opened, next(keys))
    expect(opened.locator("#key-form")).to_be_hidden()
    yield opened
    opened.close()
    assert hosts == {urlsplit(server.address).netloc}
    assert [line for line in said if not re.search(r"the server responded with a status of 4\d\d", line)] == []


def give_key(page, key):
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type(key)
    page.keyboard.press("Enter")


def tab_to(page, name):
    """Go on by the Tab key to what is called so."""
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate(NAME) == name:
            return
    raise AssertionError(f"no {name!r} within 20 steps")


def tab_order(page):
    """Names of all that is reached from the top of the page; each shows that it has the focus."""
    page.locator(".skip").focus()
    names = [page.evaluate(NAME)]
    while True:
        page.keyboard.press("Tab")
        name = page.evaluate(NAME)
        if name in ("", *names):  # the end of the page, or its top again
            return names
        assert page.evaluate(OUTLINE) != "none", name
        names.append(name)


def choose_file(page, file):
    tab_to(page, "Choose a file")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(file)
    expect(page.get_by_label("Your question")).to_be_focused()


def drop_file(page, name, text):
    page.evaluate(DROP, [name, text])
    expect(page.get_by_label("Your question")).to_be_focused()


def ask(page, question):
    """Typed where the focus is, after an upload and after a question; waits for the answer's end."""
    page.keyboard.type(question)
    page.keyboard.press("Enter")
    expect(page.locator(".turn").last.locator(".question")).to_contain_text(question)
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()


def last_answer(page):
    return page.locator(".turn .answer").last


def cached_and_prompt(page):
    words = last_answer(page).inner_text().replace(",", "")
    return [int(re.search(rf"{name} (\d+) token", words)[1]) for name in ("cached", "prompt")]


def test_a_document_is_asked_about_by_keyboard(page):
    expect(page.locator("#model")).to_have_text("demo")
    new = ["Skip to the main part", "New", "Choose a file", "Or paste text", "Encode this text"]
    assert tab_order(page) == new
    choose_file(page, DOCUMENT)
    for rank in range(2):
        bar = page.get_by_role("progressbar", name=f"rank {rank}")
        expect(bar).to_have_attribute("aria-valuetext", "2 of 2 blocks")
        expect(bar).to_have_attribute("aria-valuenow", "2")
        expect(bar).to_have_attribute("aria-valuemax", "2")
    expect(page.locator("#facts")).to_contain_text("ready")
    expect(page.get_by_role("status")).to_contain_text("demo_document.txt is ready")

    for needle, value in ANSWERS.items():
        ask(page, sentence(needle))
        expect(last_answer(page).locator(".text")).to_have_text(value)
        expect(page.get_by_role("status")).to_have_text(f"Answer: {value}")
        expect(last_answer(page)).to_contain_text(re.compile(r"first token [\d.]+ m?s.*in all .*answer 9 tokens"))
        cached, prompt = cached_and_prompt(page)
        assert 8000 < cached < prompt
    if path := os.environ.get("NEMO_STAR_SCREENSHOT"):
        page.screenshot(path=path)
    context = page.locator("#contexts button").inner_text()
    assert tab_order(page) == [*new[:2], context, "New conversation", "Delete", "Your question", "Ask"]

    page.reload()
    tab_to(page, context)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="demo_document.txt")).to_be_visible()
    for button, remaining in (("Keep", 1), ("Delete", 0)):
        page.locator("#start-over, #new").first.focus()
        tab_to(page, "Delete")
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="Keep")).to_be_focused()
        if button == "Delete":
            tab_to(page, button)
        page.keyboard.press("Enter")
        expect(page.get_by_role("dialog")).to_be_hidden()
        expect(page.locator("#contexts li")).to_have_count(remaining)
    expect(page.get_by_role("button", name="New", exact=True)).to_be_focused()
    page.reload()
    expect(page.locator("#model")).to_be_visible()
    expect(page.get_by_text("None yet.")).to_be_visible()


def test_a_conversation_that_is_too_long_goes_on_without_its_beginning(page):
    choose_file(page, DOCUMENT)
    first, second = ANSWERS
    ask(page, long_question(first))
    ask(page, long_question(second))
    expect(last_answer(page).get_by_role("alert")).to_contain_text("maximum context length is 8192 tokens")
    page.get_by_role("button", name="Ask without the earlier turns").press("Enter")
    expect(last_answer(page).locator(".text")).to_have_text(ANSWERS[second])
    expect(page.get_by_text("New conversation: the turns above are not sent along")).to_be_visible()
    expect(page.locator(".turn")).to_have_count(2)


def test_an_answer_is_stopped_and_what_came_of_it_stays(page):
    tab_to(page, "Or paste text")
    page.keyboard.type("A text that is short.")
    tab_to(page, "Encode this text")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Your question")).to_be_focused()
    page.keyboard.type(ENDLESS)
    page.keyboard.press("Enter")
    expect(last_answer(page).locator(".text")).not_to_be_empty()
    tab_to(page, "Stop")
    page.keyboard.press("Enter")
    expect(last_answer(page)).to_contain_text("stopped")
    expect(page.get_by_role("status")).to_contain_text("Stopped: ")
    expect(page.get_by_label("Your question")).to_be_focused()
    ask(page, "And then?")
    expect(last_answer(page)).to_contain_text("first token")


def test_a_file_is_dropped_and_no_text_is_taken_for_html(page):
    name = "<b>bold</b>.txt"
    drop_file(page, name, "<i>A text</i> that is short.")
    ask(page, "<img src=nowhere>")
    expect(page.get_by_role("heading", name=name)).to_be_visible()
    expect(page.locator("main b, nav b, main i, main img")).to_have_count(0)


def test_refusals_are_said_in_words(page, server, keys):
    tab_to(page, "Choose a file")
    page.locator("#file").set_input_files({"name": "x.bin", "mimeType": "x/y", "buffer": b"\xff\xfe\x00"})
    expect(page.get_by_role("alert")).to_contain_text("x.bin: The file is no UTF-8 text")
    page.get_by_role("button", name="Close").press("Enter")
    expect(page.locator("#notice")).to_be_hidden()
    page.locator("#file").set_input_files({"name": "empty.txt", "mimeType": "text/plain", "buffer": b""})
    expect(page.get_by_role("alert")).to_have_text("empty.txt is empty.")

    page.evaluate("sessionStorage.clear()")
    page.reload()
    expect(page.get_by_text("This service asks for a key.")).to_be_visible()
    give_key(page, "not-one-of-the-keys")
    expect(page.get_by_text("This key is not valid here.")).to_be_visible()
    give_key(page, next(keys))
    expect(page.locator("#key-form")).to_be_hidden()
    expect(page.locator("#model")).to_have_text("demo")


def test_a_narrow_screen_needs_no_scrolling_sideways(page):
    page.set_viewport_size({"width": 320, "height": 640})
    choose_file(page, {"name": "x" * 150 + ".txt", "mimeType": "text/plain", "buffer": b"A text that is short."})
    ask(page, "x" * 100)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(page, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe()

    def check():
        violations = axe.run(page).response["violations"]
        assert [(found["id"], [node["html"] for node in found["nodes"]]) for found in violations] == []

    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    check()
    choose_file(page, DOCUMENT)
    for needle in ANSWERS:
        ask(page, long_question(needle))
    expect(last_answer(page).get_by_role("alert")).to_be_visible()
    check()
    page.get_by_role("button", name="Delete").press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    check()
    page.evaluate("sessionStorage.clear()")
    page.reload()
    expect(page.get_by_text("This service asks for a key.")).to_be_visible()
    check()
