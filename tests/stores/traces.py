"""Where the public request traces lie: in KVLAB_TRACES, or in a data folder beside the repository."""

import os
from pathlib import Path

_BESIDE = Path(__file__).resolve().parents[3] / "shared" / "data" / "traces"
TRACES = Path(os.environ.get("KVLAB_TRACES", _BESIDE))
MOONCAKE_CONVERSATION = TRACES / "mooncake_conversation_trace.jsonl"
