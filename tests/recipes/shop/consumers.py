"""A WebSocket consumer of Channels."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from channels.generic.websocket import AsyncJsonWebsocketConsumer

from leasepool_django import LeasePoolError, run_in_pool
from shop.scoring import score_order

logger = logging.getLogger(__name__)


class ScoreConsumer(AsyncJsonWebsocketConsumer):
    call: asyncio.Task[None] | None = None

    async def receive_json(self, content: dict[str, Any], **kwargs: Any) -> None:
        if self.call is not None and not self.call.done():
            await self.send_json({"error": "one order at a time"})
            return
        self.call = asyncio.create_task(self.answer(content))

    async def disconnect(self, code: int) -> None:
        if self.call is not None:
            self.call.cancel()

    async def answer(self, order: dict[str, Any]) -> None:
        try:
            days = int(order.get("days", 10_000))
            score = await run_in_pool(
                score_order, int(order["quantity"]), int(order["stock"]), days
            )
        except (KeyError, TypeError, ValueError) as error:
            await self.send_json({"error": str(error)})
        except LeasePoolError as error:
            logger.warning("An order was not scored: %s", error)
            await self.send_json({"error": "not now, try again later"})
        else:
            await self.send_json({"score": score})
