"""The example site under a real server: every page, and what its pages promise."""

from __future__ import annotations

import contextlib
import hashlib
import html
import json
import lzma
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
import pytest

from example_project import cpu
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parent.parent
ORDER = {
    "order": "A-17",
    "lines": [
        {"sku": "lamp", "quantity": 3, "stock": 8, "price": 19.5},
        {"sku": "desk", "quantity": 1, "stock": 2, "price": 240},
    ],
}

LINE = [{"quantity": 1, "stock": 1, "price": 1}]


@dataclass
class Site:
    """The running site. ``client`` keeps cookies, as a browser does; ``port`` is on loopback."""

    client: httpx.Client
    port: int

    def page(self, path: str) -> str:
        """The text of a page that must be there."""
        response = self.client.get(path)
        assert response.status_code == 200, f"{path}: {response.status_code} {response.text[:500]}"
        return html.unescape(response.text)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """The example site, served by uvicorn in a process of its own on a free port."""
    log = tmp_path / "server.log"
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "example_project.settings"}
    arguments = ["example_project.asgi:application", "--port", "0", "--lifespan", "on"]
    with (
        log.open("w") as stream,
        serving([sys.executable, "-m", "uvicorn", *arguments], environment, stream) as server,
    ):
        port = wait_until(lambda: listening_port(server, log), timeout=30, message=log.read_text)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield Site(client, port)
    text = log.read_text()
    assert "Traceback" not in text, text
    errors = [line for line in text.splitlines() if line.startswith("ERROR")]
    # Django reports every answer of 500 and above as an error.
    assert not [line for line in errors if "Service Unavailable" not in line], text


@contextlib.contextmanager
def serving(
    command: list[str], environment: dict[str, str], log: IO[str]
) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
    ) as server:
        try:
            yield server
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(timeout=20)
            finally:
                server.kill()


def listening_port(server: subprocess.Popen[bytes], log: Path) -> int:
    """The port, or 0 as long as the server does not listen."""
    assert server.poll() is None, log.read_text()
    found = re.search(r"running on http://127\.0\.0\.1:(\d+)", log.read_text())
    return int(found[1]) if found else 0


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class TestPages:
    def test_every_page_can_be_reached_from_the_home_page(self, site: Site) -> None:
        home = site.page("/")
        links = set(re.findall(r'href="(/[^"]*)"', home))
        assert len(links) >= 10
        for link in links:
            site.page(link)

    def test_primes_are_counted(self, site: Site) -> None:
        shown = " ".join(site.page("/primes/?limit=10000").split())
        assert re.search(
            r"Counted in [\d.]+ s by a worker, not by process \d+, which sent this page\.", shown
        )
        assert '<strong id="count">1229</strong> primes below 10000' in site.page(
            "/primes/?limit=10000"
        )
        assert '<strong id="count">1229</strong> primes below 10000' in site.page(
            "/primes/sync/?limit=10000"
        )
        many = site.page("/primes/many/?limits=10000+100+10")
        assert re.findall(r"<tr><td>(\d+)</td><td>(\d+)</td>", many) == [
            ("10000", "1229"),
            ("100", "25"),
            ("10", "4"),
        ]

    def test_a_mistake_is_explained(self, site: Site) -> None:
        for path, sentence in (
            ("/primes/?limit=many", "Enter a whole number."),
            ("/primes/sync/?limit=-1", "greater than or equal to 0"),
            ("/primes/?limit=99999999", "less than or equal to 3000000"),
            ("/primes/many/?limits=1+x", "Enter a whole number."),
            ("/primes/many/?limits=1+2+3+4+5+6+7+8+9", "Give one to eight numbers."),
            ("/worker/?zone=Nowhere", "No time zone has this name."),
        ):
            assert sentence in site.page(path)

    def test_a_posted_order_is_scored(self, site: Site) -> None:
        assert site.client.post("/score/", json=ORDER).json() == cpu.score_order(ORDER)
        for body, sentence in (
            ('{"order"', "The body is not JSON: "),
            ("[]", "The body must be a JSON object."),
            ('{"order": "A-17"}', 'an order needs a list of "lines"'),
            ('{"lines": [{"quantity": 1}]}', 'line 1 needs the numbers "quantity"'),
            (
                '{"lines": [{"quantity": 0, "stock": 1, "price": 1}]}',
                "line 1 is out of range",
            ),
            (
                '{"lines": [{"quantity": 1, "stock": 1, "price": 1e999}]}',
                "line 1 is out of range",
            ),
            (
                '{"lines": [{"quantity": 1, "stock": 1, "price": NaN}]}',
                "The body is not JSON: NaN is no JSON number",
            ),
            ('{"order": -Infinity}', "The body is not JSON: -Infinity is no JSON number"),
            ('{"order": 1e999}', '"order" must be text or a whole number'),
            ("[" * 100_000 + "]" * 100_000, "The body's lists and objects are nested too deeply."),
            (json.dumps({"lines": LINE * 201}), "an order of 201 lines is too long: 200 at most"),
            (
                json.dumps({"lines": [{**LINE[0], "stock": 1000}] * 6}),
                "the stock of all lines is 6000: 5000 at most",
            ),
        ):
            refused = site.client.post("/score/", content=body)
            assert refused.status_code == 400
            assert refused.json()["error"].startswith(sentence)
        # Which of them can be parsed, and which of those can be pickled, depends on the Python.
        for depth in (100, 400, 800, 5_000):
            body = '{"lines": ' + "[" * depth + "]" * depth + "}"
            refused = site.client.post("/score/", content=body)
            assert refused.status_code == 400
            assert refused.json()["error"].endswith((".", "]"))

    def test_an_upload_is_hashed_and_compressed(self, site: Site) -> None:
        data = b"some text, many times over. " * 50_000
        site.page("/compress/")
        form = {"csrfmiddlewaretoken": site.client.cookies["csrftoken"]}
        files = {"file": ("notes.txt", data)}
        shown = site.client.post("/compress/", data=form, files=files)
        assert hashlib.sha256(data).hexdigest() in shown.text
        sent = site.client.post("/compress/", data={**form, "download": "1"}, files=files)
        assert lzma.decompress(sent.content) == data
        assert sent.headers["Content-Disposition"] == 'attachment; filename="notes.txt.xz"'
        without = site.client.post("/compress/", data=form)
        assert "This field is required." in without.text
        large = {"file": ("large.bin", bytes(20 * 1024 * 1024 + 1))}
        assert "larger than 20 MB" in site.client.post("/compress/", data=form, files=large).text

    def test_language_and_time_zone_of_the_caller_are_active_in_the_worker(
        self, site: Site
    ) -> None:
        english = facts(site.page("/worker/?zone=Asia/Tokyo"))
        assert english["Language"] == "en"
        assert english["Time zone"] == "Asia/Tokyo"
        assert re.match(r"(Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day, ", english["Now"])
        form = {
            "csrfmiddlewaretoken": site.client.cookies["csrftoken"],
            "language": "de",
            "next": "/worker/?zone=UTC",
        }
        german = facts(site.client.post("/i18n/setlang/", data=form, follow_redirects=True).text)
        assert german["Language"] == "de"
        assert german["Time zone"] == "UTC"
        assert re.match(r"\w+(tag|woch), ", german["Now"])


