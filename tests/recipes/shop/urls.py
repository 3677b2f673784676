"""Where the recipes' views are."""

from __future__ import annotations

from django.urls import path

from shop.arrays import smooth_samples
from shop.background import update_scores
from shop.batches import score_batch
from shop.forecasts import forecast
from shop.memory import unpack
from shop.ninja_api import api
from shop.progress import simulation
from shop.rest import ScoreView
from shop.traced import traced_view
from shop.uploads import upload_sales

urlpatterns = [
    path("sales/", upload_sales),
    path("forecast/<int:months>/", forecast),
    path("simulation/<int:days>/", simulation),
    path("batch/", score_batch),
    path("rest/score/", ScoreView.as_view()),
    path("ninja/", api.urls),
    path("scores/", update_scores),
    path("traced/", traced_view),
    path("unpack/", unpack),
    path("smooth/", smooth_samples),
]
