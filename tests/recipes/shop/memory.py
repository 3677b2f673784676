"""Workers that cannot take more than their share of the memory."""

from __future__ import annotations

import gzip
import resource

from django.http import HttpRequest, JsonResponse
from django.views.decorators.http import require_POST

from leasepool_django import offload


def limit_memory(limit: int) -> None:
    """Let this process have at most ``limit`` bytes of memory of its own."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


@offload(pool="limited")
def count_lines(compressed: bytes) -> int:
    """Unpack a file and count its lines."""
    return gzip.decompress(compressed).count(b"\n")


@require_POST
async def unpack(request: HttpRequest) -> JsonResponse:
    """Answer 413 for a file that is small only as long as it is packed."""
    try:
        return JsonResponse({"lines": await count_lines.run(request.body)})
    except MemoryError:
        return JsonResponse({"error": "too large when unpacked"}, status=413)
    except (OSError, EOFError) as error:
        return JsonResponse({"error": str(error)}, status=400)
