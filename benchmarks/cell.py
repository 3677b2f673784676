"""``python -m benchmarks.cell SPEC``: one contender, one group, one loop, in this process alone.

``SPEC`` is JSON: group, contender, loop, quick, floor, out. The figures, or the reason why there
are none, go to the file ``out`` as JSON. Contenders that start processes anew import this module
in each of them, some as a plain script: nothing but the standard library at the top.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure what ``spec`` says; ``{"figures": …}`` or ``{"reason": …}``."""
    from benchmarks.contenders import CONTENDERS
    from benchmarks.measuring import Effort, NotMeasuredError
    from benchmarks.reasons import of_error
    from benchmarks.workloads import load

    group = load(spec["group"])
    effort = Effort(quick=spec["quick"])
    name: str = spec["contender"]
    if group.pinned:
        # The last core: interrupts tend to go to the first.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    try:
        if spec["floor"]:
            return {"figures": group.floors[name](effort)}
        reason = group.refusal(CONTENDERS[name])
        if reason is not None:
            return {"reason": reason}
        return {"figures": group.cell(name, spec["loop"], effort)}
    except NotMeasuredError as error:
        return {"reason": str(error)}
    except Exception as error:  # noqa: BLE001 - whatever a contender raises is why it has no figures
        traceback.print_exc()
        return {"reason": f"failed: {of_error(error)}"}


if __name__ == "__main__":
    _spec = json.loads(sys.argv[1])
    Path(_spec["out"]).write_text(json.dumps(main(_spec)))
