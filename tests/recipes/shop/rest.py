"""A view of Django REST framework."""

from __future__ import annotations

from typing import Any

from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from leasepool_django import run_in_pool_sync
from shop.scoring import score_order


class OrderSerializer(serializers.Serializer[Any]):
    quantity = serializers.IntegerField(min_value=1)
    stock = serializers.IntegerField(min_value=1)


class ScoreView(APIView):
    def post(self, request: Request) -> Response:
        order = OrderSerializer(data=request.data)
        order.is_valid(raise_exception=True)
        try:
            score = run_in_pool_sync(score_order, **order.validated_data)
        except ValueError as error:
            raise serializers.ValidationError({"quantity": str(error)}) from error
        return Response({"score": score})
