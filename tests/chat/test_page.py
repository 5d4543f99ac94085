"""The chat page in Chromium, before a server that answers as told: what a user does, and what they then see."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")
PAGE = Path(__file__).parents[2] / "src" / "tenfold" / "server" / "page"
SHIFT, ENTER, ESCAPE, UP, RELEASE = "\ue008", "\ue007", "\ue00c", "\ue013", "\ue000"  # as WebDriver has keys
PATIENCE = 10  # seconds, on a busy machine
XSS = """<img src=x onerror="window.hit=1"><script>window.hit=1</script> [x](javascript:window.hit=1)

```"><script>
</pre><script>window.hit=1</script>
```

| <svg onload=window.hit=1> | $\\text{<img src=x onerror=window.hit=1>}$ |
|-|-|
"""
EMPTY = """const done = arguments[0];
localStorage.clear();
const request = indexedDB.deleteDatabase('tenfold-chat');
request.onsuccess = request.onblocked = () => done();"""
COUNT = """const done = arguments[0], request = indexedDB.open('tenfold-chat');
request.onsuccess = () => {
  const count = request.result.transaction('messages').objectStore('messages').count();
  count.onsuccess = () => { request.result.close(); done(count.result); };
};"""
FILL = """const [conversations, messages, done] = arguments;
const request = indexedDB.open('tenfold-chat');
request.onsuccess = () => {
  const transaction = request.result.transaction(['entries', 'messages'], 'readwrite');
  conversations.forEach((entry) => transaction.objectStore('entries').put(entry));
  messages.forEach((message) => transaction.objectStore('messages').put(message));
  transaction.oncomplete = () => { request.result.close(); done(); };
};"""


SOURCES = sorted(path for path in PAGE.rglob("*") if path.suffix in {".js", ".css", ".html"})
FORBIDDEN = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|style=|@import|url\("
)
ELSEWHERE = re.compile(r"""(src|href|from|import|fetch)\W{1,3}(https?:)?//""")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_the_page_makes_no_markup_of_text_and_loads_nothing_from_elsewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not FORBIDDEN.search(text) and not ELSEWHERE.search(text)
    assert text.count("\n") <= 400, "too long to be read"
    assert path.suffix != ".html" or not re.search(r"<script(?![^>]*\bsrc=)|\bon\w+=", text), "a script in the page"


