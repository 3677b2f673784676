"""An async operation of Django Ninja."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from ninja import NinjaAPI, Schema
from ninja.errors import HttpError
from pydantic import PositiveInt

from leasepool_django import LeaseUnavailableError, run_in_pool
from leasepool_django.middleware import no_capacity_response
from shop.scoring import score_order

api = NinjaAPI()


class Order(Schema):
    quantity: PositiveInt
    stock: PositiveInt


@api.exception_handler(LeaseUnavailableError)
def no_worker(request: HttpRequest, error: LeaseUnavailableError) -> HttpResponse:
    return no_capacity_response(request, error)


@api.post("/score")
async def score(request: HttpRequest, order: Order) -> dict[str, float]:
    try:
        return {"score": await run_in_pool(score_order, **order.model_dump())}
    except ValueError as error:
        raise HttpError(400, str(error)) from error
