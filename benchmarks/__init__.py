# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""Speed and memory of reformer_hf and of baselines, after correctness checks. See `benchmarks/README.md`."""
