# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
