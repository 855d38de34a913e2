"""The named policies: the settings that each of them sets to save work."""

from __future__ import annotations

from typing import Any, Literal

Policy = Literal["reference", "fast"]

# Values of each policy. The user's values come before them, the checkpoint's after.
POLICIES: dict[Policy, dict[str, Any]] = {
    "reference": {},
    "fast": {
        "acceptance": "confidence",
        "temperature": 0.0,
        "stop_on": "answer",
        "canvas_width": "answer",
        "width_mass": 0.7,
        "prefix_commit": "shrink",
        "lookahead": 0.25,
        "commit_pass": "joint",
    },
}
# Those of them that need free text: no policy sets them where text is pinned, as in `fill`.
NEED_FREE_TEXT = "width_mass", "prefix_commit", "lookahead"
