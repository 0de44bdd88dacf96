# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Speed and memory of reformer_hf beside its rivals; correctness first. See `benchmarks/README.md`."""