def facts(page: str) -> dict[str, str]:
    """The definition list of the worker page."""
    return dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", page))


class TestPromises:
    def test_the_worker_ends_when_the_client_goes_away(self, site: Site) -> None:
        job = uuid.uuid4()
        status = f"/slow/status/{job}/"
        assert site.client.get(status).json() == {"state": "waiting for a worker"}
        with socket.create_connection(("127.0.0.1", site.port)) as connection:
            request = f"GET /slow/run/{job}/ HTTP/1.1\r\nHost: localhost\r\n\r\n"
            connection.sendall(request.encode())
            wait_until(lambda: site.client.get(status).json()["state"] == "running")
            before = site.client.get(status).json()
            assert before["alive"]
            assert exists(before["pid"])
        wait_until(lambda: not exists(before["pid"]), timeout=1)
        assert site.client.get(status).json() == {
            "state": "cancelled",
            "pid": before["pid"],
            "alive": False,
        }
        assert "1229" in site.page("/primes/?limit=10000")

    def test_a_full_pool_answers_503_and_says_when_to_come_back(self, site: Site) -> None:
        with ThreadPoolExecutor(2) as threads:
            answers = list(threads.map(lambda _: site.client.get("/full/run/"), range(2)))
        assert sorted(answer.status_code for answer in answers) == [200, 503]
        refused = max(answers, key=lambda answer: answer.status_code)
        assert int(refused.headers["Retry-After"]) >= 1

    def test_the_light_view_answers_while_every_worker_is_busy(self, site: Site) -> None:
        with ThreadPoolExecutor(1) as threads:
            busy = threads.submit(site.client.get, "/responsive/busy/")
            answered = 0
            slowest = 0.0
            while not busy.done():
                start = time.perf_counter()
                assert site.client.get("/light/").status_code == 200
                slowest = max(slowest, time.perf_counter() - start)
                answered += 1
            assert busy.result().status_code == 200
        assert answered > 20
        assert slowest < 1


class TestFunctions:
    @pytest.mark.parametrize(
        ("limit", "count"), [(-1, 0), (0, 0), (2, 0), (3, 1), (4, 2), (10, 4), (1000, 168)]
    )
    def test_primes_below_a_limit(self, limit: int, count: int) -> None:
        assert cpu.count_primes(limit) == count

    @pytest.mark.parametrize(("value", "share"), [(20.0, 0.5), (25.0, 0.8413), (10.0, 0.02275)])
    def test_score_is_the_share_below_the_value(self, value: float, share: float) -> None:
        assert cpu.calculate_score({"value": value}) == pytest.approx(share, abs=1e-4)
        with pytest.raises(ValueError, match="finite"):
            cpu.calculate_score({"value": float("inf")})

    def test_an_order_always_gets_the_same_score(self) -> None:
        score = cpu.score_order(ORDER)
        assert score == cpu.score_order(ORDER)
        assert score["total"] == 298.5
        assert 0 < score["score"] < 1

    def test_a_line_that_cannot_be_scored_is_shown_in_brief(self) -> None:
        with pytest.raises(ValueError, match=r"line 1 needs the numbers .*, not \['x") as raised:
            cpu.score_order({"lines": [["x" * 100_000]]})
        assert len(str(raised.value)) < 200

    def test_the_largest_order_takes_seconds(self) -> None:
        lines = [{"quantity": 1, "stock": 25, "price": 1_000_000}] * 200
        start = time.process_time()
        assert cpu.score_order({"lines": lines})["total"] == 200_000_000
        assert time.process_time() - start < 10

    def test_compressing_nothing_is_possible(self) -> None:
        compressed = cpu.digest_and_compress(b"")
        assert compressed.percent == 100
        assert lzma.decompress(compressed.data) == b""
