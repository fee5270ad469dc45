"""The status page in a real browser, while the server works. The pictures stay in build/status-page/."""

import re
import struct
import subprocess

import pytest
from browser import Page
from live_server import PROGRAM, ROOT, Server, wait_for

TILES = """Object.fromEntries([...document.querySelectorAll(".tile")].map(
    tile => [tile.querySelector("span").textContent, tile.querySelector("b").textContent]))"""
# Of the tiles whose bar shows the figure itself: that figure, and how much of the bar is filled.
BARS = """[...document.querySelectorAll(".tile")].filter(tile => tile.querySelector("b").textContent.includes("%")).map(tile =>
    [parseFloat(tile.querySelector("b").textContent) / 100,
     tile.querySelector("i").getBoundingClientRect().width / tile.querySelector(".bar").getBoundingClientRect().width])"""
LOAD = ("sequences running", "sequences waiting", "generated tokens/s", "in use by sequences")
ROWS = """[...document.querySelectorAll("#latency tr")].map(row => [...row.cells].map(cell => cell.textContent))"""


def state(page):
    return page.evaluate("document.getElementById('state')?.textContent ?? ''")


def until(page, condition, what):
    """Waits, and listens to the page."""

    def met():
        page.wait(0.1)
        return condition()

    wait_for(met, what)


def until_live(page):
    until(page, lambda: state(page) == "live", "the page does not come to life")


def number(text):
    return float(text.replace(",", "").replace("%", ""))


@pytest.fixture(scope="module")
def server():
    server = Server(ROOT / "models" / "small", "--max-batch-size", "8")
    yield server
    server.wait_until_idle()
    assert server.stop() == 0


def picture(page, name):
    path = ROOT / "build" / "status-page" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


def test_the_page_lives_under_load(server):
    url = f"http://127.0.0.1:{server.port}/"
    with Page() as page:
        page.open(url)
        until_live(page)
        page.wait(1.2)  # its first picture of how things go
        idle = page.evaluate(TILES)
        assert number(idle["sequences running"]) == number(idle["requests so far"]) == 0
        assert page.evaluate(ROWS)[0][1:] == ["0", "–", "–", "–", "–"]
        about = page.evaluate("document.getElementById('about').textContent")
        version = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True).stdout.strip()
        assert re.fullmatch(rf"small, flash-mla {re.escape(version)}, up \d+ s", about), about
        assert page.evaluate("document.title").startswith("small")
        assert idle["workers busy in decode"] == "idle"
        picture(page, "idle")

        load = subprocess.Popen(
            [PROGRAM, "loadtest", "--url", url, "--clients", "24", "--requests", "20000", "--short-tokens", "40", "--long-tokens", "300",
             "--max-tokens", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        try:
            seen = []

            def busy():
                page.wait(1.1)
                seen.append(page.evaluate(TILES))
                most = {name: max(number(tiles[name]) for tiles in seen) for name in LOAD}
                points = page.evaluate("document.getElementById('rate').getAttribute('points')").split()
                return (
                    len(seen) >= 6
                    and number(seen[-1]["requests so far"]) > number(seen[0]["requests so far"])
                    and most["sequences running"] == 8
                    and most["sequences waiting"] >= 8
                    and most["generated tokens/s"] > 1
                    and most["in use by sequences"] > 0
                    and all(number(tiles["open connections"]) >= 24 for tiles in seen[-2:])
                    and len(points) >= 6
                    and len({point.split(",")[1] for point in points}) > 2
                )

            wait_for(busy, "the page does not show the load")
            requests = [number(tiles["requests so far"]) for tiles in seen]
            assert requests == sorted(requests)
            assert max(number(tiles["sequences running"]) for tiles in seen) == 8, "more than there is room for"
            for share, bar in page.evaluate(BARS):
                assert abs(bar - share) < 0.02, "a bar is not as long as its figure"
            rows = page.evaluate(ROWS)
            assert [row[0] for row in rows] == ["time to first token", "time per further token", "whole answer"]
            assert all(number(row[1]) > 0 and all(cell.endswith("s") for cell in row[2:]) for row in rows)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            width, height = picture(page, "load")
            assert width >= 1000 and height >= 800
            page.resize(390, 1400, mobile=True)
            page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
            page.wait(1.2)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "too wide for a telephone"
            picture(page, "narrow-dark")
        finally:
            load.kill()
            load.wait()

        server.wait_until_idle()
        until(page, lambda: page.evaluate(TILES).get("workers busy in decode") == "idle", "what the last step did is over")
        outside = [u for u in page.requested() if not u.startswith((url, "data:", "about:"))]
        assert outside == [] and len(page.requested()) > 6
        assert page.complaints() == []
    server.wait_until_idle()


def test_figures_that_the_page_cannot_know_are_bounds(server):
    with Page() as page:
        page.open(f"http://127.0.0.1:{server.port}/")
        until_live(page)
        buckets = "[[0.5, 0], [100, 4], [Infinity, 10]]"
        assert page.evaluate(f"figure(quantile({buckets}, .2))").endswith(" s")
        assert page.evaluate(f"[.5, .99].map(q => figure(quantile({buckets}, q)))") == ["> 100 s", "> 100 s"]
        assert page.evaluate("figure(quantile([[0.5, 0], [Infinity, 3]], .5))") == "> 500 ms"
        assert page.evaluate("[5, 65, 3700, 90000].map(duration)") == ["5 s", "1 min", "1 h 1 min", "1 d 1 h"]
        assert page.evaluate(r"""parse('mla_build_info{version="1",model="a\\\\b\\\"c, d"} 1\n').about""") == {"version": "1", "model": 'a\\b"c, d'}
        assert page.complaints() == []


def test_the_page_says_when_the_server_is_gone():
    server = Server(ROOT / "models" / "small")
    with Page() as page:
        page.open(f"http://127.0.0.1:{server.port}/")
        until_live(page)
        assert server.stop() == 0
        until(page, lambda: state(page).startswith("no answer"), "the page says nothing")
