# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""What LSH layers are good for: the experiments behind `docs/evidence.md`, one command each."""
