"""Every recipe of ``docs/recipes.md``, served as its reader would serve it.

The recipes are the project ``shop`` below ``tests/recipes``; ``test_docs`` holds that the page
shows them as they are.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import re
import socket
import sys
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import AsyncClient

from leasepool_django import pools
from shop import settings as shop_settings
from shop.forecasts import write_forecast
from shop.progress import events, simulate_stock
from shop.scoring import score_order
from tests.leaks import Process
from tests.process_table import identify, is_alive, worker_pids
from tests.recipe_clients import WebSocket, served
from tests.waiting import async_wait_until, wait_until

if TYPE_CHECKING:
    from pytest_django.fixtures import Settings

pytest.importorskip("channels", reason="the shop's asgi.py needs Channels")
pytest.importorskip("ninja", reason="the shop's urls.py needs Django Ninja")
pytest.importorskip("numpy", reason="the shop's urls.py needs NumPy")
pytest.importorskip("opentelemetry.sdk", reason="the shop's urls.py needs OpenTelemetry")
pytest.importorskip("rest_framework", reason="the shop's urls.py needs REST framework")

pytestmark = pytest.mark.urls("shop.urls")

ORDER = {"quantity": 8, "stock": 10}
IMPOSSIBLE = {"quantity": 80, "stock": 10}
REASON = "an order of 80 cannot be filled from a stock of 10"
FOR_EVER = 10**9


@pytest.fixture(autouse=True)
def shop(settings: Settings, tmp_path: Path) -> Iterator[None]:
    """The shop's pools, each started when a recipe uses it."""
    settings.LEASEPOOL = shop_settings.LEASEPOOL
    settings.MIDDLEWARE = shop_settings.MIDDLEWARE
    settings.MEDIA_ROOT = tmp_path
    yield
    pools.reset()


@contextmanager
def full(settings: Settings) -> Iterator[None]:
    """Somebody else has the only worker, and nobody likes to wait."""
    settings.LEASEPOOL = {"default": {"WORKERS_PER_POOL": 1, "ACQUIRE_TIMEOUT": 0.05}}
    lease = pools["default"].lease_sync(owner="somebody")
    # On a thread of its own throughout: who holds the lease would wait for itself.
    with ThreadPoolExecutor(1) as somebody:
        somebody.submit(lease.__enter__).result()
        try:
            yield
        finally:
            somebody.submit(lease.__exit__, None, None, None).result()


# -- uploads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [2_500_000, 0], ids=["in memory", "in a file"])
def test_an_upload_is_summed_up_wherever_django_keeps_it(settings: Settings, memory: int) -> None:
    settings.FILE_UPLOAD_MAX_MEMORY_SIZE = memory

    async def post(text: str) -> tuple[int, Any]:
        sales = SimpleUploadedFile("sales.csv", text.encode(), content_type="text/csv")
        response = await AsyncClient().post("/sales/", {"sales": sales})
        return response.status_code, response.json()

    async def all_posts() -> None:
        assert await post("product,quantity\nlamp,3\ndesk,1\nlamp,4\n") == (
            200,
            {"lamp": 7, "desk": 1},
        )
        assert await post("product,quantity\nlamp,three\n") == (
            400,
            {"error": "row 1 needs a product and a quantity"},
        )
        assert (await AsyncClient().post("/sales/")).status_code == 400

    asyncio.run(all_posts())


# -- the client goes away -------------------------------------------------------------------------


def test_a_report_is_written_in_a_worker() -> None:
    async def get() -> str:
        response = await AsyncClient().get("/forecast/2/")
        assert response["Content-Type"] == "text/csv"
        return response.content.decode()

    assert asyncio.run(get()) == write_forecast(2)


