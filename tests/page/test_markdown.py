"""What a model writes becomes headings, lists, code and links, and never HTML."""

from __future__ import annotations

import time

import pytest
from scripted import answer, ask, done

HOSTILE = """\
<script>alert(1)</script> <img src=x onerror=alert(2)> &lt;b&gt;
[x](javascript:alert(3)) [y](data:text/html,z) [z](https://a.example/"onclick="alert(4))
**<svg onload=alert(5)>** `<i>code</i>`

# <iframe src=//evil.example>

```<b>
</code></pre><script>alert(6)</script>
```
"""


def test_model_text_stays_text(page, script):
    script.deltas = [{"reasoning_content": "<img src=x onerror=alert(7)>"}, {"content": HOSTILE}]
    ask(page, "<img src=x onerror=alert(8)>")
    done(page)
    assert page.locator("main :is(script, img, svg, iframe, b, i, [onclick], [onerror])").count() == 0
    text = answer(page).locator(".body").inner_text()
    for piece in ("<script>alert(1)</script>", "<img src=x onerror=alert(2)>", "&lt;b&gt;", "(javascript:"):
        assert piece in text
    links = [link.get_attribute("href") for link in page.locator("main a").all()]
    assert all(link.startswith("https://") for link in links)
    assert all("noopener" in link.get_attribute("rel") for link in page.locator("main a").all())


MARKDOWN = """\
# Head
Some **bold *both*** and *it* and _under_, 2 * 3 * 4, a_b_c, __init__, `x*y*z`.
A [link](https://a.example/b_(c)).
1. one
   ```python
   if x:
       pass
   ```

2. two
   - deep
     more
   - er
* * *
- last
"""


def test_markdown(page, script):
    script.deltas = [{"content": piece} for piece in MARKDOWN.splitlines(keepends=True)]
    ask(page)
    done(page)
    body = answer(page).locator(".body")
    assert body.get_by_role("heading", name="Head").count() == 1
    assert body.locator("strong").inner_text() == "bold both"
    assert body.locator("strong em").inner_text() == "both"
    assert body.locator("p > em").all_inner_texts()[-2:] == ["it", "under"]
    assert "2 * 3 * 4, a_b_c, __init__, x*y*z." in body.inner_text()
    assert body.locator("a").get_attribute("href") == "https://a.example/b_(c)"
    assert body.locator("> ol > li").count() == 2
    assert body.locator("> ol > li pre code").inner_text() == "if x:\n    pass"
    assert body.locator("> ol > li > ul > li").all_inner_texts() == ["deep\nmore", "er"]
    assert body.locator("> hr").count() == 1
    assert body.locator("> ul > li").all_inner_texts() == ["last"]


@pytest.mark.parametrize(
    "piece", ["[", "*", "**a ", "`", "_a ", "- ", "[a](", "    " * 50 + "- x\n", "```\n"]
)
def test_hostile_markdown_takes_no_time(page, script, piece):
    script.deltas = [{"content": (piece * 50_000)[:100_000]}]
    start = time.monotonic()
    ask(page)
    done(page)
    assert time.monotonic() - start < 5
    page.get_by_role("button", name="New chat").click()


def test_lists_in_lists_in_lists(page, script):
    script.deltas = [{"content": "".join(f"{' ' * (2 * depth)}- x\n" for depth in range(500))}]
    ask(page)
    done(page)
    assert page.locator("main li").count() == 500
