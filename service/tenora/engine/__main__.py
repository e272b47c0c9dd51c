"""`python -m tenora.engine`: the engine's process, started by `tenora.engine.client.child`."""

from __future__ import annotations

import sys

from tenora.engine.process import main

sys.exit(main())