def test_the_work_on_a_report_ends_with_the_client(tmp_path: Path) -> None:
    def gone(workers: list[Process]) -> list[Process]:
        return [worker for worker in workers if not is_alive(worker)]

    with served(tmp_path) as shop:
        workers = [identify(pid) for pid in worker_pids(shop.server.pid)]
        with socket.create_connection(("127.0.0.1", shop.port)) as client:
            client.sendall(b"GET /forecast/1000000/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            shop.wait_for("forecast of 1000000 months begins")
            workers += [identify(pid) for pid in worker_pids(shop.server.pid)]
            before = list(dict.fromkeys(workers))
            assert gone(before) == []
        wait_until(lambda: gone(before), timeout=2)
        assert len(gone(before)) == 1
        answer = httpx.get(f"http://127.0.0.1:{shop.port}/forecast/1/", timeout=30)
        assert answer.text == write_forecast(1)


# -- progress -------------------------------------------------------------------------------------


def test_a_page_is_told_how_far_the_work_is() -> None:
    async def get() -> str:
        response: Any = await AsyncClient().get("/simulation/1000/")
        assert response["Content-Type"] == "text/event-stream"
        return "".join([part.decode() async for part in response])

    *reports, result = asyncio.run(get()).rstrip().split("\n\n")
    assert reports == [
        f'event: progress\ndata: {{"done": {done}, "of": 1000}}' for done in range(0, 1000, 10)
    ]
    assert result == f"event: result\ndata: {simulate_stock(1000)}"


def test_a_simulation_ends_with_its_client() -> None:
    async def leave() -> None:
        stream = events(FOR_EVER)
        assert isinstance(stream, AsyncGenerator)
        assert (await anext(stream)).startswith("event: progress")
        await stream.aclose()
        await async_wait_until(lambda: pools["reports"].stats().workers_killed == 1)

    asyncio.run(leave())


# -- a batch --------------------------------------------------------------------------------------


def test_one_failure_does_not_spoil_a_batch() -> None:
    async def post() -> Any:
        orders = [ORDER, IMPOSSIBLE, {"quantity": 5, "stock": 10}]
        response = await AsyncClient().post("/batch/", orders, content_type="application/json")
        assert pools["reports"].stats().leases_granted == 1
        assert pools["reports"].leased_count == 0
        return response.json()

    assert asyncio.run(post()) == {
        "scores": [score_order(8, 10), {"error": REASON}, score_order(5, 10)]
    }


# -- REST framework, Ninja ------------------------------------------------------------------------


def test_a_rest_framework_view_answers_from_a_worker(settings: Settings) -> None:
    from rest_framework.test import APIClient

    client = APIClient()
    answer = client.post("/rest/score/", ORDER, format="json")
    assert (answer.status_code, answer.json()) == (200, {"score": score_order(**ORDER)})
    refused = client.post("/rest/score/", IMPOSSIBLE, format="json")
    assert (refused.status_code, refused.json()) == (400, {"quantity": REASON})
    assert client.post("/rest/score/", {"quantity": 0}, format="json").status_code == 400
    with full(settings):
        busy = client.post("/rest/score/", ORDER, format="json", HTTP_ACCEPT="application/json")
    assert (busy.status_code, busy.json()["error"]) == (503, "no_capacity")
    assert int(busy["Retry-After"]) >= 1


def test_a_ninja_operation_answers_from_a_worker() -> None:
    from ninja.testing import TestAsyncClient

    from shop.ninja_api import api

    async def post() -> None:
        client = TestAsyncClient(api)
        answer = await client.post("/score", json=ORDER)
        assert (answer.status_code, answer.json()) == (200, {"score": score_order(**ORDER)})
        refused = await client.post("/score", json=IMPOSSIBLE)
        assert (refused.status_code, refused.json()) == (400, {"detail": REASON})
        assert (await client.post("/score", json={"quantity": 0})).status_code == 422

    asyncio.run(post())


def test_a_ninja_operation_without_a_worker_answers_503(settings: Settings) -> None:
    settings.DEBUG = True  # Ninja then answers errors itself, before any middleware sees them

    async def post() -> None:
        busy = await AsyncClient().post(
            "/ninja/score",
            ORDER,
            content_type="application/json",
            headers={"Accept": "application/json"},
        )
        assert (busy.status_code, busy.json()["error"]) == (503, "no_capacity")

    with full(settings):
        asyncio.run(post())


# -- Channels -------------------------------------------------------------------------------------


def test_a_consumer_answers_from_a_worker() -> None:
    async def talk() -> None:
        async with WebSocket() as client:
            await client.send(ORDER)
            assert await client.receive() == {"score": score_order(**ORDER)}
            await client.send(IMPOSSIBLE)
            assert await client.receive() == {"error": REASON}

    asyncio.run(talk())


def test_a_consumer_stops_the_work_when_its_client_leaves() -> None:
    async def talk() -> None:
        async with WebSocket() as client:
            await client.send({**ORDER, "days": FOR_EVER})
            await async_wait_until(lambda: pools["default"].stats().busy_workers == 1)
            # It still listens while it waits for the worker.
            await client.send(ORDER)
            assert await client.receive() == {"error": "one order at a time"}
            assert pools["default"].stats().workers_killed == 0
        await async_wait_until(lambda: pools["default"].stats().workers_killed == 1)

    asyncio.run(talk())


def test_a_consumer_says_when_there_is_no_worker(settings: Settings) -> None:
    async def talk() -> Any:
        async with WebSocket() as client:
            await client.send(ORDER)
            return await client.receive()

    with full(settings):
        assert asyncio.run(talk()) == {"error": "not now, try again later"}


# -- after the response ---------------------------------------------------------------------------


def test_work_goes_on_after_the_response(tmp_path: Path) -> None:
    from shop import background

    async def post() -> None:
        response = await AsyncClient().post("/scores/", {"stock": ["5", "10"]})
        assert (response.status_code, response.json()) == (202, {"status": "started"})
        await asyncio.gather(*background.tasks)

    asyncio.run(post())
    assert background.tasks == set()
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written == {"5": score_order(5, 5), "10": score_order(10, 10)}


def test_work_in_the_background_that_fails_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from shop import background

    async def post() -> None:
        assert (await AsyncClient().post("/scores/", {"stock": "-1"})).status_code == 202
        await asyncio.gather(*background.tasks)

    asyncio.run(post())
    [record] = [record for record in caplog.records if record.name == background.__name__]
    assert record.getMessage() == "scores.json was not written"
    assert record.exc_info is not None
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_stops_lets_running_work_finish(tmp_path: Path) -> None:
    with served(tmp_path) as shop:
        stocks = [str(number) for number in range(81, 101)]
        url = f"http://127.0.0.1:{shop.port}/scores/"
        assert httpx.post(url, data={"stock": stocks}, timeout=30).status_code == 202
        shop.wait_for("scores of 20 articles begin")
    assert len(json.loads((tmp_path / "scores.json").read_text())) == 20


# -- what travels with a call --------------------------------------------------------------------


def test_request_id_and_trace_follow_a_call_into_its_worker(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from opentelemetry.sdk.trace import TracerProvider

    from shop.request_ids import RequestIdFilter

    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler = Handler()
    handler.addFilter(RequestIdFilter())
    handler.setFormatter(logging.Formatter("[{request_id}] {message}", style="{"))
    logger = logging.getLogger("shop.traced")
    logger.addHandler(handler)
    caplog.set_level("INFO", "shop.traced")
    tracer = TracerProvider().get_tracer("a client")

    async def get() -> str:
        with tracer.start_as_current_span("a client's request") as span:
            response = await AsyncClient().get("/traced/", headers={"X-Request-ID": "r-17"})
            assert response["X-Request-ID"] == "r-17"
            assert response.json() == {
                "score": score_order(8, 10),
                "trace": f"{span.get_span_context().trace_id:032x}",
            }
        own = await AsyncClient().get("/traced/", headers={"X-Request-ID": "no id: \n"})
        return str(own["X-Request-ID"])

    try:
        own = asyncio.run(get())
    finally:
        logger.removeHandler(handler)
    assert re.fullmatch("[0-9a-f]{32}", own)
    assert lines == ["[r-17] scoring for request r-17", f"[{own}] scoring for request {own}"]


# -- memory, arrays -------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the limit is not enforced")
def test_a_worker_that_asks_for_too_much_memory_is_refused_it() -> None:
    async def post(body: bytes) -> tuple[int, Any]:
        response = await AsyncClient().post("/unpack/", body, content_type="application/gzip")
        return response.status_code, response.json()

    async def all_posts() -> None:
        assert await post(gzip.compress(b"a\nb\n")) == (200, {"lines": 2})
        bomb = gzip.compress(bytes(400 << 20), compresslevel=1)
        assert await post(bomb) == (413, {"error": "too large when unpacked"})
        assert (await post(b"no gzip file"))[0] == 400
        assert await post(gzip.compress(b"a\nb\n")) == (200, {"lines": 2})
        stats = pools["limited"].stats()
        assert (stats.workers_started, stats.workers_crashed) == (1, 0)

    asyncio.run(all_posts())


def test_an_array_goes_to_a_worker_and_back() -> None:
    import numpy as np

    from shop.arrays import smooth

    samples = np.sin(np.arange(100_000) / 50)

    async def post(body: bytes) -> tuple[int, bytes]:
        response = await AsyncClient().post(
            "/smooth/", body, content_type="application/octet-stream"
        )
        return response.status_code, response.content

    async def both() -> None:
        assert await post(samples.tobytes()) == (200, smooth(samples, 25).tobytes())
        assert (await post(b"seven b"))[0] == 400

    asyncio.run(both())