@dataclass(frozen=True)
class Page:
    """What a user can do with it."""

    driver: Any
    server: Any

    def open(self, path: str = "/") -> None:
        self.driver.get(self.server.url + path)
        self.until(lambda: self.find("#model").text)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector
        )

    def until(self, condition: Callable[[], T]) -> T:
        """Waits until something is there."""
        from selenium.common.exceptions import WebDriverException  # which may not be installed

        end = time.monotonic() + PATIENCE
        while True:
            try:
                if found := condition():
                    return found
            except WebDriverException:  # not there yet, or being replaced
                pass
            assert time.monotonic() < end, f"waited in vain; the page shows: {self.find('body').text}"
            time.sleep(0.02)

    def keys(self, *keys: str) -> None:
        """Presses keys, wherever the focus is."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def say(self, text: str) -> None:
        self.find("#prompt").send_keys(text, "\n")

    def answered(self, *answers: str) -> None:
        """Waits until these are the answers, and no more is being written."""
        self.until(lambda: self.texts(".answer > .prose") == list(answers) and not self.all("[aria-busy=true]"))

    def click(self, selector: str) -> None:
        """Presses a button, also one that shows only under the mouse."""
        self.driver.execute_script("document.querySelector(arguments[0]).click()", selector)

    def complaints(self) -> list[str]:
        """What the browser found wrong: errors of scripts, breaches of the content policy."""
        messages = [entry["message"] for entry in self.driver.get_log("browser")]
        return [message for message in messages if "Failed to load resource" not in message]


@pytest.fixture
def page(browser: Any, server: Any) -> Iterator[Page]:
    browser.get(f"{server.url}/icon.svg")
    browser.execute_async_script(EMPTY)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page = Page(browser, server)
    page.open()
    yield page
    assert page.complaints() == []


def test_a_chat(page: Page) -> None:
    page.server.answers["hello"] = [["**Hi**", " there"]]
    page.say("hello")
    page.answered("Hi there")
    page.say("and more")
    page.answered("Hi there", "You said: and more")
    first, second = page.server.requests
    assert first["stream"] is True and first["stream_options"] == {"include_usage": True}
    assert first["model"] == "models/qwen3-next-mid" and "temperature" not in first
    assert [(m["role"], m["content"]) for m in second["messages"]] == [
        ("user", "hello"),
        ("assistant", "**Hi** there"),
        ("user", "and more"),
    ]
    assert page.driver.title == "hello · Tenfold"
    assert page.find("#status").get_attribute("textContent") == "The answer is complete"


def test_shift_enter_breaks_the_line(page: Page) -> None:
    page.find("#prompt").send_keys("a", SHIFT, ENTER, RELEASE, "b", ENTER)
    page.until(lambda: page.server.requests)
    assert page.server.requests[0]["messages"] == [{"role": "user", "content": "a\nb"}]


def test_the_answer_shows_while_it_is_written_and_stops(page: Page) -> None:
    page.server.answers["count"] = [["one two", page.server.Wait(), "three"]]
    page.say("count")
    page.until(lambda: page.texts(".answer > .prose") == ["one two"])
    assert page.find("#send").get_attribute("aria-label") == "Stop"
    page.click("#send")
    page.until(lambda: page.texts(".stats .note") == ["stopped"])
    assert page.server.gone.wait(PATIENCE)  # the server need not write what nobody reads
    page.say("go on")
    page.answered("one two", "You said: go on")
    assert page.server.requests[1]["messages"][1] == {"role": "assistant", "content": "one two"}


def test_escape_stops_before_the_first_word(page: Page) -> None:
    page.server.answers["count"] = [[page.server.Wait(), "one"]]
    page.say("count")
    page.until(lambda: page.texts(".waiting") != [])
    page.keys(ESCAPE)
    page.until(lambda: page.texts(".stats .note") == ["stopped"])
    assert page.texts(".answer > .prose") == [""]
    page.say("hello")
    page.answered("", "You said: hello")
    assert [m["content"] for m in page.server.requests[1]["messages"]] == ["count", "hello"]  # nothing was answered


def test_editing_makes_a_branch_and_both_remain(page: Page) -> None:
    for text in ("one", "two"):
        page.say(text)
        page.until(lambda: not page.all("[aria-busy=true]"))
    page.click('.question [aria-label="Edit message"]')
    page.keys(" and a half", ENTER)
    page.answered("You said: one and a half")
    assert [m["content"] for m in page.server.requests[-1]["messages"]] == ["one and a half"]
    assert page.texts(".versions span") == ["2/2"]
    page.click('[aria-label="Earlier version"]')
    page.answered("You said: one", "You said: two")
    page.open(page.driver.current_url.removeprefix(page.server.url))
    page.answered("You said: one", "You said: two")  # which version is shown is kept as well
    page.find('[aria-label="Later version"]').send_keys(ENTER)
    page.answered("You said: one and a half")
    page.keys(ENTER)  # the focus is on the button that leads back
    page.answered("You said: one", "You said: two")


def test_up_edits_the_last_message_and_escape_leaves_it(page: Page) -> None:
    page.say("hello")
    page.answered("You said: hello")
    page.keys(UP)
    assert page.driver.switch_to.active_element.get_attribute("value") == "hello"
    page.keys(" you", ESCAPE)
    assert page.texts(".bubble") == ["hello"] and len(page.server.requests) == 1


def test_answering_again_makes_a_version(page: Page) -> None:
    page.server.answers["dice"] = [["four"], ["five"]]
    page.say("dice")
    page.answered("four")
    page.click('[aria-label="Answer again"]')
    page.answered("five")
    assert page.server.requests[0]["messages"] == page.server.requests[1]["messages"]
    page.click('[aria-label="Earlier version"]')
    page.answered("four")
    assert page.texts(".versions span") == ["1/2"]


def test_conversations_outlive_a_reload(page: Page) -> None:
    page.server.answers["why"] = [[page.server.Reasoning("because *of*"), "so"]]
    page.say("why")
    page.answered("so")
    page.keys("a draft")
    address = page.driver.current_url
    page.open("/")
    assert page.texts("#thread article") == [] and page.texts("#conversations a") == ["why"]
    page.find("#conversations a").click()
    page.answered("so")
    assert page.driver.current_url == address
    stats = page.texts(".stats span")
    assert "3,980 of 4,012 cached" in stats and "57 of 80 drafts accepted" in stats


def test_a_page_closed_while_an_answer_is_written_keeps_what_came(page: Page) -> None:
    page.server.answers["count"] = [["one two", page.server.Wait()]]
    page.say("count")
    page.until(lambda: page.texts(".answer > .prose") == ["one two"])
    time.sleep(0.8)  # it is saved twice a second
    page.driver.refresh()
    page.until(lambda: page.texts(".answer > .prose") == ["one two"] and page.texts(".stats .note") == ["stopped"])
    page.say("hello")
    page.answered("one two", "You said: hello")


def test_an_answer_goes_on_while_another_conversation_is_looked_at(page: Page) -> None:
    page.server.answers["slow"] = [["begun", page.server.Wait(), " and done"]]
    page.say("slow")
    page.until(lambda: page.texts(".answer > .prose") == ["begun"])
    page.click("#new")
    page.say("quick")
    page.answered("You said: quick")
    page.server.go.set()
    page.driver.back()
    page.answered("begun and done")


def test_reasoning_is_folded(page: Page) -> None:
    page.server.answers["why"] = [[page.server.Reasoning("because *of*"), "so"]]
    page.say("why")
    page.answered("so")
    assert page.texts(".reasoning em") == [] and page.find(".reasoning summary").text.startswith("Thought for 0.")
    page.find(".reasoning summary").click()
    page.until(lambda: page.texts(".reasoning em") == ["of"])


def test_nothing_a_model_writes_runs(page: Page) -> None:
    page.server.answers["attack"] = [[page.server.Reasoning(XSS), *XSS]]
    page.say("attack")
    page.until(lambda: page.all(".answer pre") and not page.all("[aria-busy=true]"))
    page.find(".reasoning summary").click()
    page.until(lambda: page.all(".reasoning pre"))
    assert page.all("article img, article script, article a, article svg[onload]") == []
    assert page.driver.execute_script("return window.hit") is None
    page.say(XSS.replace("\n", " "))
    page.until(lambda: len(page.server.requests) == 2)
    assert page.all("article img, article script, article a") == []


@pytest.mark.parametrize("late", [False, True])
def test_an_error_is_one_line_and_can_be_retried(late: bool, page: Page) -> None:
    refusal = page.server.Refusal("the queue\nis full", 429, {"Retry-After": "3"})
    page.server.answers["hello"] = [["half", refusal] if late else [refusal], ["whole"]]
    page.say("hello")
    page.until(lambda: page.all(".failure"))
    assert page.texts(".reason") == ["the queue is full" if late else "the queue is full (429, try again in 3 s)"]
    page.click(".failure button")
    page.answered("whole")
    assert page.texts(".versions span") == (["2/2"] if late else [])  # what came to nothing is no version


def test_a_server_that_is_gone_is_told(page: Page) -> None:
    page.driver.execute_script("window.fetch = () => Promise.reject(new TypeError('x'))")
    page.say("hello")
    page.until(lambda: page.texts(".reason") == ["The server cannot be reached"])


def test_the_token_limit_shows(page: Page) -> None:
    page.server.finish = "length"
    page.say("hello")
    page.until(lambda: page.texts(".stats .note") == ["cut off at the token limit"])


def test_settings_go_into_requests_and_stay(page: Page) -> None:
    page.click("#open-settings")
    for name, value in {"system": "Be brief.", "temperature": "0.5", "maxTokens": "64", "apiKey": "secret"}.items():
        page.find(f"#setting-{name}").send_keys(value)
    page.find("#setting-thinking").send_keys("Off")
    page.find("#settings .head button").click()
    page.find("#model").send_keys("other")
    page.say("hello")
    page.answered("You said: hello")
    page.open()
    page.say("again")
    page.answered("You said: again")
    for request in page.server.requests:
        assert request["messages"][0] == {"role": "system", "content": "Be brief."}
        assert (request["temperature"], request["max_tokens"], request["model"]) == (0.5, 64, "other")
        assert request["chat_template_kwargs"] == {"enable_thinking": False}
    assert page.server.keys == ["Bearer secret"] * 2


def test_a_server_with_keys_asks_for_one(page: Page) -> None:
    page.server.key = "secret"
    page.driver.refresh()
    page.until(lambda: page.texts("#notice span") == ["This server asks for a key"])
    page.click("#notice button")
    page.keys("secret", ENTER)
    page.until(lambda: not page.find("#notice").is_displayed())
    assert page.texts("#model option") == ["qwen3-next-mid", "other"]


def test_rename_search_and_delete(page: Page) -> None:
    for text in ("apples", "pears"):
        page.click("#new")
        page.say(text)
        page.answered(f"You said: {text}")
    page.click("#menu [value=rename]")
    page.keys("quinces", ENTER)
    page.until(lambda: page.texts("#conversations a") == ["quinces", "apples"])
    page.find("#search").send_keys("app")
    assert page.texts("#conversations a") == ["apples"]
    page.find("#search").send_keys(ESCAPE)
    page.click("#menu [value=delete]")
    page.click("#confirm button")
    assert page.texts("#conversations a") == ["quinces", "apples"]
    page.click("#menu [value=delete]")
    page.click("#confirm [value=delete]")
    page.until(lambda: page.texts("#conversations a") == ["apples"] and page.texts("#thread article") == [])


def test_deleting_stops_the_answer_and_leaves_nothing(page: Page) -> None:
    page.server.answers["count"] = [["one", page.server.Wait()]]
    page.say("count")
    page.until(lambda: page.texts(".answer > .prose") == ["one"])
    page.click("#menu [value=delete]")
    page.click("#confirm [value=delete]")
    page.until(lambda: page.texts("#conversations a") == [] and page.texts("#thread article") == [])
    assert page.server.gone.wait(PATIENCE)
    assert page.driver.execute_async_script(COUNT) == 0


@pytest.mark.parametrize("kind", ["json", "markdown"])
def test_export(kind: str, page: Page) -> None:
    page.server.answers["dice"] = [["four"], ["five"]]
    page.say("dice")
    page.answered("four")
    page.click('[aria-label="Answer again"]')
    page.answered("five")
    page.driver.execute_script(
        "URL.createObjectURL = (blob) => { blob.text().then((text) => (window.saved = text)); return '#'; };"
    )
    page.click(f"#menu [value={kind}]")
    saved = page.until(lambda: page.driver.execute_script("return window.saved"))
    if kind == "markdown":
        assert saved == "# dice\n\n## You\n\ndice\n\n## Answer\n\nfive\n"
    else:
        exported = json.loads(saved)
        assert exported["messages"] == [{"role": "user", "content": "dice"}, {"role": "assistant", "content": "five"}]
        assert sorted(m["content"] for m in exported["versions"]) == ["dice", "five", "four"]


def test_a_long_history_opens_at_once(page: Page) -> None:
    """A thousand messages with code, maths and tables, and a thousand other conversations in the list."""
    content = (
        "Some **text** with $x^2$.\n\n```python\ndef f(): return 1\n```\n\n| a | b |\n|-|-|\n| 1 | 2 |\n\n- a\n- b"
    )
    entries = [{"id": f"c{i}", "title": f"Talk {i}", "updated": i, "chosen": {}} for i in range(1000)]
    messages = [
        {"id": f"m{i}", "conversation": "c7", "parent": f"m{i - 1}" if i else None, "order": i}
        | {"role": ("user", "assistant")[i % 2], "content": content, "state": "done"}
        for i in range(1000)
    ]
    page.driver.execute_async_script(FILL, entries, messages)
    page.driver.refresh()
    page.until(lambda: len(page.texts("#conversations a")) == 1000)
    page.driver.execute_script("window.start = performance.now(); location.hash = 'c7'")
    page.until(lambda: len(page.texts("#thread article")) == 1000)
    took = page.driver.execute_script("return performance.now() - window.start")
    assert took < 5000  # milliseconds, on a busy machine; half a second on an idle one
    page.say("hello")
    page.until(lambda: page.texts(".answer > .prose")[-1] == "You said: hello")
    scroller = page.find("#scroller")
    bottom = "const s = arguments[0]; return s.scrollHeight - s.scrollTop - s.clientHeight"
    page.until(lambda: page.driver.execute_script(bottom, scroller) < 5)


def test_dark_and_light(page: Page) -> None:
    colour = "return getComputedStyle(document.body).backgroundColor"

    def prefer(scheme: str) -> str:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        return page.driver.execute_script(colour)

    light, dark = prefer("light"), prefer("dark")
    assert light != dark
    page.click("#open-settings")
    page.find("#setting-theme").send_keys("Light")
    page.until(lambda: page.driver.execute_script(colour) == light)
    page.driver.refresh()
    assert page.driver.execute_script(colour) == light
    prefer("")


def test_a_phone(page: Page) -> None:
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.server.answers["wide"] = [["```\n" + "x" * 300 + "\n```\n$$" + "x + " * 80 + "y$$\n\n" + "w" * 300]]
    page.say("wide")
    page.until(lambda: page.all(".answer math") and not page.all("[aria-busy=true]"))
    overflow = "const s = document.getElementById('scroller'); return s.scrollWidth - s.clientWidth"
    assert page.driver.execute_script(overflow) == 0
    page.until(lambda: not page.find("#sidebar").is_displayed())
    page.find("#toggle").click()
    page.until(lambda: page.find("#conversations a").is_displayed())
    page.find("#new").click()
    page.until(lambda: not page.find("#sidebar").is_displayed() and page.texts("#thread article") == [])


def test_everything_that_can_be_pressed_has_a_name(page: Page) -> None:
    page.say("hello")
    page.answered("You said: hello")
    nameless = """return [...document.querySelectorAll('button, a, input, select, textarea, summary')].filter((e) =>
      !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length)).map((e) => e.outerHTML)"""
    assert page.driver.execute_script(nameless) == []
    log = page.find("#thread")
    assert (log.get_attribute("role"), log.get_attribute("aria-live")) == ("log", "polite")
