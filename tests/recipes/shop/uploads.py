"""An upload is read and summed up in a worker."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path

from django.core.files.uploadedfile import TemporaryUploadedFile
from django.http import HttpRequest, JsonResponse
from django.views.decorators.http import require_POST

from leasepool_django import run_in_pool


def sum_sales(source: bytes | Path) -> dict[str, int]:
    """Add up the quantities of each product. Raises ``ValueError`` for what is no such table."""
    data = source.read_bytes() if isinstance(source, Path) else source
    totals: Counter[str] = Counter()
    for number, row in enumerate(csv.DictReader(io.StringIO(data.decode())), start=1):
        try:
            totals[row["product"]] += int(row["quantity"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"row {number} needs a product and a quantity") from error
    return dict(totals)


@require_POST
async def upload_sales(request: HttpRequest) -> JsonResponse:
    """Answer with the sums, or with 400 and what is wrong with the file."""
    upload = request.FILES.get("sales")
    if upload is None:
        return JsonResponse({"error": "a file named 'sales' is needed"}, status=400)
    if isinstance(upload, TemporaryUploadedFile):
        source: bytes | Path = Path(upload.temporary_file_path())
    else:
        source = upload.read()
    try:
        return JsonResponse(await run_in_pool(sum_sales, source))
    except ValueError as error:
        return JsonResponse({"error": str(error)}, status=400)
